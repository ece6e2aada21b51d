"""Supervised finetuning: SL-CAI (section 3.1 of the paper), and every helpful assistant before it.

It stands on trl's ``SFTTrainer``. The token sequence is made here and not by trl, because it has to
be, token for token, what sampling sees and what sampling must produce::

    [bos]  render(prompt, add_generation_prompt=True)  " " + response  eos
           no loss                                     loss

trl renders the prompt and the whole conversation through the chat template alone, and so would add
no eos where a template has none (the model would never learn to stop) and would train on what a
template puts after it. It takes rows with ``input_ids`` and ``labels`` as they are.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.reward_trainer import suppress_seqcls_warning

from cai_utils import models
from cai_utils.dialogue import render, uses_transcript


def encode(conversations, tokenizer):
    """Conversations that end in an assistant turn -> [(prompt ids, completion ids)], one per row.

    Prompt ids are those of ``render(messages[:-1])`` with the tokenizer's own special tokens (bos
    where it adds one); completion ids are the last turn as the chat template renders it, and one
    eos. The two are tokenized together where that leaves the prompt's tokens alone, else apart, as
    sampling would meet them.
    """
    prompts, tails = [], []
    eos = tokenizer.eos_token
    for messages in conversations:
        prompt = render(messages[:-1], tokenizer, add_generation_prompt=True)
        whole = render(messages, tokenizer, add_generation_prompt=False)
        if whole.startswith(prompt):
            tail = whole[len(prompt) :]
        else:  # a template that rewrites earlier turns: the response follows the prompt as sampled
            tail = (" " if uses_transcript(tokenizer) else "") + messages[-1]["content"]
        tail = tail.rstrip()
        prompts.append(prompt)
        tails.append(tail.removesuffix(eos) if eos else tail)
    if not prompts:
        return []
    joint = _token_ids([p + t for p, t in zip(prompts, tails, strict=True)], tokenizer)
    out = []
    for prompt, tail, ids in zip(_token_ids(prompts, tokenizer), tails, joint, strict=True):
        if ids[: len(prompt)] == prompt:
            completion = ids[len(prompt) :]
        else:
            completion = tokenizer(tail, add_special_tokens=False)["input_ids"]
        out.append((prompt, completion + [tokenizer.eos_token_id]))
    return out


def _token_ids(texts, tokenizer):
    """Texts -> lists of ids: special tokens as in sampling, no second bos, no eos of its own."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    special = not (bos and texts[0].startswith(bos))
    rows = tokenizer(texts, add_special_tokens=special)["input_ids"]
    if special and rows and tokenizer("")["input_ids"][-1:] == [eos]:
        rows = [ids[:-1] for ids in rows]  # a tokenizer that closes every text
    return rows


def shorten(prompt, completion, max_length, bos_id=None):
    """Prompt ids, cut from the left (bos kept) until prompt + completion fit ``max_length``.

    None when the completion leaves no room for two prompt tokens: a response is never cut, since
    its eos (and in a preference model its score) stands at the end.
    """
    excess = len(prompt) + len(completion) - (max_length or math.inf)
    if excess <= 0:
        return prompt
    kept = len(prompt) - excess
    if kept < 2:
        return None
    head = prompt[:1] if bos_id is not None and prompt[0] == bos_id else []
    return head + prompt[len(prompt) - kept + len(head) :]


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
        prompt = shorten(prompt, completion, max_length, tokenizer.bos_token_id)
        if prompt is None:
            too_long += 1
            continue
        encoded[i] = [(prompt + completion, [-100] * len(prompt) + completion)]
    if texts:
        contexts = [rows[i].get("context") or "" for i in texts]
        whole = [c + rows[i]["text"] for i, c in zip(texts, contexts, strict=True)]
        given = [len(ids) if c else 0
                 for ids, c in zip(_token_ids(contexts, tokenizer), contexts, strict=True)]
        for i, ids, n in zip(texts, _token_ids(whole, tokenizer), given, strict=True):
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


class LengthBuckets(Sampler):
    """Row indices such that each run of ``batch_size`` holds rows of like length, in random order.

    Rows are shuffled, sorted by length within pools of ``pool`` batches, cut into batches, and the
    batches shuffled again, so that the order of training does not follow length (as it does within
    each pool of transformers' LengthGroupedSampler). It depends on ``seed`` and epoch alone, hence
    is the same in every process.
    """

    def __init__(self, lengths, batch_size, seed=0, pool=50):
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.epoch = 0

    def __len__(self):
        return len(self.lengths)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        # The batch that is not full must come last: it takes the end of the shuffle.
        full = len(order) - len(order) % self.batch_size
        size = self.batch_size * self.pool
        batches = []
        for i in range(0, full, size):
            part = sorted(order[i : min(i + size, full)], key=lambda j: self.lengths[j])
            batches += [part[j : j + self.batch_size] for j in range(0, len(part), self.batch_size)]
        for b in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[b]
        yield from order[full:]


class Quiet:
    """What this package changes in trl's trainers, whatever their loss: batches of like length, a
    loss that is not finite stops the run, and nothing is reported to the hub."""

    lengths = None

    def _get_train_sampler(self, train_dataset=None):
        # The rows of a whole step: how it is divided changes nothing but memory.
        size = (self.args.train_batch_size * self.args.world_size
                * self.args.gradient_accumulation_steps)
        return LengthBuckets(self.lengths, size, self.args.seed)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}: lower the learning rate ({self.args.learning_rate}); "
                "nothing was saved"
            )
        return loss

    def _send_telemetry(self):
        pass


class _Trainer(Quiet, SFTTrainer):
    pass


def load_for_training(spec, head, runs_dir=None, lora=None):
    """(model, tokenizer) to be trained: fp32 weights, since bf16 would lose small AdamW steps,
    unless only a LoRA adapter learns."""
    with suppress_seqcls_warning():  # that a score head is new is what we want
        model, tokenizer = models.load(
            spec, head=head, dtype="auto" if lora else "float32", runs_dir=runs_dir,
            quantize=(lora or {}).get("quantize"),
        )
    return model.train(), tokenizer


def training_arguments(config, model, out_dir, *, rows, epochs, batch_size, lr, seed, report_to,
                       schedule, warmup, weight_decay, gradient_checkpointing=False,
                       gradient_accumulation=1, **more):
    """``config`` (SFTConfig or RewardConfig) set for short runs that are saved once, at the end.

    ``batch_size`` rows a step, whatever the number of processes that share them and of the parts
    (``gradient_accumulation``) in which each reads its share. ValueError where they do not divide.
    """
    on_cpu = model.device.type == "cpu"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not isinstance(gradient_accumulation, int) or gradient_accumulation < 1:
        raise ValueError(f"gradient_accumulation={gradient_accumulation!r}: give a whole number of "
                         "at least 1")
    parts = processes * gradient_accumulation
    if batch_size % parts:
        raise ValueError(f"batch_size={batch_size} does not divide into {parts} equal parts "
                         f"({processes} processes, gradient_accumulation={gradient_accumulation}): "
                         f"give a multiple of {parts}")
    steps = max(1, math.ceil(rows / batch_size)) * epochs
    return config(
        output_dir=f"{os.fspath(out_dir).rstrip('/')}.partial",
        run_name=Path(out_dir).name,
        num_train_epochs=epochs, per_device_train_batch_size=batch_size // parts,
        gradient_accumulation_steps=gradient_accumulation, learning_rate=lr,
        lr_scheduler_type=schedule, warmup_steps=math.ceil(warmup * steps),
        weight_decay=weight_decay, max_grad_norm=1.0, seed=seed, data_seed=seed,
        bf16=models.bf16_pays(model), use_cpu=on_cpu,
        activation_checkpointing=gradient_checkpointing,
        logging_steps=max(1, round(steps / 50)), logging_nan_inf_filter=False,
        save_strategy="no", report_to=list(report_to) or "none",
        # Few shapes, which a GPU's allocator and kernels like; a CPU would only compute more.
        pad_to_multiple_of=None if on_cpu else 8,
        disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=not on_cpu,
        **more,
    )


def lora_config(lora, task_type, **defaults):
    """A dict of LoraConfig's arguments -> LoraConfig; None or {} (all weights learn) -> None.
    ``quantize`` among them is the base's (``load_for_training``). ValueError for an argument
    that LoraConfig does not know."""
    if not lora:
        return None
    from peft import LoraConfig

    given = {name: value for name, value in lora.items() if name != "quantize"}
    try:
        return LoraConfig(task_type=task_type, **{**defaults, **given})
    except TypeError as error:
        raise ValueError(f"lora: {error}; its keys are those of peft.LoraConfig and 'quantize'"
                         ) from error


def merge(trainer, spec, head, lora, runs_dir=None):
    """Make the trained model a plain one, which it returns: a LoRA adapter becomes part of it.

    On a quantised base (QLoRA) the sum would be rounded to 4 bits again: there the adapter is laid
    on the dense weights of ``spec``, loaded anew.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        return model
    if (lora or {}).get("quantize"):
        model = dense(model, spec, head, runs_dir)
    trainer.model = model.merge_and_unload()
    return trainer.model


def dense(model, spec, head, runs_dir=None):
    """A PeftModel -> the same adapter on the weights of ``spec``, which are not quantised."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, suppress_seqcls_warning():
        model.save_pretrained(folder)
        base, _ = models.load(spec, head=head, runs_dir=runs_dir)
        base.config.pad_token_id = model.config.pad_token_id
        return PeftModel.from_pretrained(base, folder)


def run(trainer):
    """Train without the printed log lines of transformers; returns its TrainOutput."""
    trainer.remove_callback(PrinterCallback)
    try:
        return trainer.train()
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def save(trainer, tokenizer, out_dir, record):
    """Write model, tokenizer and ``record`` (as training.json) to ``out_dir``.

    File by file into place, config.json last, so that a folder that loads is a whole one.
    """
    folder = trainer.args.output_dir
    trainer.save_model(folder)  # every process takes part where the weights are sharded
    if not trainer.is_world_process_zero():
        return
    tokenizer.save_pretrained(folder)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    Path(folder, "training_args.bin").unlink(missing_ok=True)
    with open(Path(folder, "training.json"), "w") as f:
        # tables (of preference.evaluate) as lists of rows, numpy's numbers as plain ones
        plain = lambda x: x.to_dict("records") if hasattr(x, "to_dict") else float(x)  # noqa: E731
        json.dump(record, f, indent=1, default=plain)
    new = sorted(os.listdir(folder), key=lambda name: name == "config.json")
    for old in out_dir.glob("*.safetensors*"):
        if old.name not in new:
            old.unlink()  # shards of an earlier, larger model would be read along
    for name in new:
        os.replace(Path(folder, name), out_dir / name)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    from cai_utils import launch

    launch.main("cai_utils.sft", "finetune")
