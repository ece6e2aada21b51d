"""Writing to disk: whole files or none, text that UTF-8 can hold, and one line when it fails.

A writer fills a temporary file beside the place of the result, which then takes that place. All
temporary names have one form, so that `remove_stale` finds what a killed process has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
import uuid
import zlib
from pathlib import Path

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REFUSED = {
    errno.EFBIG: "it is larger than a file may be here; raise the limit (`ulimit -f`)",
    errno.EIO: "the disk reports an error; check it",
    errno.EROFS: "the disk is read-only; make it writable",
}
# How torch and numpy say that a disk did not take all; safetensors gives the number of the error.
_IN_WORDS = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs \d+|requested and \d+ written")
_DAY = 24 * 3600
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # process numbers mean nothing elsewhere
_TEMPORARY = re.compile(r"\..*\.(\d+)-([0-9a-f]{8})[0-9a-f]{8}\.tmp(\.[^.]*)?", re.S)
_SURROGATE = re.compile("[\ud800-\udfff]")


class NotWritten(OSError):
    """A disk that did not take a file: one line that names the file, what is missing, the mend."""


# ---------------------------------------------------------------- whole files or none
@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it takes the place of `path`.

    A reader sees the old file or the new one, never a part, even when the writer is killed.
    NotWritten as in `explained`.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with explained(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def temporary_name(path) -> Path:
    """Another path beside `path` at each call, hidden, with this process's number in it:
    `.<stem>.<pid>-<host and random hex>.tmp<suffix>`."""
    path = Path(path)
    # The suffix stays last because writers (matplotlib, pandas, gzip) choose the format by it.
    return path.with_name(f".{path.stem[:100]}.{os.getpid()}-{_HOST}{uuid.uuid4().hex[:8]}.tmp"
                          f"{path.suffix}")


def remove_stale(folder) -> int:
    """Remove temporary files, at any depth, whose process is gone (of other machines: those that
    nobody has written to for a day); how many there were."""
    found = [path for where, folders, files in os.walk(folder)
             for path in (Path(where, name) for name in (*folders, *files)) if _stale(path)]
    for path in found:
        _remove(path)
    return len(found)


def _stale(path) -> bool:
    import psutil

    named = _TEMPORARY.fullmatch(path.name)
    if not named:
        return False
    try:
        written = path.stat().st_mtime
    except OSError:  # its writer has finished
        return False
    if named[2] != _HOST:
        return time.time() - written > _DAY
    try:
        process = psutil.Process(int(named[1]))
        # A number is given out again: a younger process did not write this file.
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > written + 2
    except (psutil.NoSuchProcess, OverflowError, ValueError):
        return True
    except psutil.Error:  # it is there, and not ours to look at
        return False


def _remove(path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def set_aside(path) -> Path:
    """Rename a damaged file or folder to `<name>.damaged`, or `.damaged.2` and so on where there is
    one already; the new path."""
    path, number = Path(path), 1
    while (aside := path.with_name(
            f"{path.name}.damaged" + (f".{number}" if number > 1 else ""))).exists():
        number += 1
    os.rename(path, aside)
    return aside


# ---------------------------------------------------------------- disks that refuse
@contextlib.contextmanager
def explained(path, temporary=None, size=None):
    """Inside, an error of the disk becomes NotWritten about `path`, a file or a folder.

    temporary: where the file grows until it is complete; size: its bytes, where they are known.
    """
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        told = re.search(r"\(os error (\d+)\)", str(error))
        if number is None and told:
            number = int(told[1])
        if number is None and os.strerror(errno.ENOSPC) in str(error):
            number = errno.ENOSPC
        if number in _FULL or (number is None and _IN_WORDS.search(str(error))):
            why = (f"{_FULL.get(number, 'the disk did not take all of it')} "
                   f"({_missing(Path(path), temporary, size)}); make room there")
        elif number in _REFUSED:
            why = _REFUSED[number]
        else:
            raise
        failed = NotWritten(f"{path}: not written: {why}, and run the same command again: what was "
                            "finished before is kept")
        failed.errno = number
        raise failed from error


def _missing(path, temporary, size) -> str:
    """What a full disk lacks: a number where `size` is known, else at least what there was."""
    done = temporary.stat().st_size if temporary and temporary.is_file() else 0
    place = next(p for p in (path.parent.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if size is not None:
        return f"{_bytes(max(size - done - free, 0))} are missing, {_bytes(free)} are free"
    more = f"it takes more than {_bytes(done + free)}, " if done else ""
    return f"{more}{_bytes(free)} are free"


def _bytes(n) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} bytes"


# ---------------------------------------------------------------- text
def whole(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate, half a character, which UTF-8 cannot hold; two
    halves that belong together become their character."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def lone(text: str) -> int:
    """The number of lone surrogates in a text, or in a JSON text of anything."""
    return whole(text).count("\ufffd") - text.count("\ufffd")


def repaired(value):
    """`value` with `whole` texts, at any depth of dicts, lists and tuples."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {repaired(key): repaired(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(repaired, value))
    return [repaired(v) for v in value] if isinstance(value, list) else value


def write_text(path, text: str) -> None:
    """Write `whole(text)` as UTF-8, atomically, with the line ends that it has."""
    data = whole(text).encode()
    with atomic(path) as temporary, explained(path, temporary, len(data)):
        temporary.write_bytes(data)


def save_figure(figure, folder, name: str, rc: dict | None = None) -> Path:
    """Write <name>.png (200 dpi) and .pdf of a matplotlib figure; the path of the PNG.

    No date and no program name inside: the same table gives the same bytes. `rc`: matplotlib's
    rc parameters of a user's style.
    """
    import matplotlib

    # Type 42 keeps the text of a PDF editable; some publishers refuse matplotlib's default, type 3.
    rc = {"savefig.dpi": 200, "savefig.bbox": "tight", "pdf.fonttype": 42, **(rc or {})}
    pdf = {"CreationDate": None, "Creator": None, "Producer": None}
    with matplotlib.rc_context(rc):
        for suffix, metadata in (("pdf", pdf), ("png", {"Software": None})):
            with atomic(Path(folder) / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, metadata=metadata)
    return Path(folder) / f"{name}.png"
