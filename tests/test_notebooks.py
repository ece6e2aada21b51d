"""The form of the notebooks, without running them: what papermill, git and a reader rely on."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from cai_utils.experiment import dependencies
from cai_utils.experiment.fingerprint import notebook_cells
from cai_utils.experiment.params import all_params, declared, defaults, read_params

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def code_of(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = notebook.cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert cells[1].metadata.get("tags") == ["parameters"]
    start = f'run = experiment.start("{path.stem}", globals())'
    assert sum(start in cell.source for cell in cells) == 1
    assert cells[-1].source.splitlines()[-1] == "run.finish()"
    for cell in code_of(path):
        assert not cell.outputs and cell.execution_count is None, "clear the outputs"
        if not cell.metadata.get("tags"):
            assert len(cell.source.splitlines()) <= 15, f"one idea a cell:\n{cell.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_only_00_knows_the_miniature(path):
    if path.stem == "00_miniature":
        return
    for cell in code_of(path):
        if not cell.metadata.get("tags"):
            assert "miniature" not in cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_of_the_miniature_stand_in_the_notebook_alone(path):
    """In JupyterLab a notebook runs with what its cell says; that has to be what the batch does."""
    cell = next(c for c in code_of(path) if "parameters" in c.metadata.get("tags", []))
    lines = ast.parse(cell.source).body
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in lines}
    assert values == defaults(path) and values["profile"] == "miniature"
    for file in ("_common.yaml", f"{path.stem}.yaml"):
        assert not set(read_params(ROOT / "params/miniature" / file)) & set(values), file
    if (ROOT / "params/miniature" / f"{path.stem}.yaml").is_file():
        assert all_params(ROOT, path.stem, "miniature") == values


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_profile_gives_only_parameters_that_exist(path):
    for file in sorted((ROOT / "params").glob(f"*/{path.stem}.yaml")):
        given = yaml.safe_load(file.read_text()) or {}
        assert set(given) - {"grid"} <= set(declared(path)), file


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_takes_from_the_package_exists(path, monkeypatch):
    monkeypatch.setattr(dependencies, "OUTSIDE", re.compile("(?!)"))  # figures and experiment, too
    graph = dependencies.Graph()
    for chain in dependencies.of_source("\n".join(notebook_cells(path))):
        if chain[-1] not in (dependencies.ALL, dependencies.RUN):
            assert graph.follow(*chain)[1] != dependencies.ALL, ".".join(chain)
