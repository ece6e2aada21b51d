"""PPO that samples through vLLM, with a stand-in for the package."""

import fake_vllm
import pandas as pd
import pytest
import torch
from test_ppo import PROMPTS, lab, run, steady  # noqa: F401 (lab is a fixture)

from cai_utils.lm import models
from cai_utils.rl import handover
from cai_utils.rl.config import PPOConfig

OPTIONS = dict(iterations=3, checkpoint_every=1, snapshot_every=0, seed=3, episodes=8, minibatch=4,
               max_new_tokens=4, engine="vllm;max_num_seqs=16")


def test_the_present_weights_sample_and_a_killed_run_goes_on(lab, tmp_path, monkeypatch):  # noqa: F811
    fake_vllm.install(monkeypatch)
    whole = run(lab, tmp_path / "whole", **OPTIONS)
    gaps = whole["sampling/sampling_logp_difference/max"]
    assert gaps.max() < 1e-4 and (whole["policy/approxkl_avg"] > 1e-4).all()
    assert (whole["val/sampler_gap"] == gaps).all()
    assert fake_vllm.CALLS[0]["max_num_seqs"] == 16 and fake_vllm.CALLS[-1] == "shutdown"
    assert not (tmp_path / "whole" / "engine").exists()

    class Killed(BaseException):
        pass

    def kill(row):
        if row["iteration"] == 2:
            raise Killed

    with pytest.raises(Killed):
        run(lab, tmp_path / "broken", log=kill, **OPTIONS)
    again = run(lab, tmp_path / "broken", **OPTIONS)
    pd.testing.assert_frame_equal(steady(again), steady(whole), check_exact=True)
    a, b = (models.load(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_an_engine_nothing_is_added(lab, tmp_path):  # noqa: F811
    history = run(lab, tmp_path, iterations=1, snapshot_every=0)
    assert not [name for name in history if name.startswith(("sampling/", "time/handover"))]


def test_far_log_probabilities_are_told(capsys):
    found = handover.compared(torch.tensor([0.0, 0.2]), 7)
    assert list(found.values()) == pytest.approx([0.1, 0.2])
    assert "ppo 7: vLLM's log-probabilities are 0.100 nats" in capsys.readouterr().out
    handover.compared(torch.tensor([0.0, 0.01]), 7)
    assert not capsys.readouterr().out


def test_what_cannot_be_is_said_first(monkeypatch):
    for engine, message in (("sglang", "'vllm' .*or null"), ("vllm;dtyp=x", "option 'dtyp'")):
        with pytest.raises(ValueError, match=message):
            PPOConfig.from_dict({"lr": 1.0, "engine": engine})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^engine='vllm': the package vllm is not installed: pip"):
        handover.check("vllm", 1)
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ValueError, match="^engine='vllm' samples in the one process that trains"):
        handover.check("vllm", 2)
