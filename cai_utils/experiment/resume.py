"""Checkpoints: folders with checksums, from which an interrupted training goes on.

A checkpoint is a folder `checkpoint-<n>` whose `state.json` holds what its writer has to remember,
size and sha256 of the files beside it, and a checksum of itself. It is written under a hidden name
and renamed when it is complete, and all of it is checked before anything of it is read. One that
is not as it was written is renamed to `damaged-checkpoint-<n>`, never deleted, and the one before
it serves. The last two are kept; as the older one goes before a new one is written, they take no
more room than one checkpoint and its successor would.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from cai_utils.experiment import provenance
from cai_utils.experiment.files import read_json, write_json
from cai_utils.experiment.fingerprint import file_digest
from cai_utils.experiment.writing import explained

STATE = "state.json"


def checksums(folder, paths=None) -> dict:
    """{name: {"size": bytes, "sha256"}} of files below `folder` (None: all but hidden ones)."""
    return {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": file_digest(p)}
            for p in sorted(_files(folder) if paths is None else paths)}


def _files(folder):
    return [p for p in Path(folder).rglob("*") if p.is_file() and (
        p.name[0] != "." or p.name == ".metadata")]  # torch's, of weights in parts


def fault_of(folder, expected) -> tuple[str, str] | None:
    """(name, what is wrong) of the first file that is not as `checksums` found it, or None."""
    for name, was in expected.items():
        file = Path(folder, name)
        if not file.is_file():
            return name, "it is missing"
        if file.stat().st_size != was["size"]:
            return name, f"it has {file.stat().st_size} bytes and was written with {was['size']}"
        if file_digest(file) != was["sha256"]:
            return name, "its content is not what was written (sha256)"
    return None


def write_sealed(path, record) -> None:
    """Writes a JSON object with a checksum of itself (`provenance.seal`)."""
    write_json(path, provenance.seal(record))


def read_sealed(path) -> dict | None:
    """What `write_sealed` wrote; None where that is missing or damaged."""
    return provenance.unseal(read_json(path))


def set_aside(path, say="") -> Path:
    """Renames a file or folder to damaged-<its name>, with a number where there is one already; a
    file goes into a folder of that name, so that it is no part of the folder it was in."""
    path, k = Path(path), 1
    while (target := path.with_name(f"damaged-{path.name}" + f"-{k}" * (k > 1))).exists():
        k += 1
    if path.is_file():
        target.mkdir()
        target = target / path.name
    os.replace(path, target)
    print(f"{say}; set aside as {target}", flush=True)
    return target


@contextmanager
def whole_folder(folder):
    """Yields a temporary folder, for a model and what belongs to it; its files are moved into
    `folder` at the end, config.json last, after weights of an earlier model there are gone: a
    folder that loads is complete. On an error `folder` stays as it was."""
    folder = Path(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".saving-*"):  # of a run that was killed here
            shutil.rmtree(stale)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            yield temporary
            new = sorted(os.listdir(temporary), key=lambda name: name == "config.json")
            if "config.json" in new:
                (folder / "config.json").unlink(missing_ok=True)
                for old in folder.glob("*.safetensors*"):
                    if old.name not in new and old.is_file():
                        old.unlink()  # shards of an earlier, larger model would be read along
            for name in new:
                os.replace(temporary / name, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class Checkpoints:
    """The checkpoints in `folder` of the call with this `key` ({what: its fingerprint}, JSON; None:
    neither read nor written).

    name: begins the printed lines. here: accelerate's `PartialState`, where several processes may
    train: the main process looks, renames and removes, and all go on from what it found.
    keep_others: a checkpoint of another call is refused, not replaced.
    """

    def __init__(self, folder, key, name, here=None, keep_others=False):
        self.folder, self.key, self.name = Path(folder), key, name
        self.here, self.keep_others = here, keep_others
        self.last = None  # the newest checkpoint of this call

    @property
    def main(self):
        return self.here is None or self.here.is_main_process

    def wait(self):
        if self.here is not None:
            self.here.wait_for_everyone()

    def agreed(self, work):
        """What `work()` returns or raises in the main process, in every process."""
        found = error = None
        if self.main:
            try:
                found = work()
            except (ValueError, OSError) as raised:
                error = raised
        if self.here is not None and self.here.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            found, error = broadcast_object_list([found, error])
        if error is not None:
            raise error
        return found

    def find(self):
        """(folder, state) of the newest whole checkpoint of this call, or (None, None). ValueError,
        which names the differences, when all are of another call and these are kept."""
        self.last, state = self.agreed(self._find)
        return self.last, state

    def _find(self):
        for stale in self.folder.glob(".checkpoint-*"):  # a kill while it was written
            shutil.rmtree(stale)
        ours, other, damaged = [], [], False
        for folder in self._written():
            state = read_sealed(folder / STATE)
            if state is None:
                there = (folder / STATE).exists()
                wrong = "damaged or of an earlier version" if there else "missing"
                set_aside(folder, f"{self.name}: {folder / STATE} is {wrong}")
                damaged = True
            else:
                (ours if state["key"] == self.key else other).append((folder, state))
        while ours:
            folder, state = ours.pop()
            wrong = self.fault(folder, state)
            if not wrong:
                return folder, state
            set_aside(folder, f"{self.name}: {wrong}")
            damaged = True
        if damaged and self.key is not None:
            print(f"{self.name}: no whole checkpoint is left in {self.folder}: begins anew",
                  flush=True)
        if other and (self.keep_others or self.key is not None):
            folder, state = other[-1]
            now, then = self.key or {}, state["key"] or {}
            changed = ", ".join(
                sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k)))
            if self.keep_others:
                raise ValueError(
                    f"{folder} belongs to another run: it differs in {changed}. Remove that folder "
                    "to begin anew, choose another out_dir, or call as then to go on from it")
            print(f"{self.name}: {folder} is of another call, which differs in {changed}: begins "
                  "anew", flush=True)
        return None, None

    def fault(self, folder, state):
        """What is wrong with a checkpoint, as a text that names the file; None: nothing."""
        wrong = fault_of(folder, state["files"])
        found = {p.relative_to(folder).as_posix() for p in _files(folder)}
        for name in () if wrong else sorted(found - state["files"].keys() - {STATE}):
            wrong = name, "it was not written with the others"  # and may be read in their place
        if wrong:
            return f"{folder / wrong[0]}: {wrong[1]}"
        for path, was in state["needs"].items():
            if not Path(path).exists() or file_digest(path) != was:
                return f"{path}: it is not as it was when {folder} was written"
        return None

    def _written(self):
        """The checkpoints' folders, in the order of their numbers."""
        found = [f for f in self.folder.glob("checkpoint-*")
                 if re.fullmatch(r"checkpoint-\d+", f.name) and f.is_dir()]
        return sorted(found, key=lambda f: int(f.name.split("-")[1]))

    def write(self, n, save, needs=(), **state):
        """Checkpoint `n`, a larger number than that of the last: `save(folder)`, which every
        process calls, writes its files. state: JSON to remember; needs: paths whose content has to
        be the same when it is read."""
        if self.key is None:
            return
        folder, temporary = (self.folder / f"{dot}checkpoint-{n}" for dot in ("", "."))
        if self.main:
            for old in self._written():
                if old != self.last:
                    shutil.rmtree(old)
            temporary.mkdir(parents=True, exist_ok=True)
        self.wait()
        try:
            with explained(temporary):
                save(temporary)
                self.wait()
                if self.main:
                    record = {"key": self.key, **state, "files": checksums(temporary),
                              "needs": {str(path): file_digest(path) for path in needs}}
                    write_sealed(temporary / STATE, record)
                    os.replace(temporary, folder)
        except BaseException:
            if self.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.last = folder
        self.wait()

    def clear(self):
        """Removes the checkpoints, and the folder where nothing else is in it."""
        if self.main:
            for folder in self._written():
                shutil.rmtree(folder)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        self.wait()
