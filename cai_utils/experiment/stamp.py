"""Whether a run of a notebook would make again what is there, judged by contents.

Beside runs/<profile>/executed/<name>.ipynb stands <name>.stamp.json: digests of all that decided
the run, of what it read from other runs, and of what it made. `git checkout` and `touch` change
none of them, an edit of a docstring or of a plot neither.
"""

from __future__ import annotations

import os
from pathlib import Path

from cai_utils.experiment import fingerprint, provenance, registry
from cai_utils.experiment.files import PACKAGE, read_json, write_json
from cai_utils.experiment.params import all_params, files_named, grid_of

# Parameters that name a model.
MODELS = ("pretrained", "feedback", "feedback_cot", "critic", "reader", "judge_model")


def ingredients(root, notebook: str, profile: str, overrides: dict | None = None) -> dict:
    """What decides a run apart from what it reads: {"params", "code", "files", "policies"}, each
    {name: value}."""
    root = Path(root)
    params = all_params(root, notebook, profile, overrides)
    named = [params.get("method"), *(params.get("methods") or ()), *(params.get("baselines") or ())]
    if "methods" in params and not params["methods"]:  # 10_elo: those that 09_rl runs
        named += [*registry.baselines(), *grid_of(root, profile, registry.RL).get("methods", [])]
    policies = [registry.POLICIES[name] for name in named if name in registry.POLICIES]
    # A trainer is found by its name at run time.
    own = next((p for p in policies if p.name == params.get("method") and p.trainer), None)
    trainer = f"cai_utils.rl.{own.trainer}:train" if own else ""
    code = fingerprint.notebook_code(root / "notebooks" / f"{notebook}.ipynb", params, trainer)
    files = files_named(root, params)
    if any(name.startswith("cai_utils.constitution.") for name in code):
        files += (PACKAGE / "constitutions").glob("*.yaml")
    if any("miniature/" in str(params.get(name)) for name in MODELS):
        files += [PACKAGE / "miniature" / "weights"]
        # 00_miniature makes these, and the other notebooks take them before the shipped ones.
        anew = root / "runs" / profile / "models" / "pretrained"
        files += [anew] if anew.is_dir() and notebook != "00_miniature" else []
    return {
        "params": {name: fingerprint.canonical(value, name)
                   for name, value in (params | provenance.trust()).items()},
        "code": code,
        "files": {os.path.relpath(path, root): fingerprint.file_digest(path) for path in files},
        "policies": {p.name: [p.label, p.notebook, p.start, p.reward, p.trainer] for p in policies},
    }


def point(root, notebook: str, profile: str, overrides: dict | None = None) -> str:
    """The name that the batch gives a run with these parameters: the notebook, then the values of
    its profile's grid, and the seed of a further run."""
    params = all_params(root, notebook, profile, overrides)
    keys = [key.removesuffix("s") for key in sorted(grid_of(root, profile, notebook))]
    more = f"-seed{params['rl_seed']}" if params.get("rl_seed") else ""
    return "-".join([notebook, *(str(params.get(key)) for key in keys)]) + more


def changes(folder: Path, name: str, now: dict) -> list[str]:
    """What is not as it was when run `name` ended: [] where running it again would change
    nothing. folder: runs/<profile>; now: `ingredients`."""
    old = read_json(folder / "executed" / f"{name}.stamp.json")
    if not old or not (folder / "executed" / f"{name}.ipynb").is_file():
        return ["no record of an earlier run"]
    found = [
        f"{kind} {key}" for kind, values in now.items()
        for key in {**old.get(kind, {}), **values} if old.get(kind, {}).get(key) != values.get(key)
    ]
    for kind in ("read", "made"):
        found += [path for path, digest in old[kind].items() if _digest(folder / path) != digest]
    return found


def write(folder: Path, name: str, now: dict) -> None:
    """Note what decided run `name`, which has ended, with what `Run.finish` recorded of it."""
    executed = folder / "executed"
    record = read_json(executed / f"{name}.provenance.json")
    handed = {kind: record.get(kind, {}) for kind in ("read", "made")}
    write_json(executed / f"{name}.stamp.json", now | handed)


def remove_overwritten(folder: Path, name: str, made: dict) -> None:
    """Remove the stamps of other runs that made one of these results otherwise, or one of these
    tables, beside which now stands another run's record: the batch makes theirs again, so that no
    trial by hand passes for the run of the profile, and none blocks publishing."""
    for path in (folder / "executed").glob("*.stamp.json"):
        other = path.name.removesuffix(".stamp.json")
        theirs = read_json(path).get("made", {})
        if other != name and any(
                key in theirs and (theirs[key] != sha or key.startswith("results/"))
                for key, sha in made.items()):
            path.unlink()


def touch(folder: Path, name: str) -> None:
    """Make the files of a run newer than all that it depends on."""
    for ending in ("ipynb", "stamp.json"):
        os.utime(folder / "executed" / f"{name}.{ending}")


def remove(folder: Path, name: str) -> None:
    """Make the batch look at a run again."""
    (folder / "executed" / f"{name}.stamp.json").unlink(missing_ok=True)


def _digest(path: Path) -> str | None:
    return fingerprint.file_digest(path) if path.exists() else None
