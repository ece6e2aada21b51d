"""Absolute harmfulness: one conversation -> one number, learned with an L2 loss (paper, 4.5).

The paper finetuned a language model to predict the score from 0 to 4 that crowdworkers had given to
whole red-team conversations, to watch harmfulness along RL (Figure 10), where a PM's scores have no
zero. Head, tokens and training are those of a preference model, with another loss;
`preference.Scorer` of the folder gives the scores.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from trl import RewardConfig, RewardTrainer

from cai_utils import preference
from cai_utils.data import formats
from cai_utils.lm import tokens, training


class AbsoluteTrainer(training.LengthBatchedTrainer, RewardTrainer):
    """RewardTrainer with half the squared error as its loss."""

    columns = ("chosen_ids", "target")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                        use_cache=False)
        loss = ((outputs.logits.squeeze(-1).float() - inputs["target"]) ** 2).mean() / 2
        return (loss, outputs) if return_outputs else loss


def _collate(examples, pad_id, multiple):
    ids, mask = tokens.pad([e["chosen_ids"] for e in examples], pad_id, multiple)
    return {"input_ids": ids, "attention_mask": mask,
            "target": torch.tensor([e["target"] for e in examples])}


def check(rows):
    """Rows {"messages": a conversation that ends in an assistant turn, "score": number}, checked;
    ValueError names the first that is not one."""
    for i, row in enumerate(rows):
        formats.validate(formats.Score, row, f"row {i}")
    if not rows:
        raise ValueError("no rows to learn from: give at least one {'messages', 'score'} row")
    return list(rows)


def train(spec_or_folder, rows, out_dir, *, epochs=1, batch_size=32, lr=5e-4, max_length=512,
          seed=0, evaluate=None, report_to=(), runs_dir=None, lora=None, schedule="cosine",
          warmup=0.05, weight_decay=0.0, gradient_checkpointing=False, gradient_accumulation=1,
          checkpoint_every=600.0):
    """Train a score model with an L2 loss; saved as a PM's folder at `out_dir`, whose
    `preference.Scorer(out_dir).score(conversations)` is in the units of `score`.

    rows: {"messages": conversation, "score": number, higher is more harmful (paper: 0 to 4)}. Other
    arguments as in `preference.train`. The head learns scores of mean 0 and standard deviation 1;
    the model is set to the units of `score` afterwards, so that a short training need not learn
    their mean.

    Returns {"train_loss": mean of half the squared error in units of the variance, "rows",
    "tokens", "steps", "seconds", "score_mean", "score_std", "log", and, if given, "eval": what
    `evaluate(Scorer)` returns of the trained model (`evaluation.harm_scores.evaluate`, say)}.
    ValueError on bad rows (`check`) and on a loss that is not finite (nothing is saved then).
    """
    start = time.time()
    settings = dict(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, schedule=schedule,
                    warmup=warmup, weight_decay=weight_decay,
                    gradient_accumulation=gradient_accumulation)
    rows = check(rows)
    # The head is new even on a PM, whose scores have another unit.
    model, tokenizer = training.load_score_model(spec_or_folder, seed, runs_dir, lora,
                                                 new_head=True)
    model.config.score_mean = 0.0
    ids, scores = _tokenize(rows, tokenizer, max_length)
    mean, std = float(np.mean(scores)), max(float(np.std(scores)), 1e-6)
    # rejected_ids: how RewardTrainer recognises rows that are tokenized; not read.
    data = {"chosen_ids": ids, "rejected_ids": [[]] * len(ids),
            "target": [(score - mean) / std for score in scores]}
    trainer, result = training.fit(
        AbsoluteTrainer, RewardConfig, model, tokenizer, data, list(map(len, ids)), out_dir,
        collate=_collate,
        peft_config=training.lora_config(lora, "SEQ_CLS", modules_to_save=["score"]),
        spec=spec_or_folder, runs_dir=runs_dir, lora=lora, checkpoint_every=checkpoint_every,
        report_to=report_to, gradient_checkpointing=gradient_checkpointing, **settings,
    )
    model = training.merge_adapter(trainer, spec_or_folder, "score", lora, runs_dir)
    with torch.no_grad():
        model.score.weight *= std
        if getattr(model.score, "bias", None) is not None:
            model.score.bias *= std
    model.config.score_mean = -mean  # a Scorer subtracts it
    metrics = {
        "train_loss": result.training_loss, "rows": len(ids), "steps": result.global_step,
        "tokens": sum(map(len, ids)) * epochs, "score_mean": mean, "score_std": std,
        "log": trainer.state.log_history[:-1],
    }  # fmt: skip
    metrics["seconds"] = time.time() - start + trainer.seconds_before
    record = dict(base=str(spec_or_folder), stage="absolute", **settings, lora=lora,
                  max_length=max_length)
    training.save_trained(trainer, tokenizer, out_dir, {**record, **metrics})
    if evaluate:  # once the model is saved: rows that it refuses cost no training
        metrics["eval"] = evaluate(preference.Scorer(model, tokenizer, max_length=max_length))
        training.write_record(out_dir, {**record, **metrics})
    return metrics


def _tokenize(rows, tokenizer, max_length):
    """Rows -> (ids, scores), lists of the same length; rows whose response exceeds `max_length`
    tokens are left out."""
    ids, scores = [], []
    encoded = tokens.encode([r["messages"] for r in rows], tokenizer)
    for row, (prompt, response) in zip(rows, encoded, strict=True):
        cut = tokens.shorten_prompt(prompt, response, max_length, tokenizer.bos_token_id)
        if cut is not None:
            ids.append(cut + response)
            scores.append(float(row["score"]))
    if not ids:
        raise ValueError(f"max_length={max_length} is too short for every response: raise it")
    if len(ids) < len(rows):
        print(f"harmfulness: {len(rows) - len(ids)} of {len(rows)} responses exceed {max_length} "
              "tokens: left out")
    return ids, scores


if __name__ == "__main__":
    from cai_utils.experiment import launch

    launch.main("cai_utils.harmfulness", "train")
