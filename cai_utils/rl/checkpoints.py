"""Checkpoints of PPO, from which a killed run continues, and the models that it saves.

A checkpoint is the folder `out_dir/checkpoint-<iteration>`: weights, optimizer and random states of
every process (accelerate's `save_state`) and state.json (a `Progress`). With the seed, which
determines the order of prompts, the samples and the minibatches, that is all that an iteration
depends on. It is written atomically: a folder of that name is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from cai_utils.experiment import files, fingerprint, provenance
from cai_utils.lm import models

# Fields of the config that do not change what is trained.
_NOT_IN_KEY = {"print_every", "checkpoint_every", "micro_tokens"}


@dataclass
class Progress:
    """What the next iteration depends on, beside weights, optimizer and seed."""

    kl_coef: float
    iteration: int = 0            # iterations done
    norm: tuple | None = None     # (mean, std) that normalise scores; None: the next iteration's
    value: tuple = (0.0, 1.0)     # mean and std of `networks.ResponseValues`
    pm: str | None = None         # folder of the PM that the last refresh made
    history: list = field(default_factory=list)  # rows of history.csv


def key(config, prompts, function, processes, *, policy_spec, pm_folder, refresh, runs_dir):
    """{name: fingerprint} of a call of `ppo.train`: the config's fields, the other arguments, its
    code, and what it runs on. None when there is none (a PM or `refresh` that is an object without
    a `key` attribute)."""
    facts = {k: v for k, v in vars(config).items() if k not in _NOT_IN_KEY}
    facts |= {"prompts": prompts, "code": function, "processes": processes,
              "policy_spec": policy_spec, "pm_folder": pm_folder, "refresh": refresh,
              "versions": provenance.versions(), "device": str(torch.cuda.is_available())}
    for name in ("policy_spec", "pm_folder"):
        if isinstance(facts[name], str | Path):  # a Path stands for the content behind it
            facts[name] = models.resolve(facts[name], runs_dir)
    for name in ("pm_folder", "refresh"):
        if facts[name] is not None and not isinstance(facts[name], str | Path):
            facts[name] = getattr(facts[name], "key", None) or object()
    try:
        return {name: fingerprint.digest(value) for name, value in facts.items()}
    except ValueError:  # a value without a fingerprint
        return None


class Checkpoints:
    """The checkpoints of one call of `ppo.train` in `out_dir`, with the `key` of that call (None:
    no checkpoints)."""

    def __init__(self, out_dir, key):
        self.out_dir, self.here = Path(out_dir), PartialState()
        # Computed by one process, as all the others must do what it does.
        self.key = broadcast_object_list([key])[0]

    def stop(self, why):
        """No checkpoint from here on; prints why."""
        self.key = None
        if self.here.is_main_process:
            print(f"ppo: no checkpoints: {why}", flush=True)

    def finished(self):
        """The number of iterations of a finished run of the same call, or 0."""
        record = files.read_json(self.out_dir / "training.json")
        return record.get("iterations", 0) if self.key and record.get("key") == self.key else 0

    def find(self):
        """(folder, Progress) of the last checkpoint, or (None, None). ValueError, which names the
        differences, when it belongs to another call: it may be all that is left of a long run."""
        found = [(f, state) for f, state in self._written() if state["key"] == self.key]
        other = [(f, state) for f, state in self._written() if state["key"] != self.key]
        if other and not found:
            folder, state = other[-1]
            now, then = self.key or {}, state["key"] or {}
            changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
            raise ValueError(
                f"{folder} belongs to another run: it differs in {', '.join(changed)}. Remove that "
                "folder to begin anew, choose another out_dir, or call as then to go on from it")
        self.here.wait_for_everyone()
        if self.here.is_main_process:
            for stale in self.out_dir.glob(".checkpoint-*"):  # a kill while it was written
                shutil.rmtree(stale)
        self.here.wait_for_everyone()
        if not found:
            return None, None
        folder, state = found[-1]
        return folder, Progress(**{name: v for name, v in state.items() if name != "key"})

    def _written(self):
        """[(folder, state)] of the folders that `save` wrote, in the order of their iterations."""
        read = [(f, files.read_json(f / "state.json"))
                for f in self.out_dir.glob("checkpoint-*")]
        return sorted((pair for pair in read if "iteration" in pair[1] and "key" in pair[1]),
                      key=lambda pair: pair[1]["iteration"])

    def begin(self):
        """Removes what an earlier, other run left: its snapshots would mix into this one's."""
        if self.here.is_main_process:
            (self.out_dir / "training.json").unlink(missing_ok=True)
            for stale in self.out_dir.glob("step-*"):
                shutil.rmtree(stale)
        self.here.wait_for_everyone()

    def save(self, progress, accelerator):
        """Written beside its place, renamed into it, and only then are older ones removed."""
        if self.key is None:
            return
        folder = self.out_dir / f"checkpoint-{progress.iteration}"
        temporary = self.out_dir / f".checkpoint-{progress.iteration}"
        accelerator.save_state(str(temporary), safe_serialization=False)
        self.here.wait_for_everyone()
        if self.here.is_main_process:
            files.write_json(temporary / "state.json", {"key": self.key, **vars(progress)})
            os.replace(temporary, folder)
            for old, _ in self._written():
                if old != folder:
                    shutil.rmtree(old)
        self.here.wait_for_everyone()

    def finish(self, iterations, **settings):
        """Writes training.json: the run is complete, with the settings that its card shows. Removes
        the checkpoints."""
        if self.here.is_main_process:
            record = {**settings, "stage": "ppo", "iterations": iterations, "key": self.key}
            files.write_json(self.out_dir / "training.json", record)
            for old, _ in self._written():
                shutil.rmtree(old)
        self.here.wait_for_everyone()


def save_model(model, tokenizer, folder, samples):
    """Model, tokenizer and samples.jsonl, each file moved into place when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".saving-*"):  # of a run that was killed here
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files.write_rows(temporary / "samples.jsonl", files.finite(samples))
        # config.json last: a folder that loads is complete.
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary)
