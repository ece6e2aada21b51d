"""DPO on soft labels: the loss by hand, and training on tiny pairs."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_ppo import PROMPTS, lab  # noqa: F401 (lab is a fixture)

from cai_utils.experiment import registry
from cai_utils.experiment.files import write_rows
from cai_utils.lm import models, tokens
from cai_utils.rl import dpo


def pairs(p, n=16):
    """Comparisons in which w7 is preferred to w3 with probability p."""
    answer = lambda word: [{"role": "assistant", "content": word}]  # noqa: E731
    return [{"prompt": PROMPTS[i]["prompt"], "chosen": answer("w7 w7"), "rejected": answer("w3"),
             "p_chosen": p} for i in range(n)]


def logprobs(folder, rows, side):
    """log pi(response | prompt) by a plain pass over each row alone -> (N,)."""
    model, tokenizer = models.load(folder, dtype="float32", device="cpu")
    out = []
    for prompt, response in tokens.encode([r["prompt"] + r[side] for r in rows], tokenizer):
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        out.append(sum(logs[len(prompt) - 1 + i, t].item() for i, t in enumerate(response)))
    return np.array(out)


def run(lab, out, rows, **options):  # noqa: F811
    config = {"lr": 1e-3, "batch_size": 8, "beta": 0.5, "max_new_tokens": 4, **options}
    return dpo.train(lab / "policy", rows, PROMPTS, out, config)


def test_the_loss_is_the_cross_entropy_with_the_soft_label(lab, tmp_path):  # noqa: F811
    rows = pairs(0.8, 8)
    history = run(lab, tmp_path, rows, epochs=2, lr=3e-3)
    assert history["loss"][0] == pytest.approx(math.log(2), abs=1e-5)  # policy = reference
    assert list(history["episode"]) == [8, 16] and list(history["iteration"]) == [1, 2]
    # The second step's loss, from the weights that a run of one step ends with (its rate of the
    # first step is that of the longer run: both fall linearly from lr).
    run(lab, tmp_path / "one", rows, lr=3e-3)
    ratio = {side: logprobs(tmp_path / "one", rows, side) - logprobs(lab / "policy", rows, side)
             for side in ("chosen", "rejected")}
    d = 0.5 * (ratio["chosen"] - ratio["rejected"])
    expected = np.mean(0.8 * np.log1p(np.exp(-d)) + 0.2 * np.log1p(np.exp(d)))
    assert abs(d).max() > 0.02
    assert history["loss"][1] == pytest.approx(expected, abs=1e-4)
    assert history["rewards/margins"][1] == pytest.approx(d.mean(), abs=1e-4)
    assert history["rewards/chosen"][1] == pytest.approx(0.5 * ratio["chosen"].mean(), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 4, "target_modules": "all-linear"}}])
def test_training_raises_the_margin_towards_the_label(lab, tmp_path, options):  # noqa: F811
    rows = pairs(0.9)
    write_rows(tmp_path / "labels.jsonl", rows)
    history = run(lab, tmp_path / "out", tmp_path / "labels.jsonl", epochs=20, **options)
    first, last = history["rewards/margins"].iloc[0], history["rewards/margins"].iloc[-1]
    assert first == pytest.approx(0, abs=1e-4) and last > 0.3
    # Its minimum is where sigmoid(d) = p: the label bounds the margin, which hard labels do not.
    assert last < math.log(0.9 / 0.1) + 0.3
    assert history["rewards/accuracies"].iloc[-1] == 1
    gain = [logprobs(tmp_path / "out", rows, side) - logprobs(lab / "policy", rows, side)
            for side in ("chosen", "rejected")]
    assert (gain[0] > gain[1]).all()


def test_pairs_without_a_preference_move_nothing(lab, tmp_path):  # noqa: F811
    history = run(lab, tmp_path, pairs(0.5), epochs=4)
    before, after = (models.load(f, dtype="float32")[0].state_dict() for f in
                     (lab / "policy", tmp_path))
    assert max((before[k] - after[k]).abs().max() for k in before) < 1e-5
    np.testing.assert_allclose(history["loss"], math.log(2), atol=1e-5)


def test_what_is_written_is_what_ppo_writes(lab, tmp_path):  # noqa: F811
    (tmp_path / "step-999").mkdir()
    logged = []
    history = dpo.train(lab / "policy", pairs(1.0), PROMPTS, tmp_path,
                        {"lr": 1e-3, "batch_size": 8, "max_new_tokens": 4}, log=logged.append)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    assert [row["episode"] for row in logged] == [8, 16]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0", "step-16"]
    for folder in ("", "step-0", "step-16"):
        lines = (tmp_path / folder / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["messages"][:-1] for line in lines] == [
            p["prompt"] for p in PROMPTS[:8]]
    weights = [models.load(f, dtype="float32")[0].state_dict() for f in
               (lab / "policy", tmp_path / "step-0", tmp_path, tmp_path / "step-16")]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(weights, weights[1:],
                                                                    strict=False)]
    assert same == [True, False, True]
    assert json.loads((tmp_path / "training.json").read_text())["stage"] == "dpo"


def test_bad_input_is_named(lab, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="unknown field 'betta' of DPOConfig; nearest: beta"):
        run(lab, tmp_path, pairs(1.0), betta=1)
    with pytest.raises(ValueError, match="the two answers are identical"):
        run(lab, tmp_path, [{**pairs(1.0)[0], "rejected": pairs(1.0)[0]["chosen"]}])
    with pytest.raises(ValueError, match="max_length=3 is too short for every one"):
        run(lab, tmp_path, pairs(1.0), max_length=3)


def test_the_registry_names_this_trainer():
    row = registry.method("dpo_cai")
    assert (row.start, row.reward, row.trainer) == ("sl_cai", "data/labels", "dpo")
    assert registry.needs("dpo_cai") == ["07_sl_cai", "08_ai_feedback"]
