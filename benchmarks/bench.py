"""`make bench`: ours beside its peer; benchmarks/README.md says how it is measured.

python benchmarks/bench.py [NAME ...] [--rounds 5] [--quick] [--out benchmarks]
"""

import argparse
import datetime
import sys
import time
from pathlib import Path

import durations
import engines
import measure
import sampling
import tables
import torch
import training

from cai_utils.experiment.files import read_json, repo_root


def run_miniature(rounds, quick):
    """Minutes of each notebook of the finished run in runs/miniature, and of its stages; nothing is
    run here. `whole` is from the first start to the last end."""
    folder = Path(repo_root()) / "runs" / "miniature"
    rows = durations.stages(folder)
    done = folder / "executed"
    left = [*done.glob("*.running.ipynb"), *done.glob("*.failed.ipynb")]
    if left:
        raise FileNotFoundError(f"{left[0]}: the run is not finished; `make figures` goes on")
    began, ended = ([r[k] for r in durations.runs(folder)] for k in ("began", "ended"))
    record = read_json(done / f"{rows[0]['run']}.provenance.json")
    where = {"machine": measure.cpu(record["machine"], "float32"),
             "commit": record["git"]["commit"][:12] + "+" * bool(record["git"]["dirty"])}
    whole = (max(ended) - min(began)).total_seconds()
    rows = [{"run": "whole", "stage": "", "seconds": whole}, *rows]
    return {"run": [{**r, "minutes": r["seconds"] / 60, **where} for r in rows]}


BENCHES = {**sampling.BENCHES, **training.BENCHES, **engines.BENCHES,
           "run_miniature": run_miniature}  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHES)}; all without one")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--lowest", action="store_true",
                        help="measure nothing; print the lowest ratio of each name and machine")
    options = parser.parse_args(arguments)
    if options.lowest:
        for row in tables.lowest(tables.read(options.out / "results.csv")):
            if row["name"] in options.names or not options.names:
                print(*(row[k] for k in ("name", "ratio", "date", "machine")), sep="\t")
        return
    unknown = set(options.names) - set(BENCHES)
    if unknown:
        known = ", ".join(BENCHES)
        sys.exit(f"error: no benchmark {', '.join(sorted(unknown))}; there are {known}")
    for name in options.names or BENCHES:
        began = time.perf_counter()
        try:
            made = BENCHES[name](1 if options.quick else options.rounds, options.quick)
        except FileNotFoundError as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        first = next(iter(made.values()))[0]
        speed = speed_of(first["machine"], 0.1 if options.quick else 1.0)
        for kind, rows in made.items():
            more = speed if "date" in tables.COLUMNS[kind] else {}
            tables.write(options.out / f"{kind}.csv", kind, [{**row, **more} for row in rows])
        for row in made.get("results", []):
            print(f"{row['name']}: {row['ours']:.4g} against {row['peer']:.4g} {row['unit']}, "
                  f"{row['ratio']:.2f} times ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}); "
                  f"{time.perf_counter() - began:.0f} s",
                  flush=True)  # fmt: skip
    tables.readme(options.out)


def speed_of(machine, seconds):
    """`tables.SPEED` now: the hour (UTC), and the machine's peaks in the dtype of a row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = measure.peaks(getattr(torch, machine.rpartition(", ")[2]), device, seconds)
    hour = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %Hh")
    return dict(zip(tables.SPEED, (hour, *peaks), strict=True))


if __name__ == "__main__":
    main()
