"""PPO as a run: killed and resumed, on two processes, with LoRA, with a PM that is refreshed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_ppo import PROMPTS, lab, run, steady  # noqa: F401 (lab is a fixture)

from cai_utils import preference, sft
from cai_utils.experiment import launch
from cai_utils.experiment.files import write_rows
from cai_utils.lm import models
from cai_utils.rl import networks, online, packing, ppo, rollout

ROOT = Path(__file__).resolve().parents[2]


def weights(folder):
    return models.load(folder, dtype="float32")[0].state_dict()


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


# --- killed and resumed ----------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_ppo import run
def log(row):
    if row["iteration"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
run(Path({lab!r}), {out!r}, log=log, **{options!r})
"""
LONG = dict(iterations=7, checkpoint_every=2, snapshot_every=3, kl_target=0.02, lr_decay=True,
            score_norm="start", seed=3)  # fmt: skip


def test_a_killed_run_ends_bit_for_bit_where_an_unbroken_one_ends(lab, tmp_path, capsys):  # noqa: F811
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(lab, whole, **LONG)
    code = KILLED.format(tests=str(ROOT / "tests" / "rl"), root=str(ROOT), lab=str(lab),
                         out=str(broken), options=LONG)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in broken.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert len(pd.read_csv(broken / "history.csv")) == 5 and not (broken / "config.json").exists()
    capsys.readouterr()
    logged = []
    history = run(lab, broken, log=logged.append, **LONG)
    assert "resumes from iteration 4 of 7" in capsys.readouterr().out
    assert [row["iteration"] for row in logged] == list(range(1, 8))
    pd.testing.assert_frame_equal(steady(history), steady(expected), check_exact=True)
    for folder in ("", "step-0", "step-48", "step-96", "step-112"):
        assert same_weights(whole / folder, broken / folder), folder
        samples = [(f / folder / "samples.jsonl").read_text() for f in (whole, broken)]
        assert samples[0] == samples[1]
    assert not list(broken.glob("checkpoint-*")) and not list(broken.glob(".*"))

    # Finished: the same call takes it as it is, another one begins anew.
    before = (broken / "model.safetensors").stat().st_mtime_ns
    again = run(lab, broken, **LONG)
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert (broken / "model.safetensors").stat().st_mtime_ns == before
    other = run(lab, broken, **{**LONG, "iterations": 1})
    assert len(other) == 1 and not (broken / "step-96").exists()


def test_a_checkpoint_of_another_run_is_named_and_not_used(lab, tmp_path, capsys):  # noqa: F811
    def stop(row):
        if row["iteration"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lab, tmp_path, iterations=3, checkpoint_every=1, log=stop)
    assert (tmp_path / "checkpoint-2").is_dir()
    (tmp_path / "checkpoint-best").mkdir()  # of somebody else: not ours to read or remove
    with pytest.raises(ValueError, match="checkpoint-2 belongs to another run: it differs in lr. "):
        run(lab, tmp_path, iterations=3, checkpoint_every=1, lr=2e-3)
    other = tmp_path / "lab"
    shutil.copytree(lab, other)
    policy, tokenizer = models.load(lab / "policy", dtype="float32")
    policy.lm_head.weight.data += 0.1
    policy.save_pretrained(other / "policy")
    with pytest.raises(ValueError, match="it differs in policy_spec. Remove that folder"):
        run(other, tmp_path, iterations=3, checkpoint_every=1)
    assert (tmp_path / "checkpoint-2" / "state.json").is_file()
    history = run(lab, tmp_path, iterations=3, checkpoint_every=1)
    assert list(history["iteration"]) == [1, 2, 3]
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-best"]


SHORT = dict(iterations=3, checkpoint_every=1, snapshot_every=1, episodes=8, max_new_tokens=4)
DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": lambda file: file.write_bytes(flipped(file.read_bytes())),
}


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.fixture(scope="module")
def stopped(lab, tmp_path_factory):  # noqa: F811
    """A folder with a run that was stopped after its second checkpoint, and one that was not."""
    root = tmp_path_factory.mktemp("stopped")

    def stop(row):
        if row["iteration"] == 2:
            raise KeyboardInterrupt

    run(lab, root / "whole", **SHORT)
    with pytest.raises(KeyboardInterrupt):
        run(lab, root / "out", log=stop, **SHORT)
    return root


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["state.json", "pytorch_model.bin", "optimizer.bin",
                                  "random_states_0.pkl"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
        lab, stopped, tmp_path, capsys, name, damage):  # noqa: F811
    out, last = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    shutil.copytree(stopped / "out", out)
    assert {f.name for f in last.iterdir()} == {"state.json", "pytorch_model.bin", "optimizer.bin",
                                                "random_states_0.pkl"}
    DAMAGE[damage](last / name)
    (out / "damaged-checkpoint-2").mkdir()  # of an earlier time
    run(lab, out, **SHORT)
    told = capsys.readouterr().out
    assert str(last / name) in told and "resumes from iteration 1 of 3" in told
    assert same_weights(out, stopped / "whole") and not list(out.glob("checkpoint-*"))
    assert (out / "damaged-checkpoint-2-2").is_dir()


def test_what_else_a_stopped_run_left_may_be_damaged(lab, stopped, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(stopped / "out", out)
    for n in (1, 2):
        DAMAGE["empty"](out / f"checkpoint-{n}" / "state.json")
    DAMAGE["half"](out / "history.csv")
    run(lab, out, **SHORT)
    told = capsys.readouterr().out
    assert f"ppo: no whole checkpoint is left in {out}: begins anew" in told
    assert same_weights(out, stopped / "whole") and len(pd.read_csv(out / "history.csv")) == 3

    shutil.rmtree(out)
    shutil.copytree(stopped / "out", out)
    DAMAGE["flipped"](out / "step-8" / "model.safetensors")
    run(lab, out, **SHORT)
    told = capsys.readouterr().out
    assert f"{out / 'step-8' / 'model.safetensors'}: its content" in told
    assert "resumes from iteration 2" in told and same_weights(out, stopped / "whole")
    assert (out / "damaged-step-8").is_dir() and not (out / "step-8").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "history.csv",
                                  "samples.jsonl", "finished.json"])
def test_a_finished_run_is_taken_only_as_it_was_written(lab, stopped, tmp_path, capsys, name):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(stopped / "whole", out)
    DAMAGE["flipped"](out / name)
    history = run(lab, out, **SHORT)
    told = capsys.readouterr().out
    assert str(out / name) in told and len(history) == len(pd.read_csv(out / "history.csv")) == 3
    assert ("holds this run, finished" in told) == (name != "finished.json")
    for file in ("model.safetensors", "config.json", "samples.jsonl"):
        assert (out / file).read_bytes() == (stopped / "whole" / file).read_bytes()
    # Without a whole copy of the model there is nothing to take.
    DAMAGE["half"](out / "model.safetensors")
    DAMAGE["missing"](out / "step-24" / "model.safetensors")
    run(lab, out, **SHORT)
    assert "bytes and was written with" in (told := capsys.readouterr().out)
    assert "the run begins anew" in told and same_weights(out, stopped / "whole")


def test_a_full_disk_leaves_the_checkpoint_before(lab, stopped, tmp_path, monkeypatch):  # noqa: F811
    out, save = tmp_path / "out", torch.save
    shutil.copytree(stopped / "out", out)
    shutil.rmtree(out / "checkpoint-2")

    def full(value, path, *rest, **more):
        save(value, path, *rest, **more)
        if "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the disk is full .* make room") as error:
        run(lab, out, **SHORT)
    assert str(error.value).startswith(f"{out / '.checkpoint-2'}: not written")
    assert [f.name for f in out.glob("*checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    run(lab, out, **SHORT)
    assert same_weights(out, stopped / "whole")


class Judge:
    """Counts w3; says NaN from its `bad`-th call on."""

    key = "counts w3"

    def __init__(self, bad=None):
        self.calls, self.bad = 0, bad

    def score(self, conversations):
        self.calls += 1
        if self.bad and self.calls >= self.bad:
            return [float("nan")] * len(conversations)
        return [talk[-1]["content"].count("w3") for talk in conversations]


def test_not_finite_keeps_the_last_good_checkpoint(lab, tmp_path):  # noqa: F811
    how = dict(iterations=5, checkpoint_every=1, snapshot_every=0)
    whole = run(lab, tmp_path / "whole", judge=Judge(), **how)
    with pytest.raises(ValueError, match="the PM score is not finite in iteration 4"):
        run(lab, tmp_path / "out", judge=Judge(bad=5), **how)  # call 1: the snapshot at the start
    kept = sorted(f.name for f in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    mended = run(lab, tmp_path / "out", judge=Judge(), **how)
    pd.testing.assert_frame_equal(steady(mended), steady(whole), check_exact=True)


def test_weights_that_are_not_finite_are_never_saved(lab, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="not finite"):
        run(lab, tmp_path, lr=1e38, checkpoint_every=1, iterations=4)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "step-0" / "config.json").is_file()


def test_an_object_without_a_key_has_no_checkpoints_and_says_so(lab, tmp_path, capsys):  # noqa: F811
    judge = Judge()
    judge.key = None
    run(lab, tmp_path, judge=judge, iterations=1)
    assert "ppo: no checkpoints: a PM or `refresh`" in capsys.readouterr().out


# --- several processes -----------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(16, 200),
       st.integers(1, 5), st.booleans())  # fmt: skip
def test_every_row_is_passed_exactly_once_in_as_many_passes(lengths, max_tokens, processes, packs):
    found = [packing.passes_of_process(lengths, max_tokens, p, processes, packs)
             for p in range(processes)]
    assert len({len(passes) for passes in found}) == 1
    done = [i for passes in found for rows, weight in passes if weight for row in rows for i in row]
    assert sorted(done) == list(range(len(lengths)))
    assert {weight for passes in found for _, weight in passes} <= {0.0, 1.0}


def test_two_processes_equal_one(lab, tmp_path):  # noqa: F811
    # Few tokens a pass: gradients are accumulated, and one process waits for the other's last.
    how = dict(lr=1e-3, iterations=3, episodes=15, minibatch=8, max_new_tokens=6, print_every=0,
               missing_eos_penalty=0.5, seed=2, snapshot_every=0, micro_tokens=30)  # fmt: skip
    alone = ppo.train(lab / "policy", lab / "pm", PROMPTS, tmp_path / "one", how)
    logged = []
    both = launch.run(ppo.train, lab / "policy", lab / "pm", PROMPTS, tmp_path / "two",
                      how, log=logged.append, num_processes=2)
    assert list(both["episode"]) == [15, 30, 45] and len(logged) == 3
    # The number of tokens says that every rollout is there, once.
    assert list(both["val/tokens"].iloc[:1]) == list(alone["val/tokens"].iloc[:1])
    curves = ["objective/scores", "objective/kl", "objective/rlhf_reward", "loss/policy_avg",
              "loss/value_avg", "policy/grad_norm", "value/grad_norm", "val/response_length"]
    np.testing.assert_allclose(both[curves], alone[curves], rtol=2e-3, atol=2e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = weights(lab / "policy")
    moved = max((one[k] - start[k]).abs().max() for k in one)
    assert max((one[k] - two[k]).abs().max() for k in one) < 0.05 * moved


def test_preference_and_sft_run_on_two_processes(lab, tmp_path):  # noqa: F811
    def row(i):
        answers = [[{"role": "assistant", "content": w}] for w in (f"w{i % 5} w7", f"w{i % 5} w3")]
        return {"prompt": PROMPTS[i]["prompt"], "chosen": answers[0], "rejected": answers[1]}

    rows = [row(i) for i in range(32)]
    how = dict(batch_size=8, lr=3e-3, centre=False)
    alone = preference.train(lab / "policy", rows, tmp_path / "one", **how)
    both = launch.run(preference.train, lab / "policy", rows, tmp_path / "two", num_processes=2,
                      **how)
    assert both["steps"] == alone["steps"] == 4 and both["pairs"] == 32
    talks = [row(i)["prompt"] + row(i)["chosen"] for i in range(10)]
    one, two = (preference.Scorer(tmp_path / f).score(talks) for f in ("one", "two"))
    assert np.ptp(one) > 0
    np.testing.assert_allclose(one, two, atol=0.1 * np.abs(one).max())

    talks = [{"messages": r["prompt"] + r["chosen"]} for r in rows]
    how = dict(batch_size=8, lr=3e-3)
    sft.finetune(lab / "policy", talks, tmp_path / "s1", **how)
    both = launch.run(sft.finetune, lab / "policy", talks, tmp_path / "s2", num_processes=2,
                      gradient_accumulation=2, **how)
    start, one, two = (weights(f) for f in (lab / "policy", tmp_path / "s1", tmp_path / "s2"))
    moved = max((one[k] - start[k]).abs().max() for k in one)
    apart = max((one[k] - two[k]).abs().max() for k in one)
    assert both["steps"] == 4 and apart < 0.3 * moved


def test_a_config_that_does_not_fit_is_one_clear_error(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"policy_spec": "x", "lrr": 1}))
    with pytest.raises(SystemExit) as stop:
        launch.main("cai_utils.rl.ppo", "train", [str(config)])
    assert "unknown argument lrr" in str(stop.value) and "config is missing" in str(stop.value)
    call = {name: "x" for name in ("policy_spec", "pm_folder", "out_dir")} | {"prompts": []}
    for fields, error in (({"lrr": 1}, "unknown field 'lrr' of PPOConfig; nearest: lr"),
                          ({"clip": 0.1}, "PPOConfig: lr is missing")):
        config.write_text(yaml.safe_dump({**call, "config": fields}))
        with pytest.raises(SystemExit, match=error):
            launch.main("cai_utils.rl.ppo", "train", [str(config)])
    with pytest.raises(SystemExit, match="no such file"):
        launch.main("cai_utils.rl.ppo", "train", [str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_the_launch_configs_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "params" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 2 and config.mixed_precision == "bf16"
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}[name]
    assert str(config.distributed_type).rpartition(".")[2] == kind


def test_a_config_file_starts_a_run(lab, tmp_path):  # noqa: F811
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({
        "policy_spec": str(lab / "policy"), "pm_folder": str(lab / "pm"),
        "prompts": str(tmp_path / "prompts.jsonl"), "out_dir": str(tmp_path / "out"),
        "config": {"lr": 1e-3, "iterations": 1, "episodes": 8, "minibatch": 8,
                   "max_new_tokens": 4, "print_every": 0}}))
    launch.main("cai_utils.rl.ppo", "train", [str(config)])
    assert (tmp_path / "out" / "config.json").is_file()


def test_episodes_in_one_row_train_as_episodes_of_their_own(lab, tmp_path, monkeypatch):  # noqa: F811
    how = dict(lr=1e-3, iterations=2, episodes=15, minibatch=8, max_new_tokens=6, print_every=0,
               missing_eos_penalty=0.5, seed=2, snapshot_every=0, micro_tokens=60)  # fmt: skip
    rows, pack = [], packing.pack

    def counted(episodes, device, counts):
        rows.append(max(counts))
        return pack(episodes, device, counts)

    monkeypatch.setattr(rollout, "pack", counted)
    packed = ppo.train(lab / "policy", lab / "pm", PROMPTS, tmp_path / "packed", how)
    assert max(rows) > 1
    rows.clear()
    monkeypatch.setattr(networks, "can_pack", lambda *_: False)
    plain = ppo.train(lab / "policy", lab / "pm", PROMPTS, tmp_path / "plain", how)
    assert max(rows) == 1
    same = [c for c in plain if not c.startswith(("time/", "eps", "tokens_per_second"))]
    np.testing.assert_allclose(packed[same], plain[same], rtol=2e-3, atol=2e-4)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "packed")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-4, rtol=1e-3)


# --- LoRA, precision, accumulation -----------------------------------------------------------


def test_lora_trains_adapters_against_the_bare_base(lab, tmp_path):  # noqa: F811
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    history = run(lab, tmp_path, lora=lora, lr=1e-2, iterations=4, kl_coef=0.01)
    assert abs(history["objective/kl"].iloc[0]) < 1e-4  # the reference is where it starts
    assert history["objective/kl_k3"].iloc[-1] > 1e-3
    assert history["val/sampler_gap"].max() < 1e-4
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["base"] == str(lab / "policy") and told["pm"] == str(lab / "pm")
    assert (told["stage"], told["lora"], told["lr"]) == ("ppo", lora, 1e-2)
    before, after = weights(lab / "policy"), weights(tmp_path)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all("q_proj" in k or "v_proj" in k for k in changed)
    first = next(k for k in changed if "q_proj" in k)
    assert torch.linalg.matrix_rank(after[first] - before[first], tol=1e-5) <= 4


def test_bf16_stays_near_fp32(lab, tmp_path):  # noqa: F811
    one = run(lab, tmp_path / "a", iterations=1)
    two = run(lab, tmp_path / "b", iterations=1, bf16=True)
    assert weights(tmp_path / "b")["lm_head.weight"].dtype == torch.float32
    assert two["objective/entropy"][0] != one["objective/entropy"][0]
    assert two["objective/entropy"][0] == pytest.approx(one["objective/entropy"][0], rel=0.1)
    run(lab, tmp_path / "c", iterations=1)  # nothing of it stays behind
    pd.testing.assert_series_equal(pd.read_csv(tmp_path / "a" / "history.csv")["loss/policy_avg"],
                                   pd.read_csv(tmp_path / "c" / "history.csv")["loss/policy_avg"])


# --- what is shown, and the PM that follows --------------------------------------------------


def test_sampled_conversations_are_logged_with_snapshots(lab, tmp_path):  # noqa: F811
    logged = []
    history = run(lab, tmp_path, iterations=3, snapshot_every=2, log=logged.append)
    assert ["completions" in row for row in logged] == [False, True, True]
    table = logged[1]["completions"]
    assert list(table) == ["prompt", "completion", "score"] and len(table) == 8
    assert "completions" not in history and (history["tokens_per_second"] > 0).all()


def test_the_pm_is_refreshed_with_labels_on_the_policys_samples(lab, tmp_path, capsys):  # noqa: F811
    seen = []

    def label(pairs):
        seen.append(pairs)
        rows = []
        for pair in pairs:
            a, b = sorted(pair["responses"], key=lambda text: -text.count("w3"))
            rows.append({"prompt": pair["prompt"], "p_chosen": 0.9, "source": "ai",
                         "axis": "harmless", "principle": "p",
                         "chosen": [{"role": "assistant", "content": a}],
                         "rejected": [{"role": "assistant", "content": b}]})
        return rows

    refresh = online.PMRefresher(lab / "pm", label, PROMPTS, tmp_path / "pms", n=12, batch_size=8,
                               max_new_tokens=6, key="likes w3")
    history = run(lab, tmp_path / "out", iterations=5, refresh=refresh, refresh_every=2,
                  score_norm="start", checkpoint_every=2)
    assert len(history) == 5 and len(seen) == 2
    folders = sorted(p.name for p in (tmp_path / "pms").iterdir())
    assert folders == ["pm-2", "pm-4"] and refresh.pm == tmp_path / "pms" / "pm-4"
    assert not same_scores(tmp_path / "pms" / "pm-2", tmp_path / "pms" / "pm-4")
    record = json.loads((tmp_path / "pms" / "pm-4" / "training.json").read_text())
    assert record["base"].endswith("pm-2")
    assert all(len(set(p["responses"])) == 2 for pairs in seen for p in pairs)

    def again(folder, log=None):
        refresh = online.PMRefresher(lab / "pm", label, PROMPTS, folder / "pms", n=12, batch_size=8,
                                   max_new_tokens=6, key="likes w3")
        return run(lab, folder / "out", iterations=5, refresh=refresh, refresh_every=2,
                   score_norm="start", checkpoint_every=1, log=log)

    def stop(row):  # after the checkpoint of iteration 3, which the first refreshed PM judged
        if row["iteration"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(tmp_path / "killed", stop)
    shutil.copytree(tmp_path / "killed", tmp_path / "kept")
    pd.testing.assert_frame_equal(steady(again(tmp_path / "killed")), steady(history),
                                  check_exact=True)

    # The refreshed PM is damaged: the checkpoint before the refresh makes it again.
    shutil.rmtree(tmp_path / "killed")
    (tmp_path / "kept").rename(tmp_path / "killed")
    DAMAGE["flipped"](tmp_path / "killed" / "pms" / "pm-2" / "model.safetensors")
    capsys.readouterr()
    pd.testing.assert_frame_equal(steady(again(tmp_path / "killed")), steady(history),
                                  check_exact=True)
    told = capsys.readouterr().out
    assert f"{tmp_path / 'killed' / 'pms' / 'pm-2'}: it is not as it was when" in told
    assert "resumes from iteration 2 of 5" in told


def same_scores(a, b):
    talks = [p["prompt"] + [{"role": "assistant", "content": "w3 w1"}] for p in PROMPTS[:4]]
    return np.allclose(*(preference.Scorer(f).score(talks) for f in (a, b)))
