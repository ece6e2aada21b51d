"""Every figure from its tables: the one place that says which function draws which tables.

Notebooks draw with `draw`, and so does the command line, so that a run and a redrawing are alike:

    python -m cai_utils redraw --profile miniature [--figure fig05_revisions] [--style my.mplstyle]

A new figure is one function in `plots` or beside it, one row in `DRAWINGS` and one entry in
`claims.yaml`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd

from cai_utils.evaluation.samples import panels_of
from cai_utils.experiment import registry
from cai_utils.experiment.files import read_json, save_figure
from cai_utils.figures import panels, plots, statements, style


@dataclass(frozen=True)
class Drawing:
    """plot: a function of the tables, which are named after the figure unless `tables` says
    otherwise. measured_by: the only rows of the first table that are drawn; None: all. columns:
    those without which a table of this name is not for this figure. numbers: the columns in which a
    row may have no number; it is left out then."""

    plot: Callable
    tables: tuple[str, ...] = ()
    measured_by: str | None = None
    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ("estimate", "mean_p")


def _pm_accuracy(accuracy, calibration):
    """Accuracy on human comparisons, and calibration of the PMs of the run's own `size`."""
    human = accuracy[~accuracy["axis"].str.startswith("true ")]
    size = calibration.attrs.get("size") or calibration["size"].iloc[-1]
    return plots.accuracy_by_size(human, calibration[calibration["size"] == size])


DRAWINGS = {
    "pretraining_curves": Drawing(plots.pretraining_curves, numbers=("loss",)),
    "fig04_harm_identification": Drawing(plots.fig04_harm_identification),
    "fig12_identify_classify": Drawing(plots.fig12_identify_classify),
    "pm_accuracy": Drawing(_pm_accuracy, ("pm_accuracy", "pm_calibration")),
    "chains_truth": Drawing(plots.fig05_revisions, measured_by="truth"),
    "fig05_revisions": Drawing(plots.fig05_revisions),
    "fig07_critique_ablation": Drawing(plots.fig07_critique_ablation),
    "sl_cai_n": Drawing(plots.sl_cai_n),
    "fig09_calibration": Drawing(plots.fig09_calibration),
    "fig02_elo_frontier": Drawing(plots.fig02_elo_frontier, numbers=tuple(plots.ELO_AXES)),
    "fig03_elo_scaling": Drawing(plots.fig03_elo_scaling),
    "fig08_elo_training": Drawing(plots.fig08_elo_training),
    "policy_statements": Drawing(statements.policy_statements),
    "refusal_agreement": Drawing(plots.refusal_agreement),
    "refusal_confusion": Drawing(plots.refusal_confusion, numbers=plots.READ),
    "published_models": Drawing(plots.published_models),
    "published_revisions": Drawing(plots.fig05_revisions, measured_by="PM"),
}
# The same for every run of 09_rl: rl_<method>_<size> and rl_truth_<method>_<size>.
RUNS = {
    "rl_truth_": Drawing(lambda table: plots.rl_truth(panels_of(table))),
    # DPO's history has other columns.
    "rl_": Drawing(plots.rl_curves, columns=tuple(plots.RL_AXES), numbers=tuple(plots.RL_AXES)),
}
_RUN = re.compile(rf"(rl_truth_|rl_)(?:{'|'.join(registry.methods())})_[\w.-]+")


def drawing(name: str) -> Drawing:
    """How a figure is drawn; ValueError, with the nearest names, for an unknown one."""
    run = _RUN.fullmatch(name)
    if name not in DRAWINGS and not run:
        near = difflib.get_close_matches(name, DRAWINGS, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        known = [*DRAWINGS, "rl_<method>_<size>", "rl_truth_<method>_<size>"]
        raise ValueError(f"unknown figure {name!r}{hint}; known: {', '.join(known)}")
    return RUNS[run[1]] if run else DRAWINGS[name]


def tables_of(name: str) -> tuple[str, ...]:
    """The names of the tables that a figure is drawn from."""
    return drawing(name).tables or (name,)


def record(folder, table: str) -> dict:
    """The provenance of a table: in its own file beside a run's results, in provenance.json beside
    the committed ones. {} where there is none."""
    folder = Path(folder)
    own = read_json(folder / f"{table}.provenance.json")
    return own or read_json(folder / "provenance.json").get(table, {})


def read(path) -> pd.DataFrame:
    """A table; without rows and columns where the file is empty, as one of no rows may be."""
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _read(folder, table: str) -> pd.DataFrame:
    path = Path(folder) / f"{table}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, a table that the figure is drawn from")
    frame = read(path)
    if "size" in frame:
        frame["size"] = frame["size"].astype(str)
    size = record(folder, table).get("params", {}).get("size")
    frame.attrs["size"] = None if size is None else str(size)
    return frame


def _frames(name: str, folder) -> list[pd.DataFrame]:
    first, *others = (_read(folder, table) for table in tables_of(name))
    only = drawing(name).measured_by
    if only is None or not len(first):
        return [first, *others]
    return [first[first["measured_by"] == only], *others]


def draw(name: str, folder):
    """The matplotlib Figure `name`, from <folder>/<table>.csv and nothing else.

    Rows whose number is an empty cell are left out, and a line above the panels says how many; a
    table without any other row makes a figure that says just that. ValueError for an unknown name,
    a table that lacks something or an infinite number, FileNotFoundError for a table that is not
    there.
    """
    frames, lost = _frames(name, folder), []
    for i, (table, frame) in enumerate(zip(tables_of(name), frames, strict=True)):
        empty = frame[[c for c in drawing(name).numbers if c in frame]].isna().any(axis=1)
        if not len(frame) or empty.all():
            return panels.nothing(f"{table}: none of {len(frame)} rows has a number")
        frames[i] = frame[~empty]
        lost += [f"{table}: {empty.sum()} of {len(frame)} rows have no number and are left out"
                 ] if empty.any() else []
    fig = drawing(name).plot(*frames)
    return panels.headed(fig, "; ".join(lost)) if lost else fig


def drawable(folder) -> list[str]:
    """Names of the figures whose tables are in a folder, with rows to draw."""
    names = [path.stem for path in sorted(Path(folder).glob("*.csv"))]
    names = [n for n in names if n in DRAWINGS or _RUN.fullmatch(n)]
    there = [n for n in names if all((Path(folder) / f"{t}.csv").is_file() for t in tables_of(n))]
    first = {name: _frames(name, folder)[0] for name in there}
    return [n for n, frame in first.items() if len(frame) and {*drawing(n).columns} <= {*frame}]


def outdated(name: str, tables, folder) -> bool:
    """Whether a figure is missing in `folder`, or older than one of its tables, the record of one,
    a loaded module of this package, or matplotlib."""
    made = [Path(folder) / f"{name}.{ending}" for ending in ("png", "pdf")]
    if not all(path.is_file() for path in made):
        return True
    modules = [m.__file__ for n, m in [*sys.modules.items()]
               if n.split(".")[0] == "cai_utils" and getattr(m, "__file__", None)]
    records = [Path(tables) / f"{table}.provenance.json" for table in tables_of(name)]
    records.append(Path(tables) / "provenance.json")
    sources = [*(Path(tables) / f"{table}.csv" for table in tables_of(name)), *modules,
               matplotlib.__file__, *(path for path in records if path.is_file())]
    newest = max(os.stat(path).st_mtime_ns for path in sources)
    return min(path.stat().st_mtime_ns for path in made) < newest


def redraw(tables, folder, names=None, own_style=None) -> list[Path]:
    """Draw figures from the tables of one folder into another; the paths of the PNGs.

    names: which, None for all that can be drawn. own_style: a .mplstyle file, or the name of a
    matplotlib style, on top of the project's.
    """
    names = drawable(tables) if names is None else names
    with style.on_top(own_style) if own_style else contextlib.nullcontext() as rc:
        return [save_figure(draw(name, tables), folder, name, rc) for name in names]
