"""Disks that refuse: one line, the old file intact, nothing left over; files of killed writers."""

import errno
import os
import re
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from cai_utils import experiment
from cai_utils.data import fetch
from cai_utils.experiment import files, writing
from cai_utils.experiment.journal import Journal, recording
from cai_utils.experiment.writing import NotWritten

BIG = torch.rand(1 << 17)  # 0.5 MB
FULL = r"the disk is full \(.* are free\); make room there"


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 256 kB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def limited(size=1 << 16):
    """Files end at `size` bytes, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def figure():
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2, 2))
    drawn.add_axes([0, 0, 1, 1]).imshow(np.random.default_rng(0).random((400, 400)))
    return drawn


def into(write):
    def with_atomic(path):
        with files.atomic(path) as temporary:
            write(temporary)

    return with_atomic


ROWS = [{"id": i, "text": os.urandom(400).hex()} for i in range(1000)]
WRITERS = {
    "a.jsonl": lambda path: files.write_rows(path, ROWS),
    "a.jsonl.gz": lambda path: files.write_rows(path, ROWS),
    "a.json": lambda path: files.write_json(path, ROWS),
    "a.md": lambda path: writing.write_text(path, "x" * 600_000),
    "a.csv": into(pd.DataFrame(ROWS).to_csv),
    "a.pt": into(lambda path: torch.save({"a": BIG}, path)),
    "a.safetensors": into(lambda path: save_file({"a": BIG}, path)),
    "a.npy": into(lambda path: np.save(path, BIG.numpy())),
    "a.png": lambda path: files.save_figure(figure(), path.parent, "a"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_in_a_line_and_costs_nothing_that_was_there(disk, name):
    path = disk / name
    path.write_text("old")
    with pytest.raises(NotWritten) as caught:
        WRITERS[name](path)
    said = str(caught.value)
    assert "\n" not in said and f"{path.stem}." in said and str(disk) in said
    # torch and numpy may say no more than that not all was taken.
    words = "the disk is full" + "|did not take all" * (name in ("a.pt", "a.npy"))
    assert re.search(words, said)
    assert "run the same command again: what was finished before is kept" in said
    known = {"a.json": "are missing, ", "a.md": "are missing, ", "a.safetensors": r"\(",
             "a.npy": r"\("}
    assert re.search(known.get(name, r"takes more than 0\.[23] MB, ") + r".* are free\)", said)
    assert path.read_text() == "old"
    assert [p.name for p in disk.iterdir()] == [name]
    path.unlink()


def test_what_is_missing_is_told_where_the_size_is_known(disk):
    with pytest.raises(NotWritten, match=r"a.md: not written: the disk is full \(0.3 MB are miss"):
        WRITERS["a.md"](disk / "a.md")  # 600 kB


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.safetensors"])
def test_a_limit_of_the_size_of_files_is_told(tmp_path, name):
    with limited(), pytest.raises(NotWritten, match=rf"{name}: not written: it is larger .*ulimit"):
        WRITERS[name](tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, says", [
    (errno.EDQUOT, "the disk quota is used up"), (errno.EIO, "the disk reports an error"),
    (errno.EROFS, "the disk is read-only"), (errno.ENOENT, None)])
def test_other_errors_of_a_disk_are_told_and_those_that_are_none_pass(tmp_path, number, says):
    with pytest.raises(OSError) as caught, files.atomic(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value, NotWritten) == bool(says)
    assert caught.value.errno == number and (says or "") in str(caught.value)
    with pytest.raises(RuntimeError, match="^CUDA"), files.atomic(tmp_path / "a"):
        raise RuntimeError("CUDA out of memory")


def test_a_journal_goes_on_after_a_full_disk(disk):
    path, ballast = disk / "x.partial", disk / "ballast"
    ballast.write_bytes(b"x" * 200_000)
    written = 0
    with pytest.raises(NotWritten, match=rf"x\.partial: not written: {FULL}"):
        with recording(path, {"k": 1}) as journal:
            for written in range(1000):
                journal.add([(f"{written}", "y" * 500)])
    assert 20 < written < 1000
    ballast.unlink()
    journal = Journal(path, {"k": 1})
    assert set(journal.found) == {f"{i}" for i in range(written)} and journal.damaged == 0
    journal.add([(f"{written}", "z")])
    journal.close()
    assert len(Journal(path, {"k": 1}).found) == written + 1
    path.unlink()


def test_a_stage_that_meets_a_full_disk_goes_on_when_there_is_room(
        disk, tmp_path, monkeypatch, capsys):
    (tmp_path / "params" / "mini").mkdir(parents=True)
    monkeypatch.setenv("CAI_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mini").symlink_to(disk)
    run = experiment.start("04_x", {"profile": "mini"})
    rows = [[{"n": 1}], ROWS]
    old = run.rows("x", lambda: rows[0], k=1)
    run.table([{"n": 1}], "t")
    with pytest.raises(NotWritten, match=rf"data/x\.jsonl: not written: {FULL}"):
        run.rows("x", lambda: rows[1], k=2)
    with pytest.raises(NotWritten, match=rf"results/t\.csv: not written: {FULL}"):
        run.table(ROWS, "t")
    capsys.readouterr()
    assert run.rows("x", lambda: rows[0], k=1) == old
    assert "1 rows, kept" in capsys.readouterr().out
    assert run.read_table("t")["n"].tolist() == [1]

    def train(folder):
        folder.mkdir(parents=True)
        save_file({"a": BIG}, folder / "model.safetensors")

    with pytest.raises(NotWritten, match=rf"models/pm/s: not written: {FULL}"):
        run.trained("pm", "s", train)
    assert not [p for p in disk.rglob("*") if ".tmp" in p.name]


def test_a_download_that_does_not_fit_is_told_as_such(tmp_path, monkeypatch):
    import pooch

    def full(self, name, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.delenv("CAI_DATA_DIR", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr(pooch.Pooch, "fetch", full)
    with pytest.raises(NotWritten, match=rf"xstest_prompts\.csv: not written: {FULL}"):
        fetch.xstest_file("xstest_prompts.csv")


# ---------------------------------------------------------------- files of killed writers
KILLED = """
import os, sys
sys.path.insert(0, {root!r})
from cai_utils.experiment.writing import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_files_of_killed_writers_are_removed_and_no_others(tmp_path):
    deep = tmp_path / "results" / "fig"
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(files.PACKAGE.parent)),
                           str(deep / "elo.csv")], timeout=60)
    assert done.returncode == -9
    (left,) = deep.iterdir()
    assert left.name.startswith(".elo.") and left.name.endswith(".tmp.csv")
    number, rest = left.name.split(".")[2].split("-")
    stale = [left, deep / f".a.{number}-{rest}.tmp", deep / f".b.{2**40}-{rest}.tmp.gz"]
    stale += [deep / f".new.{os.getpid()}-{rest}.tmp.csv", deep / f".c.1-{'0' * 16}.tmp.csv"]
    live = [writing.temporary_name(deep / "elo.csv"), deep / f".c.{number}-{'0' * 16}.tmp.csv",
            deep / "elo.csv", deep / f"elo.{number}-{rest}.tmp.csv", deep / ".env.tmp",
            deep / ".x.12-ab.tmp.csv"]
    for path in (*stale, *live):
        path.write_text("")
    os.utime(stale[3], (0, 0))  # older than this process: it had the number of another
    os.utime(stale[4], (time.time() - 90_000,) * 2)  # of another machine, a day old
    folder = deep / f".model.{number}-{rest}.tmp"
    (folder / "sub").mkdir(parents=True)
    assert files.remove_stale(tmp_path) == len(stale) + 1
    assert set(deep.iterdir()) == set(live)
    assert files.remove_stale(tmp_path) == files.remove_stale(tmp_path / "none") == 0


def test_damaged_things_never_take_the_place_of_earlier_ones(tmp_path):
    for name in ("x.damaged", "x.damaged.2", "x.damaged.3"):
        (tmp_path / "x").mkdir()
        assert writing.set_aside(tmp_path / "x") == tmp_path / name
    assert len(list(tmp_path.iterdir())) == 3
