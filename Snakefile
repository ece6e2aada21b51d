# The experiments in order, in parallel where they allow it; what is up to date is not run again.
#
#   snakemake --cores 2 --config profile=miniature        (what `make figures` does)
#
# One rule a notebook. A profile has the notebooks for which params/<profile>/<notebook>.yaml
# exists; `grid:` in that file makes several runs of one notebook (09_rl: method x size).
# A notebook is run again when it, its parameters, a module that it uses or what it builds on is
# newer than its last run.
import itertools
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))

from cai_utils.experiment.params import GRID, check_profile, merge_params, read_params
from cai_utils.experiment.fingerprint import modules_of, notebook_cells

# What each notebook needs before it: the models and rows that those hand on.
NEEDS = {
    "00_miniature": [],
    "02_preference_models": ["00_miniature"],
    "03_critique_revision": ["00_miniature"],
    "01_harm_identification": ["00_miniature", "02_preference_models"],
    "04_revision_iterations": ["02_preference_models", "03_critique_revision"],
    "06_critique_ablation": ["02_preference_models", "03_critique_revision"],
    "07_sl_cai": ["03_critique_revision"],
    "08_ai_feedback": ["07_sl_cai"],
    "09_rl": ["02_preference_models", "03_critique_revision", "08_ai_feedback"],
    "10_elo": ["07_sl_cai", "09_rl"],
    "12_published_samples": ["02_preference_models"],
}
# RL from human labels alone does not wait for the AI feedback.
NEEDS_BY_METHOD = {
    "helpful_rlhf": ["02_preference_models", "03_critique_revision"],
    "hh_rlhf": ["02_preference_models", "03_critique_revision"],
    "rl_cai": ["02_preference_models", "08_ai_feedback"],
    "rl_cai_cot": ["02_preference_models", "08_ai_feedback"],
}
# Nothing can run beside the first and the last: they get every core, the others
# one thread each (or --config threads=N).
ALONE = {"00_miniature", "10_elo"}
# The longest path decides how long everything takes: when several can start, these go first.
FIRST = {"03_critique_revision": 3, "07_sl_cai": 3, "08_ai_feedback": 3, "09_rl": 2}

try:
    PROFILE = check_profile(ROOT, str(config.get("profile", "miniature")))
    FILES = {p.stem: p for p in sorted((ROOT / "params" / PROFILE).glob("[0-9]*.yaml"))}
    GRIDS = {name: read_params(path).get(GRID) or {} for name, path in FILES.items()}
    for name, path in FILES.items():
        if name not in NEEDS:
            raise ValueError(f"{path}: no notebook {name} in NEEDS of the Snakefile; add it there")
        if not (ROOT / "notebooks" / f"{name}.ipynb").is_file():
            raise ValueError(f"{path} is there, but notebooks/{name}.ipynb is not")
    if not FILES:
        raise ValueError(f"params/{PROFILE}/ has no file NN_notebook.yaml: nothing to run")
    # Notebooks with PMs that score their samples.
    SCORED = {name for name in FILES if merge_params(ROOT, name, PROFILE).get("pms")}
except ValueError as error:
    raise WorkflowError(str(error)) from None


def runs_of(notebook):
    """Runs of a notebook in this profile: [(name, {parameter: value})], one a point of its grid."""
    grid = {key.removesuffix("s"): values for key, values in sorted(GRIDS[notebook].items())}
    points = [dict(zip(grid, point)) for point in itertools.product(*grid.values())]
    return [("-".join([notebook, *map(str, point.values())]), point) for point in points]


def executed(name):
    return f"runs/{PROFILE}/executed/{name}.ipynb"


def inputs(notebook):
    """Files that make a run stale: the notebook, its parameters, its modules and their data."""
    source = ROOT / "notebooks" / f"{notebook}.ipynb"
    values = [ROOT / "params" / PROFILE / "_common.yaml", FILES[notebook]]
    values = [path for path in values if path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in values)
    modules = modules_of(*notebook_cells(source), text=text)
    data = []
    if any(path.stem == "constitution" for path in modules):
        data += sorted((ROOT / "cai_utils" / "constitutions").glob("*.yaml"))
    if notebook == "00_miniature":
        weights = ROOT / "cai_utils" / "miniature" / "weights"
        data += sorted(path for path in weights.rglob("*") if path.is_file())
    return [str(path.relative_to(ROOT)) for path in [source, *values, *modules, *data]]


def upstream(notebook, point):
    """Executed notebooks that come first. One that the profile leaves out passes on its own."""
    waiting, first = list(NEEDS_BY_METHOD.get(point.get("method"), NEEDS[notebook])), []
    if notebook in SCORED:
        waiting.append("02_preference_models")
    while waiting:
        other = waiting.pop()
        if other in FILES:
            first += [executed(name) for name, _ in runs_of(other)]
        else:
            waiting += NEEDS[other]
    return sorted(set(first))


RUNS = [(notebook, name, point) for notebook in FILES for name, point in runs_of(notebook)]
PRETRAIN = str(config.get("pretrain", "")).lower() in ("1", "true", "yes")


rule all:
    input:
        [executed(name) for _, name, _ in RUNS],
    default_target: True


for NOTEBOOK, NAME, POINT in RUNS:

    rule:
        name:
            NAME
        input:
            inputs(NOTEBOOK),
            upstream(NOTEBOOK, POINT),
        output:
            executed(NAME),
        priority: FIRST.get(NOTEBOOK, 1)
        threads: workflow.cores if NOTEBOOK in ALONE else int(config.get("threads", 1))
        message:
            f"{NAME}"
        params:
            notebook=NOTEBOOK,
            name=NAME,
            values=" ".join(
                [f"{key}={value}" for key, value in POINT.items()]
                + (["pretrain=true"] if PRETRAIN and NOTEBOOK == "00_miniature" else [])
            ),
        shell:
            # Snakemake gives each job OMP_NUM_THREADS={threads}.
            "{sys.executable} -m cai_utils run {params.notebook} {params.values}"
            f" --profile {PROFILE}"
            " --name {params.name}"


onsuccess:
    figures = sorted((ROOT / "figures" / PROFILE).glob("*.png"))
    print(f"\nFigures of profile {PROFILE}:")
    for path in figures:
        print(f"  {path.relative_to(ROOT)}")
    print(f"Their tables: runs/{PROFILE}/results/   The notebooks: runs/{PROFILE}/executed/")
