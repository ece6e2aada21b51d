"""Progress of long work, and a journal of finished samples from which a killed run resumes.

A sampler reports to `progress` and hands finished samples to the journal of `pick_up`, so every
stage that samples (responses, chains, labels) resumes without code of its own: `Run.rows` opens a
journal beside its file, and a second run of the same code on the same key finds there what is
finished and samples only the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import zlib
from contextvars import ContextVar
from pathlib import Path

from tqdm.auto import tqdm

from cai_utils.experiment.writing import explained, lone, repaired, set_aside

_LINE_EVERY = 30.0  # seconds between two lines of a batch
_active: ContextVar[Journal | None] = ContextVar("journal", default=None)


def progress(total, unit, show=None, done=0):
    """A context manager with `update(n)` that shows how many of `total` are done, rate, time
    left.

    done: finished before, so not part of the rate. show: True is a bar, False nothing; None a bar
    that appears after two seconds in a terminal or an open notebook, and in a batch a line of text
    every 30 seconds.
    """
    if show is None and not _interactive():
        return _Lines(total, unit, done)
    auto = {"delay": 2, "leave": False} if show is None else {}
    return tqdm(total=total, initial=done, unit=unit, disable=show is False, **auto)


def _interactive():
    """Whether somebody watches; a notebook that the batch runs has a name from `execute`."""
    in_notebook = "ipykernel" in sys.modules and "CAI_RUN_NAME" not in os.environ
    return in_notebook or sys.stderr.isatty()


class _Lines:
    def __init__(self, total, unit, done):
        self.total, self.unit, self.before, self.done = total, unit, done, done

    def __enter__(self):
        self.began = self.printed = time.monotonic()
        return self

    def __exit__(self, *_):
        return None

    def update(self, n):
        self.done += n
        now = time.monotonic()
        if now - self.printed >= _LINE_EVERY and self.done > self.before:
            self.printed = now
            rate = (self.done - self.before) / (now - self.began)
            left = (self.total - self.done) / rate
            print(f"{self.done} of {self.total} {self.unit}s, {rate:.3g} a second, "
                  f"{left:.0f} s left", flush=True)  # fmt: skip


class Journal:
    """Finished samples in a file of JSON lines: a header, then `[key, value, checksum]` each.

    A file with another header belongs to other work and is overwritten; one with a damaged header
    is set aside. A last line without its end (the process was killed while it wrote) is cut off; a
    line that does not match its checksum is left out, and counted in `damaged`. `marks` counts the
    lone surrogates in what was put (`pick_up`).
    """

    def __init__(self, path, header):
        self.path, self.found, self.damaged, self.marks = Path(path), {}, 0, 0
        first = _line(json.dumps([header], sort_keys=True))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        if not self._alone:
            return
        with open(self.path, "rb") as file:
            there = file.readline()
            if there.endswith(b"\n") and _parts(there) is None:
                self._refuse(there)
            good = len(first) if there == first else 0
            for line in file if good else ():
                if not line.endswith(b"\n"):
                    break
                good += len(line)
                self._take(_parts(line))
        self._file.truncate(good)
        self._size = good
        if not good:
            self._write(first)

    def _open(self):
        # Without a buffer: what a full disk has not taken would be in it for ever.
        self._file = open(self.path, "ab", buffering=0)
        self._alone = _lock(self._file)

    def _refuse(self, there):
        """Says why a file with such a first line is begun anew."""
        with contextlib.suppress(ValueError):
            if not isinstance(json.loads(there), list):
                print(f"{self.path.name}: of an earlier version, without checksums; begun anew")
                return
        self._file.close()
        print(f"{self.path.name}: its first line is damaged; set aside as "
              f"{set_aside(self.path).name}, begun anew")
        self._open()

    def _take(self, parts):
        try:
            key, value = parts
            self.found[key] = value
        except (TypeError, ValueError):
            self.damaged += 1

    def add(self, pieces):
        """Appends (key, value) pairs to the file. A value with NaN or an infinity, which JSON has
        not, is left out: a run that resumes computes it again. NotWritten where the disk is full:
        what is in the file stays good."""
        if not self._alone:
            return
        for key, value in pieces:
            with contextlib.suppress(ValueError):
                self._write(_line(json.dumps([key, value], allow_nan=False)))
                self.found[key] = value

    def _write(self, line):
        with explained(self.path):
            try:
                done = 0
                while done < len(line):
                    done += self._file.write(line[done:])
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += len(line)

    def close(self):
        self._file.close()

    def remove(self):
        """Closes the journal and deletes its file, once the result is saved elsewhere."""
        self.close()
        if self._alone:
            self.path.unlink(missing_ok=True)


def _line(text):
    """A line of the file: a list, as JSON, with a checksum as one more entry."""
    text = text.encode()
    return text[:-1] + b', "%08x"]\n' % zlib.crc32(text)


def _parts(line):
    """The list that `_line` was made from; None for a line that does not match its checksum."""
    text, check = line[:-14] + b"]", line[-14:]
    if check != b', "%08x"]\n' % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _lock(file):
    """Whether this process may write: of two that do the same work at once only the first may."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def recording(path, header):
    """Inside, samplers write what they finish to the `Journal` at `path` and reuse what it
    holds. The file stays when the work fails or is killed; `remove` it when it is done.

    header: what the work depends on, JSON; a file with another header is overwritten.
    """
    journal = Journal(path, header)
    token = _active.set(journal)
    try:
        yield journal
    finally:
        _active.reset(token)
        journal.close() if journal.found else journal.remove()


def pick_up(source, jobs, describe, put):
    """The jobs that the active journal does not hold yet, and how to store them: (jobs, keep).

    Texts come to `put` with U+FFFD for each lone surrogate (`writing.whole`), which no tokenizer
    and no file takes.

    source: JSON that identifies a model which does not change, or None: then nothing is stored.
    describe: job -> JSON of all that decides its result. `put(job, value)` is called at once for
    jobs in the journal; `keep(jobs, values)` stores values (JSON) and calls `put` for them.
    """
    journal = _active.get() if source is not None else None

    def key(job):
        plain = json.dumps([source, describe(job)], sort_keys=True)
        return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()

    keys = {job: key(job) for job in jobs} if journal else {}

    def told(job, value):
        clean = repaired(value)
        if journal and clean != value:
            journal.marks += lone(json.dumps(value, ensure_ascii=False))
        put(job, clean)

    def keep(done, values):
        if journal:
            journal.add([(keys[job], value) for job, value in zip(done, values, strict=True)])
        for job, value in zip(done, values, strict=True):
            told(job, value)

    left, unfit = [], 0
    for job in jobs:
        if journal and keys[job] in journal.found:
            try:
                told(job, journal.found[keys[job]])
                continue
            except (TypeError, ValueError, LookupError, AttributeError):
                unfit += 1
        left.append(job)
    if unfit:
        print(f"{journal.path.name}: {unfit} samples do not have their form; made again")
    return left, keep
