"""The gallery: README.md in a folder of figures, written from the saved tables alone.

Each figure stands with what the paper claims (`claims.yaml`) and, from the table of paired
differences beside it, what this run says, with 95 % intervals. The interval alone decides the
words: above 0, below 0, or undecided.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import yaml

from cai_utils.evaluation.escape import cell
from cai_utils.evaluation.tables import number
from cai_utils.experiment.registry import PANELS, is_further
from cai_utils.experiment.writing import write_text
from cai_utils.figures import redraw

CLAIMS = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))


def entries(tables) -> dict[str, dict]:
    """{figure: its entry in `claims.yaml`} of everything that a folder of tables can show, without
    further runs of RL, which may be older than the first."""
    there = redraw.drawable(tables)
    found = {name: entry for name, entry in CLAIMS["figures"].items() if name in there}
    for path in sorted(Path(tables).glob("rl_scores_*.csv")):
        run = path.stem.removeprefix("rl_scores_")
        if f"rl_{run}" in there and not is_further(run):
            found[f"rl_{run}"] = {
                "title": f"RL: {cell(run)}", "tables": {path.stem: CLAIMS["rl_scores"]}}
    return found


def shown_tables(tables) -> list[str]:
    """Names of the tables that figures of the gallery are drawn from, or whose numbers it shows."""
    names = []
    for figure, entry in entries(tables).items():
        more = [entry["truth"]] if "truth" in entry else []
        names += [*redraw.tables_of(figure), *entry.get("tables", {}), *more]
    names += CLAIMS["scores"] if _file(tables, "sl_cai_scores").is_file() else []
    return [name for name in dict.fromkeys(names) if _file(tables, name).is_file()]


def _file(tables, name: str) -> Path:
    return Path(tables) / f"{name}.csv"


def _details(path, what, link) -> list[str]:
    frame = redraw.read(path)
    opened = f"<details><summary>{what}: {len(frame)} rows</summary>"
    return [opened, "", *_table(frame), "", _link(path.name, link), "", "</details>", ""]


def _link(name, folder) -> str:
    return f"[{cell(name)}]({quote(f'{folder}/{name}')})"


def _compared(row) -> bool:
    """Whether 0 means something for a row: a difference, or how far labels follow the order."""
    if str(row.get("measure")) in ("position bias", "over-confidence"):
        return True
    return "difference" in row or " - " in str(row.get("group", ""))


def _verdict(row) -> str:
    if not _compared(row):
        return ""
    if pd.isna(row["ci_low"]):  # too few units for an interval
        return "no interval"
    return "above 0" if row["ci_low"] > 0 else "below 0" if row["ci_high"] < 0 else "undecided"


def _table(frame: pd.DataFrame) -> list[str]:
    numbers = ("estimate", "ci_low", "ci_high", "n", "parameters")
    labels = [c for c in frame.dropna(axis=1, how="all") if c not in numbers]
    lines = [
        "| " + " | ".join([*map(cell, labels), "estimate [95 % interval]", "n", ""]) + " |",
        "|" + "---|" * (len(labels) + 3),
    ]
    for _, row in frame.iterrows():
        named = ["" if pd.isna(row[c]) else cell(row[c]) for c in labels]
        words = number(row, 3, "+" if _compared(row) else "")
        units = "" if pd.isna(row["n"]) else f"{row['n']:g}"
        lines.append("| " + " | ".join([*named, words, units, _verdict(row)]) + " |")
    return lines


def _models(frame: pd.DataFrame) -> list[str]:
    """What the ground truth says of each final model: a row per size and model."""
    lines = [
        "| size | model | " + " | ".join(PANELS) + " |",
        "|" + "---|" * (len(PANELS) + 2),
    ]
    for (size, method), rows in frame.groupby(["size", "method"], sort=False):
        rows = rows.set_index(["kind", "measure"])
        cells = [number(rows.loc[pair]) if pair in rows.index else "" for pair in PANELS.values()]
        lines.append(f"| {cell(size)} | {cell(method)} | " + " | ".join(cells) + " |")
    return lines


def _figure(name: str, entry: dict, tables: Path, link: str) -> list[str]:
    """The section of one figure."""
    sources = ", ".join(_link(f"{table}.csv", link) for table in redraw.tables_of(name))
    text = [f"## {entry['title']}", ""]
    text += [f"*The paper:* {entry['claim']}", ""] if "claim" in entry else []
    text += [f"![{entry['title']}]({name}.png)", ""]
    text += [f"[PDF]({name}.pdf) · drawn from {sources}", ""]
    if "truth" in entry and _file(tables, entry["truth"]).is_file():
        text += ["The ground truth about the models that play, with 95 % intervals:", ""]
        text += [*_models(redraw.read(_file(tables, entry["truth"]))), ""]
    for table, what in entry.get("tables", {}).items():
        if _file(tables, table).is_file():
            text += _details(_file(tables, table), what, link)
    return text


def write(title: str, folder, tables) -> Path:
    """Write <folder>/README.md about the figures in a folder; its path.

    `NOTES.md` in the folder, where there is one, is put before the figures: it is the place for
    what a person saw in them. FileNotFoundError where there is no table to draw from.
    """
    folder, tables = Path(folder), Path(tables)
    shown, link = entries(tables), Path(os.path.relpath(tables, folder)).as_posix()
    if not shown:
        raise FileNotFoundError(f"{tables} holds no table of a figure")
    text = [f"# {title}", ""]
    notes = folder / "NOTES.md"
    if notes.is_file():
        text += [notes.read_text(encoding="utf-8").strip(), ""]
    for page in sorted(folder.glob("*_chains.md")):
        read = "prompt, response, critiques and revisions to read."
        text += [f"[{cell(page.stem)}]({quote(page.name)}): {read}", ""]
    for name, entry in shown.items():
        text += _figure(name, entry, tables, link)
    if _file(tables, "sl_cai_scores").is_file():
        text += ["## Without a ground truth", ""]
        for name, what in CLAIMS["scores"].items():
            if _file(tables, name).is_file():
                text += _details(_file(tables, name), what, link)
    others = [name for name in redraw.drawable(tables) if name not in shown]
    if others:
        text += ["## More figures", "", " · ".join(f"[{cell(n)}]({n}.png)" for n in others), ""]
    made = [redraw.record(tables, name) for name in shown_tables(tables)]
    commits = {str((m.get("git") or {}).get("commit"))[:10] for m in made if m}
    text += ["Made at commit " + ", ".join(f"`{c}`" for c in sorted(commits)) + "."]
    path = folder / "README.md"
    write_text(path, "\n".join(text) + "\n")
    return path
