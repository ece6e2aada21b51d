"""What was measured: CSV files, and the tables of README.md that are made of them."""

import csv
import statistics

SPEED = ["date", "gflops_peak", "gbs_peak"]  # of the machine, when the row was measured
WHERE = ["machine", "commit"]
COLUMNS = {
    "run": ["run", "stage", "minutes", *WHERE, *SPEED],
    "results": ["name", "ours", "peer", "unit", "ratio", "ratio_low", "ratio_high", *WHERE, *SPEED],
    "growth": ["name", "batch", "prompt_tokens", "new_tokens", "ours", "peer", "unit", "ratio",
               *WHERE, *SPEED],
    "memory": ["name", "ours", "peer", "unit", *WHERE],
    "losses": ["name", "step", "turns", "ours", "peer", "unit", *WHERE],
    "limits": ["name", "gflops", "gflops_peak", "gflops_share", "gbs", "gbs_peak", "gbs_share",
               *WHERE],
}  # fmt: skip
KEY = {"run": ("run", "stage", "machine"), "results": ("name", "machine", "date"),
       "growth": ("name", "batch", "prompt_tokens", "new_tokens", "machine"),
       "memory": ("name", "machine"), "losses": ("name", "step", "machine"),
       "limits": ("name", "machine")}  # fmt: skip
KEPT = 3  # hours of which results are kept, for each name and machine


def read(path):
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path, kind, rows):
    """Put rows into a CSV: each replaces the row with its key (KEY), all others stay; of results
    those of the last hours (KEPT). Cells that older rows lack are empty."""
    known = {tuple(r.get(k) or "" for k in KEY[kind]): r for r in read(path)}
    if kind == "run":  # stages that a newer run does not have go
        known = {k: r for k, r in known.items() if r["machine"] != rows[0]["machine"]}
    for row in rows:
        row = {k: f"{row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in COLUMNS[kind]}
        known[tuple(str(row[k]) for k in KEY[kind])] = row
        if kind == "results":
            same = [k for k in known if k[:2] == (row["name"], row["machine"])]
            for old in sorted(same, key=lambda k: k[2])[:-KEPT]:
                del known[old]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS[kind], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())


def lowest(rows):
    """Of each name and machine the result with the lowest ratio of its hours, in the order of the
    rows, with `others`: the ratios of the other hours."""
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row["machine"]), []).append(row)
    out = []
    for group in groups.values():
        low = min(group, key=lambda row: float(row["ratio"]))
        others = [f"{row['ratio']} ({row['date']})" for row in group if row is not low]
        out.append({**low, "others": ", ".join(others)})
    return out


def lines(kind, rows):
    """Lines of README.md: a table for each machine, so that no row repeats its name."""
    columns = [c for c in COLUMNS[kind] if c != "machine"]
    if kind == "results":
        rows = lowest(rows)
        columns.insert(columns.index("ratio") + 1, "others")
    if kind == "losses":
        rows = tenths(rows)
    if kind == "run":
        rows, columns[1:3] = notebooks(rows), ["minutes", "stages"]
    out = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        cells = [[row.get(c) or "" for c in columns] for row in rows if row["machine"] == machine]
        out += ["", f"{machine}:", ""]
        out += ["| " + " | ".join(r) + " |" for r in [columns, ["---"] * len(columns), *cells]]
    return out


def notebooks(rows):
    """Minutes of each notebook, and of its stages of half a minute or more."""
    groups = {}
    for row in rows:
        groups.setdefault((row["run"], row["machine"]), []).append(row)
    out = []
    for group in groups.values():
        long = [f"{r['stage']} {float(r['minutes']):.1f}" for r in group
                if r["stage"] and float(r["minutes"]) >= 0.5]  # fmt: skip
        total = sum(float(r["minutes"]) for r in group)
        out.append({**group[0], "minutes": f"{total:.1f}", "stages": "; ".join(long)})
    return out


def tenths(rows):
    """Losses of long trainings averaged over tenths of their logged steps; `step`: the last."""
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row["machine"]), []).append(row)
    out = []
    for group in groups.values():
        size = max(1, len(group) // 10)
        for part in (group[i : i + size] for i in range(0, len(group), size)):
            mean = {side: f"{statistics.mean(float(row[side]) for row in part):.4g}"
                    for side in ("ours", "peer")}  # fmt: skip
            out.append({**part[-1], **mean})
    return out


def readme(folder):
    """Put the tables into README.md, between its marks."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for kind in COLUMNS:
        begin, end = f"<!-- {kind} -->\n", f"<!-- end of {kind} -->"
        rows = read(folder / f"{kind}.csv")
        if begin not in text or not rows:
            continue
        head, rest = text.split(begin)
        text = head + begin + "\n".join(lines(kind, rows)) + "\n\n" + end + rest.split(end)[1]
    path.write_text(text, encoding="utf-8")
