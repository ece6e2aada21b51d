"""The layout of the package: floors, sizes, and tests that mirror it. Nothing is imported here."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cai_utils"

# From the ground up: a part imports its own floor and those below, never those above.
FLOORS = [
    {"experiment"},  # knows nothing of the paper
    {"seeds", "dialogue"},
    {"data"},
    {"constitution", "lm"},
    # the stages of the paper
    {"multiple_choice", "critique", "sft", "feedback", "preference", "harmfulness"},
    {"rl", "miniature"},
    {"evaluation"},
    {"figures"},
    {"__main__"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}

# Tests of the whole project; every other tests/test_NAME.py is about cai_utils/NAME.py.
WHOLE = {"bench", "chain", "environment", "feedback_model", "forged_text", "kills", "layout",
         "notebooks", "repeat", "snakefile", "trl"}

# Modules of the flat package that was here before, as far as their names mean nothing else now.
OLD = (
    "absolute analysis cards comparisons cost elo endpoint engine evasiveness export fetch gallery "
    "hh journal kvcache labels launch longwork models online panels params plots policies ppo "
    "ppo_checkpoint ppo_math ppo_nets ppo_step provenance published published_samples refusals "
    "runs sampling server stats"
).split()
OLD_NAMES = re.compile(
    rf"\bcai_utils[./](?:{'|'.join(OLD)})\b(?!/)|\bminiature[./]files\b"
    r"|\b(?:analysis|policies|evasiveness|longwork|ppo_(?:math|nets|step))\.[a-z]"
    r"|\b(?:published(?:_samples\.(?!md)|\.(?:load|samples))|refusals\.(?:label|reader)|runs\.(?:start|Run)\b"
    r"|absolute\.(?:train|check|evaluate))|`evasiveness`"
)


def modules(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


CODE = modules("cai_utils", "scripts", "benchmarks")
NAMES = {dotted(path) for path in modules("cai_utils", "scripts")}


def imports(path):
    """Modules of the project that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & NAMES
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}, line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner if inner in NAMES else node.module} & NAMES
    return found


GRAPH = {dotted(path): imports(path) for path in modules("cai_utils", "scripts")}


def part(module):
    return module.split(".")[1] if "." in module else ""


def functions():
    for path in modules("cai_utils", "scripts"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{dotted(path)}.{node.name}", node.end_lineno - node.lineno + 1


def texts():
    """(path, text) of the files that a reader sees; LOG.md tells of the past in its own words."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\n") if name]
    paths = paths or [p for folder in ("cai_utils", "notebooks", "scripts", "params", "tests")
                      for p in (ROOT / folder).rglob("*")]
    kinds = {".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ""}
    for path in paths:
        exempt = path.name in ("LOG.md", "test_layout.py")
        if path.suffix in kinds and path.is_file() and not exempt:
            yield path, path.read_text(encoding="utf-8", errors="ignore")


def test_no_circular_imports():
    list(TopologicalSorter(GRAPH).static_order())  # CycleError shows the circle


def test_every_part_has_a_floor():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()
             if path.suffix == ".py" or list(path.glob("*.py"))}
    assert parts - {"__init__"} == set(FLOOR)


def test_nothing_imports_upwards():
    upwards = [f"{module} imports {other}" for module, others in GRAPH.items() for other in others
               if module.startswith("cai_utils.") and part(other)
               and (other.startswith("scripts") or FLOOR[part(other)] > FLOOR[part(module)])]
    assert not upwards


def test_only_miniature_imports_miniature():
    edges = [(part(module), part(other)) for module, others in GRAPH.items() for other in others]
    assert {user for user, used in edges if used == "miniature"} == {"miniature"}
    assert ("miniature", "rl") not in edges


def test_the_package_shows_few_entries():
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) < 20


def test_functions_fit_a_screen():
    assert not {name: lines for name, lines in functions() if lines > 80}


def test_modules_are_read_in_one_sitting():
    lengths = {dotted(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert not {name: lines for name, lines in lengths.items() if lines > 450}


def test_every_module_has_a_docstring():
    assert not [path for path in CODE if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]


def test_the_tests_mirror_the_package():
    folders = {p.name for p in PACKAGE.iterdir() if list(p.glob("*.py"))}
    tested = {p.name for p in (ROOT / "tests").iterdir() if list(p.glob("test_*.py"))}
    assert tested == folders | {"scripts"}
    stages = {p.stem for p in PACKAGE.glob("*.py")}
    named = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    assert named - stages == WHOLE


@pytest.mark.parametrize("what, pattern", [
    ("a plan that users do not have", re.compile(r"\bDESIGN\b")),
    ("a module that is gone", OLD_NAMES),
], ids=["plan", "modules"])
def test_no_text_points_to_what_is_not_here(what, pattern):
    found = []
    for path, text in texts():
        if path.name == "README.md":  # the list for users of the old names
            text = re.sub(r"## Moved names\n.*?(?=\n## |\Z)", "", text, flags=re.S)
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(text)]
    assert not found, f"{what}: {found}"


def test_every_fault_names_a_test_that_exists():
    """FAULTS.md: the last cell of each row, `file::test`, or `::test` of the file named before."""
    rows = [line for line in (ROOT / "tests/FAULTS.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and not line.startswith("| fault |")]
    path = None
    for row in rows:
        named = re.findall(r"`([\w/.]*)::(\w+)`", row.rpartition(" | ")[2])
        assert named, row
        for file, test in named:
            path = ROOT / "tests" / file if file else path
            assert re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.M), row
    assert rows
