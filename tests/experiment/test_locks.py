"""Locks of runs, what killed processes leave behind, and processes that end with others."""

import json
import os
import subprocess
import sys
import time

import pytest

from cai_utils.experiment import locks, writing

HOLD = """
import sys, time
from cai_utils.experiment import locks
with locks.held(sys.argv[1], ["a", "b"], "a runs"):
    print("held", flush=True)
    time.sleep(60)
"""


def other(code, *arguments, **more):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, **more)


def test_a_lock_names_its_holder_and_is_free_when_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.2)
    holder = other(HOLD, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError) as caught, locks.held(tmp_path, ["b", "c"], "b runs"):
        pass
    assert str(caught.value) == (f"b runs already in {tmp_path}, as process {holder.pid}: wait for "
                                 "it, or stop it")
    with locks.held(tmp_path, ["c", "../d"], "c runs"):  # whatever it is called, in this folder
        assert not (tmp_path / "d").exists()
    holder.kill()
    with locks.held(tmp_path, ["b"], "b runs"):
        assert holder.wait() == -9


def test_a_kernel_shares_the_lock_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.2)
    code = ("from cai_utils.experiment import locks; locks.join()\n"
            "print('joined', flush=True); input()")
    with locks.held(tmp_path, ["a"], "a runs"):
        kernel = other(code, stdin=subprocess.PIPE)
        assert kernel.stdout.readline() == "joined\n"
        shared = os.environ[locks.LOCKS]
    assert locks.LOCKS not in os.environ and len(json.loads(shared)) == 1
    (tmp_path / ".locks" / "a").write_text(f"{2**22 + 1}\n{kernel.pid}\n")  # the first is gone
    with pytest.raises(RuntimeError, match=f"process {kernel.pid}"):
        with locks.held(tmp_path, ["a"], "a runs"):
            pass
    kernel.communicate("\n")
    # One that comes too late, when the run has been started again.
    again = other("import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX)\n"
                  "print(f.fileno(), flush=True); input()", tmp_path / ".locks" / "a",
                  stdin=subprocess.PIPE)
    again.stdout.readline()
    monkeypatch.setenv(locks.LOCKS, shared)
    with pytest.raises(RuntimeError, match="this run was started again by"):
        locks.join()
    again.communicate("\n")


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    executed = tmp_path / "executed"
    executed.mkdir()
    dead = executed.parent / writing.temporary_name("elo.csv").name.replace(
        f".{os.getpid()}-", f".{2**22 + 1}-")
    mine = writing.temporary_name(tmp_path / "fig02.pdf")
    kept = [mine, executed / "a.running.ipynb", executed / "b.ipynb", tmp_path / "elo.csv"]
    for path in (dead, executed / "b.running.ipynb", *kept):
        path.touch()
    with locks.held(tmp_path, ["a"], "a runs"):
        locks.remove_leftovers(tmp_path)
    left = {path for path in tmp_path.rglob("*") if path.is_file() and ".locks" not in path.parts}
    assert left == set(kept)


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_a_process_ends_with_the_one_that_started_it(platform):
    child = ("import sys, time; from cai_utils.experiment import locks\n"
             f"sys.platform = {platform!r}; locks.end_with_parent()\n"
             "print('ready', flush=True); time.sleep(60)")
    parent = ("import os, subprocess, sys, time\n"
              "os.environ['CAI_PARENT'] = str(os.getpid())\n"
              f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
              "time.sleep(60)")
    started = other(parent)
    assert started.stdout.readline() == "ready\n"
    started.kill()
    before = time.monotonic()
    assert started.stdout.read() == ""  # which ends when the child has
    assert time.monotonic() - before < 30
    # Of a parent that ended before the child could look.
    late = other(child, env={**os.environ, "CAI_PARENT": str(2**22 + 1)})
    assert late.communicate(timeout=20)[0] == "" and late.returncode == 1


def test_a_worker_ends_with_its_input():
    code = ("import time; from cai_utils.experiment import locks; locks.end_with_input()\n"
            "print('ready', flush=True); time.sleep(60)")
    worker = other(code, stdin=subprocess.PIPE)
    assert worker.stdout.readline() == "ready\n"
    time.sleep(0.1)
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait(10) == -9
