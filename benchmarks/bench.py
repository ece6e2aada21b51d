"""`make bench`: ours beside its peer; benchmarks/README.md says how it is measured.

python benchmarks/bench.py [NAME ...] [--rounds 5] [--quick] [--out benchmarks]
"""

import argparse
import csv
import sys
from pathlib import Path

import sampling
import training

BENCHES = {**sampling.BENCHES, **training.BENCHES}
COLUMNS = {
    "results": ["name", "ours", "peer", "unit", "ratio", "ratio_low", "ratio_high", "machine",
                "commit"],
    "growth": ["name", "batch", "prompt_tokens", "new_tokens", "ours", "peer", "unit", "ratio",
               "machine", "commit"],
    "memory": ["name", "ours", "peer", "unit", "machine", "commit"],
    "losses": ["name", "step", "turns", "ours", "peer", "unit", "machine", "commit"],
    "limits": ["name", "gflops", "gflops_peak", "gflops_share", "gbs", "gbs_peak", "gbs_share",
               "machine", "commit"],
}  # fmt: skip
KEY = {"results": ("name", "machine"), "limits": ("name", "machine"),
       "memory": ("name", "machine"), "losses": ("name", "step", "machine"),
       "growth": ("name", "batch", "prompt_tokens", "new_tokens", "machine")}  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHES)}; all without one")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(BENCHES)
    if unknown:
        known = ", ".join(BENCHES)
        sys.exit(f"error: no benchmark {', '.join(sorted(unknown))}; there are {known}")
    for name in options.names or BENCHES:
        try:
            made = BENCHES[name](1 if options.quick else options.rounds, options.quick)
        except FileNotFoundError as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        for kind, rows in made.items():
            write(options.out / f"{kind}.csv", kind, rows)
        for row in made["results"]:
            print(f"{row['name']}: {row['ours']:.4g} against {row['peer']:.4g} {row['unit']}, "
                  f"{row['ratio']:.2f} times ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
                  flush=True)  # fmt: skip
    readme(options.out)


def write(path, kind, rows):
    """Put rows into a CSV: each replaces the row with its key (KEY), all others stay."""
    known = {}
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            known = {tuple(r[k] for k in KEY[kind]): r for r in csv.DictReader(file)}
    for row in rows:
        row = {k: f"{row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in COLUMNS[kind]}
        known[tuple(str(row[k]) for k in KEY[kind])] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS[kind], lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())


def readme(folder):
    """Put the tables into README.md, between its marks."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for kind, columns in COLUMNS.items():
        begin, end = f"<!-- {kind} -->\n", f"<!-- end of {kind} -->"
        if begin not in text or not (folder / f"{kind}.csv").is_file():
            continue
        with open(folder / f"{kind}.csv", newline="", encoding="utf-8") as file:
            rows = [[r[k] for k in columns] for r in csv.DictReader(file)]
        lines = ["| " + " | ".join(r) + " |" for r in [columns, ["---"] * len(columns), *rows]]
        head, rest = text.split(begin)
        text = head + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.split(end)[1]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
