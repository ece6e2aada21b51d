"""Supervised finetuning: SL-CAI (section 3.1 of the paper), and every helpful assistant before it.

It stands on trl's `SFTTrainer`. The token ids are made here and not by trl, because they have to
be exactly what sampling reads and what sampling must produce::

    [bos]  render(prompt, add_generation_prompt=True)  " " + response  eos
           no loss                                     loss

trl renders the prompt and the whole conversation through the chat template alone, and so would add
no eos where a template has none (the model would never learn to stop) and would train on what a
template puts after it. It takes rows with `input_ids` and `labels` as they are.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from trl import SFTConfig, SFTTrainer

from cai_utils import dialogue
from cai_utils.lm import packing, tokens, training
from cai_utils.lm.packed import PackedTrainer


def sl_cai_rows(chains, helpful, n, up_to=True) -> list[dict]:
    """What SL-CAI-n is finetuned on (paper 3.2): SFT rows {"messages"}.

    chains: rows of `critique.revise`; with `up_to` all revisions 1..n of a chain are used, else
    the n-th alone. helpful: samples of the helpful assistant on helpful prompts, which keep the
    model helpful. Empty responses are left out, equal ones of a chain are used once. ValueError
    where chains are shorter than n.
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
    """SFT rows, followed by so many randomly drawn pretraining rows ({"text"}, or {"context",
    "text"}) that these are the fraction `share` of all rows."""
    n = min(len(texts), round(len(rows) * share / (1 - share)))
    order = np.random.default_rng(seed).permutation(len(texts))[:n]
    return [*rows, *(texts[i] for i in sorted(order))]


def tokenize(rows, tokenizer, max_length=512):
    """SFT rows -> {"input_ids": [[int]], "labels": [[int]]}, what `SFTTrainer` trains on.

    `{"messages": [...]}`: labels are -100 except on the last assistant turn and its eos; a
    long prompt loses its first tokens. `{"text": str}`: pretraining text, loss on all tokens, cut
    into pieces of `max_length` (special tokens: `tokens.documents`); with `"context": str` before
    it, the loss is on the text alone.
    ValueError names a row that is neither, or has an empty response.
    """
    if not rows:
        raise ValueError("no rows to finetune on: give at least one {'messages': [...]} row")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token: set one, or responses never end")
    conversations, texts = [], []
    for i, row in enumerate(rows):
        if row.get("messages"):
            if not (isinstance(row["messages"], list | tuple)
                    and all(isinstance(m, dict) for m in row["messages"])):
                raise ValueError(f"SFT row {i}: 'messages' has to be a list of messages, not "
                                 f"{row['messages']!r:.80}")
            last = row["messages"][-1]
            if last.get("role") != "assistant" or not str(last.get("content") or "").strip():
                raise ValueError(
                    f"SFT row {i}: 'messages' must end with an assistant turn that is not empty, "
                    f"got {last!r}"
                )
            if len(row["messages"]) < 2:
                raise ValueError(f"SFT row {i}: no prompt before the assistant turn")
            conversations.append(i)
        elif isinstance(row.get("text"), str) and row["text"].strip():
            if not isinstance(row.get("context") or "", str):
                raise ValueError(f"SFT row {i}: 'context' has to be a text, not "
                                 f"{row['context']!r:.80}")
            texts.append(i)
        else:
            raise ValueError(f"SFT row {i}: needs 'messages' or 'text', has {sorted(row)}")
    found, too_long = {}, 0  # row -> [(ids, labels)]
    encoded = tokens.encode([rows[i]["messages"] for i in conversations], tokenizer, conversations)
    for i, (prompt, response) in zip(conversations, encoded, strict=True):
        prompt = tokens.shorten_prompt(prompt, response, max_length, tokenizer.bos_token_id)
        if prompt is None:
            too_long += 1
        else:
            found[i] = [(prompt + response, [-100] * len(prompt) + response)]
    if too_long:
        print(f"sft: {too_long} of {len(conversations)} responses exceed {max_length} tokens: "
              "left out")
    for i, pieces in zip(texts, _pieces([rows[i] for i in texts], tokenizer, max_length),
                         strict=True):
        found[i] = pieces
    pairs = [pair for i in sorted(found) for pair in found[i]]
    if not pairs:
        raise ValueError(f"no SFT row fits max_length={max_length} tokens: raise it")
    return {"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]}


def _pieces(rows, tokenizer, max_length):
    """Pretraining rows -> for each a list of (ids, labels), one per piece that has a loss."""
    contexts, texts = (tokens.documents([row.get(name) or "" for row in rows], tokenizer)
                       for name in ("context", "text"))
    starts = [ids if context else []
              for ids, context in zip(tokens.text_ids(contexts, tokenizer), contexts, strict=True)]
    ends = tokens.continuation_ids(contexts, starts, texts, tokenizer)
    out = []
    for start, end in zip(starts, ends, strict=True):
        end = end + [tokenizer.eos_token_id] * (end[-1:] != [tokenizer.eos_token_id])
        ids, labels = start + end, [-100] * len(start) + end
        step = max_length or len(ids)
        pieces = [(ids[j : j + step], labels[j : j + step]) for j in range(0, len(ids), step)]
        out.append([(a, b) for a, b in pieces if len(a) > 1 and any(x >= 0 for x in b)])
    return out


def finetune(spec_or_folder, rows, out_dir, *, epochs=1, batch_size=32, lr=5e-4, max_length=512,
             seed=0, runs_dir=None, report_to=(), lora=None, schedule="cosine", warmup=0.05,
             weight_decay=0.0, gradient_checkpointing=False, gradient_accumulation=1,
             checkpoint_every=600.0):
    """Finetune a causal LM on `rows`; model and tokenizer are saved as a HF folder at out_dir.

    rows: as in `tokenize`. `lr` suits models of 0.1 to 10M parameters (larger ones: 1e-5 to
    5e-5). `lora`: keyword arguments of `peft.LoraConfig`; the adapter is merged before saving.
    With `"quantize": "4bit"` (or `"8bit"`) among them it is QLoRA: as in `models.load`.
    `schedule`: "cosine", "linear" or "constant_with_warmup"; `warmup`: fraction of the steps.
    `gradient_accumulation`: passes in which a step reads its batch, for less memory; the rows of
    a step and their gradient are those of one pass. `checkpoint_every`: seconds between two
    checkpoints, in <out_dir>.partial, from which the same call goes on after a kill; 0: none.

    Returns {"train_loss": nats per trained token, mean over the steps, "tokens": tokens read
    without padding, "loss_tokens": those with a loss, "steps", "rows", "seconds",
    "tokens_per_second", "log": [one dict per logging step]}. ValueError on a bad row, and on a loss
    that is not finite (nothing is saved then).
    """
    start = time.time()
    settings = dict(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, schedule=schedule,
                    warmup=warmup, weight_decay=weight_decay,
                    gradient_accumulation=gradient_accumulation)
    model, tokenizer = training.load_for_training(spec_or_folder, "lm", runs_dir, lora)
    data = tokenize(rows, tokenizer, max_length)
    lengths = [len(ids) for ids in data["input_ids"]]
    trainer, result = training.fit(
        _Trainer, SFTConfig, model, tokenizer, data, lengths, out_dir,
        peft_config=training.lora_config(lora, "CAUSAL_LM"), spec=spec_or_folder,
        runs_dir=runs_dir, lora=lora, checkpoint_every=checkpoint_every,
        report_to=report_to, gradient_checkpointing=gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True}, **settings,
    )
    training.merge_adapter(trainer, spec_or_folder, "lm", lora, runs_dir)
    n_tokens = int(sum(lengths) * epochs)
    metrics = {
        "train_loss": result.training_loss,
        "tokens": n_tokens,
        "loss_tokens": int(sum(t != -100 for row in data["labels"] for t in row[1:]) * epochs),
        "steps": result.global_step,
        "rows": len(lengths),
        "seconds": time.time() - start + trainer.seconds_before,
        "tokens_per_second": n_tokens / result.metrics["train_runtime"],
        "log": trainer.state.log_history[:-1],
    }
    record = dict(base=str(spec_or_folder), stage="sft", **settings, lora=lora,
                  max_length=max_length)
    training.save_trained(trainer, tokenizer, out_dir, {**record, **metrics})
    return metrics


class _Trainer(PackedTrainer, SFTTrainer):
    """SFTTrainer, with several rows in a row that do not read each other."""

    @staticmethod
    def examples(data):
        return list(map(packing.Example, data["input_ids"]))

    @staticmethod
    def places(data, picked, starts, examples):
        at, targets = [], []
        for i, start in zip(picked, starts, strict=True):
            learned = [(start + k, y) for k, y in enumerate(data["labels"][i][1:]) if y != -100]
            at += [place for place, _ in learned]
            targets += [y for _, y in learned]
        return {"at": torch.tensor(at), "targets": torch.tensor(targets),
                "tokens": torch.tensor(sum(len(examples[i]) for i in picked))}, len(at)

    def pass_loss(self, model, batch, scale):
        names = ("input_ids", "position_ids", "owner", "at", "targets")
        loss, stats = model(**{name: batch[name] for name in names}, scale=scale)
        read = batch["tokens"].float()
        self._metrics["train"]["sums"].append(torch.stack(
            [*stats, torch.full_like(read, len(batch["at"])), read]))
        return loss

    def log(self, logs, start_time=None):
        sums = self._metrics["train"].pop("sums", None)
        if sums:
            entropy, right, learned, read = self.accelerator.reduce(
                torch.stack(sums).sum(0), "sum").tolist()
            self._total_train_tokens += int(read)
            self._metrics["train"].update(
                entropy=[entropy / learned], mean_token_accuracy=[right / learned],
                num_tokens=[self._total_train_tokens])
        super().log(logs, start_time)


if __name__ == "__main__":
    from cai_utils.experiment import launch

    launch.main("cai_utils.sft", "finetune")
