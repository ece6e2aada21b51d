"""Tidy tables with intervals, made from rows of measurements.

Every table has `estimate`, `ci_low`, `ci_high`, `n` (ARCHITECTURE.md, Rows). A "long" table has one
row per prompt, with what was measured on it; such a table is a summary of one. A number that there
is none of is an empty cell (nan): the interval of one unit, of which `n` says so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from cai_utils.evaluation import stats
from cai_utils.evaluation.escape import visible


def finite(values, what: str, ids: Iterable | None = None) -> np.ndarray:
    """Measured numbers (N,) as floats. ValueError that names `what` measured and the first of the
    rows whose number is nan or infinite: left out, they would change a mean unseen."""
    values = np.asarray(values, dtype=float)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = f"row {bad[0]}" if ids is None else f"row {bad[0]} (id {list(ids)[bad[0]]})"
        raise ValueError(f"{what}: {len(bad)} of {len(values)} numbers are not finite, the first "
                         f"in {row}: {values[bad[0]]}; correct what measures them")
    return values


def summarize(long, by, value, cluster="id") -> pd.DataFrame:
    """Mean of column `value` for each group of `by`, rows without a value left out: what was
    measured is `finite`, so a row has none where it does not exist, as the change of a first
    response. Groups without any have no row.

    95 % intervals: Wilson for 0/1 values measured once per `cluster`, else bootstrap over clusters;
    `n` counts clusters. Where a column `run` tells training runs of a policy apart, the interval
    covers these, too (`stats.with_runs`), and a column `runs` says how many there are. ValueError,
    naming the column, for an infinite value.
    """
    by, rows = [by] if isinstance(by, str) else list(by), []
    columns = [*by, "estimate", "ci_low", "ci_high", "n", *(["runs"] if "run" in long else [])]
    if not len(long):
        return pd.DataFrame(columns=columns)
    finite(long[value].dropna(), f"column {value!r}", long.loc[long[value].notna(), cluster])
    for group, d in long.dropna(subset=[value]).groupby(by, sort=False):
        x, runs = d[value].astype(float), _of_runs(d, value)
        binary = x.isin((0, 1)).all()
        if binary and not d[cluster].duplicated().any():
            found = stats.wilson(x.sum(), len(x))
        else:
            found = stats.bootstrap_mean(x, cluster=d[cluster])
        if binary and len(runs) > 1:  # where all agree, the bootstrap has no width
            floor = stats.wilson(found.n * found.estimate, found.n)
            found = found._replace(low=float(np.fmin(found.low, floor.low)),
                                   high=float(np.fmax(found.high, floor.high)))
        found = stats.with_runs(found, runs, within=(0, 1) if binary else (-np.inf, np.inf))
        rows.append({**dict(zip(by, group, strict=True)), "estimate": found.estimate,
                     "ci_low": found.low, "ci_high": found.high, "n": found.n, "runs": len(runs)})
    return pd.DataFrame(rows, columns=columns)


def _of_runs(long, value) -> list[float]:
    """The mean of `value` in each run; none where no column tells runs apart."""
    return long.groupby("run")[value].mean().tolist() if "run" in long else []


def difference(long, column, a, b, value, unit="id", cluster=None) -> stats.Estimate:
    """Mean of `value` where `column` is `a`, minus that where it is `b`, paired by `unit`.

    Units that lack one of the two are left out. `cluster` names a column that is equal for units
    that are not independent; those are resampled together. With a column `run` the interval covers
    the runs of both, as in `summarize`; those of `a` and `b` are not paired. ValueError when no
    unit has both.
    """
    sides = [long[long[column] == side].dropna(subset=[value]) for side in (a, b)]
    both = pd.concat([side.groupby(unit)[value].mean() for side in sides],
                     axis=1, join="inner").astype(float)
    if not len(both):
        raise ValueError(f"no {unit} with both {column} = {a!r} and {column} = {b!r}")
    groups = long.groupby(unit)[cluster].first()[both.index] if cluster else None
    found = stats.paired_difference(both.iloc[:, 0], both.iloc[:, 1], groups)
    shares = all(side[value].astype(float).isin((0, 1)).all() for side in sides)
    return stats.with_runs(
        found, *(_of_runs(side[side[unit].isin(both.index)], value) for side in sides),
        within=(-1, 1) if shares else (-np.inf, np.inf))


def differences(long, column, pairs, value, by, unit="id", cluster=None) -> pd.DataFrame:
    """`difference` of every pair (a, b) within every group of `by`.

    Columns: *by, difference ("a - b"), estimate, ci_low, ci_high, n. Pairs of which a group lacks
    one side are left out.
    """
    by, rows = [by] if isinstance(by, str) else list(by), []
    for group, d in long.groupby(by, sort=False) if len(long) else ():
        for a, b in pairs:
            if {a, b} <= set(d.loc[d[value].notna(), column]):
                e = difference(d, column, a, b, value, unit, cluster)
                rows.append({**dict(zip(by, group, strict=True)), "difference": f"{a} - {b}",
                             "estimate": e.estimate, "ci_low": e.low, "ci_high": e.high, "n": e.n})
    return pd.DataFrame(rows, columns=[*by, "difference", "estimate", "ci_low", "ci_high", "n"])


def number(row, digits=2, sign="") -> str:
    """The estimate of a table's row with its 95 % interval: "0.50 [0.40, 0.60]", or "0.50, no
    interval" where there is none, "no number" where there is no estimate. sign: "+" writes it."""
    value, low, high = (row[c] for c in ("estimate", "ci_low", "ci_high"))
    if pd.isna(value):
        return "no number"
    if pd.isna(low) or pd.isna(high):
        return f"{value:{sign}.{digits}f}, no interval"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def report(df, by, digits=2):
    """Print each row of a table in words: its labels, the estimate and its 95 % interval."""
    by = [by] if isinstance(by, str) else list(by)
    for _, row in df.iterrows():
        label = ", ".join(visible(row[c]) if isinstance(row[c], str) else f"{c} {row[c]:g}"
                          for c in by)
        print(f"{label}: {number(row, digits)}, n = {row['n']:g}")
