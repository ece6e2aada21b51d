"""One process at a time in each run, and none that outlives what started it.

The locks are those of the operating system: flock on files in runs/<profile>/.locks/. It frees
those of a killed process by itself, so that a restart finds nothing stale in its way.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

WAIT = 5.0  # seconds in which processes end whose parent was killed
# Environment variables: for the kernel of a run the lock files that it shares; for the next
# process the one with which it ends.
LOCKS, PARENT = "CAI_LOCKS", "CAI_PARENT"
BATCH = ".batch"  # no run has this name
_joined = {}  # open files by path: a lock lasts as long as its file is open


# ---------------------------------------------------------------- locks
@contextlib.contextmanager
def held(folder, names, what: str):
    """Inside, the locks `names` of the run folder `folder` are this process's, and of kernels that
    `join` them.

    RuntimeError, one line with the number of the other process, where another one keeps a lock for
    WAIT seconds; also where the folder cannot be written. what: for this line, as "01_x runs".
    """
    paths = sorted({_path(folder, name) for name in names})
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            except OSError as error:
                raise RuntimeError(f"{folder} cannot be written ({error.strerror}): make it a "
                                   "folder that you may write to") from None
            _take(file, f"{what} already in {folder}")
        os.environ[LOCKS] = json.dumps([str(path.absolute()) for path in paths])
        try:
            yield
        finally:
            os.environ.pop(LOCKS, None)


def _path(folder, name) -> Path:
    return Path(folder) / ".locks" / re.sub(r"[^\w. -]", "_", name)[:150]


def _take(file, what):
    end = time.monotonic() + WAIT
    while not _claimed(file):
        if time.monotonic() > end:
            raise RuntimeError(f"{what}, as {_holder(file)}: wait for it, or stop it")
        time.sleep(0.1)


def _claimed(file) -> bool:
    if not _flock(file, exclusive=True):
        return False
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    # False where another process took it in between: nobody's lock is kept over a change.
    return _flock(file, exclusive=False)


def _flock(file, exclusive) -> bool:
    """Whether this process has the lock of an open file now; exclusive: it has it alone."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _holder(file) -> str:
    """Of the processes that wrote into a lock file the first that is alive."""
    file.seek(0)
    pids = [int(line) for line in file.read().split() if line.isdigit()]
    alive = [pid for pid in pids if _alive(pid)]
    return f"process {alive[0]}" if alive else "another process"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def join() -> None:
    """In the kernel of a run, and in processes that it starts: share the locks of the run until
    this process ends, and end when its parent does. Elsewhere nothing happens.

    RuntimeError where the run has been started again in the meantime.
    """
    for path in json.loads(os.environ.get(LOCKS, "[]")):
        if path in _joined:
            continue
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        if not _flock(file, exclusive=False):
            raise RuntimeError(f"this run was started again by {_holder(file)}")
        file.write(f"{os.getpid()}\n")
        file.flush()
        _joined[path] = file
    # ipykernel looks for its parent once a second only.
    if _joined and sys.platform == "linux" and os.environ.get("JPY_PARENT_PID"):
        _end_with(int(os.environ["JPY_PARENT_PID"]))


def remove_leftovers(folder) -> None:
    """Remove what killed processes left in a run's folder: temporary files, and unfinished
    notebooks of runs that nobody runs."""
    from cai_utils.experiment.writing import remove_stale

    folder = Path(folder)
    remove_stale(folder)
    for path in (folder / "executed").glob("*.running.ipynb"):
        if _free(folder, path.name.removesuffix(".running.ipynb")):
            path.unlink(missing_ok=True)


def _free(folder, name) -> bool:
    try:
        with open(_path(folder, name), encoding="utf-8") as file:
            return _flock(file, exclusive=True)
    except OSError:  # nobody has had it
        return True


# ---------------------------------------------------------------- no orphans
def end_with_parent() -> None:
    """End this process as soon as its parent does, where the parent asked for it: it gave its
    number in the environment."""
    parent = os.environ.pop(PARENT, "")
    if parent.isdigit():
        _end_with(int(parent))


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:
        _when(lambda: _wait_for_end_of(os.getppid()))
    if os.getppid() != parent and not _alive(parent):  # before the lines above
        os._exit(1)


def _wait_for_end_of(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)


def end_with_input() -> None:
    """End this process at the end of its standard input, a pipe that the process which it works for
    holds open."""
    _when(lambda: os.read(0, 1))


def _when(wait) -> None:
    def watch():
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
