"""Supervised finetuning: SL-CAI (section 3.1 of the paper), and every helpful assistant before it.

It stands on trl's ``SFTTrainer``. The token sequence is made here and not by trl, because it has to
be, token for token, what sampling sees and what sampling must produce::

    [bos]  render(prompt, add_generation_prompt=True)  " " + response  eos
           no loss                                     loss

trl renders the prompt and the whole conversation through the chat template alone, and so would add
no eos where a template has none (the model would never learn to stop) and would train on what a
template puts after it. It takes rows with ``input_ids`` and ``labels`` as they are.
"""

from __future__ import annotations

import time

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from cai_utils import dialogue
from cai_utils.lm import models
from cai_utils.lm.tokens import encode, shorten_prompt, text_ids
from cai_utils.lm.training import (
    Quiet,
    load_for_training,
    lora_config,
    merge,
    run,
    save,
    training_arguments,
)


def sl_cai_rows(chains, helpful, n, up_to=True) -> list[dict]:
    """What SL-CAI-n is finetuned on (paper 3.2): SFT rows {"messages"}.

    chains: rows of `critique.revise`; with `up_to` every revision 1..n of a chain counts, else the
    n-th alone. helpful: samples of the helpful assistant on helpful prompts, so that it stays one.
    Responses that are empty are left out, equal ones of a chain count once. ValueError where chains
    are shorter than n.
    """
    out = []
    for i, chain in enumerate(chains):
        if not 1 <= n < len(chain["responses"]):
            raise ValueError(f"chain {i} has {len(chain['responses']) - 1} revisions; SL-CAI-{n} "
                             "needs that many: raise n_revisions in 03_critique_revision")
        revisions = chain["responses"][1 : n + 1] if up_to else [chain["responses"][n]]
        out += [dialogue.with_response(chain["prompt"], r) for r in dict.fromkeys(revisions) if r]
    out += [dialogue.with_response(s["prompt"], s["response"]) for s in helpful if s["response"]]
    return [{"messages": messages} for messages in out]


def with_pretraining(rows, texts, share, seed=0) -> list[dict]:
    """SFT rows, and pretraining rows ({"text"}, perhaps with the "context" before it), so many that
    they are `share` of the whole."""
    n = min(len(texts), round(len(rows) * share / (1 - share)))
    order = np.random.default_rng(seed).permutation(len(texts))[:n]
    return [*rows, *(texts[i] for i in sorted(order))]


def tokenize(rows, tokenizer, max_length=512):
    """SFT rows -> {"input_ids": [[int]], "labels": [[int]]}, what ``SFTTrainer`` trains on.

    ``{"messages": [...]}``: labels are -100 but on the last assistant turn and its eos; a long
    prompt loses its beginning. ``{"text": str}``: pretraining text, loss on every token, cut into
    pieces of ``max_length``; with ``"context": str`` before it, the loss is on the text alone.
    ValueError names a row that is neither, or has an empty answer.
    """
    if not rows:
        raise ValueError("no rows to finetune on: give at least one {'messages': [...]} row")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token: set one, or responses never end")
    talks, texts = [], []
    for i, row in enumerate(rows):
        if row.get("messages"):
            last = row["messages"][-1]
            if last.get("role") != "assistant" or not str(last.get("content") or "").strip():
                raise ValueError(
                    f"SFT row {i}: 'messages' must end with an assistant turn that is not empty, "
                    f"got {last!r}"
                )
            if len(row["messages"]) < 2:
                raise ValueError(f"SFT row {i}: no prompt before the assistant turn")
            talks.append(i)
        elif isinstance(row.get("text"), str) and row["text"].strip():
            texts.append(i)
        else:
            raise ValueError(f"SFT row {i}: needs 'messages' or 'text', has {sorted(row)}")
    encoded, too_long = {}, 0
    for i, (prompt, completion) in zip(
        talks, encode([rows[i]["messages"] for i in talks], tokenizer), strict=True
    ):
        prompt = shorten_prompt(prompt, completion, max_length, tokenizer.bos_token_id)
        if prompt is None:
            too_long += 1
            continue
        encoded[i] = [(prompt + completion, [-100] * len(prompt) + completion)]
    if texts:
        contexts = [rows[i].get("context") or "" for i in texts]
        whole = [c + rows[i]["text"] for i, c in zip(texts, contexts, strict=True)]
        given = [len(ids) if c else 0
                 for ids, c in zip(text_ids(contexts, tokenizer), contexts, strict=True)]
        for i, ids, n in zip(texts, text_ids(whole, tokenizer), given, strict=True):
            ids = ids + [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id])
            step = max_length or len(ids)
            labels = [-100] * n + ids[n:]
            pieces = [(ids[j : j + step], labels[j : j + step]) for j in range(0, len(ids), step)]
            encoded[i] = [(a, b) for a, b in pieces if len(a) > 1 and any(x >= 0 for x in b)]
    if too_long:
        print(f"sft: {too_long} of {len(talks)} responses exceed {max_length} tokens: left out")
    pairs = [pair for i in sorted(encoded) for pair in encoded[i]]
    if not pairs:
        raise ValueError(f"no SFT row fits max_length={max_length} tokens: raise it")
    return {"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]}


def finetune(spec_or_folder, rows, out_dir, *, epochs=1, batch_size=32, lr=5e-4, max_length=512,
             seed=0, runs_dir=None, report_to=(), lora=None, schedule="cosine", warmup=0.05,
             weight_decay=0.0, gradient_checkpointing=False, gradient_accumulation=1):
    """Finetune a causal LM on ``rows``; model and tokenizer are saved as a HF folder at out_dir.

    rows: as in ``tokenize``. ``lr`` suits models of 0.1 to 10M parameters (larger ones: 1e-5 to
    5e-5). ``lora``: keyword arguments of ``peft.LoraConfig``; the adapter is merged before saving.
    With ``"quantize": "4bit"`` (or ``"8bit"``) among them it is QLoRA: as in ``models.load``.
    ``schedule``: "cosine", "linear" or "constant_with_warmup"; ``warmup``: share of the steps.
    ``gradient_accumulation``: parts in which a step reads its batch, for less memory; the rows of a
    step and their gradient stay those of one part.

    Returns {"train_loss": nats per trained token, mean over the steps, "tokens": tokens read
    without padding, "loss_tokens": those with a loss, "steps", "rows", "seconds",
    "tokens_per_second", "log": [one dict per logging step]}. ValueError on a bad row, and on a loss
    that is not finite (nothing is saved then).
    """
    start = time.time()
    model, tokenizer = load_for_training(spec_or_folder, "lm", runs_dir, lora)
    data = tokenize(rows, tokenizer, max_length)
    lengths = [len(ids) for ids in data["input_ids"]]
    models.attend_for_training(model, max(lengths))
    args = training_arguments(
        SFTConfig, model, out_dir, rows=len(lengths), epochs=epochs, batch_size=batch_size, lr=lr,
        seed=seed, report_to=report_to, schedule=schedule, warmup=warmup, weight_decay=weight_decay,
        gradient_checkpointing=gradient_checkpointing, gradient_accumulation=gradient_accumulation,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = _Trainer(
        model=model, args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        peft_config=lora_config(lora, "CAUSAL_LM"),
    )
    trainer.lengths = lengths
    result = run(trainer)
    merge(trainer, spec_or_folder, "lm", lora, runs_dir)
    tokens = int(sum(lengths) * epochs)
    metrics = {
        "train_loss": result.training_loss,
        "tokens": tokens,
        "loss_tokens": int(sum(t != -100 for row in data["labels"] for t in row[1:]) * epochs),
        "steps": result.global_step,
        "rows": len(lengths),
        "seconds": time.time() - start,
        "tokens_per_second": tokens / result.metrics["train_runtime"],
        "log": trainer.state.log_history[:-1],
    }
    settings = dict(base=str(spec_or_folder), stage="sft", epochs=epochs, batch_size=batch_size,
                    lr=lr, max_length=max_length, seed=seed, lora=lora, schedule=schedule,
                    warmup=warmup, weight_decay=weight_decay,
                    gradient_accumulation=gradient_accumulation)
    save(trainer, tokenizer, out_dir, {**settings, **metrics})
    return metrics


class _Trainer(Quiet, SFTTrainer):
    pass


if __name__ == "__main__":
    from cai_utils.experiment import launch

    launch.main("cai_utils.sft", "finetune")
