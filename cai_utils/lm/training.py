"""What SFT and preference models share in training: batches, arguments, LoRA, saving."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback
from trl.trainer.reward_trainer import suppress_seqcls_warning

from cai_utils.lm import models


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
