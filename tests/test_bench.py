"""`make bench` on tiny sizes: every measurement runs, and its rows are kept beside others."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "bench.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.mark.parametrize("name", ["sampling_xs", "feedback_prefix_smollm2"])
def test_a_measurement_runs(tmp_path, monkeypatch, request, name):
    if name.endswith("smollm2"):
        monkeypatch.setenv("CAI_BENCH_SMOLLM2", request.getfixturevalue("smollm2"))
    results = tmp_path / "results.csv"
    head = "name,ours,peer,unit,ratio,ratio_low,ratio_high,machine,commit\n"
    results.write_text(f"{head}{name},1,1,x/s,1,1,1,another machine,abc\n")
    (tmp_path / "README.md").write_text("A\n<!-- results -->\nold\n<!-- end of results -->\nB\n")
    done = bench(name, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(results.read_text().splitlines()))
    new = {"sampling_xs": ["sampling_xs", "sampling_xs_same_length"]}.get(name, [name])
    assert [r["name"] for r in rows] == [name, *new]
    assert rows[0]["machine"] == "another machine" and rows[0]["date"] == ""
    for row in rows[1:]:
        assert float(row["ours"]) > 0 and float(row["peer"]) > 0
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        assert float(row["gflops_peak"]) > 1 and float(row["gbs_peak"]) > 0.1
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\dh", row["date"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("A\n") and text.endswith("B\n") and "old" not in text
    assert f"| {name} |" in text
    if name == "sampling_xs":
        (limit,) = csv.DictReader((tmp_path / "limits.csv").read_text().splitlines())
        assert 0 < float(limit["gflops_share"]) < 1 and 0 < float(limit["gbs_share"]) < 1


def result(ratio, date, machine="a"):
    numbers = ("ours", "peer", "ratio_low", "ratio_high", "gflops_peak", "gbs_peak")
    return {"name": "x", "unit": "u", "commit": "c", "machine": machine, "ratio": ratio,
            "date": date, **dict.fromkeys(numbers, 1.0)}  # fmt: skip


def test_results_of_several_hours_are_kept_and_the_lowest_is_told(tmp_path, tables):
    path = tmp_path / "results.csv"
    path.write_text("name,ours,peer,unit,ratio,ratio_low,ratio_high,machine,commit\n"
                    "x,1,1,u,0.5,1,1,a,old\nx,1,1,u,9.0,1,1,b,old\n")  # fmt: skip
    kept = []
    for ratio, hour in ((3.0, "01h"), (2.5, "02h"), (2.0, "02h"), (4.0, "03h")):
        tables.write(path, "results", [result(ratio, hour)])
        kept.append([(r["ratio"], r["date"]) for r in tables.read(path) if r["machine"] == "a"])
    assert kept[2] == [("0.5", ""), ("3", "01h"), ("2", "02h")]  # the same hour replaces
    assert kept[3] == [("3", "01h"), ("2", "02h"), ("4", "03h")]  # the oldest of four goes
    low = {r["machine"]: r for r in tables.lowest(tables.read(path))}
    assert low["a"]["ratio"] == "2" and low["a"]["others"] == "3 (01h), 4 (03h)"
    assert low["b"]["ratio"] == "9.0" and low["b"]["others"] == ""
    (tmp_path / "README.md").write_text("A\n<!-- results -->\nold\n<!-- end of results -->\nB\n")
    for _ in range(2):  # the second changes nothing
        tables.readme(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert text.count("| x |") == 2 and "3 (01h), 4 (03h)" in text and text.endswith("B\n")


def test_minutes_of_a_run_and_of_its_stages(tmp_path, tables):
    import durations

    def cell(kind, source, seconds=None):
        took = {"papermill": {"duration": seconds}}
        return {"cell_type": kind, "source": source, "metadata": took}

    folder = tmp_path / "executed"
    folder.mkdir()
    for name, began, seconds in (("b", "10:00:30", 60.0), ("a", "10:00:00", 90.0)):
        about = {"duration": seconds + 6, "start_time": f"2026-01-01T{began}",
                 "end_time": "2026-01-01T10:02:00"}  # fmt: skip
        cells = [cell("code", "import x", 6.0), cell("markdown", ["## Train\n", "text"]),
                 cell("code", "y", seconds - 6), cell("code", "never run")]  # fmt: skip
        (folder / f"{name}.ipynb").write_text(json.dumps(
            {"cells": cells, "metadata": {"papermill": about}}))  # fmt: skip
    rows = durations.stages(tmp_path)
    assert [(r["run"], r["stage"], r["seconds"]) for r in rows[:3]] == [
        ("a", "kernel", 6.0), ("a", durations.BEFORE, 6.0), ("a", "Train", 84.0)]  # fmt: skip
    assert [r["run"] for r in durations.runs(tmp_path)] == ["a", "b"]
    shown = tables.notebooks([{**r, "minutes": r["seconds"] / 60, "machine": "m"} for r in rows])
    assert [(r["run"], r["minutes"], r["stages"]) for r in shown] == [
        ("a", "1.6", "Train 1.4"), ("b", "1.1", "Train 0.9")]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="make figures"):
        durations.stages(tmp_path / "none")


def test_training_measurements_run(tmp_path):
    """All in one process: it takes seconds to start one."""
    names = ["ppo_xs", "sft_s"]
    names += ["pm_smollm2"] if os.environ.get("CAI_DATA_DIR") else []  # on hh-rlhf
    done = bench(*names, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    if "ppo_xs: skipped" in done.stdout:  # the peer's package index is out of reach
        assert "could not be installed" in done.stdout
        names.remove("ppo_xs")

    def rows(kind):
        return list(csv.DictReader((tmp_path / f"{kind}.csv").read_text().splitlines()))

    for kind in ("results", "memory"):
        assert [r["name"] for r in rows(kind)] == names
        assert all(float(r["ours"]) > 0 and float(r["peer"]) > 0 for r in rows(kind))
    if "ppo_xs" in names:
        assert [(r["batch"], r["new_tokens"]) for r in rows("growth")] == [("2", "4")]
    for name in set(names) - {"ppo_xs"}:
        curve = [r for r in rows("losses") if r["name"] == name]
        assert [r["step"] for r in curve] == ["1", "2"]  # 4 rows in batches of 2
        assert float(curve[0]["ours"]) > 0 and float(curve[0]["peer"]) > 0


def test_an_unknown_name_is_an_error():
    done = bench("sampling_xxl")
    assert done.returncode == 1
    assert "no benchmark sampling_xxl; there are sampling_xs" in done.stderr
