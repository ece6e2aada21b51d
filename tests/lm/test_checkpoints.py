"""Trainings of trl's trainers that are stopped and go on: SFT, preference models, DPO."""

import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch

from cai_utils import harmfulness, preference, sft
from cai_utils.experiment import resume
from cai_utils.lm import checkpoints
from cai_utils.rl import dpo

ROOT = Path(__file__).resolve().parents[2]
LORA = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.3}


def turn(text):
    return [{"role": "assistant", "content": text}]


PROMPTS = [[{"role": "user", "content": "Hi" * n}] for n in (1, 2, 3)]
TALKS = [{"messages": PROMPTS[i % 3] + turn("x" * (i % 7 + 1) + "yz"[i % 2])} for i in range(11)]
TEXTS = [{"text": "so it goes " * n} for n in (1, 2, 3)]  # a mixture with pretraining text
PAIRS = [{"prompt": PROMPTS[i % 3], "chosen": turn("y" * (i % 5 + 1)), "rejected": turn("n"),
          "p_chosen": 0.6 + i % 4 / 10} for i in range(14)]
SCORED = [{**talk, "score": float(i % 5)} for i, talk in enumerate([*TALKS, *TALKS[:3]])]

# 14 rows in batches of 4: an epoch's last one is not full. Two epochs of four steps.
HOW = dict(lr=1e-2, epochs=2, batch_size=4)
PARTS = dict(HOW, gradient_accumulation=2, lora=LORA)


def run_dpo(folder, pairs, out, **config):
    return dpo.train(folder, pairs, PROMPTS, out, {**config, "max_new_tokens": 2})


CALLS = {
    "sft": (sft.finetune, TALKS + TEXTS, HOW),
    "sft-lora": (sft.finetune, TALKS + TEXTS, PARTS),
    "pm": (preference.train, PAIRS, dict(HOW, gradient_accumulation=2)),
    "pm-lora": (preference.train, PAIRS, dict(HOW, lora=LORA)),
    "harmfulness": (harmfulness.train, SCORED, HOW),
    "dpo": (run_dpo, PAIRS, dict(HOW, gradient_accumulation=2)),
    "dpo-lora": (run_dpo, PAIRS, PARTS),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, call): the call, stopped by ^C at the end of a step."""
    asks = checkpoints._Clock.on_step_end

    def stopped(step, call, error=KeyboardInterrupt):
        def on_step_end(self, args, state, control, **kwargs):
            asks(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise error

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(checkpoints._Clock, "on_step_end", on_step_end)
            call()

    return stopped


def model(folder):
    return (folder / "model.safetensors").read_bytes()


def curve(result):
    return result.to_dict("records") if isinstance(result, pd.DataFrame) else [
        result["train_loss"], result["log"], result["steps"]]


@pytest.mark.parametrize("kind", CALLS)
def test_a_stopped_training_ends_bit_for_bit_where_an_unbroken_one_ends(
        base, stop_at, tmp_path, capsys, kind):
    train, rows, how = CALLS[kind]
    whole = train(base, rows, tmp_path / "whole", checkpoint_every=0, **how)
    assert not (tmp_path / "whole.partial").exists()
    call = partial(train, base, rows, tmp_path / "out", checkpoint_every=1e-9, **how)
    for step in (5, 7):  # the last checkpoint before: where an epoch ended, and in one
        stop_at(step, call)
        kept = sorted(f.name for f in (tmp_path / "out.partial").iterdir())
        assert kept == [f"checkpoint-{n}" for n in (step - 2, step - 1)]
    assert not (tmp_path / "out" / "config.json").exists()
    capsys.readouterr()
    again = call()
    assert "resumes from step 6 of 8" in capsys.readouterr().out
    assert model(tmp_path / "out") == model(tmp_path / "whole") and curve(again) == curve(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
        base, stop_at, tmp_path, capsys):
    call = partial(sft.finetune, base, TALKS + TEXTS, tmp_path / "out", checkpoint_every=1e-9,
                   **HOW)
    sft.finetune(base, TALKS + TEXTS, tmp_path / "whole", **HOW)
    stop_at(5, call)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    names = sorted(f.name for f in (tmp_path / "kept" / "checkpoint-4").iterdir())
    assert names == ["optimizer.pt", "rng_state.pth", "scheduler.pt", "state.json", "sums_0.pt",
                     "trainer_state.json", "weights.pt"]
    for name in ("weights.pt", "sums_0.pt"):
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")
        file = tmp_path / "out.partial" / "checkpoint-4" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] + b"\1" + content[len(content) // 2 + 1 :])
        call()
        told = capsys.readouterr().out
        assert str(file) in told and "resumes from step 3 of 8" in told
        assert model(tmp_path / "out") == model(tmp_path / "whole")
        left = [f.name for f in (tmp_path / "out.partial").iterdir()]
        assert left == ["damaged-checkpoint-4"]


def test_a_checkpoint_of_another_call_is_not_used(base, stop_at, tmp_path, capsys):
    out = tmp_path / "out"
    call = partial(preference.train, base, out_dir=out, checkpoint_every=1e-9)
    sft.finetune(base, TALKS, tmp_path / "policy", lr=1e-2)
    start = (tmp_path / "policy", *[base] * 3)
    rows = (PAIRS, PAIRS[:-1], PAIRS, PAIRS)
    lr = (1e-2, 1e-2, 3e-2, 1e-2)
    stop_at(7, partial(call, comparisons=PAIRS, **HOW))
    for spec, pairs, rate, changed in zip(
            start, rows, lr, ("model", "rows", "lr", None), strict=True):
        how = dict(HOW, lr=rate, checkpoint_every=1e9)
        stop_at(2 if changed else 7, partial(preference.train, spec, pairs, out, **how))
        told = capsys.readouterr().out
        assert ("resumes" in told) == (changed is None)
        if changed:
            assert f"is of another call, which differs in {changed}: begins anew" in told
        else:
            assert "resumes from step 6 of 8" in told


def test_short_trainings_write_no_checkpoint_and_make_no_key(base, tmp_path, monkeypatch):
    monkeypatch.setattr(resume.Checkpoints, "write", None)
    monkeypatch.setattr(checkpoints, "call_facts", lambda *_, **__: 1 / 0)
    sft.finetune(base, TALKS, tmp_path / "out", lr=1e-2)
    for wrong in (-1, True, None, float("nan")):
        with pytest.raises(ValueError, match=f"checkpoint_every={wrong}: give seconds"):
            sft.finetune(base, TALKS, tmp_path / "out", checkpoint_every=wrong)
