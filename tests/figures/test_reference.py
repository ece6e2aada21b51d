"""Figures drawn again from their tables, a run that becomes the reference, and the gallery."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from matplotlib.testing.compare import compare_images

from cai_utils.figures import gallery, redraw, reference

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "figures" / "miniature"
NOTEBOOK = """profile = "mini"
seed = 0
sizes = ["xs", "s", "m"]
n_boot = 500
"""


def git(root, *arguments):
    done = subprocess.run(["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t",
                           *arguments], capture_output=True, text=True, check=True)
    return done.stdout


# ---------------------------------------------------------------- the committed tables
@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """(folder, seconds): the figures of the committed reference, drawn from its tables."""
    folder, before = tmp_path_factory.mktemp("again"), time.process_time()
    redraw.redraw(KEPT / "tables", folder)
    return folder, time.process_time() - before


def test_the_committed_tables_draw_every_committed_figure_in_under_a_minute(again):
    folder, seconds = again
    assert {p.name for p in folder.iterdir()} == {
        p.name for p in KEPT.iterdir() if p.suffix in (".png", ".pdf")}
    assert seconds < 60
    for path in folder.glob("*.png"):
        # Root mean square of 0 to 255; another build of the font library moves letters by a pixel.
        assert compare_images(KEPT / path.name, path, tol=8) is None


def test_the_committed_tables_have_their_provenance():
    records = json.loads((KEPT / "tables" / "provenance.json").read_text())
    assert set(records) == {p.stem for p in (KEPT / "tables").glob("*.csv")}
    for name, record in records.items():
        text = (KEPT / "tables" / f"{name}.csv").read_bytes()
        assert record["sha256"] == hashlib.sha256(text).hexdigest()
        assert record["profile"] == "miniature" and record["seed"] == 0
        assert len(record["git"]["commit"]) == 40 and "torch" in record["versions"]


@pytest.mark.parametrize("profile", ["miniature", "smollm2"])
def test_the_links_of_the_committed_gallery_lead_somewhere(profile):
    page = ROOT / "figures" / profile / "README.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert len(links) > 10
    assert not [link for link in links if not (page.parent / link).exists()]


def test_notebooks_drawings_and_claims_name_the_same_figures():
    code = "".join(cell.source for path in (ROOT / "notebooks").glob("*.ipynb")
                   for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    drawn = set(re.findall(r'\bdraw\(f?"([^"]+)"', code))
    saved = set(re.findall(r'run\.figure\(figure, f?"([^"]+)"', code))
    assert drawn == saved == {*redraw.DRAWINGS, "rl_{name}", "rl_truth_{name}"}
    assert set(gallery.CLAIMS["figures"]) == set(redraw.DRAWINGS)
    for name in ("rl_rl_cai_cot_m", "rl_truth_hh_rlhf_135M"):
        assert redraw.tables_of(name) == (name,)
    for name in ("rl_change_rl_cai_m", "rl_scores_rl_cai_m", "rl_nothing_m"):
        with pytest.raises(ValueError, match="unknown figure"):
            redraw.drawing(name)


def test_a_figure_is_drawn_again_where_its_table_or_the_code_is_newer(tmp_path, monkeypatch):
    table = shutil.copy(KEPT / "tables" / "pretraining_curves.csv", tmp_path)
    (figure,) = redraw.redraw(tmp_path, tmp_path, ["pretraining_curves"])
    state = "pretraining_curves", tmp_path, tmp_path
    later = figure.stat().st_mtime_ns + 10**9
    code, record = tmp_path / "plots.py", tmp_path / "pretraining_curves.provenance.json"
    for source in (code, record):
        source.touch()
        os.utime(source, ns=(0, 0))
    monkeypatch.setattr(redraw.plots, "__file__", str(code))
    assert not redraw.outdated(*state)
    for source in (table, code, record):
        os.utime(source, ns=(later, later))
        assert redraw.outdated(*state)
        os.utime(source, ns=(0, 0))
        assert not redraw.outdated(*state)
    figure.with_suffix(".pdf").unlink()
    assert redraw.outdated(*state)


def test_further_runs_of_rl_are_drawn_and_are_no_reference(tmp_path):
    for run in ("135M", "135M_seed1"):
        for kind in ("rl", "rl_scores"):
            shutil.copy(ROOT / f"figures/smollm2/tables/{kind}_rl_cai_135M.csv",
                        tmp_path / f"{kind}_rl_cai_{run}.csv")
    assert gallery.shown_tables(tmp_path) == ["rl_rl_cai_135M", "rl_scores_rl_cai_135M"]
    assert redraw.drawable(tmp_path) == ["rl_rl_cai_135M", "rl_rl_cai_135M_seed1"]
    page = gallery.write("A run", tmp_path, tmp_path).read_text()
    assert "(rl_rl_cai_135M_seed1.png)" in page and "rl_scores_rl_cai_135M_seed1" not in page


def test_calibration_is_that_of_the_size_of_the_run(tmp_path):
    for name in ("pm_accuracy", "pm_calibration"):
        shutil.copy(KEPT / "tables" / f"{name}.csv", tmp_path)
    record = {"params": {"size": "xs"}}
    (tmp_path / "pm_calibration.provenance.json").write_text(json.dumps(record))
    table = pd.read_csv(tmp_path / "pm_calibration.csv").query("size == 'xs'")
    drawn = redraw.draw("pm_accuracy", tmp_path).axes[-1].lines
    assert set(table["estimate"]) <= {y for line in drawn for y in line.get_ydata()}


def test_a_figure_is_drawn_of_the_rows_that_it_is_about(tmp_path):
    table = pd.read_csv(KEPT / "tables" / "chains_truth.csv")
    table.to_csv(tmp_path / "chains_truth.csv", index=False)
    assert redraw.drawable(tmp_path) == ["chains_truth"]
    table[table["measured_by"] != "truth"].to_csv(tmp_path / "chains_truth.csv", index=False)
    assert redraw.drawable(tmp_path) == []


# ---------------------------------------------------------------- a lab with a finished run
@pytest.fixture
def lab(tmp_path):
    """A clone with one notebook on a profile `mini`, run to its end; nothing is published yet."""
    (tmp_path / "params" / "mini").mkdir(parents=True)
    (tmp_path / "params" / "mini" / "_common.yaml").write_text("sizes: [xs, s, m]\nseed: 0\n")
    (tmp_path / "params" / "mini" / "04_revision_iterations.yaml").write_text("")
    parameters = nbformat.v4.new_code_cell(NOTEBOOK, metadata={"tags": ["parameters"]})
    drawing = nbformat.v4.new_code_cell('figure = draw("fig05_revisions", run.dir / "results")')
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, drawing]),
                   tmp_path / "notebooks" / "04_revision_iterations.ipynb")
    (tmp_path / ".gitignore").write_text("/runs/\n")
    run = tmp_path / "runs" / "mini"
    for name in ("executed", "results", "figures"):
        (run / name).mkdir(parents=True)
    (run / "executed" / "04_revision_iterations.ipynb").write_text("{}")
    (run / "figures" / "04_chains.md").write_text("# Chains\n")
    for name in ("fig05_revisions", "fig05_differences"):
        shutil.copy(KEPT / "tables" / f"{name}.csv", run / "results")
    made_with(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "lab")
    return tmp_path


def made_with(lab, **values):
    """Let the records of the run say that it was made with the profile's parameters but these."""
    params = {"profile": "mini", "seed": 0, "sizes": ["xs", "s", "m"], "n_boot": 500, **values}
    record = {"notebook": "04_revision_iterations", "profile": "mini", "seed": params["seed"],
              "params": params, "git": {"commit": "a" * 40, "dirty": False}}
    run = lab / "runs" / "mini"
    (run / "executed" / "04_revision_iterations.provenance.json").write_text(json.dumps(record))
    for table in (run / "results").glob("*.csv"):
        record["sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
        table.with_suffix(".provenance.json").write_text(json.dumps(record))


def test_a_published_run_is_the_reference_and_a_redrawing_changes_nothing(lab):
    reference.redraw(lab, "mini", source="runs")
    assert not git(lab, "status", "--porcelain")  # a run changes nothing that git sees
    page = (lab / "runs/mini/figures/README.md").read_text()
    assert "(../results/fig05_revisions.csv)" in page
    folder = reference.publish(lab, "mini")
    made = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert made == {"README.md", "04_chains.md", "fig05_revisions.png", "fig05_revisions.pdf",
                    "tables/fig05_revisions.csv", "tables/fig05_differences.csv",
                    "tables/provenance.json"}
    for suffix in ("png", "pdf"):
        name = f"fig05_revisions.{suffix}"
        assert (folder / name).read_bytes() == (lab / "runs/mini/figures" / name).read_bytes()
    git(lab, "add", ".")
    git(lab, "commit", "-qm", "reference")
    reference.redraw(lab, "mini")
    reference.redraw(lab, "mini", figure="fig05_revisions")
    reference.publish(lab, "mini")
    assert not git(lab, "status", "--porcelain")


def test_the_gallery_quotes_the_claim_and_links_the_tables(lab):
    text = (reference.publish(lab, "mini") / "README.md").read_text()
    assert "*The paper:* Harmlessness rises with every revision" in text
    assert "drawn from [fig05_revisions.csv](tables/fig05_revisions.csv)" in text
    assert "[fig05_differences.csv](tables/fig05_differences.csv)" in text
    assert f"Made at commit `{'a' * 10}`." in text
    for row in pd.read_csv(lab / "runs/mini/results/fig05_differences.csv").itertuples():
        verdict = "above 0" if row.ci_low > 0 else "below 0" if row.ci_high < 0 else "undecided"
        number = f"{row.estimate:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        assert f"{number} | {row.n:g} | {verdict}" in text


@pytest.mark.parametrize("values, says", [
    ({"sizes": ["xs"]}, r"of a trial, with its own sizes=\['xs'\]"),
    ({"seed": 1}, "of a trial, with its own seed=1"),
    ({"n_boot": 20}, "of a trial, with its own n_boot=20"),
    ({"sizes": ["xs"], "seed": 2}, r"its own seed=2, sizes=\['xs'\]"),
])
def test_a_trial_is_not_published(lab, values, says):
    made_with(lab, **values)
    with pytest.raises(ValueError, match=says):
        reference.publish(lab, "mini")
    assert not (lab / "figures").exists()


def test_a_table_of_a_trial_among_those_of_a_run_is_not_published(lab):
    path = lab / "runs/mini/results/fig05_differences.provenance.json"
    record = json.loads(path.read_text())
    record["params"]["sizes"] = ["xs"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"fig05_differences\.csv is of a trial"):
        reference.publish(lab, "mini")


def test_an_unfinished_run_is_not_published(lab):
    run = lab / "runs" / "mini"
    (run / "results" / "fig05_revisions.csv").rename(run / "away.csv")
    with pytest.raises(ValueError, match=r"fig05_revisions\.csv is missing; run 04_revision"):
        reference.publish(lab, "mini")
    (run / "away.csv").rename(run / "results" / "fig05_revisions.csv")
    (run / "executed" / "04_revision_iterations.ipynb").unlink()
    with pytest.raises(ValueError, match="04_revision_iterations has not run; make figures PROF"):
        reference.publish(lab, "mini")


def test_a_changed_table_and_a_lost_figure_are_not_published(lab):
    (lab / "figures" / "mini").mkdir(parents=True)
    (lab / "figures" / "mini" / "fig09_calibration.png").write_bytes(b"")
    with pytest.raises(ValueError, match="lacks a figure of the reference, fig09_calibration"):
        reference.publish(lab, "mini")
    (lab / "figures" / "mini" / "fig09_calibration.png").unlink()
    table = lab / "runs/mini/results/fig05_revisions.csv"
    table.write_text(table.read_text().replace("0.", "1.", 1))
    with pytest.raises(ValueError, match="is not what 04_revision_iterations wrote"):
        reference.publish(lab, "mini")


def test_every_point_of_a_grid_has_to_be_there_and_is_no_trial(lab):
    file = lab / "params" / "mini" / "04_revision_iterations.yaml"
    file.write_text("grid: {seeds: [0, 1]}\n")
    executed = lab / "runs" / "mini" / "executed"
    record = json.loads((executed / "04_revision_iterations.provenance.json").read_text())
    for seed in (0, 1):
        record["params"]["seed"] = seed
        text = json.dumps(record)
        (executed / f"04_revision_iterations-{seed}.provenance.json").write_text(text)
    (executed / "04_revision_iterations-0.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="04_revision_iterations-1 has not run"):
        reference.publish(lab, "mini")
    (executed / "04_revision_iterations-1.ipynb").write_text("{}")
    reference.publish(lab, "mini")


# ---------------------------------------------------------------- one figure, another style
def test_an_own_style_goes_on_top_and_to_a_folder_of_its_own(lab):
    folder = reference.publish(lab, "mini")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    own = lab / "wide.mplstyle"
    own.write_text("lines.linewidth: 3\nfont.size: 12\n")
    made = reference.redraw(lab, "mini", "fig05_revisions", own)
    assert made == lab / "runs/mini/restyled/wide"
    assert (made / "fig05_revisions.png").read_bytes() != before["fig05_revisions.png"]
    own.write_text("")  # another style at the same place
    reference.redraw(lab, "mini", "fig05_revisions", own, if_changed=True)
    assert (made / "fig05_revisions.png").read_bytes() == before["fig05_revisions.png"]
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    reference.redraw(lab, "mini")  # the style is gone again
    assert (folder / "fig05_revisions.png").read_bytes() == before["fig05_revisions.png"]
    assert reference.redraw(lab, "mini", own_style="ggplot", out=lab / "mine") == lab / "mine"
    assert {p.name for p in (lab / "mine").iterdir()} == {
        "fig05_revisions.png", "fig05_revisions.pdf"}


def test_what_cannot_be_drawn_is_one_clear_error(lab):
    with pytest.raises(ValueError, match="unknown profile 'minni'"):
        reference.redraw(lab, "minni")
    with pytest.raises(FileNotFoundError, match="tables holds no table of a figure: `make figures"):
        reference.redraw(lab, "mini")
    reference.publish(lab, "mini")
    with pytest.raises(ValueError, match="unknown figure 'fig05_revision'; nearest: fig05_rev"):
        reference.redraw(lab, "mini", "fig05_revision")
    with pytest.raises(FileNotFoundError, match=r"no fig09_calibration\.csv: .* FROM=runs"):
        reference.redraw(lab, "mini", "fig09_calibration")
    with pytest.raises(ValueError, match="nope.mplstyle is no file, and no style of matplotlib"):
        reference.redraw(lab, "mini", own_style="nope.mplstyle")


@pytest.mark.parametrize("size", ["s", "135M", "1.4b", "12b", "0.5B-base"])
def test_every_size_has_its_figures(size):
    assert redraw.tables_of(f"rl_rl_cai_{size}") == (f"rl_rl_cai_{size}",)
    assert redraw.tables_of(f"rl_truth_dpo_cai_{size}") == (f"rl_truth_dpo_cai_{size}",)


@pytest.mark.parametrize("line", ["font.size: abc", "no.such.key: 1"])
def test_a_style_that_matplotlib_cannot_read_is_refused(tmp_path, line):
    own = tmp_path / "my.mplstyle"
    own.write_text(line + "\n")
    with pytest.raises(ValueError, match="my.mplstyle: .*(font.size|no.such.key)"):
        redraw.redraw(KEPT / "tables", tmp_path, ["fig05_revisions"], own)


def test_a_history_without_what_is_drawn_is_passed_over(tmp_path):
    columns = "method,size,episode,loss\n"
    (tmp_path / "rl_dpo_cai_s.csv").write_text(columns + "DPO-CAI,s,32,0.69\n")
    assert redraw.drawable(tmp_path) == []
