"""One update of our PPO against one of the last trl that had PPO (1.12.0), on the same rollouts,
weights and hyperparameters. tests/rl/fixtures/make_trl_ppo.py recorded trl's side."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from cai_utils.rl import networks, packing, ppo, rollout
from cai_utils.rl.config import PPOConfig
from cai_utils.rl.learner import Learner

FIXTURE = Path(__file__).parent / "fixtures" / "trl_ppo.safetensors"


@pytest.fixture(scope="module")
def recorded():
    with safe_open(FIXTURE, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["facts"])


def state(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def ours(tensors, facts, case):
    """The weights after our update: (policy's, value model's), each a state dict."""
    config, how = LlamaConfig(**facts["config"]), facts["how"]
    policy, value = LlamaForCausalLM(config), LlamaForSequenceClassification(
        LlamaConfig(**facts["config"], num_labels=1))
    reference = copy.deepcopy(policy)
    for name, net in (("policy", policy), ("value", value), ("reference", reference)):
        net.load_state_dict(state(tensors, f"start.{name}."))
    batch = []
    for query, response in zip(tensors[f"{case}.queries"].tolist(),
                               tensors[f"{case}.responses"].tolist(), strict=True):
        said = [t for t in response if t != config.pad_token_id]
        batch.append(packing.Episode([t for t in query if t != config.pad_token_id], said))
    accelerator = Accelerator()
    logprobs = networks.ResponseLogprobs(reference.eval(), how["temperature"])
    bare = networks.Actor(networks.ResponseLogprobs(policy.eval(), how["temperature"]),
                          networks.ResponseValues(value.eval()))
    optimizer = torch.optim.Adam(bare.parameters(), lr=how["lr"], eps=1e-5)
    actor, optimizer = accelerator.prepare(bare, optimizer)
    ppo_config = PPOConfig(**how, **facts["cases"][case], micro_tokens=40, minibatch=len(batch),
                           max_grad_norm=1e9)
    learner = Learner(ppo_config, accelerator, bare, actor, optimizer, lambda *b: logprobs(*b)[0])
    predicted = rollout.evaluate(learner, batch, 1)
    experience = rollout.experience_of(predicted, tensors[f"{case}.scores"], ppo_config,
                                       how["kl_coef"])
    ppo.update(learner, batch, experience, 1)
    return policy.state_dict(), value.state_dict()


@pytest.mark.parametrize("case, nets", [("full", ("policy", "value")), ("ended", ("policy",))])
def test_one_update_equals_trls(recorded, case, nets):
    tensors, facts = recorded
    after = dict(zip(("policy", "value"), ours(tensors, facts, case), strict=True))
    for name in nets:
        start, theirs = state(tensors, f"start.{name}."), state(tensors, f"{case}.{name}.")
        moved = max((theirs[k] - start[k]).abs().max().item() for k in theirs)
        apart = max((theirs[k] - after[name][k]).abs().max().item() for k in theirs)
        assert moved > facts["how"]["lr"]  # two steps of Adam
        assert apart < 1e-3 * moved, (name, moved, apart)
    assert FIXTURE.stat().st_size < 200_000
