# The experiments in order, in parallel where they allow it; what is up to date is not run again.
#
#   snakemake --cores 2 --rerun-incomplete --config profile=miniature    (what `make figures` does)
#
# One rule per run of a notebook. A profile has the notebooks for which
# params/<profile>/<notebook>.yaml exists; `grid:` in that file makes several runs of one notebook
# (09_rl: method x size), and --config seeds=3 three of each of 09_rl, with other seeds. Snakemake
# schedules a run when the notebook, its parameters, a module that it uses or an upstream run is
# newer; `run --if-changed` then compares contents, and runs it only if something that decides its
# results has changed. One batch at a time works on a profile, and a killed
# one is in nobody's way (experiment/locks.py).
import atexit
import contextlib
import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))

from cai_utils.experiment import locks, registry
from cai_utils.experiment.execute import check_folder, check_name
from cai_utils.experiment.files import read_json
from cai_utils.experiment.fingerprint import modules_of, notebook_cells
from cai_utils.experiment.params import (
    all_params, as_override, check_profile, files_named, grid_of)

# What each notebook needs before it: the models and rows that those make. A run of 09_rl needs
# what makes the start and the reward of its method (experiment/registry.py).
NEEDS = {
    "00_miniature": [],
    "02_preference_models": ["00_miniature"],
    "03_critique_revision": ["00_miniature"],
    "01_harm_identification": ["00_miniature", "02_preference_models"],
    "04_revision_iterations": ["02_preference_models", "03_critique_revision"],
    "06_critique_ablation": ["02_preference_models", "03_critique_revision"],
    "07_sl_cai": ["03_critique_revision"],
    "08_ai_feedback": ["07_sl_cai"],
    "09_rl": sorted({name for method in registry.methods() for name in registry.needs(method)}),
    "10_elo": ["07_sl_cai", "09_rl"],
    "12_published_samples": ["02_preference_models"],
}
# Nothing can run beside these two: they get every core, the others one thread each (or --config
# threads=N).
ALONE = {"00_miniature", "10_elo"}
# The longest path decides how long everything takes: when several can start, these go first.
FIRST = {"03_critique_revision": 3, "07_sl_cai": 3, "08_ai_feedback": 3, "09_rl": 2}

# Ends with the make that started it, as its jobs end with it: a kill leaves nothing that goes on.
locks.end_with_parent()
os.environ[locks.PARENT] = str(os.getpid())
# Ours (onstart, below) takes the place of Snakemake's own lock, which stays behind after a kill.
LOCK = contextlib.ExitStack()
atexit.register(LOCK.close)
shutil.rmtree(Path(".snakemake") / "locks", ignore_errors=True)


def runs_of(notebook):
    """Runs of a notebook in this profile: [(name, {parameter: value})], one a point of its grid."""
    grid = {key.removesuffix("s"): values for key, values in sorted(GRIDS[notebook].items())}
    points = [dict(zip(grid, point)) for point in itertools.product(*grid.values())]
    named = [("-".join([notebook, *map(str, point.values())]), point) for point in points]
    more = range(1, SEEDS) if notebook == registry.RL else ()
    return named + [
        (f"{name}-seed{k}", {**point, "rl_seed": k}) for k in more for name, point in named]


try:
    PROFILE = check_profile(ROOT, str(config.get("profile", "miniature")))
    SEEDS = int(config.get("seeds", 1))
    if not (ROOT / "runs" / PROFILE).is_dir():  # before Snakemake looks for files in it
        check_folder(ROOT / "runs" / PROFILE)
    FILES = {p.stem: p for p in sorted((ROOT / "params" / PROFILE).glob("[0-9]*.yaml"))}
    GRIDS = {name: grid_of(ROOT, PROFILE, name) for name in FILES}
    for name, grid in GRIDS.items():
        if not isinstance(grid, dict):
            raise ValueError(f"{FILES[name]}: grid is {grid!r}; give 'parameters: [values]' lines")
        for key, points in grid.items():
            fine = isinstance(points, list) and points and all(
                re.fullmatch(r"[^/{}\n]+", str(point)) for point in points)
            if not fine:  # the values stand in the name of the executed notebook
                raise ValueError(f"{FILES[name]}: grid: {key} is {points!r}; give a list of values "
                                 "without / and braces")
    for name, path in FILES.items():
        if name not in NEEDS:
            raise ValueError(f"{path}: no notebook {name} in NEEDS of the Snakefile; add it there")
        if not (ROOT / "notebooks" / f"{name}.ipynb").is_file():
            raise ValueError(f"{path} is there, but notebooks/{name}.ipynb is not")
        names = [check_name(run) for run, _ in runs_of(name)]
        twice = sorted({run for run in names if names.count(run) > 1})
        if twice:
            raise ValueError(f"{path}: grid: {twice[0]} is there twice; give each value once")
    if not FILES:
        raise ValueError(f"params/{PROFILE}/ has no file NN_notebook.yaml: nothing to run")
    # Notebooks with PMs that score their samples.
    PARAMS = {name: all_params(ROOT, name, PROFILE) for name in FILES}
    SCORED = {name for name in FILES if PARAMS[name].get("pms")}
    for name, grid in GRIDS.items():
        for method in grid.get("methods", []):
            registry.method(method)  # ValueError for an unknown one
        for _, point in runs_of(name):
            all_params(ROOT, name, PROFILE, point)  # also for a value that the notebook refuses
    THREADS = int(config.get("threads", 1))
except ValueError as error:
    raise WorkflowError(str(error)) from None


def executed(name, ending="ipynb"):
    return f"runs/{PROFILE}/executed/{name}.{ending}"


def inputs(notebook):
    """Files that may make a run stale: the notebook, its parameters, its modules and their data."""
    source = ROOT / "notebooks" / f"{notebook}.ipynb"
    values = [ROOT / "params" / PROFILE / "_common.yaml", FILES[notebook]]
    values = [path for path in values if path.is_file()]
    text = " ".join([str(PARAMS[notebook])] + [
        f"cai_utils.rl.{registry.method(name).trainer}:train"
        for name in GRIDS[notebook].get("methods", [])])
    modules = modules_of(*notebook_cells(source), text=text)
    data = [path for path in files_named(ROOT, PARAMS[notebook]) if path.is_file()]
    data.append(ROOT / "cai_utils" / "experiment" / "registry.py")
    if any(path.stem == "constitution" for path in modules):
        data += sorted((ROOT / "cai_utils" / "constitutions").glob("*.yaml"))
    if notebook == "00_miniature":
        weights = ROOT / "cai_utils" / "miniature" / "weights"
        data += sorted(path for path in weights.rglob("*") if path.is_file())
    return [os.path.relpath(path, ROOT) for path in [source, *values, *modules, *data]]


def upstream(notebook, point):
    """Executed notebooks that come first; for one that the profile leaves out, those before it."""
    waiting = registry.needs(point["method"]) if "method" in point else list(NEEDS[notebook])
    first = []
    if notebook in SCORED:
        waiting.append("02_preference_models")
    while waiting:
        other = waiting.pop()
        if other in FILES:
            first += [executed(name) for name, _ in runs_of(other)]
        else:
            waiting += NEEDS[other]
    return sorted(set(first))


def arguments(notebook, name, point):
    """The command line of a run."""
    again = PRETRAIN and notebook == "00_miniature"
    if "n_seeds" in PARAMS[notebook] and SEEDS > 1:
        point = {**point, "n_seeds": SEEDS}
    return [
        sys.executable, "-m", "cai_utils", "run", notebook,
        *(as_override(key, value) for key, value in point.items()),
        *(["pretrain=true"] if again else ["--if-changed"]),
        "--profile", PROFILE, "--name", name,
    ]


def other_seeds(notebook, name):
    """A new file where the run that is there took another number of runs of RL: it has to be made
    again, and no other file is newer."""
    before = read_json(ROOT / executed(name, "stamp.json")).get("params", {}).get("n_seeds")
    if before in (None, SEEDS if SEEDS > 1 else PARAMS[notebook].get("n_seeds")):
        return []
    (ROOT / executed(name, "seeds")).write_text(f"{SEEDS}, not {before}: {time.time()}\n")
    return [executed(name, "seeds")]


RUNS = [(notebook, name, point) for notebook in FILES for name, point in runs_of(notebook)]
PRETRAIN = str(config.get("pretrain", "")).lower() in ("1", "true", "yes")


rule all:
    input:
        [executed(name, ending) for _, name, _ in RUNS for ending in ("ipynb", "stamp.json")],
    default_target: True


for NOTEBOOK, NAME, POINT in RUNS:

    rule:
        name:
            NAME
        input:
            inputs(NOTEBOOK),
            upstream(NOTEBOOK, POINT),
            other_seeds(NOTEBOOK, NAME),
        output:
            # Not deleted first: they stay where the run is up to date.
            update(executed(NAME)),
            update(executed(NAME, "stamp.json")),
        priority: FIRST.get(NOTEBOOK, 1)
        threads: workflow.cores if NOTEBOOK in ALONE else THREADS
        message:
            f"{NAME}"
        params:
            # From a function: in plain text, braces (of the clone's path) would be wildcards.
            command=lambda wildcards, line=arguments(NOTEBOOK, NAME, POINT): line,
        shell:
            # Snakemake gives each job OMP_NUM_THREADS={threads}. Quoted, as values may be any text;
            # in place of the shell, so that it is this process's child.
            "exec {params.command:q}"


onstart:
    try:
        folder = check_folder(ROOT / "runs" / PROFILE)
        LOCK.enter_context(locks.held(folder, [locks.BATCH], "another `make figures` works"))
    except (ValueError, RuntimeError) as error:
        raise WorkflowError(str(error)) from None
    locks.remove_leftovers(folder)


onsuccess:
    figures = sorted((ROOT / "runs" / PROFILE / "figures").glob("*.png"))
    print(f"\nFigures of profile {PROFILE}:")
    for path in figures:
        print(f"  {path.relative_to(ROOT)}")
    print(f"Their tables: runs/{PROFILE}/results/   The notebooks: runs/{PROFILE}/executed/")
