"""PPO that survives a kill: its state on disk, whole or not at all, and the models that it saves.

A checkpoint is the folder `out_dir/checkpoint-<iteration>`: weights, optimizer and random states of
every process (accelerate's `save_state`) and state.json (iteration, KL coefficient, normalisation,
PM, history). With the seed, from which the order of prompts, the samples and the minibatches
follow, that is all that an iteration depends on.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from . import models, provenance

# Where results go and how they are shown; not what is in them.
_NOT_IN_KEY = {"out_dir", "log", "print_every", "checkpoint_every", "runs_dir"}


def key(options, prompts, function, processes):
    """{argument: fingerprint} of a call of `ppo.train`, with its code and what it runs on; None
    when it cannot be told (a PM or `refresh` that is an object without a `key` attribute)."""
    facts = {k: v for k, v in options.items() if k not in _NOT_IN_KEY}
    facts |= {"prompts": prompts, "code": function, "processes": processes,
              "versions": provenance.versions(), "device": str(torch.cuda.is_available())}
    for name in ("policy_spec", "pm_folder"):
        if isinstance(facts[name], str | Path):  # a Path stands for the content behind it
            facts[name] = models.resolve(facts[name], options["runs_dir"])
    for name in ("pm_folder", "refresh"):
        if facts[name] is not None and not isinstance(facts[name], str | Path):
            facts[name] = getattr(facts[name], "key", None) or object()
    try:
        return {name: provenance.digest(value) for name, value in facts.items()}
    except ValueError:  # a value without a fingerprint
        return None


class Checkpoints:
    """The checkpoints of one call of `ppo.train` in `out_dir`."""

    def __init__(self, out_dir, key, accelerator):
        self.out_dir, self.accelerator = Path(out_dir), accelerator
        # Computed by one process, as all the others must do what it does.
        self.key = broadcast_object_list([key])[0]

    def finished(self):
        """The number of iterations of a finished run of this very call, or 0."""
        record = _read(self.out_dir / "training.json")
        return record.get("iterations", 0) if self.key and record.get("key") == self.key else 0

    def find(self):
        """(folder, state) of the last checkpoint of this call, or (None, None); says so when the
        last one there belongs to another call, and removes all others."""
        found, other = (None, None), None
        folders = sorted(self.out_dir.glob("checkpoint-*"), key=lambda f: -int(f.name[11:]))
        for folder in folders:
            state = _read(folder / "state.json")
            if found[0] is None and self.key and state.get("key") == self.key:
                found = folder, state
            else:
                other = other or (state.get("key") or {})
        if other is not None and found[0] is None and self.accelerator.is_main_process:
            changed = sorted(k for k, v in (self.key or {}).items() if other.get(k) != v)
            print(f"ppo: the checkpoint in {self.out_dir} belongs to another run (it differs in "
                  f"{', '.join(changed) or 'what cannot be compared'}): begun anew", flush=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for folder in folders:
                if folder != found[0]:
                    shutil.rmtree(folder)
            for stale in self.out_dir.glob(".checkpoint-*"):  # a kill while it was written
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()
        return found

    def begin(self):
        """Of an earlier, other run: its snapshots would mix into this one's curve."""
        if self.accelerator.is_main_process:
            (self.out_dir / "training.json").unlink(missing_ok=True)
            for stale in self.out_dir.glob("step-*"):
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()

    def load(self, folder):
        self.accelerator.load_state(str(folder))

    def save(self, iteration, state):
        """Written beside its place, renamed into it, and only then are older ones removed."""
        if self.key is None:
            return
        folder = self.out_dir / f"checkpoint-{iteration}"
        temporary = self.out_dir / f".checkpoint-{iteration}"
        self.accelerator.save_state(str(temporary), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            provenance.write_json(temporary / "state.json", {"key": self.key, **state})
            os.replace(temporary, folder)
            for old in self.out_dir.glob("checkpoint-*"):
                if old != folder:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def finish(self, iterations):
        if self.accelerator.is_main_process:
            record = {"stage": "ppo", "iterations": iterations, "key": self.key}
            provenance.write_json(self.out_dir / "training.json", record)
            for old in self.out_dir.glob("checkpoint-*"):
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def save_model(model, tokenizer, folder, samples):
    """Model, tokenizer and samples.jsonl, each file moved into place when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".saving-*"):  # of a run that was killed here
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
        (temporary / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        # config.json last: a folder that loads is a whole one.
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary)
