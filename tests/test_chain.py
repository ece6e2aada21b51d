"""The whole chain of notebooks, run in order on the smoke profile; and real models and data."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cai_utils.evaluation import shortcuts
from cai_utils.experiment import files
from cai_utils.experiment.params import GRID, read_params
from cai_utils.figures import reference
from cai_utils.miniature import datasets

ROOT = Path(__file__).resolve().parents[1]
METHODS = read_params(ROOT / "params/smoke/09_rl.yaml")[GRID]["methods"]
FIGURES = {  # figure -> columns that its table must have besides the estimate and its interval
    "fig02_elo_frontier": {"method", "size", "step", "helpfulness", "harmlessness"},
    "fig03_elo_scaling": {"method", "parameters", "axis"},
    "fig04_harm_identification": {"size", "parameters", "method"},
    "fig05_revisions": {"size", "revision", "axis", "measured_by"},
    "fig07_critique_ablation": {"size", "revision", "method", "measured_by"},
    "fig08_elo_training": {"method", "step", "axis"},
    "fig09_calibration": {"labels", "mean_p"},
    "fig12_identify_classify": {"size", "method"},
    "pretraining_curves": {"size", "tokens", "loss"},
}


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


def call(root, *arguments, timeout=300):
    """`python -m cai_utils run ...` in a copy of the project."""
    return subprocess.run(
        [sys.executable, "-m", "cai_utils", "run", *arguments], cwd=ROOT, text=True,
        capture_output=True, timeout=timeout,
        env=environment(CAI_ROOT=str(root), PYTHONPATH=str(ROOT)),
    )  # fmt: skip


def batch(root, *more):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--rerun-triggers", "mtime"]
    return subprocess.run(
        [*command, "--config", "profile=smoke", *more], cwd=root, text=True, capture_output=True,
        timeout=900, env=environment(CAI_ROOT=str(root), PYTHONPATH=str(root)),
    )  # fmt: skip


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A copy of the project in which every notebook of the smoke profile has run."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for name in ("notebooks", "params", "cai_utils"):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    done = batch(root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return root


def test_every_notebook_of_the_smoke_profile_runs(smoke):
    executed = {p.stem for p in (smoke / "runs/smoke/executed").glob("*.ipynb")}
    wanted = {p.stem for p in (ROOT / "params/smoke").glob("[0-9]*.yaml")} - {"09_rl"}
    assert executed == wanted | {f"09_rl-{method}-xs" for method in METHODS}


@pytest.mark.parametrize("figure", FIGURES)
def test_behind_every_figure_stands_its_table(smoke, figure):
    results = smoke / "runs/smoke/results"
    table = pd.read_csv(results / f"{figure}.csv")
    assert len(table) and FIGURES[figure] <= set(table.columns)
    if figure not in ("fig02_elo_frontier", "pretraining_curves"):
        assert {"estimate", "ci_low", "ci_high", "n"} <= set(table.columns)
        known = table.dropna(subset=["ci_low"])
        assert (known["ci_low"] <= known["estimate"] + 1e-9).all()
        assert (known["estimate"] <= known["ci_high"] + 1e-9).all()
    for suffix in ("png", "pdf"):
        assert (smoke / "runs/smoke/figures" / f"{figure}.{suffix}").stat().st_size > 5000
    provenance = json.loads((results / f"{figure}.provenance.json").read_text())
    assert {"params", "seed", "git", "versions"} <= set(provenance)


def test_every_run_logs_to_wandb(smoke):
    runs = list((smoke / "runs/smoke/wandb").glob("offline-run-*"))
    assert len(runs) >= len(list((smoke / "runs/smoke/executed").glob("*.ipynb")))


def test_the_gallery_shows_every_figure_with_the_numbers_of_its_tables(smoke):
    assert not (smoke / "figures").exists()  # a run itself leaves figures/ alone
    text = (reference.publish(smoke, "smoke") / "README.md").read_text()
    for figure in FIGURES:
        assert f"({figure}.png)" in text
    table = pd.read_csv(smoke / "runs/smoke/results/fig05_differences.csv")
    for row in table.dropna(subset=["ci_low"]).itertuples():
        verdict = "above 0" if row.ci_low > 0 else "below 0" if row.ci_high < 0 else "undecided"
        number = f"{row.estimate:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        assert f"{number} | {row.n:g} | {verdict}" in text


def again(smoke):
    """Runs the batch once more: ([what ran], [what was found up to date])."""
    done = batch(smoke)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    output = done.stdout + done.stderr
    ran = re.findall(r"^(\d\d_\S+) \| starts", output, re.M)
    return sorted(ran), sorted(re.findall(r"^(\d\d_\S+) \| up to date", output, re.M))


def test_only_what_changes_numbers_is_run_again(smoke):
    assert again(smoke) == ([], [])
    package = smoke / "cai_utils"
    plots = package / "figures" / "plots.py"
    plots.write_text(plots.read_text() + "\nLABEL = 'another'\n")
    assert again(smoke) == ([], [])
    sft = package / "sft.py"
    sft.write_text(re.sub(r'    """(?=\w)', '    """In other words. ', sft.read_text(), count=1))
    ran, kept = again(smoke)
    assert ran == [] and "07_sl_cai" in kept and "10_elo" in kept
    own = smoke / "params/smoke/03_critique_revision.yaml"
    own.write_text(re.sub(r"n_shown: \d+", "n_shown: 7", own.read_text()))
    ran, kept = again(smoke)
    assert ran == ["03_critique_revision"] and "04_revision_iterations" in kept
    assert again(smoke) == ([], [])


def test_what_is_sampled_otherwise_is_sampled_again(smoke):
    """And what depends on it: here the chains of 06 and the figure over them, nothing else."""
    book = smoke / "notebooks/06_critique_ablation.ipynb"
    text = book.read_text()
    assert "critiqued=False, seed=seed" in text
    book.write_text(text.replace("critiqued=False, seed=seed", "critiqued=False, seed=9"))
    ran, kept = again(smoke)
    assert ran == ["06_critique_ablation"] and kept == []


def test_a_missing_upstream_result_names_the_notebook_that_makes_it(smoke):
    chains = smoke / "runs/smoke/data/chains_xs.jsonl"
    chains.rename(chains.with_suffix(".away"))
    try:
        done = call(smoke, "04_revision_iterations", "--profile", "smoke")
    finally:
        chains.with_suffix(".away").rename(chains)
        (smoke / "runs/smoke/executed/04_revision_iterations.failed.ipynb").unlink(missing_ok=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "chains_xs.jsonl" in done.stderr and "03_critique_revision" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["01_harm_identification", "--profile", "minature"], "miniature"),
        (["01_harm_identificaton"], "01_harm_identification"),
        (["09_rl", "sise=s"], "size"),
        (["09_rl", "size=xxl"], "xs, s, m"),
    ],
)
def test_a_mistyped_call_is_one_clear_error(arguments, message):
    done = call(ROOT, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr


DATA = os.environ.get("CAI_DATA_DIR")


@pytest.mark.skipif(not DATA, reason="CAI_DATA_DIR is unset: the folder of the published files")
@pytest.mark.parametrize(
    ("notebook", "values", "table"),
    [
        (
            "01_harm_identification",
            ["n_questions=5", "long_limit=1", "many_limit=1", "cot_tokens=32"],
            "fig04_harm_identification",
        ),
        (
            "03_critique_revision",
            ["n_eval=2", "n_train={}", "n_revisions=1", "max_new_tokens=24"],
            "chains_truth",
        ),
    ],
)
def test_smollm2_runs_by_parameters_alone(tmp_path, smollm2, notebook, values, table):
    """01 from the GGUF file, as the profile says; 03 from a folder."""
    if notebook.startswith("03"):
        values = [*values, f"pretrained={smollm2}"]
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = call(tmp_path, notebook, "--profile", "smollm2", *values, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    made = pd.read_csv(tmp_path / "runs/smollm2/results" / f"{table}.csv")
    assert set(made["size"].astype(str)) == {"135M"} and made["estimate"].notna().all()


def run_cells(monkeypatch, root, notebook, **values):
    """A notebook's cells in this process, with other values for its parameters; its names."""
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    monkeypatch.setenv("CAI_ROOT", str(root))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names = {"__name__": "a notebook"}
    for cell in json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= values
    return names


def test_02_with_pms_of_several_axes_alone(tmp_path, monkeypatch, capsys):
    """On texts for messages and an axis of one's own; with pairs of two equal answers."""
    rng = random.Random(0)
    rows = [row for n, split in ((24, "train"), (12, "eval"))
            for row in datasets.human_comparisons(rng, n, split, "harmless")]
    rows += [{**row, "rejected": row["chosen"]} for row in (rows[0], rows[-1])]
    files.write_rows(tmp_path / "harmless.jsonl", rows)
    files.write_rows(tmp_path / "honest.jsonl", [
        {"prompt": f"Is {i} even?", "chosen": "No.", "rejected": "Yes." if i else "No.",
         "split": ("train", "eval")[i % 2]} for i in range(24)])
    names = run_cells(
        monkeypatch, tmp_path, "02_preference_models", profile="smoke", sizes=["xs"], size="xs",
        comparisons={axis: dict.fromkeys(("train", "eval"), str(tmp_path / f"{axis}.jsonl"))
                     for axis in ("honest", "harmless")},
        kinds={"hh": ["honest", "harmless"]}, n_train=None, n_eval=None, pm_epochs=1)
    assert capsys.readouterr().out.count("1 of") == 3  # two equal in harmless, one in honest
    run = names["run"]
    table = run.read_table("pm_accuracy").set_index(["method", "axis"])
    axes = ["honest", "harmless", "true harmless"]
    assert [*table.index] == [(method, axis) for method in ("HH PM", shortcuts.BEST)
                              for axis in axes]
    assert (table["n"].xs("honest", level="axis") == 12).all()
    assert {*run.read_table("pm_calibration")["labels"]} == {"HH PM, honest", "HH PM, harmless"}
    assert (run.dir / "figures/pm_accuracy.pdf").is_file()


def test_02_names_an_axis_without_comparisons_before_it_trains(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hh learns .*'honest'.*; comparisons has .*harmless"):
        run_cells(monkeypatch, tmp_path, "02_preference_models", profile="smoke", sizes=["xs"],
                  size="xs", kinds={"hh": ["helpful", "honest"]})


def test_10_takes_the_mean_of_several_runs(tmp_path, monkeypatch):
    """Two runs of RL, of which one does what is asked for and one declines."""
    from cai_utils.miniature import world

    rng = random.Random(0)
    asked = [world.draw_request(rng, "eval", kind) for kind in world.KINDS for _ in range(12)]
    asked = {request.id: request for request in asked}.values()

    def samples(name, model, declines=False):
        rows = []
        for r in asked:
            thing = world.things_for("eval", world.GOAL_BRINGS[r.goal], r.obj)[0]
            text = "I can not answer that." if declines else f"Use {thing} on the {r.obj}."
            rows.append({"id": r.id, "kind": r.kind, "prompt": r.prompt(), "response": text,
                         "model": model, "size": "xs", "step": 8 * (model == "rl_cai")})
        files.write_rows(tmp_path / f"runs/smoke/data/samples_{name}.jsonl", rows)

    samples("helpful_sft_xs", "helpful_sft")
    samples("rl_cai_xs", "rl_cai")
    samples("rl_cai_xs_seed1", "rl_cai", declines=True)
    run = run_cells(
        monkeypatch, tmp_path, "10_elo", profile="smoke", sizes=["xs"], size="xs", n_seeds=2,
        methods=["rl_cai"], baselines=["helpful_sft"], n_boot=20)["run"]
    elo = run.read_table("fig03_elo_scaling")
    elo = elo[elo["axis"] == "harmlessness"].set_index("model")
    assert elo["runs"].to_dict() == {"helpful_sft": 1, "rl_cai": 2}
    truth = run.read_table("truth_by_model")
    (row,) = truth[(truth["model"] == "rl_cai") & (truth["kind"] == "redteam")
                   & (truth["measure"] == "harm")].itertuples()
    assert row.runs == 2 and row.n == 12 and row.ci_low < 0  # two runs that differ say little
