"""Checkpoints of PPO, from which a killed run continues, and the models that it saves.

A checkpoint (`experiment.resume`) is the folder `out_dir/checkpoint-<iteration>`: weights,
optimizer and random states of every process (accelerate's `save_state`) and, in state.json, a
`Progress`. With the seed, which determines the order of prompts, the samples and the minibatches,
that is all that an iteration depends on. A finished run has `finished.json`: the history, and
checksums of the model and of the snapshots.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from cai_utils.experiment import files, fingerprint, provenance, resume
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
              "versions": provenance.versions(), "device": models.hardware()}
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


class Checkpoints(resume.Checkpoints):
    """The checkpoints of one call of `ppo.train` in `out_dir`, with the `key` of that call (None:
    no checkpoints). One of another call is refused: it may be all that is left of a long run."""

    def __init__(self, out_dir, key):
        super().__init__(out_dir, key, "ppo", PartialState(), keep_others=True)
        # Computed by one process, as all the others must do what it does.
        self.key = self.agreed(lambda: key)
        self.snapshots = {}  # name: `resume.checksums` of a snapshot

    def stop(self, why):
        """No checkpoint from here on; prints why."""
        self.key = None
        if self.main:
            print(f"ppo: no checkpoints: {why}", flush=True)

    def finished(self):
        """The history of a finished run of the same call whose model is whole, or None. What is
        damaged is named and set aside; a history.csv that was changed is written anew."""
        rows = self.agreed(self._finished)
        return None if rows is None else pd.DataFrame(rows)

    def _finished(self):
        path = self.folder / "finished.json"
        if self.key is None or not path.exists():
            return None
        record = resume.read_sealed(path)
        if record is None:
            resume.set_aside(path, f"ppo: {path} is damaged: the run begins anew")
        if record is None or record["key"] != self.key:
            return None
        if not self._mended(record["model"], f"step-{record['history'][-1]['episode']}"):
            return None
        self._check_snapshots(record["snapshots"])
        if resume.fault_of(self.folder, record["table"]):
            print(f"ppo: {self.folder / 'history.csv'} is not as it was written: written anew",
                  flush=True)
            write_history(record["history"], self.folder)
        return record["history"]

    def _mended(self, model, last):
        """Whether the final model is whole, or is again with the files of the last snapshot, which
        are the same."""
        while wrong := resume.fault_of(self.folder, model):
            name, why = wrong
            twin = resume.fault_of(self.folder / last, {name: model[name]}) is None
            self._set_aside(self.folder / name, f"{self.folder / name}: {why}: " + (
                f"taken from {last}" if twin else "the run begins anew"))
            if not twin:
                return False
            shutil.copy2(self.folder / last / name, self.folder / name)
        return True

    def _check_snapshots(self, snapshots):
        """Sets aside those that are not as they were saved; returns the others."""
        whole = {}
        for name, expected in snapshots.items():
            folder = self.folder / name
            wrong = resume.fault_of(folder, expected)
            if wrong:
                self._set_aside(folder, f"{folder / wrong[0]}: {wrong[1]}: this snapshot is lost; "
                                        f"for it, remove {self.folder} and begin anew")
            else:
                whole[name] = expected
        return whole

    def _set_aside(self, path, say):
        if path.exists():
            resume.set_aside(path, f"ppo: {say}")
        else:
            print(f"ppo: {say}", flush=True)

    def resume(self):
        """(folder, Progress) of the last whole checkpoint, or (None, None); errors as in `find`."""
        folder, state = self.find()
        if folder is None:
            return None, None
        self.snapshots = self.agreed(lambda: self._check_snapshots(state["snapshots"]))
        names = Progress.__dataclass_fields__
        return folder, Progress(**{name: v for name, v in state.items() if name in names})

    def begin(self):
        """Removes what an earlier, other run left: its snapshots would mix into this one's."""
        if self.main:
            for name in ("training.json", "finished.json"):
                (self.folder / name).unlink(missing_ok=True)
            for stale in self.folder.glob("step-*"):
                shutil.rmtree(stale)
        self.wait()

    def saved(self, folder):
        """Notes the snapshot in `folder`, as it was just saved."""
        if self.main and self.key is not None:
            self.snapshots[folder.name] = resume.checksums(folder)

    def save(self, progress, accelerator):
        needs = [progress.pm] if progress.pm and Path(progress.pm).exists() else []
        self.write(progress.iteration,
                   lambda folder: accelerator.save_state(str(folder), safe_serialization=False),
                   needs, snapshots=self.snapshots, **vars(progress))

    def finish(self, history, **settings):
        """Writes training.json, the settings that the model's card shows, and finished.json: the
        run is complete, its final model that of the last snapshot. Removes the checkpoints."""
        if self.main:
            files.write_json(self.folder / "training.json",
                             {**settings, "stage": "ppo", "iterations": len(history)})
            if self.key is not None:
                model = self.snapshots[f"step-{history[-1]['episode']}"]
                resume.write_sealed(self.folder / "finished.json", {
                    "key": self.key, "history": history, "snapshots": self.snapshots,
                    "model": resume.checksums(self.folder, [self.folder / n for n in model]),
                    "table": resume.checksums(self.folder, [self.folder / "history.csv"])})
        self.wait()
        self.clear()


def write_history(history, out_dir):
    """Writes out_dir/history.csv, a row per iteration."""
    with files.atomic(Path(out_dir, "history.csv")) as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)


def save_model(model, tokenizer, folder, samples):
    """Model, tokenizer and samples.jsonl, moved into place when they are complete."""
    with resume.whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files.write_rows(temporary / "samples.jsonl", files.finite(samples))
