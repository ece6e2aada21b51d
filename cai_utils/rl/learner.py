"""What learns in PPO, built in one place: models, optimizer, and accelerate around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from cai_utils.lm import models
from cai_utils.lm.architectures import check_rows
from cai_utils.lm.sampling import Sampler
from cai_utils.lm.tokens import prompt_ids_of
from cai_utils.rl import networks, rollout
from cai_utils.rl.config import PPOConfig
from cai_utils.rl.distributed import copy_weights, make_accelerator


@dataclass
class Learner:
    """Policy and value model with their optimizer, and the reference that the policy started as."""

    config: PPOConfig
    accelerator: Accelerator
    networks: networks.Actor  # policy and value model
    actor: nn.Module          # the same, as accelerate wraps it
    optimizer: torch.optim.Optimizer  # its groups: policy, value model
    reference: Callable       # a batch -> its log-probabilities (N,) under the starting policy

    @property
    def sharded(self):
        """Whether the weights are spread over devices."""
        return self.accelerator.distributed_type in (DistributedType.FSDP,
                                                     DistributedType.DEEPSPEED)

    def follow(self, collector):
        """Gives the policy that `collector` samples from the present weights, where it is a copy.
        Without sharding it is the very model that learns."""
        if self.sharded:
            copy_weights(self.networks, collector.model, collector.adapted)


def build(policy_spec, pm, prompts, config, runs_dir, device):
    """-> (Learner, rollout.Collector) for a run of `ppo.train`, whose arguments these are.

    ValueError: different tokenizers, a prompt that leaves no room for a response, a launch config
    that does not fit.
    """
    model, value_model, scorer, tokenizer, adapted = networks.load(
        policy_spec, pm, device=device, micro_tokens=config.micro_tokens, runs_dir=runs_dir,
        lora=config.lora, seed=config.seed)
    accelerator = make_accelerator(model, config.bf16)
    prompt_ids = prompt_ids_of(prompts, tokenizer, model, config.max_new_tokens)
    for net in (model, value_model):
        check_rows(net.config, [len(ids) + extra for ids in prompt_ids
                                for extra in (1, config.max_new_tokens)],
                   "max_new_tokens, or shorten the prompts")
    if accelerator.mixed_precision == "bf16":
        for net in (model, value_model):
            models.attend_for_training(net, max(map(len, prompt_ids)) + config.max_new_tokens)
    policy = networks.ResponseLogprobs(model, config.temperature)
    value = networks.ResponseValues(value_model)
    nets = networks.Actor(policy, value)

    def scorer_of(pm):
        return networks.scorer_of(pm, tokenizer, policy_spec, device, config.micro_tokens, runs_dir)

    learner = Learner(config, accelerator, nets, actor=None, optimizer=None, reference=None)
    whole, adapted_whole = model, adapted
    if learner.sharded:
        # What gathers weights expects one pass through each layer, and sampling a whole model.
        policy.shares_prefix = value.shares_prefix = False
        whole, adapted_whole = copy.deepcopy((model, adapted))
    collector = rollout.Collector(config, accelerator, tokenizer, Sampler(whole, tokenizer), whole,
                                  adapted_whole, scorer, scorer_of, prompts, prompt_ids)
    frozen = None if adapted else copy.deepcopy(policy).requires_grad_(False)
    groups = [{"params": [w for w in net.parameters() if w.requires_grad]}
              for net in (policy, value)]
    optimizer = torch.optim.Adam(groups, lr=config.lr, eps=1e-5, fused=True)
    learner.actor, learner.optimizer = accelerator.prepare(nets, optimizer)
    learner.networks = accelerator.unwrap_model(learner.actor)

    def reference(*batch):
        """With LoRA the starting policy is the base alone."""
        if frozen is not None:
            return frozen(*batch)[0]
        with adapted[0].disable_adapter():
            return (learner.actor if learner.sharded else nets)(*batch, with_values=False)[0]

    learner.reference = reference
    return learner, collector
