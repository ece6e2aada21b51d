"""PPO that survives a kill: its state on disk, whole or not at all, and the models that it saves.

A checkpoint is the folder `out_dir/checkpoint-<iteration>`: weights, optimizer and random states of
every process (accelerate's `save_state`) and state.json (iteration, KL coefficient, normalisation,
PM, history). With the seed, from which the order of prompts, the samples and the minibatches
follow, that is all that an iteration depends on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from cai_utils.experiment import files, fingerprint, provenance
from cai_utils.lm import models

# Where results go, how they are shown, and memory; not what is in them.
_NOT_IN_KEY = {"out_dir", "log", "print_every", "checkpoint_every", "runs_dir", "micro_tokens"}


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
        return {name: fingerprint.digest(value) for name, value in facts.items()}
    except ValueError:  # a value without a fingerprint
        return None


class Checkpoints:
    """The checkpoints of one call of `ppo.train` in `out_dir`."""

    def __init__(self, out_dir, key, accelerator):
        self.out_dir, self.accelerator = Path(out_dir), accelerator
        # Computed by one process, as all the others must do what it does.
        self.key = broadcast_object_list([key])[0]

    def stop(self, why):
        """No checkpoint from here on, which is said."""
        self.key = None
        if self.accelerator.is_main_process:
            print(f"ppo: no checkpoints: {why}", flush=True)

    def finished(self):
        """The number of iterations of a finished run of this very call, or 0."""
        record = files.read_json(self.out_dir / "training.json")
        return record.get("iterations", 0) if self.key and record.get("key") == self.key else 0

    def find(self):
        """(folder, state) of the last checkpoint, or (None, None); ValueError, which says in what
        it differs, when it belongs to another call: it may be all that is left of a long run."""
        found = [(f, state) for f, state in self._own() if state["key"] == self.key]
        other = [(f, state) for f, state in self._own() if state["key"] != self.key]
        if other and not found:
            folder, state = other[-1]
            now, then = self.key or {}, state["key"] or {}
            changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
            raise ValueError(
                f"{folder} belongs to another run: it differs in {', '.join(changed)}. Remove that "
                "folder to begin anew, choose another out_dir, or call as then to go on from it")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for stale in self.out_dir.glob(".checkpoint-*"):  # a kill while it was written
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()
        return found[-1] if found else (None, None)

    def _own(self):
        """[(folder, state)] of the folders that `save` wrote, in the order of their iterations."""
        read = [(f, files.read_json(f / "state.json"))
                for f in self.out_dir.glob("checkpoint-*")]
        return sorted((pair for pair in read if "iteration" in pair[1] and "key" in pair[1]),
                      key=lambda pair: pair[1]["iteration"])

    def begin(self):
        """Of an earlier, other run: its snapshots would mix into this one's curve."""
        if self.accelerator.is_main_process:
            (self.out_dir / "training.json").unlink(missing_ok=True)
            for stale in self.out_dir.glob("step-*"):
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()

    def load(self, folder):
        """Weights, optimizer and random states of this process from a checkpoint's folder."""
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
            files.write_json(temporary / "state.json", {"key": self.key, **state})
            os.replace(temporary, folder)
            for old, _ in self._own():
                if old != folder:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def finish(self, iterations, **settings):
        """Notes that the run is whole, with the settings that its card shall tell; its checkpoints
        are no longer needed."""
        if self.accelerator.is_main_process:
            record = {**settings, "stage": "ppo", "iterations": iterations, "key": self.key}
            files.write_json(self.out_dir / "training.json", record)
            for old, _ in self._own():
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


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
