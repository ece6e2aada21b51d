"""PPO against a preference model (the paper, sections 4.2 and 4.3), on `accelerate`.

The method is that of Bai et al. 2022 (arXiv 2204.05862, section 4.1: reward = PM score - KL penalty
to the starting policy) with the details of "The N+ Implementation Details of RLHF with PPO" (Huang
et al. 2024, arXiv 2403.17031): a value model of its own that starts as the PM, the KL penalty on
every token, the score on the last one, whitened advantages, clipped losses, no dropout, Adam with
eps 1e-5, log-probabilities at the sampling temperature. The formulas stand in `ppo_math`; here are
the two networks and the loop. B: episodes, T: response tokens, L: tokens of prompt and response.

Everything random is a function of (seed, iteration), so an iteration depends on nothing but the
weights, the optimizer, the KL coefficient and its number.
"""

import copy
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from . import dialogue, models, ppo_math, preference
from .provenance import atomic
from .sampling import Sampler


class ResponseLogprobs(nn.Module):
    """A causal LM that gives log-probabilities of the response tokens alone: its head never sees
    prompt or padding. Right padding needs no attention mask: attention is causal, so that what
    comes after a token cannot reach it."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature, self.plain_head = model, temperature, True
        ids = torch.arange(4, device=model.device)[None]
        with torch.no_grad():  # some architectures scale or cap their logits: then take theirs
            whole = model(input_ids=ids).logits[0]
            self.plain_head = torch.allclose(self._logits(ids, ids[0]), whole, atol=1e-4)

    def _logits(self, ids, at):
        if not self.plain_head:
            return self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[at]
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, at))

    def forward(self, ids, at, targets, with_entropy=False):
        """ids: (B, L); at: (N,) flat places in (B, L) whose next token is wanted; targets: (N,).
        Returns log-probabilities (N,) and the distributions' entropies (N,) in nats, or None."""
        logits = self._logits(ids, at) / self.temperature
        logp = -nn.functional.cross_entropy(logits, targets, reduction="none")
        if not with_entropy:
            return logp, None
        logs = logits.log_softmax(-1)
        return logp, -(logs.exp() * logs).sum(-1)


class ResponseValues(nn.Module):
    """A PM read at every position: base model and score head, shifted and scaled as the scores."""

    def __init__(self, model):
        super().__init__()
        self.model, self.mean, self.std = model, 0.0, 1.0

    def forward(self, ids, at):
        """ids: (B, L); at: (N,) flat places in (B, L) -> values (N,)."""
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows = self.model.score(hidden.flatten(0, 1).index_select(0, at))
        return (rows.squeeze(-1) - self.mean) / self.std


def length_groups(lengths, max_tokens, max_padding=0.1):
    """Indices of rows in groups of like length, longest first. Padded to its longest row, a group
    holds at most `max_tokens` tokens (or one row), and at most the share `max_padding` of padding
    unless it is small (a quarter of `max_tokens`), when one more pass would cost more than that."""
    groups, total = [], 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        padded = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else math.inf
        little = padded - total - lengths[i] <= max_padding * padded or padded <= max_tokens // 4
        if padded <= max_tokens and little:
            groups[-1].append(i)
            total += lengths[i]
        else:
            groups.append([i])
            total = lengths[i]
    return groups


def pack(episodes, device="cpu"):
    """Episodes {"prompt_ids", "response_ids"} -> ids (B, L), right-padded, and, flat over their N
    response tokens in order, `at` (the place in (B, L) that predicts a token) and the tokens."""
    rows = [e["prompt_ids"] + e["response_ids"] for e in episodes]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    starts = [i * width + len(e["prompt_ids"]) - 1 for i, e in enumerate(episodes)]
    spans = zip(starts, episodes, strict=True)
    at = torch.cat([torch.arange(s, s + len(e["response_ids"])) for s, e in spans])
    return ids.to(device), at.to(device), ids.flatten()[at + 1].to(device)


def train(
    policy_spec, pm_folder, prompts, out_dir, *, lr, value_lr=None, lr_decay=False,
    iterations=40, episodes=128, ppo_epochs=2, minibatch=32, micro_tokens=2048,
    kl_coef=0.05, kl_target=None, target_kl=None, gamma=1.0, lam=0.95, clip=0.2, vf_clip=0.2,
    vf_coef=0.1, whiten_rewards=False, score_norm=None, missing_eos_penalty=1.0,
    max_grad_norm=1.0, temperature=1.0, max_new_tokens=48, seed=0, snapshot_every=10,
    print_every=5, runs_dir=None, log=None,
):  # fmt: skip
    """Train a policy with PPO; returns the history, a DataFrame of one row per iteration.

    policy_spec: spec or folder of a causal LM; the reference is a frozen copy of it.
    pm_folder: folder of a PM with the policy's tokenizer, or any object with
        `.score(conversations) -> (N,)`. The value model starts as a copy of the PM, or, if the
        object is no `preference.Scorer`, as the policy with a head of zeros.
    prompts: rows {"prompt": messages} or lists of messages, at least `episodes`; each pass over
        them is shuffled anew.
    lr, value_lr: Adam's learning rates of policy and value model (`value_lr` None: the same);
        `lr_decay`: both fall linearly to 0 over the run.
    kl_coef: weight of the KL penalty; with `kl_target` (nats per response) it is adapted.
    target_kl: ends an iteration's updates when a minibatch's approximate KL from the policy that
        sampled (nats per token) exceeds it.
    score_norm: None, (mean, std) of the PM's scores, or "start": those of the first iteration.
    missing_eos_penalty: taken from the (normalised) score of a response that does not end.
    micro_tokens: the most padded tokens that pass through a model at once: memory, not results.
    log: called with each iteration's metrics (a W&B run's `log`).

    Written: out_dir (the final model; `history.csv` after every iteration) and, at the start, every
    `snapshot_every` iterations and at the end, out_dir/step-<episodes so far>: model, tokenizer and
    samples.jsonl (8 conversations, the same prompts each time, with their PM scores). Snapshots of
    an earlier run there are removed.

    Metrics have trl's names. objective/scores is the PM's own mean score; objective/rlhf_reward the
    mean of normalised score - penalty - kl_coef * KL; objective/kl is in nats per response.
    ValueError: different tokenizers, too few or too long prompts, a quantity that is not finite
    (the message names iteration and quantity; what was saved stays).
    """
    options = dict(locals())
    out_dir = Path(out_dir)
    prompts = [row["prompt"] if isinstance(row, dict) else row for row in prompts]
    if len(prompts) < episodes:
        raise ValueError(f"{len(prompts)} prompts are fewer than the {episodes} episodes of an "
                         "iteration: give more prompts or lower `episodes`")
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("ppo.train runs in one process: start it without `accelerate launch`")
    device = accelerator.device
    model, value_model, scorer, tokenizer = _load(policy_spec, pm_folder, options, device)
    prompt_ids = _tokenize(prompts, tokenizer, model, max_new_tokens)
    sampler = Sampler(model, tokenizer)
    policy, value = ResponseLogprobs(model, temperature), ResponseValues(value_model)
    nets = {"reference": copy.deepcopy(policy).requires_grad_(False)}
    rates = (lr, lr if value_lr is None else value_lr)
    groups = [{"params": list(net.parameters()), "lr": rate}
              for net, rate in zip((policy, value), rates, strict=True)]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    nets["policy"], nets["value"], optimizer = accelerator.prepare(policy, value, optimizer)

    def respond(chosen, seed):
        """One response to each chosen prompt: completions, conversations, PM scores, seconds."""
        clock = [time.perf_counter()]
        asked, how = [prompts[i] for i in chosen], {"temperature": temperature, "seed": seed}
        rows = sampler.generate(asked, max_new_tokens=max_new_tokens, **how)
        completions = [row[0] for row in rows]
        clock.append(time.perf_counter())
        said = [dialogue.with_response(p, c.text) for p, c in zip(asked, completions, strict=True)]
        scores = torch.as_tensor(np.asarray(scorer.score(said)), dtype=torch.float32).to(device)
        clock.append(time.perf_counter())
        return completions, said, scores, np.diff(clock).tolist()

    def snapshot(folder):
        _, said, scores, _ = respond(range(min(8, len(prompts))), seed)
        rows = [{"messages": m, "score": s} for m, s in zip(said, scores.tolist(), strict=True)]
        _save(model, tokenizer, folder, rows)

    for stale in out_dir.glob("step-*"):  # of an earlier run, which would mix into this one's curve
        shutil.rmtree(stale)
    snapshot(out_dir / "step-0")
    history, started = [], time.perf_counter()
    for iteration in range(1, iterations + 1):
        began = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - (iteration - 1) / iterations if lr_decay else 1)
        chosen = _draw(len(prompts), episodes, (iteration - 1) * episodes, seed)
        fresh = int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0])
        completions, _, scores, seconds = respond(chosen, fresh)
        _finite(scores, "the PM score", iteration)
        if score_norm == "start":
            score_norm = (scores.mean().item(), max(scores.std().item(), 1e-6))
        mean, std = score_norm or (0.0, 1.0)
        value.mean, value.std = mean + getattr(scorer, "mean", 0.0), std
        ended = torch.tensor([c.finish_reason == "eos" for c in completions], device=device)
        shaped = (scores - mean) / std - missing_eos_penalty * (~ended).float()
        batch = [{"prompt_ids": prompt_ids[i], "response_ids": list(c.token_ids)}
                 for i, c in zip(chosen, completions, strict=True)]
        clock = [time.perf_counter()]
        data, stats = _evaluate(nets, batch, shaped, options, kl_coef, iteration)
        clock.append(time.perf_counter())
        losses = _update(nets, optimizer, accelerator, batch, data, options, iteration)
        clock.append(time.perf_counter())

        sampled = torch.tensor([p for c in completions for p in c.logprobs], device=device)
        names = ("time/sample", "time/score", "time/evaluate", "time/update")
        seconds = zip(names, seconds + np.diff(clock).tolist(), strict=True)
        row = {
            "iteration": iteration,
            "episode": iteration * episodes,
            "objective/scores": scores.mean().item(),
            **stats, **losses,
            "val/num_eos_tokens": int(ended.sum()),
            "val/missing_eos_rate": 1 - ended.float().mean().item(),
            # The sampler's log-probabilities against ours: about 0, or it is off policy.
            "val/sampler_gap": (sampled - data["logp"][data["mask"] > 0]).abs().max().item(),
            "lr": optimizer.param_groups[0]["lr"],
            "kl_coef": kl_coef,
            "eps": episodes / (clock[-1] - began),
            **dict(seconds),
        }
        if kl_target is not None:
            kl_coef = ppo_math.adapt_kl_coef(kl_coef, row["objective/kl"], kl_target, episodes)
        history.append(row)
        with atomic(out_dir / "history.csv") as temporary:
            pd.DataFrame(history).to_csv(temporary, index=False)
        if log is not None:
            log(row)
        if print_every and (iteration % print_every == 0 or iteration in (1, iterations)):
            left = (time.perf_counter() - started) / iteration * (iterations - iteration)
            print(f"ppo {iteration}/{iterations}  score {row['objective/scores']:+.3f}  "
                  f"kl {row['objective/kl']:.2f}  length {row['val/response_length']:.1f}  "
                  f"ended {1 - row['val/missing_eos_rate']:.0%}  {row['eps']:.0f} episodes/s  "
                  f"{left:.0f} s left", flush=True)
        if iteration == iterations or (snapshot_every and iteration % snapshot_every == 0):
            snapshot(out_dir / f"step-{iteration * episodes}")
    snapshot(out_dir)
    return pd.DataFrame(history)


def _load(policy_spec, pm, options, device):
    """-> policy, value model, scorer, tokenizer. Float32: Adam's small steps vanish in bf16."""
    where = {"dtype": "float32", "runs_dir": options["runs_dir"]}
    policy, tokenizer = models.load(policy_spec, device=device, **where)
    scorer = pm if hasattr(pm, "score") else preference.Scorer(
        pm, batch_tokens=options["micro_tokens"], **where)
    if not isinstance(scorer, preference.Scorer):
        value_model, _ = models.load(policy_spec, head="score", device=device, **where)
        nn.init.zeros_(value_model.score.weight)
        return policy, value_model, scorer, tokenizer
    if scorer.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the PM {pm} and the policy {policy_spec} have different tokenizers: "
                         "train the PM from a model of the policy's family")
    value_model = copy.deepcopy(scorer.model).float().to(device).requires_grad_(True)
    return policy, value_model.eval(), scorer, tokenizer


def _tokenize(prompts, tokenizer, model, max_new_tokens):
    """Prompts -> token ids, as the sampler makes them; ValueError when one leaves no room."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids, bos = [], tokenizer.bos_token
    for i, prompt in enumerate(prompts):
        text = dialogue.render(prompt, tokenizer)
        special = not (bos and text.startswith(bos))
        ids.append(list(tokenizer(text, add_special_tokens=special)["input_ids"]))
        if room and len(ids[-1]) + max_new_tokens > room:
            raise ValueError(f"prompt {i} has {len(ids[-1])} tokens; with max_new_tokens="
                             f"{max_new_tokens} it exceeds the policy's {room} positions: drop it "
                             "or lower max_new_tokens")
    return ids


def _draw(n, count, position, seed):
    """`count` of `n` prompt indices from place `position` of an endless row of shuffled passes."""
    passes = range(position // n, (position + count - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, p]).permutation(n) for p in passes])
    return order[position % n :][:count].tolist()


def _finite(x, quantity, iteration):
    if not torch.isfinite(torch.as_tensor(x)).all():
        raise ValueError(f"{quantity} is not finite in iteration {iteration}: PPO stopped, what "
                         "was saved is kept; look at history.csv and at the PM, or lower lr")


@torch.no_grad()
def _evaluate(nets, batch, shaped, options, kl_coef, iteration):
    """What the updates need from the models that sampled: a dict of (B, T) tensors logp, values,
    returns, advantages, mask; and metrics. shaped: (B,) normalised scores less penalties."""
    device = shaped.device
    lengths = torch.tensor([len(e["response_ids"]) for e in batch], device=device)
    mask = (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).float()
    logp, ref_logp, values, entropy = (torch.zeros_like(mask) for _ in range(4))
    whole = [len(e["prompt_ids"]) + len(e["response_ids"]) for e in batch]
    for index in length_groups(whole, options["micro_tokens"]):
        ids, at, targets = pack([batch[i] for i in index], device)
        rows, columns = mask[index].nonzero(as_tuple=True)
        places = torch.tensor(index, device=device)[rows], columns
        logp[places], entropy[places] = nets["policy"](ids, at, targets, with_entropy=True)
        ref_logp[places], _ = nets["reference"](ids, at, targets)
        values[places] = nets["value"](ids, at)
    _finite(logp, "the policy's log-probability", iteration)
    _finite(values, "the value", iteration)

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


def _update(nets, optimizer, accelerator, batch, data, options, iteration):
    """Epochs of shuffled minibatches; returns metrics, means over the minibatches.

    A minibatch is drawn at random and passes through the models in parts of like length, whose
    gradients add up: little padding, and still no minibatch of short responses only."""
    mask = data["mask"] > 0
    lengths = [len(e["prompt_ids"]) + len(e["response_ids"]) for e in batch]
    records, stopped = [], False
    for epoch in range(options["ppo_epochs"]):
        order = np.random.default_rng([options["seed"], iteration, epoch]).permutation(len(batch))
        for start in range(0, len(order), options["minibatch"]):
            chosen = order[start : start + options["minibatch"]]
            total = int(mask[chosen].sum())
            sums = torch.zeros(6, device=mask.device)
            for part in length_groups([lengths[i] for i in chosen], options["micro_tokens"]):
                index = chosen[part]
                ids, at, targets = pack([batch[i] for i in index], mask.device)
                old = {name: x[index][mask[index]] for name, x in data.items()}
                logp, _ = nets["policy"](ids, at, targets)
                values = nets["value"](ids, at)
                pg, clipped = ppo_math.policy_loss(
                    logp, old["logp"], old["advantages"], old["mask"], options["clip"])
                vf, vf_clipped = ppo_math.value_loss(
                    values, old["values"], old["returns"], old["mask"], options["vf_clip"])
                share = len(at) / total
                accelerator.backward((pg + options["vf_coef"] * vf) * share)
                change = logp.detach() - old["logp"]
                means = (pg, vf, (change**2).mean() / 2, clipped, vf_clipped, change.exp().mean())
                sums += torch.stack([m.detach() for m in means]) * share
            record = dict(zip(_MEANS, sums.tolist(), strict=True))
            for name in ("policy", "value"):
                _finite(record[f"loss/{name}_avg"], f"the {name} loss", iteration)
            limit = options["target_kl"]
            if limit is not None and record["policy/approxkl_avg"] > limit:
                optimizer.zero_grad()
                stopped = True
                break
            for name in ("policy", "value"):  # apart: a large value loss must not shrink the other
                weights = nets[name].parameters()
                norm = accelerator.clip_grad_norm_(weights, options["max_grad_norm"])
                _finite(norm, f"the gradient of the {name}", iteration)
                record[f"{name}/grad_norm"] = norm.item()
            optimizer.step()
            optimizer.zero_grad()
            records.append(record)
        if stopped:
            break
    table = pd.DataFrame(records)
    extra = {"val/ratio_var": table["val/ratio"].var(ddof=0), "val/stopped_early": int(stopped)}
    return {**table.mean().to_dict(), **extra, "val/minibatches": len(records)}


_MEANS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
          "val/clipfrac_avg", "val/ratio")


def _save(model, tokenizer, folder, samples):
    """Model, tokenizer and samples.jsonl, written beside `folder` and then moved into it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".saving-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
        (temporary / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        # config.json last: a folder that loads is a whole one.
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary)
