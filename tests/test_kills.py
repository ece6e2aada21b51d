"""A run that is killed again and again, and started again by `make figures` alone, ends as one that
nobody disturbed: no row is lost, doubled or different, and nothing is left lying about.

`make kills` runs the long test, on the smoke profile.
"""

import json
import random
import shutil
import time
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import kills
import nbformat
import pytest

# Everything a run of a notebook does, in a second: samples that are journaled, rows, a table.
PARAMETERS = 'profile = "tiny"\nseed = 0\nn = 20\n'
NOTEBOOK = """
import time
from cai_utils import experiment
from cai_utils.experiment import journal
run = experiment.start("{notebook}", globals())
def square():
    rows = {{}}
    left, keep = journal.pick_up("squares", range({first}, {first} + n), str, rows.__setitem__)
    for job in left:
        time.sleep(0.05)
        with open(run.dir / "drawn.txt", "a") as file:
            file.write(f"{{job}}\\n")
        keep([job], [job * job])
    return [{{"id": job, "square": rows[job]}} for job in sorted(rows)]
rows = run.rows("{name}", square, n=n)
table = [{{"size": "xs", "split": "train", "tokens": 1e6 * (1 + row["id"]),
          "loss": 3 + row["square"]}} for row in rows]
run.table(table, "{table}")
run.finish()
"""
NAMES = ("00_miniature", "03_critique_revision")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The repository's Makefile, Snakefile and package with two notebooks that need no torch."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = tmp_path / "lab"
    root.mkdir()
    for name in ("Makefile", "Snakefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(kills.REPOSITORY / name, root)
    shutil.copytree(kills.REPOSITORY / "cai_utils", root / "cai_utils",
                    ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for folder in ("notebooks", "params/tiny"):
        (root / folder).mkdir(parents=True)
    for number, notebook in enumerate(NAMES):
        (root / "params" / "tiny" / f"{notebook}.yaml").write_text("")
        source = NOTEBOOK.format(notebook=notebook, first=100 * number, name=f"rows_{number}",
                                 table=("pretraining_curves", "squares")[number])
        book = nbformat.v4.new_notebook()
        book.cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(source)]
        book.cells[0].metadata.tags = ["parameters"]
        nbformat.write(book, root / "notebooks" / f"{notebook}.ipynb")
    kills.environment(root)
    yield root
    kills.end_all(root)


def test_a_few_kills_of_two_small_notebooks(lab):
    run = lab / "runs" / "tiny"
    drawn = run / "drawn.txt"

    def progress():
        return drawn.read_text().count("\n") if drawn.exists() else 0

    blows = [("group", SIGKILL), ("kernel", SIGKILL), ("snakemake", SIGKILL), ("group", SIGHUP)]
    moments = sorted(random.Random(16).sample(range(2, 38), len(blows)))
    kills.disturbed(lab, "tiny", blows, lambda number: lambda: progress() >= moments[number])
    assert kills.gone(lab) == []
    for number in range(2):
        jobs = range(100 * number, 100 * number + 20)
        assert (run / "data" / f"rows_{number}.jsonl").read_text() == "".join(
            json.dumps({"id": job, "square": job * job}) + "\n" for job in jobs)
        table = (run / "results" / f"{('pretraining_curves', 'squares')[number]}.csv").read_text()
        assert table == "size,split,tokens,loss\n" + "".join(
            f"xs,train,{1e6 * (1 + job)},{3 + job * job}\n" for job in jobs)
    # A blow costs the one sample that was being made, not those before it.
    assert 40 <= progress() <= 40 + len(blows)
    assert sorted(kills.contents(lab, "tiny")) == sorted([
        "data/rows_0.jsonl", "data/rows_0.jsonl.key.json", "data/rows_1.jsonl",
        "data/rows_1.jsonl.key.json", "drawn.txt",
        *(f"executed/{name}.{end}" for name in NAMES
          for end in ("ipynb", "provenance.json", "stamp.json")),
        "figures/README.md", "figures/pretraining_curves.pdf", "figures/pretraining_curves.png",
        "results/pretraining_curves.csv", "results/pretraining_curves.provenance.json",
        "results/squares.csv", "results/squares.provenance.json"])


BLOWS = [*[("group", SIGKILL)] * 4, *[("tree", SIGKILL)] * 3, *[("make", SIGKILL)] * 2,
         *[("snakemake", SIGKILL)] * 2, *[("run", SIGKILL)] * 2, *[("kernel", SIGKILL)] * 2,
         *[("group", SIGHUP)] * 2, *[("group", SIGTERM)] * 2, ("group", SIGINT)]


@pytest.mark.kills
def test_twenty_kills_of_a_smoke_run(tmp_path):
    """At moments up to a quarter of an undisturbed run after each start."""
    lab = kills.clone(tmp_path)
    try:
        before, first = time.monotonic(), kills.Attempt(lab, "smoke")
        assert first.wait() == 0, first.text()[-3000:]
        seconds, want = time.monotonic() - before, kills.contents(lab, "smoke")
        # In the same place, as records name folders.
        for folder in ("runs", ".snakemake"):
            shutil.rmtree(lab / folder)
        blows = random.Random(16).sample(BLOWS, len(BLOWS))
        kills.disturbed(lab, "smoke", blows, kills.after(2, seconds / 4, seed=16))
        assert kills.gone(lab) == []
    finally:
        kills.end_all(lab)
    got = kills.contents(lab, "smoke")
    assert sorted(got) == sorted(want)
    assert [name for name in want if got[name] != want[name]] == []
