"""One iteration of PPO after its rollouts: what the models say of them, and the updates.

Both work on the whole batch's (B, T) tensors in every process; the passes through the models, and
nothing else, are divided among the processes (`ppo_nets.shares`).
"""

import contextlib

import numpy as np
import pandas as pd
import torch

from . import ppo_math
from .ppo_nets import pack, shares

_MEANS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
          "val/clipfrac_avg", "val/ratio")


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

    kl1, _, kl3 = ppo_math.kl_estimators(logp, ref_logp)
    rewards = ppo_math.token_rewards(logp, ref_logp, shaped, mask, kl_coef)
    reward = rewards.sum(1).mean().item()
    if options["whiten_rewards"]:
        rewards = ppo_math.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = ppo_math.gae(rewards, values, mask, options["gamma"], options["lam"])
    spread, missed = returns[mask > 0].var(), (returns - values)[mask > 0].var()
    advantages = ppo_math.masked_whiten(advantages, mask)
    data = dict(logp=logp, values=values, returns=returns, advantages=advantages, mask=mask)
    return data, {
        "objective/kl": kl1.sum(1).mean().item(),
        "objective/kl_k3": kl3.sum(1).mean().item(),
        "objective/entropy": -logp.sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl1.sum(1).mean().item(),
        "objective/rlhf_reward": reward,
        "policy/entropy_avg": ppo_math.masked_mean(entropy, mask).item(),
        "val/explained_variance": (1 - missed / spread).item() if spread > 0 else 0.0,
        "val/response_length": lengths.float().mean().item(),
        "val/tokens": int(lengths.sum()),
    }


def update(actor, optimizer, accelerator, batch, data, options, iteration):
    """Epochs of shuffled minibatches; returns metrics, means over the minibatches.

    A minibatch is drawn at random and passes through the models in parts of little padding, whose
    gradients add up: rows of like length, or of several episodes, and still no minibatch of short
    responses only. ValueError, before the weights are touched, when a loss or a gradient is not
    finite."""
    mask = data["mask"] > 0
    lengths = [len(e["prompt_ids"]) + len(e["response_ids"]) for e in batch]
    bare, world = accelerator.unwrap_model(actor), accelerator.num_processes
    weights = {name: [w for w in getattr(bare, name).parameters() if w.requires_grad]
               for name in ("policy", "value")}
    records, stopped = [], False
    for epoch in range(options["ppo_epochs"]):
        order = np.random.default_rng([options["seed"], iteration, epoch]).permutation(len(batch))
        for start in range(0, len(order), options["minibatch"]):
            chosen = order[start : start + options["minibatch"]]
            total = int(mask[chosen].sum())
            sums = torch.zeros(6, device=mask.device)
            parts = _shares([lengths[i] for i in chosen], options, accelerator, actor)
            for k, (rows, weight) in enumerate(parts):
                rows = [chosen[row].tolist() for row in rows]
                index, inputs = _inputs(batch, rows, mask.device)
                index = torch.tensor(index, device=mask.device)
                own = mask[index]
                old = {name: x[index][own] for name, x in data.items()}
                # Gradients are exchanged once a minibatch, with its last part.
                accelerator.sync_gradients = last = k == len(parts) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(actor):
                    logp, _, values = actor(*inputs)
                    pg, clipped = ppo_math.policy_loss(
                        logp, old["logp"], old["advantages"], old["mask"], options["clip"])
                    vf, vf_clipped = ppo_math.value_loss(
                        values, old["values"], old["returns"], old["mask"], options["vf_clip"])
                    share = weight * len(logp) / total
                    # Times `world`: the exchange takes the mean over processes, we want the sum.
                    accelerator.backward((pg + options["vf_coef"] * vf) * (share * world))
                change = logp.detach() - old["logp"]
                means = (pg, vf, (change**2).mean() / 2, clipped, vf_clipped, change.exp().mean())
                sums += torch.stack([m.detach() for m in means]) * share
            sums = accelerator.reduce(sums, "sum")
            record = dict(zip(_MEANS, sums.tolist(), strict=True))
            for name in ("policy", "value"):
                finite(record[f"loss/{name}_avg"], f"the {name} loss", iteration)
            limit = options["target_kl"]
            if limit is not None and record["policy/approxkl_avg"] > limit:
                optimizer.zero_grad()
                stopped = True
                break
            for name in ("policy", "value"):  # apart: a large value loss must not shrink the other
                norm = accelerator.clip_grad_norm_(weights[name], options["max_grad_norm"])
                if norm is not None:  # DeepSpeed keeps it to itself
                    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                    finite(norm, f"the gradient of the {name}", iteration)
                    record[f"{name}/grad_norm"] = float(norm)
            optimizer.step()
            optimizer.zero_grad()
            records.append(record)
        if stopped:
            break
    # Stopped before its first update: what was measured there is still the iteration's record.
    table = pd.DataFrame(records or [record])
    extra = {"val/ratio_var": table["val/ratio"].var(ddof=0), "val/stopped_early": int(stopped)}
    return {**table.mean().to_dict(), **extra, "val/minibatches": len(records)}


def _shares(lengths, options, accelerator, actor):
    return shares(lengths, options["micro_tokens"], accelerator.process_index,
                  accelerator.num_processes, accelerator.unwrap_model(actor).packs)


def _inputs(batch, rows, device):
    """Rows of indices -> (the indices in order, what the networks take)."""
    index = [i for row in rows for i in row]
    return index, pack([batch[i] for i in index], device, [len(row) for row in rows])
