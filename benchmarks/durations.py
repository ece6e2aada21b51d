"""How long the notebooks of a finished run took, and each of their stages.

    python benchmarks/durations.py runs/miniature
"""

import json
import sys
from datetime import datetime
from pathlib import Path

BEFORE = "imports and start"  # the cells above a notebook's first heading


def stages(folder) -> list[dict]:
    """What each stage of a run took: [{"run", "stage", "seconds"}], in the order of the notebooks.

    folder: runs/<profile>. run: the name of the executed notebook, as 09_rl-rl_cai-s. stage: the
    `##` heading above a cell; "kernel" is what a notebook took outside its cells. A run that found
    its results made took no time for them. FileNotFoundError where no notebook was executed.
    """
    found = []
    for name, notebook in _executed(folder):
        seconds, stage = {"kernel": 0.0}, BEFORE
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown" and "".join(cell["source"]).startswith("## "):
                stage = "".join(cell["source"]).splitlines()[0].removeprefix("## ")
            took = cell["metadata"].get("papermill", {}).get("duration") or 0.0
            seconds[stage] = seconds.get(stage, 0.0) + took
        total = notebook["metadata"]["papermill"]["duration"]
        seconds["kernel"] = max(0.0, total - sum(seconds.values()))
        found += [{"run": name, "stage": stage, "seconds": s} for stage, s in seconds.items()]
    return found


def runs(folder) -> list[dict]:
    """When each notebook of a run began and ended: [{"run", "began", "ended"}], datetimes, in the
    order in which they began; errors as of `stages`."""
    found = []
    for name, notebook in _executed(folder):
        about = notebook["metadata"]["papermill"]
        began, ended = (datetime.fromisoformat(about[key]) for key in ("start_time", "end_time"))
        found.append({"run": name, "began": began, "ended": ended})
    return sorted(found, key=lambda row: row["began"])


def _executed(folder):
    paths = [path for path in sorted((Path(folder) / "executed").glob("*.ipynb"))
             if not path.name.endswith((".running.ipynb", ".failed.ipynb"))]
    if not paths:
        raise FileNotFoundError(f"{folder}/executed holds no notebook: `make figures` runs them")
    return [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def main(folder) -> None:
    order = runs(folder)
    rows = stages(folder)
    for run in (row["run"] for row in order):
        own = [row for row in rows if row["run"] == run]
        print(f"{run}: {sum(row['seconds'] for row in own):.1f} s")
        for row in own:
            print(f"{row['seconds']:9.1f}  {row['stage']}")
    ended = max(row["ended"] for row in order)
    whole = (ended - order[0]["began"]).total_seconds()
    print(f"{sum(row['seconds'] for row in rows) / 60:.1f} minutes in notebooks, "
          f"{whole / 60:.1f} minutes from the first to the last")


if __name__ == "__main__":
    main(*sys.argv[1:])
