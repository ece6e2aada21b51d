"""An iteration of PPO up to its updates: sampled and scored responses, log-probabilities and values
of their tokens, advantages.

B: episodes, T: response tokens of the longest one, N: response tokens of all of them, flat. Every
process holds the whole batch; sampling, scoring and the passes through the models are divided.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from cai_utils import dialogue
from cai_utils.lm import models
from cai_utils.lm.sampling import Sampler
from cai_utils.rl import losses
from cai_utils.rl.config import PPOConfig
from cai_utils.rl.packing import Episode, pack, passes_of_process


@dataclass(frozen=True)
class Rollout:
    """B sampled and scored responses."""

    episodes: list[Episode]          # B
    conversations: list[list[dict]]  # B: messages, the last one the response
    scores: torch.Tensor             # (B,) float32, the PM's
    ended: torch.Tensor              # (B,) bool: ended with eos
    sampled_logprobs: torch.Tensor   # (N,) as the sampler computed them
    seconds: dict                    # time/sample, time/score


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities and values of the response tokens before any update. All (B, T)."""

    mask: torch.Tensor          # float: 1 on a response's tokens, 0 after them
    logprobs: torch.Tensor      # of the policy, at the sampling temperature
    entropies: torch.Tensor     # of its distributions, nats
    ref_logprobs: torch.Tensor  # of the reference
    values: torch.Tensor        # before each token


@dataclass(frozen=True)
class Experience:
    """What the updates learn from. All (B, T), or after `at` all (N,)."""

    mask: torch.Tensor          # float: 1 on a response's tokens, 0 after them
    logprobs: torch.Tensor      # of the policy that sampled
    ref_logprobs: torch.Tensor  # of the reference
    values: torch.Tensor        # of the value model before the updates
    rewards: torch.Tensor       # KL penalty of each token, score on the last one
    advantages: torch.Tensor    # GAE, whitened
    returns: torch.Tensor       # the value model's targets

    def at(self, index):
        """Flat, the response tokens of the episodes at `index` (a tensor of indices), in order."""
        inside = self.mask[index] > 0
        return Experience(*(getattr(self, f.name)[index][inside] for f in fields(self)))


@dataclass
class Collector:
    """What makes rollouts: prompts, the policy as a plain model to sample from, and the PM."""

    config: PPOConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler             # of `model`, or what `handover.sampling` puts there
    model: nn.Module             # the policy; where weights are sharded, a whole copy of it
    adapted: tuple | None        # with LoRA, the peft models around policy and value model
    scorer: object               # `.score(conversations) -> (B,)`
    scorer_of: Callable          # the folder of a PM, or a scorer -> scorer
    prompts: list[list[dict]]    # messages
    prompt_ids: list[list[int]]  # their tokens
    weights: int = 0             # counts the changes of the policy's weights

    def collect(self, chosen, seed):
        """One response to each prompt at the indices `chosen` -> Rollout. Each process samples and
        scores every `num_processes`-th; afterwards all of them hold the whole."""
        accelerator, config = self.accelerator, self.config
        clock = [time.perf_counter()]
        rows = range(accelerator.process_index, len(chosen), accelerator.num_processes)
        prompts, completions = [self.prompts[chosen[i]] for i in rows], []
        if rows:
            with self._precision():
                completions = self.sampler.generate(
                    prompts, max_new_tokens=config.max_new_tokens, rows=rows, progress=False,
                    temperature=config.temperature, seed=seed)
        completions = [row[0] for row in completions]
        clock.append(time.perf_counter())
        conversations = [dialogue.with_response(p, c.text)
                         for p, c in zip(prompts, completions, strict=True)]
        scores = self.scorer.score(conversations) if conversations else []
        scores = np.asarray(scores, dtype=float).tolist()
        clock.append(time.perf_counter())
        mine = list(zip(rows, completions, conversations, scores, strict=True))
        whole = sorted(gather_object(mine), key=lambda item: item[0])
        _, completions, conversations, scores = zip(*whole, strict=True)
        device = accelerator.device
        seconds = dict(zip(("time/sample", "time/score"), np.diff(clock).tolist(), strict=True))
        if config.engine is not None:
            seconds["time/handover"] = self.sampler.seconds  # of the last one, part of time/sample
        return Rollout(
            episodes=[Episode(self.prompt_ids[i], list(c.token_ids))
                      for i, c in zip(chosen, completions, strict=True)],
            conversations=list(conversations),
            scores=torch.tensor(scores, dtype=torch.float32, device=device),
            ended=torch.tensor([c.finish_reason == "eos" for c in completions], device=device),
            sampled_logprobs=torch.tensor([p for c in completions for p in c.logprobs],
                                          device=device),
            seconds=seconds,
        )

    @property
    def dtype(self):
        """The torch dtype in which the policy samples."""
        bf16 = self.accelerator.mixed_precision == "bf16" and not self._plain
        return torch.bfloat16 if bf16 else torch.float32

    @property
    def _plain(self):
        """Whether sampling stays in float32: that of a small model on a CPU does. Each of its
        decoding steps has a new shape, for which bf16 would need a new kernel."""
        return self.accelerator.device.type == "cpu" and models.is_small(self.model)

    def _precision(self):
        return contextlib.nullcontext() if self._plain else self.accelerator.autocast()


def finite(x, quantity, iteration):
    """x: a number or a tensor of any shape; ValueError that names it when it is not finite."""
    if not torch.isfinite(torch.as_tensor(x)).all():
        raise ValueError(f"{quantity} is not finite in iteration {iteration}: PPO stopped, what "
                         "was saved is kept; look at history.csv and at the PM, or lower lr")


def passes(learner, lengths):
    """[(rows, weight)]: this process's passes over episodes of these lengths, in few dense rows."""
    accelerator = learner.accelerator
    return passes_of_process(lengths, learner.config.micro_tokens, accelerator.process_index,
                             accelerator.num_processes, learner.networks.packs)


def batch_of(episodes, rows, device):
    """Rows of indices -> (the indices in order, what the networks take)."""
    index = [i for row in rows for i in row]
    return index, pack([episodes[i] for i in index], device, [len(row) for row in rows])


@torch.no_grad()
def evaluate(learner, episodes, iteration):
    """B episodes -> Predictions. ValueError when a log-probability or a value is not finite."""
    accelerator = learner.accelerator
    device = accelerator.device
    lengths = torch.tensor([len(e.response_ids) for e in episodes], device=device)
    mask = (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).float()
    found = torch.zeros(4, *mask.shape, device=device)
    for rows, weight in passes(learner, [len(e) for e in episodes]):
        index, inputs = batch_of(episodes, rows, device)
        logprobs, entropies, values = learner.actor(*inputs, with_entropy=True)
        with accelerator.autocast():
            ref_logprobs = learner.reference(*inputs)
        if weight:
            which, columns = mask[index].nonzero(as_tuple=True)
            places = torch.tensor(index, device=device)[which], columns
            for x, y in zip(found, (logprobs, entropies, ref_logprobs, values), strict=True):
                x[places] = y
    # A token is computed in one process and 0 in the others: the sum is exact.
    predictions = Predictions(mask, *accelerator.reduce(found, "sum"))
    finite(predictions.logprobs, "the policy's log-probability", iteration)
    finite(predictions.values, "the value", iteration)
    return predictions


@torch.no_grad()
def experience_of(predictions, shaped, config, kl_coef):
    """Predictions and shaped scores (B,), normalised, minus penalties -> Experience (HH, section
    4.1: reward = score - kl_coef * KL; N+ details, 4.1 and 4.2)."""
    p = predictions
    rewards = losses.token_rewards(p.logprobs, p.ref_logprobs, shaped, p.mask, kl_coef)
    whitened = rewards
    if config.whiten_rewards:
        whitened = losses.masked_whiten(rewards, p.mask, shift_mean=False)
    advantages, returns = losses.gae(whitened, p.values, p.mask, config.gamma, config.lam)
    return Experience(
        p.mask, p.logprobs, p.ref_logprobs, p.values, rewards,
        advantages=losses.masked_whiten(advantages, p.mask), returns=returns)


@torch.no_grad()
def statistics(predictions, experience, kl_coef):
    """Metrics of an iteration before its updates, under trl's names. KL in nats per response."""
    p, e = predictions, experience
    kl1, _, kl3 = losses.kl_estimators(p.logprobs, p.ref_logprobs)
    spread, missed = e.returns[p.mask > 0].var(), (e.returns - e.values)[p.mask > 0].var()
    lengths = p.mask.sum(1)
    return {
        "objective/kl": kl1.sum(1).mean().item(),
        "objective/kl_k3": kl3.sum(1).mean().item(),
        "objective/entropy": -p.logprobs.sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl1.sum(1).mean().item(),
        "objective/rlhf_reward": e.rewards.sum(1).mean().item(),
        "policy/entropy_avg": losses.masked_mean(p.entropies, p.mask).item(),
        "val/explained_variance": (1 - missed / spread).item() if spread > 0 else 0.0,
        "val/response_length": lengths.mean().item(),
        "val/tokens": int(lengths.sum()),
    }
