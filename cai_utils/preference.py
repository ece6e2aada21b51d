"""Preference models (PMs): one score per conversation, trained on comparisons with soft labels.

The loss is that of section 4.1 of the paper: cross-entropy against the feedback model's probability
that the chosen response is the better one. A human label is the special case 1. It stands on trl's
`RewardTrainer`; ours are the loss, the tokens (`tokens.encode`: those of sampling, ended by
eos, where the score is read) and batches of similar length.

The scale of scores: sigmoid(score(a) - score(b)) is the probability that a is preferred.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from trl import RewardConfig, RewardTrainer

from cai_utils import dialogue
from cai_utils.data.comparisons import check
from cai_utils.experiment import journal
from cai_utils.lm import models, packing, tokens, training
from cai_utils.lm.architectures import longest_of, switch_of
from cai_utils.lm.packed import PackedTrainer


def soft_preference_loss(chosen, rejected, p):
    """-(p log sigmoid(d) + (1 - p) log sigmoid(-d)), d = chosen - rejected (paper, section 4.1).

    chosen, rejected: (N,) scores; p: (N,) target probabilities that `chosen` is preferred, or a
    float. Returns (N,) nats, smallest where sigmoid(d) = p; with p = 1 it is the hard loss
    -log sigmoid(d).
    """
    d = chosen - rejected
    return -(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d))


class PreferenceTrainer(PackedTrainer, RewardTrainer):
    """RewardTrainer with the soft loss, and a prompt that is read once for both its answers."""

    columns = ("chosen_ids", "rejected_ids", "p_chosen", "weight")

    @staticmethod
    def examples(data):
        return list(map(packing.pair, data["chosen_ids"], data["rejected_ids"]))

    @staticmethod
    def places(data, picked, starts, examples):
        pairs = [(start, examples[i]) for start, i in zip(starts, picked, strict=True)]
        chosen = [start + len(e.prompt) + len(e.answers[0]) - 1 for start, e in pairs]
        rejected = [start + len(e) - 1 for start, e in pairs]
        return {"at": torch.tensor(chosen + rejected),
                **{name: torch.tensor([data[name][i] for i in picked])
                   for name in ("p_chosen", "weight")}}, len(picked)

    def pass_loss(self, model, batch, scale):
        names = ("input_ids", "position_ids", "owner", "at")
        scores = model(**{name: batch[name] for name in names})
        return self._loss(scores, batch).sum() * scale

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                        use_cache=False)
        loss = self._loss(outputs.logits.squeeze(-1).float(), inputs).mean()
        return (loss, outputs) if return_outputs else loss

    def _loss(self, scores, batch):
        """Scores (2 N,), the chosen ones first -> the loss of each pair (N,)."""
        chosen, rejected = scores.chunk(2)
        with torch.no_grad():  # kept as tensors until logged: .item() in each step stalls a GPU
            margin = chosen - rejected
            right = torch.where(margin == 0, 0.5, (margin > 0).float())
            self._metrics["train" if self.model.training else "eval"]["batch"].append(torch.stack([
                right.sum(), margin.sum(), scores.sum() / 2, torch.ones_like(margin).sum()]))
        return batch["weight"] * soft_preference_loss(chosen, rejected, batch["p_chosen"])

    def log(self, logs, start_time=None):
        metrics = self._metrics["train" if self.model.training else "eval"]
        batches = metrics.pop("batch", None)
        if batches:
            *sums, pairs = self.accelerator.reduce(torch.stack(batches).sum(0), "sum").tolist()
            for name, total in zip(("accuracy", "margin", "mean_reward"), sums, strict=True):
                metrics[name] = [total / pairs]
        super().log(logs, start_time)


def _collate(examples, pad_id, multiple):
    """B rows -> a batch of 2 B sequences, the chosen ones first (`tokens.pad`)."""
    ids = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
    input_ids, mask = tokens.pad(ids, pad_id, multiple)
    return {"input_ids": input_ids, "attention_mask": mask,
            "p_chosen": torch.tensor([e["p_chosen"] for e in examples]),
            "weight": torch.tensor([e["weight"] for e in examples])}


def tokenize(rows, tokenizer, max_length=512):
    """Checked comparisons -> {chosen_ids, rejected_ids: [[int]], p_chosen, weight: [float]}.

    A pair that is too long loses the first tokens of its prompt, the same on both sides; it is left
    out (their number is printed) only if a response alone is too long. Weights are scaled to mean
    1. ValueError where no pair is left, or all weights are 0.
    """
    sides = [tokens.encode([r["prompt"] + r[side] for r in rows], tokenizer)
             for side in ("chosen", "rejected")]
    out = {"chosen_ids": [], "rejected_ids": [], "p_chosen": [], "weight": []}
    for row, (prompt, chosen), (other, rejected) in zip(rows, *sides, strict=True):
        longer = max(chosen, rejected, key=len)
        cut = [tokens.shorten_prompt(ids, longer, max_length, tokenizer.bos_token_id)
               for ids in (prompt, other)]
        if None in cut:
            continue
        out["chosen_ids"].append(cut[0] + chosen)
        out["rejected_ids"].append(cut[1] + rejected)
        out["p_chosen"].append(row["p_chosen"])
        out["weight"].append(row["weight"])
    kept = len(out["weight"])
    if kept < len(rows):
        print(f"preference: {len(rows) - kept} of {len(rows)} pairs exceed {max_length} tokens: "
              "left out")
    if not kept or sum(out["weight"]) == 0:
        raise ValueError(f"no comparison to train on: max_length={max_length} is too short for "
                         "every response, or every weight is 0")
    mean = sum(out["weight"]) / kept
    out["weight"] = [w / mean for w in out["weight"]]
    return out


def train(spec_or_folder, comparisons, out_dir, *, epochs=1, batch_size=32, lr=5e-4, max_length=512,
          seed=0, evaluate=None, report_to=(), runs_dir=None, lora=None, on_bad="raise",
          centre=True, schedule="cosine", warmup=0.05, weight_decay=0.0,
          gradient_checkpointing=False, gradient_accumulation=1,
          checkpoint_every=600.0):
    """Train a PM from any causal LM, or go on from a PM; saved as a HF folder at `out_dir`.

    comparisons: rows as in ARCHITECTURE.md, Rows; `p_chosen` is the soft target and `weight`
    (see `comparisons.mix`) how much a row counts, both 1 if absent. on_bad: as in
    `comparisons.check`. `lr` suits models of 0.1 to 10M parameters. `lora`: as in
    `sft.finetune`; the head is trained too, and the adapter merged. `gradient_accumulation`:
    passes in which a step reads its batch, for less memory. The gradient is that of one pass,
    except, for models whose rows are not packed (`lm.packed.allowed`), in an epoch's last step if
    it is not full. `checkpoint_every`: as in `sft.finetune`.
    `centre`: shift the scores so that their mean over the training responses (at most 2,000 of
    them) is 0: in the head's bias where it has one, else as `score_mean` in config.json, which
    `Scorer` subtracts. `score_std` is written beside it for those who want unit variance; it is
    not applied, since score differences stand for probabilities.

    Returns {"train_loss", "tokens", "pairs", "steps", "seconds", "pairs_per_second", "score_mean",
    "score_std", "log", and, if given, "eval": what `evaluate(Scorer)` returns of the trained PM
    (`evaluation.agreement.evaluate` with its rows, say)}. ValueError on bad rows
    (`comparisons.check`) and on a loss that is not finite (nothing is saved then).
    """
    start = time.time()
    settings = dict(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, schedule=schedule,
                    warmup=warmup, weight_decay=weight_decay,
                    gradient_accumulation=gradient_accumulation)
    rows = check(comparisons, on_bad)
    model, tokenizer = training.load_score_model(spec_or_folder, seed, runs_dir, lora)
    data = tokenize(rows, tokenizer, max_length)
    pairs = list(zip(data["chosen_ids"], data["rejected_ids"], strict=True))
    trainer, result = training.fit(
        PreferenceTrainer, RewardConfig, model, tokenizer, data,
        [max(map(len, pair)) for pair in pairs], out_dir, collate=_collate,
        peft_config=training.lora_config(lora, "SEQ_CLS", modules_to_save=["score"]),
        spec=spec_or_folder, runs_dir=runs_dir, lora=lora, checkpoint_every=checkpoint_every,
        report_to=report_to, gradient_checkpointing=gradient_checkpointing, **settings,
    )
    metrics = {
        "train_loss": result.training_loss,
        "tokens": int(sum(len(ids) for pair in pairs for ids in pair) * epochs),
        "pairs": len(pairs),
        "steps": result.global_step,
        "pairs_per_second": len(pairs) * epochs / result.metrics["train_runtime"],
        "log": trainer.state.log_history[:-1],
    }
    model = training.merge_adapter(trainer, spec_or_folder, "score", lora, runs_dir)
    scorer = Scorer(model, tokenizer, max_length=max_length)
    if centre:
        metrics |= _centre(scorer, data, seed)
    metrics["seconds"] = time.time() - start + trainer.seconds_before
    record = dict(base=str(spec_or_folder), stage="preference", **settings, lora=lora,
                  max_length=max_length)
    training.save_trained(trainer, tokenizer, out_dir, {**record, **metrics})
    if evaluate:  # once the model is saved: rows that it refuses cost no training
        metrics["eval"] = evaluate(scorer)
        training.write_record(out_dir, {**record, **metrics})
    return metrics


def _centre(scorer, data, seed, at_most=2000):
    """Write the mean of the training responses' scores into the model; returns mean and std."""
    ids = data["chosen_ids"] + data["rejected_ids"]
    picked = np.random.default_rng(seed).permutation(len(ids))[:at_most]
    scorer.mean = 0.0
    scores = scorer.score_ids([ids[i] for i in picked])
    mean, std = float(scores.mean()), float(scores.std())
    bias = getattr(scorer.model.score, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias -= mean
    scorer.mean = scorer.model.config.score_mean = 0.0 if bias is not None else mean
    scorer.model.config.score_std = std
    return {"score_mean": mean, "score_std": std}


class Scorer:
    """Scores of conversations under a PM: higher is better, sigmoid(a - b) = P(a preferred to b).

    `model`: a folder (or any spec of `models.load`) that `train` wrote, or a live model with
    its `tokenizer`. Batches hold sequences of similar length, at most `batch_tokens` tokens
    with padding (None: 4,096 on a CPU, whose caches hold no more, and 16,384 elsewhere). A
    conversation over `max_length` tokens (None: the model's positions) loses the first tokens of
    its prompt. ValueError when the folder holds no PM, and in scoring, naming model and rows, for a
    score that is not finite.
    """

    def __init__(self, model, tokenizer=None, *, batch_tokens=None, max_length=None, runs_dir=None,
                 dtype="float32"):
        spec = None
        if tokenizer is None:
            spec, (model, tokenizer) = model, models.load(model, "score", dtype, runs_dir=runs_dir)
            if not models.has_score_head(model):
                raise ValueError(f"{spec}: a language model, not a preference model; "
                                 "make one of it with preference.train")
        self.name = getattr(model.config, "_name_or_path", "") if spec is None else spec
        if not hasattr(model, "score"):
            raise ValueError(f"a {type(model).__name__} has no score head: "
                             "load it with models.load(spec, head='score')")
        self.pad_id = models.pad_apart_from_eos(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens = batch_tokens or (4096 if model.device.type == "cpu" else 16384)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = (max_length, positions, longest_of(model.config))
        self.max_length = min(n or 10**9 for n in limits)
        self.switch = switch_of(model.config) or 0
        self.mean = float(getattr(model.config, "score_mean", 0.0))

    def score(self, conversations):
        """Conversations (messages, or transcripts) that end in an assistant turn -> (N,) float64.

        The order of the rows does not matter. An empty response has a score, since a policy under
        training may give one. ValueError names a conversation without a response.
        """
        conversations = [dialogue.parse_transcript(c) if isinstance(c, str) else c
                         for c in conversations]
        for i, messages in enumerate(conversations):
            if len(messages) < 2 or messages[-1].get("role") != "assistant":
                raise ValueError(f"conversation {i}: a score needs a prompt and an assistant turn")
        ids = []
        for prompt, response in tokens.encode(conversations, self.tokenizer):
            kept = tokens.shorten_prompt(prompt, response, self.max_length,
                                         self.tokenizer.bos_token_id)
            ids.append(response[-self.max_length :] if kept is None else kept + response)
        return self.score_ids(ids)

    @torch.inference_mode()
    def score_ids(self, sequences):
        """Lists of token ids (bos .. eos, unpadded) -> (N,) float64."""
        out = np.zeros(len(sequences))
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        start, device = 0, self.model.device
        with journal.progress(len(order), "conversation") as bar:
            while start < len(order):
                longest = len(sequences[order[start]])
                batch = order[start : start + max(1, self.batch_tokens // longest)]
                if longest > self.switch:  # rows on both sides of it would change each other
                    batch = [i for i in batch if len(sequences[i]) > self.switch]
                ids, mask = tokens.pad([sequences[i] for i in batch], self.pad_id)
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device),
                                    use_cache=False).logits
                out[batch] = logits[:, 0].float().cpu().numpy()
                start += len(batch)
                bar.update(len(batch))
        self.model.train(was_training)
        bad = np.flatnonzero(~np.isfinite(out))
        if len(bad):
            rows = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise ValueError(f"{self.name or type(self.model).__name__}: {len(bad)} of {len(out)} "
                             f"scores are not finite (conversations {rows}): its weights are "
                             "damaged or went out of range; fetch or train the model again")
        return out - self.mean


if __name__ == "__main__":
    from cai_utils.experiment import launch

    launch.main("cai_utils.preference", "train")
