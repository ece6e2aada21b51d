"""Training with weights that are spread over processes (params/accelerate/fsdp.yaml, as it is
shipped): two processes without a GPU equal one, and a killed training goes on to the same bits."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sharded
import torch
from test_ppo import PROMPTS, lab  # noqa: F401 (a fixture)

from cai_utils import preference, sft
from cai_utils.experiment import launch
from cai_utils.experiment.files import read_json
from cai_utils.lm import models

CONFIGS = Path(__file__).resolve().parents[2] / "params" / "accelerate"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
TALKS = [{"prompt": row["prompt"], **{side: [{"role": "assistant", "content": f"w{i % 5} {last}"}]
                                      for side, last in (("chosen", "w7"), ("rejected", "w3"))}}
         for i, row in enumerate(PROMPTS[:32])]


def trainings(lab):  # noqa: F811
    """{name: (trainer, its arguments)}"""
    chats = [{"messages": row["prompt"] + row["chosen"]} for row in TALKS]
    steps = dict(batch_size=8, lr=3e-3, checkpoint_every=1e-6)
    tuned = dict(lr=1e-3, iterations=3, episodes=15, minibatch=8, max_new_tokens=6, print_every=0,
                 missing_eos_penalty=0.5, seed=2, snapshot_every=0, micro_tokens=30,
                 checkpoint_every=1)  # fmt: skip
    policy, pm = str(lab / "policy"), str(lab / "pm")
    rl = dict(policy_spec=policy, pm_folder=pm, prompts=PROMPTS)
    return {
        "sft": ("sft", dict(spec_or_folder=policy, rows=chats, gradient_accumulation=2, **steps)),
        "pm": ("preference", dict(spec_or_folder=policy, comparisons=TALKS, lora=LORA, **steps)),
        "dpo": ("dpo", dict(policy_spec=policy, comparisons=TALKS, prompts=PROMPTS[:2],
                            config=dict(steps, lr=1e-3, max_new_tokens=4))),
        "ppo": ("ppo", dict(rl, config=tuned)),
        "ppo_lora": ("ppo", dict(rl, config={**tuned, "iterations": 1, "lora": LORA,
                                             "checkpoint_every": 0})),
    }


def call(training, out, stop=0, kill=False):
    name, arguments = training
    return {"trainer": name, "call": dict(arguments, out_dir=str(out)), "stop": stop, "kill": kill}


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory):  # noqa: F811
    """Folder of all trainings in one process (one-NAME), two (two-NAME), and two that were
    interrupted (broken-NAME)."""
    root, parts = tmp_path_factory.mktemp("sharded"), trainings(lab)
    for name, (trainer, arguments) in parts.items():
        sharded.TRAINERS[trainer](**arguments, out_dir=root / f"one-{name}")
    calls = [call(part, root / f"two-{name}") for name, part in parts.items()]
    for name in ("sft", "pm", "dpo"):
        calls += [call(parts[name], root / f"broken-{name}", stop) for stop in (2, 0)]
    ppo = call(parts["ppo"], root / "broken-ppo", 2, kill=True)
    with pytest.MonkeyPatch.context() as patch:
        here = os.pathsep.join([str(Path(__file__).parent), os.getcwd()])
        patch.setenv("PYTHONPATH", here)
        patch.setenv("OMP_NUM_THREADS", "1")
        group = dict(num_processes=2, accelerate_config=CONFIGS / "fsdp.yaml")
        with pytest.raises(RuntimeError, match=r"exitcode: -9"):
            launch.run(sharded.several, [*calls, ppo], root, **group)
        left = sorted(p.name for p in (root / "broken-ppo").glob("checkpoint-*"))
        assert left == ["checkpoint-1", "checkpoint-2"]
        # Three checkpoints each; what was interrupted after two went on from there.
        written = read_json(root / "training.json")["written"]
        assert written == [3, 3, 3, 2, 0, 2, 1, 2, 1, 2, 1]
        more = launch.run(sharded.several, [ppo | {"stop": 0}], root, **group)
        assert more == {"written": [0]}
    return root


def weights(folder):
    return models.load(folder, dtype="float32")[0].state_dict()


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "ppo_lora"])
def test_two_processes_with_spread_weights_equal_one(runs, lab, name):  # noqa: F811
    start, one, two = (weights(f) for f in (lab / "policy", runs / f"one-{name}",
                                            runs / f"two-{name}"))
    moved = max((one[k] - start[k]).abs().max() for k in start)
    assert one.keys() == two.keys() and moved > 1e-3
    assert max((one[k] - two[k]).abs().max() for k in one) < 0.02 * moved


def test_a_preference_model_scores_as_that_of_one_process(runs):
    talks = [row["prompt"] + row["chosen"] for row in TALKS[:10]]
    one, two = (preference.Scorer(runs / f"{n}-pm").score(talks) for n in ("one", "two"))
    assert np.ptp(one) > 1e-3
    np.testing.assert_allclose(one, two, atol=0.02 * np.ptp(one))


def test_ppo_has_the_same_curves_and_clips_by_the_norm_of_all_parts(runs):
    one, two = (pd.read_csv(runs / f"{n}-ppo" / "history.csv") for n in ("one", "two"))
    curves = ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
              "policy/grad_norm", "value/grad_norm", "val/tokens"]
    np.testing.assert_allclose(one[curves], two[curves], rtol=2e-3, atol=2e-4)
    assert one["policy/grad_norm"].min() > 1  # it was clipped


@pytest.mark.parametrize("name", ["sft", "pm", "dpo", "ppo"])
def test_an_interrupted_training_ends_with_the_same_bits(runs, name):
    whole, broken = (models.load(runs / f"{kind}-{name}", "score" if name == "pm" else "lm",
                                 "float32")[0].state_dict() for kind in ("two", "broken"))
    assert all(torch.equal(whole[k], broken[k]) for k in whole)
    assert not [*runs.glob(f"broken-{name}*/checkpoint-*"), *runs.glob(f"broken-{name}*/.*")]


def test_deepspeed_trains_as_one_process(runs, lab, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("deepspeed")  # its first run compiles for minutes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, arguments = trainings(lab)["sft"]
    arguments = {**arguments, "gradient_accumulation": 1, "checkpoint_every": 0}
    launch.run(sft.finetune, out_dir=tmp_path / "two", num_processes=2,
               accelerate_config=CONFIGS / "deepspeed.yaml", **arguments)
    one, two = weights(runs / "one-sft"), weights(tmp_path / "two")
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4
