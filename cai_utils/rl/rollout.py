"""One iteration of PPO after its rollouts: what the models say of them, and the updates.

Both work on the whole batch's (B, T) tensors in every process; the passes through the models, and
nothing else, are divided among the processes (`ppo_nets.shares`).
"""

from __future__ import annotations

import torch

from cai_utils.rl import losses
from cai_utils.rl.packing import pack, shares


def finite(x, quantity, iteration):
    """x: a number or a tensor of any shape; ValueError that names it when it is not finite."""
    if not torch.isfinite(torch.as_tensor(x)).all():
        raise ValueError(f"{quantity} is not finite in iteration {iteration}: PPO stopped, what "
                         "was saved is kept; look at history.csv and at the PM, or lower lr")


@torch.no_grad()
def evaluate(actor, reference, accelerator, batch, shaped, options, kl_coef, iteration):
    """What the updates need from the models that sampled: a dict of (B, T) tensors logp, values,
    returns, advantages, mask; and metrics. shaped: (B,) normalised scores less penalties.
    ValueError when a log-probability or a value is not finite."""
    device = shaped.device
    lengths = torch.tensor([len(e["response_ids"]) for e in batch], device=device)
    mask = (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).float()
    found = torch.zeros(4, *mask.shape, device=device)  # logp, entropy, reference's logp, values
    whole = [len(e["prompt_ids"]) + len(e["response_ids"]) for e in batch]
    for rows, weight in _shares(whole, options, accelerator, actor):
        index, inputs = _inputs(batch, rows, device)
        own = actor(*inputs, with_entropy=True)
        with accelerator.autocast():
            ref = reference(*inputs)
        if weight:
            which, columns = mask[index].nonzero(as_tuple=True)
            places = torch.tensor(index, device=device)[which], columns
            for x, y in zip(found, (own[0], own[1], ref, own[2]), strict=True):
                x[places] = y
    # A token is computed in one process and 0 in the others: the sum is exact.
    logp, entropy, ref_logp, values = accelerator.reduce(found, "sum")
    finite(logp, "the policy's log-probability", iteration)
    finite(values, "the value", iteration)

    kl1, _, kl3 = losses.kl_estimators(logp, ref_logp)
    rewards = losses.token_rewards(logp, ref_logp, shaped, mask, kl_coef)
    reward = rewards.sum(1).mean().item()
    if options["whiten_rewards"]:
        rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = losses.gae(rewards, values, mask, options["gamma"], options["lam"])
    spread, missed = returns[mask > 0].var(), (returns - values)[mask > 0].var()
    advantages = losses.masked_whiten(advantages, mask)
    data = dict(logp=logp, values=values, returns=returns, advantages=advantages, mask=mask)
    return data, {
        "objective/kl": kl1.sum(1).mean().item(),
        "objective/kl_k3": kl3.sum(1).mean().item(),
        "objective/entropy": -logp.sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl1.sum(1).mean().item(),
        "objective/rlhf_reward": reward,
        "policy/entropy_avg": losses.masked_mean(entropy, mask).item(),
        "val/explained_variance": (1 - missed / spread).item() if spread > 0 else 0.0,
        "val/response_length": lengths.float().mean().item(),
        "val/tokens": int(lengths.sum()),
    }


def _shares(lengths, options, accelerator, actor):
    return shares(lengths, options["micro_tokens"], accelerator.process_index,
                  accelerator.num_processes, accelerator.unwrap_model(actor).packs)


def _inputs(batch, rows, device):
    """Rows of indices -> (the indices in order, what the networks take)."""
    index = [i for row in rows for i in row]
    return index, pack([batch[i] for i in index], device, [len(row) for row in rows])
