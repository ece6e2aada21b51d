"""The reference in figures/<profile>/: committed figures, the tables behind them, the gallery.

    python -m cai_utils publish --profile miniature     a finished run becomes the reference
    python -m cai_utils redraw --profile miniature      its figures anew, from the committed tables

A run writes to runs/<profile>/ alone: only `publish` takes its tables over, and it refuses those of
an unfinished run or of a trial with other parameters than the profile's.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

from cai_utils.experiment.files import finite, read_json
from cai_utils.experiment.fingerprint import file_digest
from cai_utils.experiment.params import all_params, check_profile, grid_of
from cai_utils.experiment.writing import atomic, explained, write_text
from cai_utils.figures import gallery
from cai_utils.figures import redraw as drawings

KEPT = ("notebook", "profile", "seed", "params", "git", "versions", "time", "sha256")
# What a run may do otherwise without being a trial: pretraining leads to the same models, and more
# runs of RL are better evidence.
FREE = {"pretrain", "n_seeds"}


# ---------------------------------------------------------------- drawing again
def redraw(root, profile: str, figure=None, own_style=None, source="figures", out=None,
           if_changed=False) -> Path:
    """Draw a profile's figures, or one of them, from saved tables; the folder that they are in.

    source: "figures", the committed tables, or "runs", those of the last run. The figures go to
    where that keeps its own, and the gallery is written again; with `own_style` they go to
    runs/<profile>/restyled/<style>/, or wherever `out` says. if_changed: those alone that are older
    than their tables, or than the code that draws them; all with `own_style`, whose age is unknown.
    ValueError for an unknown profile, figure or style; FileNotFoundError where tables are missing.
    """
    check_profile(root, profile)
    kept, run = Path(root) / "figures" / profile, Path(root) / "runs" / profile
    places = {"figures": (kept / "tables", kept), "runs": (run / "results", run / "figures")}
    tables, home = places[source]
    names = drawings.drawable(tables) if figure is None else [figure]
    missing = [t for name in names for t in drawings.tables_of(name)
               if not (tables / f"{t}.csv").is_file()]
    if missing or not names:
        what = f"no {missing[0]}.csv" if missing else "no table of a figure"
        raise FileNotFoundError(
            f"{tables} holds {what}: `make figures PROFILE={profile}` makes it in runs/"
            + (f", `make redraw FROM=runs PROFILE={profile}` draws from there"
               if source == "figures" else ""))
    restyled = run / "restyled" / Path(own_style).stem if own_style else home
    folder = Path(out) if out else restyled
    for table in sorted({t for name in names for t in drawings.tables_of(name)}):
        wanted = drawings.record(tables, table).get("sha256")
        if wanted and wanted != file_digest(tables / f"{table}.csv"):
            print(f"note: {tables / table}.csv is not what its record says: edited, or damaged")
    if if_changed and not own_style:
        names = [n for n in names if drawings.outdated(n, tables, folder)]
    drawings.redraw(tables, folder, names, own_style)
    if folder == home and figure is None:
        title = "The figures of the reference run" if source == "figures" else "Figures of a run"
        gallery.write(f"{title}: `{profile}`", folder, tables)
    return folder


# ---------------------------------------------------------------- a run becomes the reference
def publish(root, profile: str) -> Path:
    """Make the finished run in runs/<profile>/ the reference; the folder figures/<profile>/.

    Tables and pages are copied, figures and gallery made from them. ValueError, and nothing
    changes, where the run is unfinished, a trial, or lacks a figure of the present reference.
    """
    check_profile(root, profile)
    root = Path(root)
    run, folder = root / "runs" / profile, root / "figures" / profile
    results, tables = run / "results", folder / "tables"
    wanted = _check(root, profile, run, folder)
    records = {name: drawings.record(results, name) for name in wanted}
    # Written beside its place and put there whole: a kill loses neither the old tables nor the new.
    fresh, old = folder / ".tables.new", folder / ".tables.old"
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    lines = [f"{json.dumps(name)}: " + json.dumps({k: r[k] for k in KEPT if k in r})
             for name, r in sorted(records.items())]  # a line a table: changes can be read
    try:
        with explained(tables):
            fresh.mkdir(parents=True)
            for name in wanted:
                shutil.copyfile(results / f"{name}.csv", fresh / f"{name}.csv")
            write_text(fresh / "provenance.json", "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if tables.exists():
        os.replace(tables, old)
    os.replace(fresh, tables)
    shutil.rmtree(old, ignore_errors=True)
    for page in (run / "figures").glob("*.md"):
        if page.name != "README.md":
            with atomic(folder / page.name) as temporary:
                shutil.copyfile(page, temporary)
    dirty = sorted({r["notebook"] for r in records.values() if (r.get("git") or {}).get("dirty")})
    if dirty:
        print(f"note: made with code that was not committed: {', '.join(dirty)}")
    return redraw(root, profile)


def _check(root: Path, profile: str, run: Path, folder: Path) -> list[str]:
    """Names of the tables of a run that the reference keeps; ValueError if it cannot be taken."""
    results, refused = run / "results", f"runs/{profile} cannot be published: "
    points = {}
    for notebook, point, name in _runs(root, profile):
        points.setdefault(notebook, []).append(point)
        if not (run / "executed" / f"{name}.ipynb").is_file():
            raise ValueError(f"{refused}{name} has not run; make figures PROFILE={profile} does it")
        record = read_json(run / "executed" / f"{name}.provenance.json")
        _check_params(root, profile, f"{refused}{name}", record, points)
        for figure in _always_drawn(root / "notebooks" / f"{notebook}.ipynb"):
            for table in drawings.tables_of(figure):
                if not (results / f"{table}.csv").is_file():
                    raise ValueError(f"{refused}results/{table}.csv is missing; run {name} again")
    shown = gallery.entries(results)
    lost = sorted(path.stem for path in folder.glob("*.png") if path.stem not in shown)
    if lost:
        raise ValueError(f"{refused}it lacks a figure of the reference, {', '.join(lost)}; remove "
                         f"it from figures/{profile}/ if it is no longer wanted")
    wanted = gallery.shown_tables(results)
    for table in wanted:
        record = drawings.record(results, table)
        _check_params(root, profile, f"{refused}results/{table}.csv", record, points)
        if record.get("sha256") != file_digest(results / f"{table}.csv"):
            raise ValueError(f"{refused}results/{table}.csv is not what {record['notebook']} wrote")
    return wanted


def _runs(root: Path, profile: str):
    """(notebook, {parameter: value}, name) of every run of a profile: one a point of a grid."""
    for path in sorted((root / "params" / profile).glob("[0-9]*.yaml")):
        grid = sorted(grid_of(root, profile, path.stem).items())
        for values in itertools.product(*(values for _, values in grid)):
            point = dict(zip((key.removesuffix("s") for key, _ in grid), values))
            yield path.stem, point, "-".join([path.stem, *map(str, values)])


def _check_params(root: Path, profile: str, what: str, record: dict, points: dict) -> None:
    """ValueError where a record's parameters are not those of the profile."""
    notebook, found = record.get("notebook"), record.get("params", {})
    if notebook not in points:
        raise ValueError(f"{what} has no record of a notebook of this profile beside it")
    differing = []
    for point in points[notebook]:
        wanted = finite(json.loads(json.dumps(all_params(root, notebook, profile, point))))
        differing.append([name for name, value in wanted.items()
                          if name not in FREE and name in found and found[name] != value])
    names = min(differing, key=len)
    if names:
        raise ValueError(f"{what} is of a trial, with its own "
                         + ", ".join(f"{name}={found[name]}" for name in names)
                         + f"; run {notebook} with the parameters of the profile first")


def _always_drawn(notebook: Path) -> list[str]:
    """Figures that a notebook draws under no condition."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.findall(r'^figure = draw\("(\w+)"', code, re.M)
