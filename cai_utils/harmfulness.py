"""Absolute harmfulness: one conversation -> one number, learned with an L2 loss (paper, 4.5).

The paper finetuned a language model to predict the score from 0 to 4 that crowdworkers had given to
whole red-team conversations, to watch harmfulness along RL (Figure 10) where a PM's scores have no
zero. It is the head, the tokens and the trainer of a preference model under another loss;
`preference.Scorer` of the folder gives the scores.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from datasets import Dataset
from trl import RewardConfig

from cai_utils import preference
from cai_utils.data import formats
from cai_utils.lm import models, tokens, training
from cai_utils.lm.tokens import pad


class AbsoluteTrainer(preference.PreferenceTrainer):
    """The PM's trainer with half the squared error, on columns chosen_ids and target."""

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["chosen_ids", "target"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                        use_cache=False)
        loss = ((outputs.logits.squeeze(-1).float() - inputs["target"]) ** 2).mean() / 2
        return (loss, outputs) if return_outputs else loss


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
          warmup=0.05, weight_decay=0.0, gradient_checkpointing=False, gradient_accumulation=1):
    """Train a score model with an L2 loss; saved as a PM's folder at `out_dir`, whose
    `preference.Scorer(out_dir).score(conversations)` is in the units of `score`.

    rows: {"messages": conversation, "score": number, higher is more harmful (paper: 0 to 4)}. Other
    arguments as in `preference.train`. The head learns scores of mean 0 and spread 1; both stand in
    the model afterwards, so that a short training need not move the mean.

    Returns {"train_loss": mean of half the squared error in units of the spread, "rows", "tokens",
    "steps", "seconds", "score_mean", "score_std", "log", and, if given, "eval": what
    `evaluate(Scorer)` returns of the trained model (`evaluation.harm_scores.evaluate`, say)}.
    ValueError on bad rows (`check`) and on a loss that is not finite (nothing is saved then).
    """
    start = time.time()
    rows = check(rows)
    torch.manual_seed(seed)
    model, tokenizer = training.load_for_training(spec_or_folder, "score", runs_dir, lora)
    pad_id = models.pad_apart_from_eos(model, tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    # Also over the head of a PM: its unit is another.
    torch.nn.init.normal_(model.score.weight, std=1 / (model.score.in_features + 1))
    model.config.score_mean = 0.0
    ids, targets = [], []
    encoded = tokens.encode([r["messages"] for r in rows], tokenizer)
    for row, (prompt, answer) in zip(rows, encoded, strict=True):
        cut = tokens.shorten(prompt, answer, max_length, tokenizer.bos_token_id)
        if cut is not None:
            ids.append(cut + answer)
            targets.append(float(row["score"]))
    if not ids:
        raise ValueError(f"max_length={max_length} is too short for every answer: raise it")
    if len(ids) < len(rows):
        print(f"absolute: {len(rows) - len(ids)} of {len(rows)} answers exceed {max_length} "
              "tokens: left out")
    models.attend_for_training(model, max(map(len, ids)))
    mean, std = float(np.mean(targets)), max(float(np.std(targets)), 1e-6)
    args = training.training_arguments(
        RewardConfig, model, out_dir, rows=len(ids), epochs=epochs, batch_size=batch_size,
        lr=lr, seed=seed, report_to=report_to, schedule=schedule, warmup=warmup,
        weight_decay=weight_decay, gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation=gradient_accumulation, max_length=None,
    )

    def collate(examples):
        ids, mask = pad([e["chosen_ids"] for e in examples], pad_id,
                        args.pad_to_multiple_of)
        target = torch.tensor([(e["target"] - mean) / std for e in examples])
        return {"input_ids": ids, "attention_mask": mask, "target": target}

    trainer = AbsoluteTrainer(
        model=model, args=args, processing_class=tokenizer, data_collator=collate,
        # rejected_ids: how RewardTrainer knows rows that are tokenized; not read.
        train_dataset=Dataset.from_dict(
            {"chosen_ids": ids, "rejected_ids": [[]] * len(ids), "target": targets}),
        peft_config=training.lora_config(lora, "SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.lengths = [len(row) for row in ids]
    result = training.run(trainer)
    model = training.merge(trainer, spec_or_folder, "score", lora, runs_dir)
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
    if evaluate:
        scorer = preference.Scorer(model, tokenizer, max_length=max_length)
        metrics["eval"] = evaluate(scorer)
    metrics["seconds"] = time.time() - start
    settings = dict(base=str(spec_or_folder), stage="absolute", epochs=epochs, lr=lr, lora=lora,
                    batch_size=batch_size, max_length=max_length, seed=seed, schedule=schedule,
                    warmup=warmup, weight_decay=weight_decay)
    training.save(trainer, tokenizer, out_dir, {**settings, **metrics})
    return metrics


if __name__ == "__main__":
    from cai_utils.experiment import launch

    launch.main("cai_utils.harmfulness", "train")
