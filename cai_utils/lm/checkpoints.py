"""Checkpoints of SFT, preference models and DPO, from which a killed training goes on.

A checkpoint (`experiment.resume`) holds the weights that learn, optimizer, schedule, the random
states of every process, and the sums of which the trainer makes the next numbers it logs. The order
of the rows is a function of seed and epoch: nothing else is needed to end, on a CPU, with the same
weights to the bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import TrainerCallback

from cai_utils.experiment import fingerprint, provenance, resume
from cai_utils.lm import models

# What transformers' and trl's trainers add up between two log lines.
_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


class ResumableTrainer:
    """A mixin for transformers' Trainer: what a checkpoint of `train` holds, and how it is read."""

    checkpoints = resumed = None
    seconds_before = 0.0  # of training, in the processes that were killed
    sampler = None        # set by the trainer: its `set_epoch` decides the order of the rows

    @property
    def _sharded(self):
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _learning(self):
        return {name: weight for name, weight in self.model.named_parameters()
                if weight.requires_grad}

    def _save_checkpoint(self, model, trial):
        self.store_flos()
        self.checkpoints.write(self.state.global_step, self._save_parts,
                               seconds=self.seconds_before + time.monotonic() - self.began)

    def _save_parts(self, folder):
        if self._sharded:
            self.save_model(str(folder), _internal_call=True)
        elif self.is_world_process_zero():
            torch.save(self._learning(), folder / "weights.pt")
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        sums = {name: getattr(self, name) for name in _SUMS}
        sums["metrics"] = {name: list(values) for name, values in self._metrics["train"].items()}
        torch.save(sums, folder / f"sums_{self.args.process_index}.pt")
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, folder, model=None):
        if self._sharded:
            return super()._load_from_checkpoint(folder, model)
        kept, learning = _load(folder, "weights.pt", "cpu"), self._learning()
        with torch.no_grad():
            for name in kept.keys() | learning.keys():
                learning[name].copy_(kept[name])

    def restore_sums(self):
        device = self.args.device
        # torch cannot restore to "cpu:0", the device of a CPU process among several.
        sums = _load(self.resumed, f"sums_{self.args.process_index}.pt",
                     "cpu" if device.type == "cpu" else device)
        self._metrics["train"].update(sums.pop("metrics"))
        for name, value in sums.items():
            setattr(self, name, value.to(device) if torch.is_tensor(value) else value)
        self._initial_global_step = 0  # the mean loss is that of the whole training


def without_weights(model):
    """A copy of `model` whose parameters are empty, to be filled by `gather`."""
    empty = {id(w): torch.nn.Parameter(torch.empty_like(w, device="meta"), w.requires_grad)
             for w in model.parameters()}
    model = copy.deepcopy(model, empty)
    for module in model.modules():  # trl's ways through a model would still lead to the original
        module.__dict__.pop("forward", None)
    return model


def gather(trainer, model):
    """Puts `model`, of `without_weights`, in the place of the trained model, of which each process
    has a part: whole, in every process (all call it), for scoring, merging and saving."""
    model.load_state_dict(dict(whole_weights(trainer.model)), assign=True)
    getattr(model, "tie_weights", lambda: None)()
    trainer.model = trainer.model_wrapped = model
    trainer.is_fsdp_enabled = False  # from here on it is as if it had never been sharded


def whole_weights(model, of=""):
    """Yields (name, tensor) of the weights of a model, or of its module `of`, each gathered from
    all processes that have a part of it, which all call this."""
    for name, weight in get_model_state_dict(model).items():
        if name.startswith(of):
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            yield name.removeprefix(of), weight


def _load(folder, name, device):
    return torch.load(Path(folder, name), map_location=device, weights_only=True)


class _Clock(TrainerCallback):
    """Asks for a checkpoint every `every` seconds, and goes on from the one that was found."""

    def __init__(self, trainer, every):
        self.trainer, self.every, self.last = trainer, every, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed is None:
            return
        self.trainer.restore_sums()
        if state.is_world_process_zero:
            print(f"{self.trainer.checkpoints.name}: resumes from step {state.global_step} of "
                  f"{state.max_steps}", flush=True)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate does not reach the sampler of an epoch that begins in the middle.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        due = time.monotonic() - self.last >= self.every
        if args.world_size > 1:  # all take part in writing it
            flag = torch.tensor(float(due), device=args.device)
            due = self.trainer.accelerator.reduce(flag, "sum").item() > 0
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.last = time.monotonic()


class _Saved(resume.Checkpoints):
    """Checkpoints whose key is computed when it is first needed: it reads the whole model."""

    def __init__(self, folder, facts, name):
        super().__init__(folder, None, name, PartialState())
        self.facts = facts

    def find(self):
        if not self.agreed(lambda: bool(self._written())):
            return None, None
        self._set_key()
        return (None, None) if self.key is None else super().find()

    def write(self, n, save, needs=(), **state):
        self._set_key()
        super().write(n, save, needs, **state)

    def _set_key(self):
        if self.key is None and self.facts is not None:
            self.key, self.facts = self.agreed(self._digests), None

    def _digests(self):
        try:
            return {name: fingerprint.digest(value) for name, value in self.facts().items()}
        except (ValueError, OSError) as error:  # a long training must not end for it
            print(f"{self.name}: no checkpoints: {error}", flush=True)
            return None


def train(trainer, every, facts):
    """`trainer.train()`, a `ResumableTrainer`'s, with a checkpoint in `<output_dir>/checkpoint-*`
    every `every` seconds (0: none), and from the last one where a killed call left it.

    facts: called when a checkpoint is written or found -> {name: value} of what determines the
    training (`call_facts`). A checkpoint of another call is not used, and goes when this one writes
    its own. `clear` removes them, once the model is saved. ValueError for `every` below 0.
    """
    if isinstance(every, bool) or not isinstance(every, int | float) or not every >= 0:
        raise ValueError(f"checkpoint_every={every!r}: give seconds between two checkpoints of a "
                         "training, 0 for none")
    name = type(trainer).__module__.rpartition(".")[2]
    trainer.checkpoints = _Saved(trainer.args.output_dir, facts, name)
    trainer.began = time.monotonic()
    if every:
        trainer.resumed, state = trainer.checkpoints.find()
        trainer.seconds_before = state["seconds"] if state else 0.0
        trainer.add_callback(_Clock(trainer, every))
    empty = without_weights(trainer.model) if trainer.is_fsdp_enabled else None
    try:
        result = trainer.train(resume_from_checkpoint=trainer.resumed and str(trainer.resumed))
    except BaseException:
        _remove_empty(trainer)
        raise
    if empty is not None:
        gather(trainer, empty)
    result.metrics["train_runtime"] += trainer.seconds_before
    return result


def clear(trainer):
    """Removes the checkpoints of a training whose model is saved."""
    trainer.checkpoints.clear()
    _remove_empty(trainer)


def _remove_empty(trainer):
    folder = Path(trainer.args.output_dir)
    if trainer.checkpoints.main and folder.is_dir() and not os.listdir(folder):
        folder.rmdir()


def call_facts(trainer_class, data, spec, runs_dir, **settings):
    """{name: value} of what determines a training: the code of `trainer_class`'s module, its `data`
    ({column: one value per row}), the model of `spec`, `settings`, and what it runs on."""
    rows = hashlib.sha256()
    for name, column in data.items():
        rows.update(name.encode())
        for value in column:
            rows.update(json.dumps(value).encode())
    return {"code": sys.modules[trainer_class.__module__], "rows": rows.hexdigest(),
            "model": models.resolve(spec, runs_dir), **settings,
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "versions": provenance.versions(), "device": models.hardware()}
