"""Kills of `make figures` at seeded moments, and what is there afterwards: for test_kills.py."""

import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
# Names the lab in the environment of all its processes, so that orphans are found, too.
MARK = "CAI_KILLS"
# Who is struck -> a part of its command line; "group" and "tree" are more than one process.
NAMES = {"make": "make figures", "snakemake": "snakemake --cores", "run": "-m cai_utils run",
         "kernel": "ipykernel_launcher"}
TIME = re.compile("^(time/.*|eps)$|seconds$|_per_second$")


def environment(root):
    """A .venv that hands over to this Python, counted as installed."""
    bin, here = root / ".venv" / "bin", Path(sys.executable).parent
    bin.mkdir(parents=True)
    for name in ("python", "snakemake"):
        (bin / name).write_text(f'#!/bin/sh\nexec "{here / name}" "$@"\n')
        (bin / name).chmod(0o755)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(root / name, (0, 0))
    (root / ".venv" / ".installed").touch()


def clone(root):
    """A copy of this repository's files as they are now, with an environment."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True,
                            text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, root / name)
    environment(root)
    return root


# ---------------------------------------------------------------- one start, one blow
class Attempt:
    """One `make figures` of the lab in `root`, in a session of its own as in a terminal."""

    def __init__(self, root, profile, jobs=2):
        self.root = root
        self.log = root / "attempt.log"
        self.orphans = alive(root)  # of the attempt before
        kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "PRETRAIN")}
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                ["make", "figures", f"PROFILE={profile}", f"JOBS={jobs}"], cwd=root, stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**kept, MARK: str(root)}, preexec_fn=_plain_signals)

    def text(self):
        return self.log.read_text(errors="replace")

    def ended(self):
        return self.process.poll() is not None

    def victims(self, who):
        """Process ids to strike; [] while there is none."""
        if who in ("group", "tree", "make"):
            return [self.process.pid] if who != "tree" else [p.pid for p in alive(self.root)]
        return [p.pid for p in alive(self.root) if NAMES[who] in _command(p)][:1]

    def strike(self, who, number, when):
        """Sends signal `number` once `when()` is true and `who` is there; False where the run
        has ended before."""
        while not self.ended():
            found = self.victims(who) if when() else []
            for pid in found:
                try:
                    (os.killpg if who == "group" else os.kill)(pid, number)
                except ProcessLookupError:
                    pass
            if found:
                return True
            time.sleep(0.05)
        return False

    def wait(self, seconds=900):
        """The exit status of make."""
        return self.process.wait(timeout=seconds)


def _plain_signals():
    # A shell without job control starts what runs in its background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def alive(root):
    """Processes that were started from a lab and are there still."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(root):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except psutil.Error:
            continue
    return found


def gone(root, seconds=30):
    """Waits for the end of a lab's processes; command lines of those that stay."""
    end = time.monotonic() + seconds
    while alive(root) and time.monotonic() < end:
        time.sleep(0.1)
    return [_command(process)[:200] for process in alive(root)]


def end_all(root):
    """Ends what a failed test has left."""
    for process in alive(root):
        process.kill()


# ---------------------------------------------------------------- many blows
def disturbed(root, profile, blows, when, jobs=2, say=print):
    """Runs the lab with a blow (who, signal) to each start, then to its end; [(who, signal,
    seconds, starts that were refused)].

    when(number) is called at the start of blow `number` and gives the condition of its moment.
    AssertionError where a start ends in an error without having been struck. One that comes while
    orphans of the attempt before are still at work may be refused; the next comes when they are
    gone. A run that ends before its blow is removed and begun again.
    """
    report = []
    for number, (who, kind) in enumerate(blows):
        refused = 0
        while True:
            before, attempt = time.monotonic(), Attempt(root, profile, jobs)
            if attempt.strike(who, kind, when(number)):
                break
            if attempt.wait() == 0:
                say(f"blow {number}: the run ended before it")
                shutil.rmtree(root / "runs" / profile)
                continue
            assert attempt.orphans, f"blow {number}: refused\n{attempt.text()[-3000:]}"
            refused += 1
            gone(root, 900)
        code = attempt.wait()
        report.append((who, kind.name, round(time.monotonic() - before, 1), refused))
        say(f"blow {number}: {report[-1]}, status {code}")
    refused = 0
    while (code := (last := Attempt(root, profile, jobs)).wait(3600)) and last.orphans:
        refused += 1
        gone(root, 900)
    assert code == 0, last.text()[-3000:]
    say(f"to the end, refused {refused} times")
    return report


def after(low, high, seed):
    """`when` for `disturbed`: seconds after the start, drawn evenly for each blow."""
    draw = random.Random(seed)

    def when(number):
        moment = time.monotonic() + draw.uniform(low, high)
        return lambda: time.monotonic() >= moment

    return when


# ---------------------------------------------------------------- what is there
def contents(root, profile):
    """{path: digest} of what a run made, its speeds and durations left out; None for a record of
    how it was made, which has the date: only its being there counts."""
    run, found = root / "runs" / profile, {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if name.startswith(("wandb/", ".locks/")):
            continue
        data = path.read_bytes()
        if name.endswith(("/training.json", "/history.csv")) or name.startswith(
                ("data/training_", "results/rl_")):
            data = timeless(path).encode()
        if name.endswith("/finished.json"):  # a history, and checksums of it
            record = json.loads(data)
            record["history"] = _timeless(record["history"])
            for folder in ("policy_spec", "pm_folder"):  # their files are here themselves
                record["key"].pop(folder)
            kept = {k: v for k, v in record.items() if k not in ("table", "check")}
            data = json.dumps(kept).encode()
        dated = name.startswith("executed/") or name.endswith(
            (".provenance.json", ".key.json", "README.md"))
        found[name] = None if dated else hashlib.sha256(data).hexdigest()
    return found


def timeless(path):
    """The text of a file of rows without its speeds and durations."""
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        text = path.read_text()
        rows = [json.loads(line) for line in ([text] if path.suffix == ".json" else
                                              text.splitlines())]
    return json.dumps(_timeless(rows))


def _timeless(rows):
    return [{k: v for k, v in row.items() if not TIME.search(k)} for row in rows]
