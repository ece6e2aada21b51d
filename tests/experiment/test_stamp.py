"""Whether a run is up to date: contents of code, parameters and files, not times."""

import dataclasses
import os

import nbformat
import pytest

from cai_utils import experiment
from cai_utils.experiment import registry, stamp

PARAMETERS = 'profile = "mini"\nseed = 0\nn = 1\n'
CODE = {
    "03_chains": "from cai_utils import critique\nx = critique.STOPS\nrun.finish()",
    "04_scores": "from cai_utils.evaluation import stats\nstats.interval\nrun.finish()",
}


def notebook(root, name, code, prose="# Title"):
    book = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell(PARAMETERS)
    cell.metadata.tags = ["parameters"]
    book.cells = [nbformat.v4.new_markdown_cell(prose), cell, nbformat.v4.new_code_cell(code)]
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(book, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two notebooks that have run: the second reads what the first made."""
    (tmp_path / "params" / "mini").mkdir(parents=True)
    for name, code in CODE.items():
        notebook(tmp_path, name, code)
    monkeypatch.setenv("CAI_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    first(tmp_path)
    second(tmp_path)
    return tmp_path


def ended(run, name=None, **overrides):
    name = name or run.notebook
    os.environ["CAI_RUN_NAME"] = name
    run.finish()
    del os.environ["CAI_RUN_NAME"]
    (run.dir / "executed" / f"{name}.ipynb").write_text("{}")
    now = stamp.ingredients(run.root, run.notebook, "mini", overrides)
    stamp.write(run.dir, name, now)


def first(lab, value=1, name=None, table=True, **overrides):
    run = experiment.start("03_chains", {"profile": "mini"})
    run.rows("chains", lambda: [{"n": value}], value=value)
    if table:
        run.table([{"n": value}], "lengths")
    model = run.model("helpful", "s")
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text("{}")
    run.trained("helpful", "s", lambda folder: {"train_loss": 0.0, "steps": 1, "seconds": 1})
    ended(run, name, **overrides)


def second(lab):
    run = experiment.start("04_scores", {"profile": "mini"})
    run.need("data/chains.jsonl", "03_chains")
    run.need(run.model("helpful", "s"), "03_chains")
    run.table([{"score": 1}], "scores")
    assert set(run.read) == {"data/chains.jsonl", "models/helpful/s"}
    run.read_table("scores")  # its own is nothing that it was handed
    assert set(run.read) == {"data/chains.jsonl", "models/helpful/s"}
    ended(run)


def changes(lab, name, **overrides):
    now = stamp.ingredients(lab, name, "mini", overrides)
    return stamp.changes(lab / "runs" / "mini", name, now)


def test_nothing_has_changed_after_a_run_and_after_an_edit_of_prose(lab):
    assert changes(lab, "03_chains") == changes(lab, "04_scores") == []
    notebook(lab, "03_chains", "# a comment\n" + CODE["03_chains"], prose="# Another title")
    assert changes(lab, "03_chains") == []
    (lab / "runs" / "mini" / "executed" / "03_chains.ipynb").unlink()
    assert changes(lab, "03_chains") == ["no record of an earlier run"]


def test_code_and_parameters_count(lab):
    notebook(lab, "03_chains", CODE["03_chains"].replace("STOPS", "revise"))
    found = changes(lab, "03_chains")
    assert "code cells" in found and "code cai_utils.critique.revise" in found
    assert changes(lab, "04_scores") == []
    assert changes(lab, "04_scores", n=2) == ["params n"]
    (lab / "params" / "mini" / "04_scores.yaml").write_text("n: 1\n")  # what the notebook says
    assert changes(lab, "04_scores") == []


def test_what_another_run_handed_on_counts_by_its_content(lab):
    first(lab)
    assert changes(lab, "04_scores") == []
    first(lab, value=2)
    assert changes(lab, "04_scores") == ["data/chains.jsonl"]
    second(lab)
    assert changes(lab, "04_scores") == []
    (lab / "runs" / "mini" / "models" / "helpful" / "s" / "config.json").write_text("{ }")
    assert changes(lab, "04_scores") == ["models/helpful/s"]


def test_results_that_are_gone_or_overwritten_are_made_again(lab):
    first(lab, name="trial", table=False)  # gives the same rows and model
    assert changes(lab, "03_chains") == []
    first(lab, name="trial")  # the same table, too, but its record is the trial's
    assert changes(lab, "03_chains") == ["no record of an earlier run"]
    first(lab)
    assert changes(lab, "03_chains") == []
    first(lab, value=2, name="trial", n=2)
    assert not (lab / "runs" / "mini" / "executed" / "03_chains.stamp.json").exists()
    assert changes(lab, "03_chains") == ["no record of an earlier run"]
    assert changes(lab, "04_scores") == ["data/chains.jsonl"]
    (lab / "runs" / "mini" / "results" / "scores.csv").unlink()
    assert "results/scores.csv" in changes(lab, "04_scores")


def test_a_method_counts_with_the_code_of_its_trainer(lab):
    notebook(lab, "09_rl", "print(method)")
    path = lab / "notebooks" / "09_rl.ipynb"
    path.write_text(path.read_text().replace("n = 1", "method = \\\"rl_cai\\\""))
    code = stamp.ingredients(lab, "09_rl", "mini")["code"]
    assert any(name.startswith("cai_utils.rl.ppo.") for name in code)


def test_a_method_counts_with_its_row_of_the_registry(lab, monkeypatch):
    notebook(lab, "09_rl", "print(method)")
    path = lab / "notebooks" / "09_rl.ipynb"
    path.write_text(path.read_text().replace("n = 1", "method = \\\"rl_cai\\\""))
    before, row = stamp.ingredients(lab, "09_rl", "mini"), registry.POLICIES["rl_cai"]
    for field, value, same in (("reward", "pm_hh", False), ("start", "helpful_sft", False),
                               ("color", "#123456", True)):
        changed = dataclasses.replace(row, **{field: value})
        monkeypatch.setitem(registry.POLICIES, "rl_cai", changed)
        assert (stamp.ingredients(lab, "09_rl", "mini") == before) is same, field
    monkeypatch.setitem(registry.POLICIES, "hh_rlhf", dataclasses.replace(row, name="hh_rlhf"))
    monkeypatch.setitem(registry.POLICIES, "rl_cai", row)
    assert stamp.ingredients(lab, "09_rl", "mini") == before  # another method's row is no matter


def test_own_files_of_one_name_are_told_apart(lab):
    for folder in ("a", "b"):
        (lab / folder).mkdir()
        (lab / folder / "mine.jsonl").write_text(folder)
    path = lab / "notebooks" / "03_chains.ipynb"
    own = "n = ['a/mine.jsonl', 'b/mine.jsonl']"
    path.write_text(path.read_text().replace("n = 1", own))
    before = stamp.ingredients(lab, "03_chains", "mini")
    assert {"a/mine.jsonl", "b/mine.jsonl"} <= set(before["files"])
    for folder in ("a", "b"):
        (lab / folder / "mine.jsonl").write_text("other")
        after = stamp.ingredients(lab, "03_chains", "mini")
        assert after["files"] != before["files"]
        before = after
