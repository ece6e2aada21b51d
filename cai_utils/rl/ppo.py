"""PPO against a preference model (the paper, sections 4.2 and 4.3), on `accelerate`.

The method is that of Bai et al. 2022 (arXiv 2204.05862, section 4.1: reward = PM score - KL penalty
to the starting policy) with the details of "The N+ Implementation Details of RLHF with PPO" (Huang
et al. 2024, arXiv 2403.17031): a separate value model that starts as the PM, the KL penalty on
every token, the score on the last one, whitened advantages, clipped losses, no dropout, Adam with
eps 1e-5, log-probabilities at the sampling temperature.

Here is the loop. Hyperparameters are in `config`, formulas in `losses`, sampling, evaluation and
advantages in `rollout`, sampling by vLLM in `handover`, the two networks in `networks`, their
construction in `learner`, resuming in `checkpoints`. Everything random is a function of (seed,
iteration), so that an iteration depends on nothing but weights, optimizer and
`checkpoints.Progress`.

On several devices: `accelerate launch --config_file params/accelerate/ddp.yaml -m cai_utils.rl.ppo
CONFIG.yaml`, where CONFIG holds the arguments of `train`, `prompts` as a file of JSON lines.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cai_utils import dialogue, preference
from cai_utils.experiment import launch
from cai_utils.rl import checkpoints, distributed, handover, losses, networks, rollout
from cai_utils.rl.config import PPOConfig
from cai_utils.rl.learner import build
from cai_utils.rl.rollout import finite

Config = PPOConfig  # what notebook 09 asks of every trainer's module: `train` and `Config`


def train(policy_spec, pm_folder, prompts, out_dir, config, *, runs_dir=None, log=None,
          refresh=None):
    """Train a policy with PPO; returns the history, a DataFrame of one row per iteration.

    policy_spec: spec or folder of a causal LM; the reference is a frozen copy of it.
    pm_folder: folder of a PM with the policy's tokenizer, or any object with
        `.score(conversations) -> (B,)`. The value model starts as a copy of the PM, or, if the
        object is no `preference.Scorer`, as the policy with a head of zeros.
    prompts: rows {"prompt": messages} or lists of messages, at least `episodes`; each pass over
        them is shuffled anew.
    config: a `PPOConfig`, or a dict of its fields.
    log: called with each iteration's metrics (a W&B run's `log`); at snapshots "completions" is a
        DataFrame of sampled conversations.
    refresh: online RLAIF (paper, section 6.1): before every `refresh_every`-th iteration but the
        first, `refresh(iteration, sampler)`, with the iterations done and the current policy's
        `Sampler`, returns the PM from there on (a folder or a scorer); see `online.PMRefresher`.

    The same call (same config, models, prompts, code, versions) continues from its last checkpoint
    and ends as if it had not been interrupted; when it had finished, its history is returned;
    another call is refused while the checkpoint is there. With a PM or `refresh` that is an object,
    only if that has an attribute `key` (JSON) that identifies it, and `refresh` returns folders.

    Written: out_dir (the final model; `history.csv` after every iteration) and, at the start, every
    `snapshot_every` iterations and at the end, out_dir/step-<episodes so far>: model, tokenizer and
    samples.jsonl (8 conversations, the same prompts each time, with their PM scores). Snapshots of
    an earlier, other run there are removed. With `lora` models are saved merged.

    Metrics have trl's names. objective/scores is the PM's own mean score; objective/rlhf_reward the
    mean of normalised score - penalty - kl_coef * KL; objective/kl is in nats per response.
    ValueError: different tokenizers, too few or too long prompts, a checkpoint of another run, a
    quantity that is not finite (the message names iteration and quantity; what was saved stays).

    With `engine` (config) vLLM samples, and takes the policy's weights from out_dir/engine, where
    they are written when they have changed. Log-probabilities are the policy's all the same;
    sampling/sampling_logp_difference/mean and /max tell how far vLLM's are from them. ValueError
    where it is not installed, and for several processes.
    """
    config, out_dir = PPOConfig.from_dict(config), Path(out_dir)
    prompts = [row["prompt"] if isinstance(row, dict) else row for row in prompts]
    here = distributed.process_state()
    _check(prompts, config, refresh, here.num_processes)
    key = None
    if here.is_main_process and config.checkpoint_every:
        key = checkpoints.key(config, prompts, train, here.num_processes, policy_spec=policy_spec,
                              pm_folder=pm_folder, refresh=refresh, runs_dir=runs_dir)
    saved = checkpoints.Checkpoints(out_dir, key)
    history = saved.finished()
    if history is not None:
        print(f"ppo: {out_dir} holds this run, finished: taken as it is", flush=True)
        return history
    handover.check(config.engine, here.num_processes)
    if saved.key is None and config.checkpoint_every:
        saved.stop("a PM or `refresh` that is an object without `key` cannot be compared")

    learner, collector = build(policy_spec, pm_folder, prompts, config, runs_dir, here.device)
    log = log if log is not None and here.is_main_process else lambda row: None
    progress = _resume(saved, learner, collector, refresh, log)
    with handover.sampling(collector, out_dir / "engine"):
        if progress is None:
            saved.begin()
            progress = checkpoints.Progress(config.kl_coef)
            _snapshot(collector, out_dir / "step-0")
            saved.saved(out_dir / "step-0")
        _loop(learner, collector, saved, progress, refresh, log)
        _snapshot(collector, out_dir)
    shown = ("episodes", "ppo_epochs", "minibatch", "lr", "kl_coef", "score_norm", "lora", "seed")
    pm = str(pm_folder) if isinstance(pm_folder, str | Path) else type(pm_folder).__name__
    saved.finish(progress.history, base=str(policy_spec), pm=pm,
                 **{name: getattr(config, name) for name in shown})
    return pd.DataFrame(progress.history)


def _loop(learner, collector, saved, progress, refresh, log):
    """The iterations after `progress`, which is updated in place."""
    config, out_dir = learner.config, saved.folder
    started, first = time.perf_counter(), progress.iteration + 1
    for iteration in range(first, config.iterations + 1):
        clock = [time.perf_counter()]
        # 1. Set the learning rates; with `refresh`, train the PM further.
        _set_learning_rates(learner, iteration)
        if refresh and _due(config.refresh_every, iteration - 1):
            _refresh_pm(refresh, iteration - 1, collector, saved, progress)
        # 2. Sample one response to each of the next prompts, and score it with the PM.
        chosen = _next_prompts(len(collector.prompts), config.episodes,
                               (iteration - 1) * config.episodes, config.seed)
        seed = int(np.random.SeedSequence([config.seed, iteration]).generate_state(1)[0])
        sampled = collector.collect(chosen, seed)
        finite(sampled.scores, "the PM score", iteration)
        # 3. Normalise the scores; a response that does not end pays a penalty.
        shaped = _shaped_scores(sampled, progress, learner, collector, iteration)
        clock.append(time.perf_counter())
        # 4. Evaluate every response token: log-probabilities of policy and reference, values.
        predicted = rollout.evaluate(learner, sampled.episodes, iteration)
        # 5. Compute rewards, advantages and returns of the tokens.
        experience = rollout.experience_of(predicted, shaped, config, progress.kl_coef)
        metrics = rollout.statistics(predicted, experience, progress.kl_coef)
        clock.append(time.perf_counter())
        # 6. Update policy and value model.
        metrics |= update(learner, sampled.episodes, experience, iteration)
        learner.follow(collector)
        collector.weights += 1
        clock.append(time.perf_counter())
        # 7. Record the iteration, and adapt the KL coefficient.
        row = _row(iteration, sampled, experience, metrics, learner, progress.kl_coef, clock)
        if config.kl_target is not None:
            progress.kl_coef = losses.adapt_kl_coef(
                progress.kl_coef, row["objective/kl"], config.kl_target, config.episodes)
        progress.iteration = iteration
        progress.history.append(row)
        if saved.main:
            checkpoints.write_history(progress.history, out_dir)
            _print_progress(row, config, first, started)
        # 8. Save a snapshot of the policy.
        logged = dict(row)
        if iteration == config.iterations or _due(config.snapshot_every, iteration):
            folder = out_dir / f"step-{row['episode']}"
            logged["completions"] = _snapshot(collector, folder)
            saved.saved(folder)
        # 9. Save a checkpoint, unless the run is over.
        if iteration < config.iterations and _due(config.checkpoint_every, iteration):
            for name, weight in learner.networks.named_parameters():
                finite(weight, f"the weight {name}", iteration)
            saved.save(progress, learner.accelerator)
        log(logged)


def _check(prompts, config, refresh, processes):
    """ValueError for arguments of `train` that do not fit each other."""
    if len(prompts) < config.episodes:
        raise ValueError(f"{len(prompts)} prompts are fewer than the {config.episodes} episodes of "
                         "an iteration: give more prompts or lower `episodes`")
    if config.episodes < processes:
        raise ValueError(f"{config.episodes} episodes are fewer than the {processes} processes "
                         "that share them: raise `episodes`")
    if refresh and processes > 1:
        raise ValueError("`refresh` trains its PM in one process: start one only")


def _resume(saved, learner, collector, refresh, log):
    """Restores everything from the last checkpoint -> its Progress, or None where there is none."""
    folder, progress = saved.resume()
    if not folder:
        return None
    learner.accelerator.load_state(str(folder))
    value = learner.networks.value
    value.mean, value.std = progress.value
    if progress.pm is not None:
        collector.scorer = collector.scorer_of(progress.pm)
    getattr(refresh, "resume", lambda pm: None)(progress.pm)
    print(f"ppo: resumes from iteration {progress.iteration} of {learner.config.iterations}",
          flush=True)
    for row in progress.history:  # a new W&B run shows the whole curve
        log(row)
    learner.follow(collector)
    return progress


def _due(every, done):
    """Whether something that happens every so many iterations (0: never) happens now."""
    return bool(every and done and done % every == 0)


def _set_learning_rates(learner, iteration):
    config = learner.config
    rates = (config.lr, config.lr if config.value_lr is None else config.value_lr)
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        left = 1 - (iteration - 1) / config.iterations
        group["lr"] = rate * (left if config.lr_decay else 1)


def _refresh_pm(refresh, done, collector, saved, progress):
    """Online RLAIF: `refresh` gives another PM, whose scores are normalised anew."""
    pm = distributed.keeping_state(refresh, done, collector.sampler)
    collector.scorer = collector.scorer_of(pm)
    progress.pm, progress.norm = str(pm), None
    if saved.key is not None and not isinstance(pm, str | Path):
        saved.stop("`refresh` returned an object, not the folder of a PM")


def _next_prompts(n, count, position, seed):
    """Indices of `count` of `n` prompts, from `position` on in an endless sequence of passes over
    all of them, each pass shuffled anew."""
    passes = range(position // n, (position + count - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, p]).permutation(n) for p in passes])
    return order[position % n :][:count].tolist()


def _shaped_scores(sampled, progress, learner, collector, iteration):
    """(B,) normalised scores minus penalties. Where `progress` has no normalisation yet, it is that
    of the config, or with "start" mean and standard deviation of these scores."""
    config, scores = learner.config, sampled.scores
    if progress.norm is None:
        progress.norm = config.score_norm or (0.0, 1.0)
        if config.score_norm == "start":
            spread = scores.std().item() if config.episodes > 1 else 1.0
            progress.norm = (scores.mean().item(), max(spread, 1e-6))
        # The value model starts as the PM, hence in the unit of its scores. A later PM has another
        # unit, but the value model's targets, normalised returns, have not.
        if iteration == 1 and isinstance(collector.scorer, preference.Scorer):
            mean, std = progress.norm
            progress.value = (mean + collector.scorer.mean, std)
            learner.networks.value.mean, learner.networks.value.std = progress.value
    mean, std = progress.norm
    return (scores - mean) / std - config.missing_eos_penalty * (~sampled.ended).float()


def _row(iteration, sampled, experience, metrics, learner, kl_coef, clock):
    """One row of the history. clock: when the iteration, evaluation and updates began, and now."""
    seconds = clock[-1] - clock[0]
    ours = experience.logprobs[experience.mask > 0]
    gaps = (sampled.sampled_logprobs - ours).abs()
    engine = handover.compared(gaps, iteration) if learner.config.engine else {}
    return {
        "iteration": iteration,
        "episode": iteration * learner.config.episodes,
        "objective/scores": sampled.scores.mean().item(),
        **metrics,
        "val/num_eos_tokens": int(sampled.ended.sum()),
        "val/missing_eos_rate": 1 - sampled.ended.float().mean().item(),
        # The sampler's log-probabilities against ours, the worst token: about 0 in fp32 (bf16: some
        # tenths, of rare tokens), or training is off policy.
        "val/sampler_gap": gaps.max().item(),
        **engine,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "kl_coef": kl_coef,
        "eps": learner.config.episodes / seconds,
        "tokens_per_second": metrics["val/tokens"] / seconds,
        **sampled.seconds,
        "time/evaluate": clock[2] - clock[1],
        "time/update": clock[3] - clock[2],
    }


def _print_progress(row, config, first, started):
    """A line for the first iteration, the last, and every `print_every`-th."""
    iteration, every = row["iteration"], config.print_every
    if not every or (iteration % every and iteration not in (1, config.iterations)):
        return
    each = (time.perf_counter() - started) / (iteration - first + 1)
    print(f"ppo {iteration}/{config.iterations}  score {row['objective/scores']:+.3f}  "
          f"kl {row['objective/kl']:.2f}  length {row['val/response_length']:.1f}  "
          f"ended {1 - row['val/missing_eos_rate']:.0%}  {row['eps']:.0f} episodes/s  "
          f"{each * (config.iterations - iteration):.0f} s left", flush=True)


def _snapshot(collector, folder):
    """Saves the policy with samples of it; returns these as a DataFrame (prompt, completion,
    score)."""
    sampled = collector.collect(range(min(8, len(collector.prompts))), collector.config.seed)
    scored = list(zip(sampled.conversations, sampled.scores.tolist(), strict=True))
    if collector.accelerator.is_main_process:
        rows = [{"messages": messages, "score": score} for messages, score in scored]
        model = networks.merged(collector.model, collector.adapted)
        checkpoints.save_model(model, collector.tokenizer, folder, rows)
    collector.accelerator.wait_for_everyone()
    return pd.DataFrame([
        {"prompt": dialogue.transcript(messages[:-1]), "completion": messages[-1]["content"],
         "score": score} for messages, score in scored])


_MEANS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
          "val/clipfrac_avg", "val/ratio")


def update(learner, episodes, experience, iteration):
    """Epochs of shuffled minibatches; returns metrics, means over the minibatches.

    ValueError, before the weights are touched, when a loss or a gradient is not finite.
    """
    config, records, record = learner.config, [], None
    for epoch in range(config.ppo_epochs):
        order = np.random.default_rng([config.seed, iteration, epoch]).permutation(len(episodes))
        for start in range(0, len(order), config.minibatch):
            record = _backward(learner, episodes, experience, order[start:][: config.minibatch])
            for name in ("policy", "value"):
                finite(record[f"loss/{name}_avg"], f"the {name} loss", iteration)
            limit = config.target_kl
            if limit is not None and record["policy/approxkl_avg"] > limit:
                learner.optimizer.zero_grad()
                # Stopped before the first update: its minibatch is still the iteration's record.
                return _means(records or [record], len(records), stopped=True)
            record |= _step(learner, iteration)
            records.append(record)
    return _means(records, len(records), stopped=False)


def _backward(learner, episodes, experience, chosen):
    """Gradients of the losses of a minibatch, the episodes at the indices `chosen`; returns its
    means.

    It passes through the models in parts of little padding, rows of similar length or of several
    episodes, whose gradients add up: minibatches stay random, none has short responses only.
    """
    config, accelerator, device = learner.config, learner.accelerator, experience.mask.device
    tokens = int((experience.mask[chosen] > 0).sum())
    sums = torch.zeros(len(_MEANS), device=device)
    parts = rollout.passes(learner, [len(episodes[i]) for i in chosen])
    for k, (rows, weight) in enumerate(parts):
        index, inputs = rollout.batch_of(episodes, [chosen[row].tolist() for row in rows], device)
        old = experience.at(torch.tensor(index, device=device))
        # Gradients are exchanged once a minibatch, with its last part.
        accelerator.sync_gradients = last = k == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(learner.actor):
            logprobs, _, values = learner.actor(*inputs)
            policy_loss, clipped = losses.policy_loss(
                logprobs, old.logprobs, old.advantages, old.mask, config.clip)
            value_loss, value_clipped = losses.value_loss(
                values, old.values, old.returns, old.mask, config.vf_clip)
            token_fraction = weight * len(logprobs) / tokens
            # The exchange takes the mean over processes, and we want the sum.
            loss_scale = token_fraction * accelerator.num_processes
            accelerator.backward((policy_loss + config.vf_coef * value_loss) * loss_scale)
        change = logprobs.detach() - old.logprobs
        means = (policy_loss, value_loss, (change**2).mean() / 2, clipped, value_clipped,
                 change.exp().mean())
        sums += torch.stack([m.detach() for m in means]) * token_fraction
    return dict(zip(_MEANS, accelerator.reduce(sums, "sum").tolist(), strict=True))


def _step(learner, iteration):
    """Clips the gradients and updates the weights; returns the norms before clipping. Policy and
    value model apart, as a large value loss must not shrink the policy's step."""
    norms = {}
    for name in ("policy", "value"):
        weights = [w for w in getattr(learner.networks, name).parameters() if w.requires_grad]
        norm = learner.accelerator.clip_grad_norm_(weights, learner.config.max_grad_norm)
        if norm is not None:  # DeepSpeed does not return it
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            finite(norm, f"the gradient of the {name}", iteration)
            norms[f"{name}/grad_norm"] = float(norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return norms


def _means(records, updates, stopped):
    table = pd.DataFrame(records)
    return {**table.mean().to_dict(), "val/ratio_var": table["val/ratio"].var(ddof=0),
            "val/stopped_early": int(stopped), "val/minibatches": updates}


if __name__ == "__main__":
    launch.main("cai_utils.rl.ppo", "train")
