"""PPO against a preference model (the paper, sections 4.2 and 4.3), on `accelerate`.

The method is that of Bai et al. 2022 (arXiv 2204.05862, section 4.1: reward = PM score - KL penalty
to the starting policy) with the details of "The N+ Implementation Details of RLHF with PPO" (Huang
et al. 2024, arXiv 2403.17031): a value model of its own that starts as the PM, the KL penalty on
every token, the score on the last one, whitened advantages, clipped losses, no dropout, Adam with
eps 1e-5, log-probabilities at the sampling temperature.

The formulas stand in `ppo_math`, the two networks in `ppo_nets`, evaluation and updates in
`ppo_step`, what survives a kill in `ppo_checkpoint`; here is the loop. Everything random is a
function of (seed, iteration), so an iteration depends on nothing but the weights, the optimizer,
the KL coefficient and its number.

On several devices: `accelerate launch --config_file params/accelerate/ddp.yaml -m cai_utils.rl.ppo
CONFIG.yaml`, where CONFIG holds the arguments of `train`, `prompts` as a file of JSON lines. Every
process samples and scores its share of the episodes; all of them then know the whole batch.
"""

from __future__ import annotations

import contextlib
import copy
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object

from cai_utils import dialogue, preference
from cai_utils.experiment import launch
from cai_utils.experiment.files import atomic
from cai_utils.lm import models
from cai_utils.lm.sampling import Sampler
from cai_utils.lm.tokens import prompt_ids_of
from cai_utils.rl import checkpoints, losses, networks, rollout
from cai_utils.rl.distributed import _accelerator, _apart, _follow, _on_cpu
from cai_utils.rl.networks import ResponseLogprobs, ResponseValues
from cai_utils.rl.packing import length_groups, pack
from cai_utils.rl.rollout import _inputs, _shares, finite


def report_health(history) -> None:
    """Print how a history of `ppo.train` begins and ends, in fifths of the run."""
    columns = {"score": "objective/scores", "KL (nats)": "objective/kl",
               "entropy per token": "policy/entropy_avg", "length": "val/response_length",
               "not ended": "val/missing_eos_rate", "value explains": "val/explained_variance",
               "clipped": "policy/clipfrac_avg"}
    fifth = max(1, len(history) // 5)
    for label, column in columns.items():
        first, last = history[column].head(fifth).mean(), history[column].tail(fifth).mean()
        print(f"{label}: {first:.3f} -> {last:.3f}")


__all__ = ["ResponseLogprobs", "ResponseValues", "length_groups", "pack", "train"]


def train(
    policy_spec, pm_folder, prompts, out_dir, *, lr, value_lr=None, lr_decay=False,
    iterations=40, episodes=128, ppo_epochs=2, minibatch=32, micro_tokens=2048,
    kl_coef=0.05, kl_target=None, target_kl=None, gamma=1.0, lam=0.95, clip=0.2, vf_clip=0.2,
    vf_coef=0.1, whiten_rewards=False, score_norm=None, missing_eos_penalty=1.0,
    max_grad_norm=1.0, temperature=1.0, max_new_tokens=48, seed=0, snapshot_every=10,
    print_every=5, runs_dir=None, log=None, lora=None, bf16="auto", checkpoint_every=5,
    refresh=None, refresh_every=0,
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
    score_norm: None, (mean, std) of the PM's scores, or "start": those of the first iteration (and
        of the first one after each `refresh`).
    missing_eos_penalty: taken from the (normalised) score of a response that does not end.
    micro_tokens: the most padded tokens that pass through a model at once, in each process: memory,
        not results. A minibatch that holds more accumulates its gradients over several passes.
    log: called with each iteration's metrics (a W&B run's `log`); at snapshots "completions" is a
        DataFrame of sampled conversations.
    lora: keyword arguments of peft.LoraConfig: only adapters learn (and the value model's head);
        the reference is then the policy with its adapter off. Models are saved merged.
    bf16: bfloat16 in the passes through the models; "auto": where hardware and size make it pay.
        Under `accelerate launch` its config decides instead.
    checkpoint_every: iterations between two checkpoints; 0: none. The same call (same arguments,
        models, prompts, code, versions) goes on from the last one and ends as if it had not been
        interrupted; when it had finished, its history is returned; another call is refused while
        the checkpoint is there. With a PM or `refresh` that is an object, only if that has an
        attribute `key` (JSON) that says what it is, and `refresh` returns folders.
    refresh: online RLAIF (paper, section 6.1): before every `refresh_every`-th iteration but the
        first, `refresh(iteration, sampler)`, with the iterations done and the current policy's
        `Sampler`, returns the PM from there on (a folder or a scorer); see `online.refresher`.

    Written: out_dir (the final model; `history.csv` after every iteration) and, at the start, every
    `snapshot_every` iterations and at the end, out_dir/step-<episodes so far>: model, tokenizer and
    samples.jsonl (8 conversations, the same prompts each time, with their PM scores). Snapshots of
    an earlier, other run there are removed.

    Metrics have trl's names. objective/scores is the PM's own mean score; objective/rlhf_reward the
    mean of normalised score - penalty - kl_coef * KL; objective/kl is in nats per response.
    ValueError: different tokenizers, too few or too long prompts, a checkpoint of another run, a
    quantity that is not finite (the message names iteration and quantity; what was saved stays).
    """
    options = dict(locals())
    out_dir = Path(out_dir)
    prompts = [row["prompt"] if isinstance(row, dict) else row for row in prompts]
    if len(prompts) < episodes:
        raise ValueError(f"{len(prompts)} prompts are fewer than the {episodes} episodes of an "
                         "iteration: give more prompts or lower `episodes`")
    here = PartialState(cpu=_on_cpu())
    if episodes < here.num_processes:
        raise ValueError(f"{episodes} episodes are fewer than the {here.num_processes} processes "
                         "that share them: raise `episodes`")
    if refresh and here.num_processes > 1:
        raise ValueError("`refresh` trains its PM in one process: start one only")
    key = None
    if here.is_main_process and checkpoint_every:
        key = checkpoints.key(options, prompts, train, here.num_processes)
    model, value_model, scorer, tokenizer, adapted = networks.load(
        policy_spec, pm_folder, device=here.device, micro_tokens=micro_tokens, runs_dir=runs_dir,
        lora=lora, seed=seed)
    accelerator = _accelerator(model, bf16)
    device, main = accelerator.device, accelerator.is_main_process
    saved = checkpoints.Checkpoints(out_dir, key, accelerator)
    if saved.finished():
        print(f"ppo: {out_dir} holds this run, finished: taken as it is", flush=True)
        return pd.read_csv(out_dir / "history.csv")
    if saved.key is None and checkpoint_every:
        saved.stop("a PM or `refresh` that is an object without `key` cannot be compared")
    prompt_ids = prompt_ids_of(prompts, tokenizer, model, max_new_tokens)
    if accelerator.mixed_precision == "bf16":
        for net in (model, value_model):
            models.attend_for_training(net, max(map(len, prompt_ids)) + max_new_tokens)
    policy, value = ResponseLogprobs(model, temperature), ResponseValues(value_model)
    bare = networks.Actor(policy, value)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded:  # what gathers weights expects one pass through each layer
        policy.share = value.share = False
    # Weights that are spread over devices cannot be sampled from: a whole copy follows them.
    whole, adapted_whole = copy.deepcopy((model, adapted)) if sharded else (model, adapted)
    sampler = Sampler(whole, tokenizer)
    # Not a small model on a CPU: its steps of decoding have a new shape each, hence a new kernel.
    plain = device.type == "cpu" and models.is_small(model)
    decoding = contextlib.nullcontext if plain else accelerator.autocast
    frozen = None if adapted else copy.deepcopy(policy).requires_grad_(False)
    rates = (lr, lr if value_lr is None else value_lr)
    groups = [{"params": [w for w in net.parameters() if w.requires_grad], "lr": rate}
              for net, rate in zip((policy, value), rates, strict=True)]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    actor, optimizer = accelerator.prepare(bare, optimizer)

    def reference(*batch):
        """Log-probabilities under the starting policy, which with LoRA is the base alone."""
        if frozen is not None:
            return frozen(*batch)[0]
        with adapted[0].disable_adapter():
            return (actor if sharded else bare)(*batch, with_values=False)[0]

    def respond(chosen, seed):
        """One response to each chosen prompt: completions, conversations, PM scores, seconds."""
        clock = [time.perf_counter()]
        mine = range(accelerator.process_index, len(chosen), accelerator.num_processes)
        asked, how = [prompts[chosen[i]] for i in mine], {"temperature": temperature, "seed": seed}
        rows = []
        if mine:
            with decoding():
                rows = sampler.generate(asked, max_new_tokens=max_new_tokens, rows=mine,
                                        progress=False, **how)
        rows = [row[0] for row in rows]
        clock.append(time.perf_counter())
        said = [dialogue.with_response(p, c.text) for p, c in zip(asked, rows, strict=True)]
        scores = np.asarray(scorer.score(said) if said else [], dtype=float).tolist()
        clock.append(time.perf_counter())
        done = sorted(gather_object(list(zip(mine, rows, said, scores, strict=True))),
                      key=lambda item: item[0])
        _, rows, said, scores = zip(*done, strict=True)
        scores = torch.tensor(scores, dtype=torch.float32, device=device)
        return rows, list(said), scores, np.diff(clock).tolist()

    def snapshot(folder):
        """Saves the policy and what it says; returns that as a DataFrame."""
        _, said, scores, _ = respond(range(min(8, len(prompts))), seed)
        rows = [{"messages": m, "score": s} for m, s in zip(said, scores.tolist(), strict=True)]
        if main:
            with networks.merged(whole, adapted_whole) as plain:
                checkpoints.save_model(plain, tokenizer, folder, rows)
        accelerator.wait_for_everyone()
        return pd.DataFrame([{"prompt": dialogue.transcript(m[:-1]),
                              "completion": m[-1]["content"], "score": s}
                             for m, s in zip(said, scores.tolist(), strict=True)])

    folder, state = saved.find()
    if folder:
        saved.load(folder)
        history, first = state["history"], state["iteration"] + 1
        kl_coef, norm, pm = state["kl_coef"], state["norm"], state["pm"]
        value.mean, value.std = state["value"]
        if pm is not None:
            scorer = networks.scorer_of(pm, tokenizer, policy_spec, device, micro_tokens, runs_dir)
        getattr(refresh, "resume", lambda pm: None)(pm)
        print(f"ppo: goes on from iteration {first - 1} of {iterations}", flush=True)
        if log is not None and main:  # a new W&B run shows the whole curve
            for row in history:
                log(row)
        if sharded:
            _follow(whole, adapted_whole, actor, accelerator)
    else:
        saved.begin()
        history, first, norm, pm = [], 1, None, None
        snapshot(out_dir / "step-0")
    started = time.perf_counter()
    for iteration in range(first, iterations + 1):
        began = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - (iteration - 1) / iterations if lr_decay else 1)
        if refresh and refresh_every and iteration > 1 and (iteration - 1) % refresh_every == 0:
            pm = _apart(refresh, iteration - 1, sampler)
            scorer = networks.scorer_of(pm, tokenizer, policy_spec, device, micro_tokens, runs_dir)
            norm = None
            if saved.key is not None and not isinstance(pm, str | Path):
                saved.stop("`refresh` returned an object, not the folder of a PM")
        chosen = _draw(len(prompts), episodes, (iteration - 1) * episodes, seed)
        fresh = int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0])
        completions, _, scores, seconds = respond(chosen, fresh)
        rollout.finite(scores, "the PM score", iteration)
        if norm is None:
            norm = score_norm or (0.0, 1.0)
            if score_norm == "start":
                spread = scores.std().item() if episodes > 1 else 1.0
                norm = (scores.mean().item(), max(spread, 1e-6))
            # The value model began as the PM, so its unit is that PM's; a later PM has another, but
            # what is learned, normalised returns, keeps its own.
            if iteration == 1 and isinstance(scorer, preference.Scorer):
                value.mean, value.std = norm[0] + scorer.mean, norm[1]
        mean, std = norm
        ended = torch.tensor([c.finish_reason == "eos" for c in completions], device=device)
        shaped = (scores - mean) / std - missing_eos_penalty * (~ended).float()
        batch = [{"prompt_ids": prompt_ids[i], "response_ids": list(c.token_ids)}
                 for i, c in zip(chosen, completions, strict=True)]
        clock = [time.perf_counter()]
        data, stats = rollout.evaluate(
            actor, reference, accelerator, batch, shaped, options, kl_coef, iteration)
        clock.append(time.perf_counter())
        learned = update(actor, optimizer, accelerator, batch, data, options, iteration)
        if sharded:
            _follow(whole, adapted_whole, actor, accelerator)
        clock.append(time.perf_counter())

        sampled = torch.tensor([p for c in completions for p in c.logprobs], device=device)
        names = ("time/sample", "time/score", "time/evaluate", "time/update")
        seconds = zip(names, seconds + np.diff(clock).tolist(), strict=True)
        row = {
            "iteration": iteration,
            "episode": iteration * episodes,
            "objective/scores": scores.mean().item(),
            **stats, **learned,
            "val/num_eos_tokens": int(ended.sum()),
            "val/missing_eos_rate": 1 - ended.float().mean().item(),
            # The sampler's log-probabilities against ours, the worst token: about 0 in fp32 (bf16:
            # some tenths, of rare tokens), or it is off policy.
            "val/sampler_gap": (sampled - data["logp"][data["mask"] > 0]).abs().max().item(),
            "lr": optimizer.param_groups[0]["lr"],
            "kl_coef": kl_coef,
            "eps": episodes / (clock[-1] - began),
            "tokens_per_second": stats["val/tokens"] / (clock[-1] - began),
            **dict(seconds),
        }
        if kl_target is not None:
            kl_coef = losses.adapt_kl_coef(kl_coef, row["objective/kl"], kl_target, episodes)
        history.append(row)
        if main:
            with atomic(out_dir / "history.csv") as temporary:
                pd.DataFrame(history).to_csv(temporary, index=False)
        if main and print_every and (iteration % print_every == 0 or iteration in (1, iterations)):
            done = iteration - first + 1
            left = (time.perf_counter() - started) / done * (iterations - iteration)
            print(f"ppo {iteration}/{iterations}  score {row['objective/scores']:+.3f}  "
                  f"kl {row['objective/kl']:.2f}  length {row['val/response_length']:.1f}  "
                  f"ended {1 - row['val/missing_eos_rate']:.0%}  {row['eps']:.0f} episodes/s  "
                  f"{left:.0f} s left", flush=True)
        table = {}
        if iteration == iterations or (snapshot_every and iteration % snapshot_every == 0):
            table = {"completions": snapshot(out_dir / f"step-{iteration * episodes}")}
        if checkpoint_every and iteration % checkpoint_every == 0 and iteration < iterations:
            for name, weight in bare.named_parameters():
                rollout.finite(weight, f"the weight {name}", iteration)
            saved.save(iteration, {"iteration": iteration, "kl_coef": kl_coef, "norm": norm,
                                   "value": (value.mean, value.std), "history": history,
                                   "pm": pm if pm is None else str(pm)})
        if log is not None and main:
            log({**row, **table})
    snapshot(out_dir)
    told = {name: options[name] for name in ("episodes", "ppo_epochs", "minibatch", "lr", "kl_coef",
                                             "score_norm", "lora", "seed")}
    pm = str(pm_folder) if isinstance(pm_folder, str | Path) else type(pm_folder).__name__
    saved.finish(iterations, base=str(policy_spec), pm=pm, **told)
    return pd.DataFrame(history)


def _draw(n, count, position, seed):
    """`count` of `n` prompt indices from place `position` of an endless row of shuffled passes."""
    passes = range(position // n, (position + count - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, p]).permutation(n) for p in passes])
    return order[position % n :][:count].tolist()


if __name__ == "__main__":
    launch.main("cai_utils.rl.ppo", "train")


_MEANS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
          "val/clipfrac_avg", "val/ratio")


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
                    pg, clipped = losses.policy_loss(
                        logp, old["logp"], old["advantages"], old["mask"], options["clip"])
                    vf, vf_clipped = losses.value_loss(
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
