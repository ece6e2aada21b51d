"""Intervals and calibration: the statistics behind every figure.

All intervals are 95 % unless `level` says otherwise. Resampled is the independent unit of the
experiment, nearly always the prompt: several samples for one prompt are one cluster.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as sps

_BLOCK = 4_000_000  # weights held at once while resampling (32 MB)


class Estimate(NamedTuple):
    """A number with its interval; `n` counts independent units (clusters where they are given).

    `low` and `high` are nan when there is only one unit: nothing can be said about its spread.
    """

    estimate: float
    low: float
    high: float
    n: int


def _vector(x, name):
    x = np.asarray(x, dtype=float)
    if x.ndim != 1:
        raise ValueError(f"{name}: expected one number per row, got shape {x.shape}")
    if len(x) == 0:
        raise ValueError(f"{name}: no rows, so there is nothing to average")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"{name}: row {bad[0]} is {x[bad[0]]}; drop such rows first and say so")
    return x


def _codes(cluster, n):
    """Cluster number of each row, (n,), and the number of clusters."""
    if cluster is None:
        return np.arange(n), n
    if len(cluster) != n:
        raise ValueError(f"cluster: {len(cluster)} labels for {n} rows; give one per row")
    # objects: an array of texts would take for each as much memory as the longest does
    codes, names = pd.factorize(pd.Series(list(cluster), dtype=object))
    if (codes < 0).any():
        raise ValueError(f"cluster: row {np.argmin(codes)} has no label")
    return codes, len(names)


def resample(n_units, n_boot, seed):
    """Yield blocks (b, n_units) of bootstrap weights: how often each unit was drawn."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n_units)
    for start in range(0, n_boot, block):
        b = min(block, n_boot - start)
        yield rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=b).astype(float)


def interval(draws, n_units, level=0.95):
    """Bootstrap percentile interval along axis 0 of `draws`: (low, high), nan for one unit.

    The tails are widened for few units (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 3.3): plain percentiles ignore that a resample of n units varies by
    (n - 1) / n too little and that its spread is itself estimated, and cover 95 % only for large n.
    """
    draws = np.asarray(draws, dtype=float)
    if n_units < 2:
        nothing = np.full(draws.shape[1:], np.nan)[()]
        return nothing, nothing.copy()  # two arrays: who fills in one leaves the other
    t = sps.t.ppf((1 - level) / 2, n_units - 1)
    tail = sps.norm.cdf(t * np.sqrt(n_units / (n_units - 1)))
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def bootstrap_mean(x, cluster=None, n_boot=2000, seed=0, level=0.95):
    """Mean of `x` (n,) with a bootstrap interval -> Estimate(estimate, low, high, n).

    `cluster` (n,), for instance prompt ids: whole clusters are resampled. For 0/1 data near 0 or 1,
    where every resample is the same, use `wilson`. Raises ValueError for no rows, nan, or a
    cluster of the wrong length.
    """
    x = _vector(x, "x")
    codes, n = _codes(cluster, len(x))
    total, count = np.bincount(codes, x), np.bincount(codes)
    draws = np.concatenate([w @ total / (w @ count) for w in resample(n, n_boot, seed)])
    low, high = interval(draws, n, level)
    return Estimate(float(x.mean()), float(low), float(high), n)


def bootstrap_means(x, cluster=None, n_boot=2000, seed=0, level=0.95):
    """Means of each line of `x` (R, N), with the same resamples for all -> estimate, low, high
    (each (R,)), n. As R times `bootstrap_mean`, in the time of one, with the interval of `wilson`
    for a line of only 0 and 1 whose units are alone in their clusters, or in which all clusters
    agree. Errors as there.
    """
    x = np.asarray(x, dtype=float)
    for r, line in enumerate(x):
        _vector(line, f"x, line {r}")
    codes, n = _codes(cluster, x.shape[1])
    total, count = np.zeros((n, len(x))), np.bincount(codes)
    np.add.at(total, codes, x.T)
    draws = np.concatenate([w @ total / (w @ count)[:, None] for w in resample(n, n_boot, seed)])
    low, high = interval(draws, n, level)
    estimate = x.mean(1)
    for r in np.flatnonzero((0 <= x.min(1)) & (x.max(1) <= 1)):
        if (n == x.shape[1] and np.isin(x[r], (0, 1)).all()) or (n > 1 and low[r] == high[r]):
            _, low[r], high[r], _ = wilson(estimate[r] * n, n, level)
    return estimate, low, high, n


def paired_difference(a, b, cluster=None, n_boot=2000, seed=0, level=0.95):
    """Mean of a - b for two measurements (n,) of the same units, row by row -> Estimate.

    Pairing removes what the units have in common: the interval is that of the difference, not of
    two means. Raises ValueError when the lengths differ.
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    if len(a) != len(b):
        raise ValueError(f"paired_difference: a has {len(a)} rows and b {len(b)}; pair them first")
    return bootstrap_mean(a - b, cluster, n_boot, seed, level)


def with_runs(found, *sides, level=0.95, within=(-np.inf, np.inf)):
    """An Estimate over prompts of the mean of several training runs, widened to cover the runs.

    sides: for each of the means that the estimate is made of (one; for a difference of two policies
    both), the values of its runs on the same prompts. Half-widths are added in quadrature: that
    over prompts, and Student's t times the standard error over runs, sqrt(sum of s^2 / runs), with
    Welch's degrees of freedom. A side of one run adds nothing, since nothing is known about its
    spread. The spread of runs holds some of the prompts' noise, so that the interval is a little
    too wide rather than too narrow. within: the range of what is measured, (0, 1) of a share.
    """
    sides = [np.asarray(values, dtype=float) for values in sides]
    parts = [(values.var(ddof=1) / len(values), len(values) - 1)
             for values in sides if len(values) > 1]
    variance = sum(part for part, _ in parts)
    if not variance:
        return found
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    half = sps.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    low, high = (found.estimate + sign * np.hypot(found.estimate - end, half)
                 for sign, end in ((-1, found.low), (1, found.high)))
    low, high = np.clip([low, high], *within)
    return Estimate(found.estimate, float(low), float(high), found.n)


def wilson(k, n, level=0.95):
    """`k` successes of `n` independent trials -> Estimate(k / n, low, high, n) (Wilson 1927).

    Never of zero width, so it is the interval for accuracies close to 0 or 1. `k` may be fractional
    (averaged answers); the interval is then conservative. Raises ValueError unless 0 <= k <= n > 0.
    """
    if not (n > 0 and 0 <= k <= n):
        raise ValueError(f"wilson: k = {k} of n = {n} is not a proportion (0 <= k <= n, n > 0)")
    z = sps.norm.ppf((1 + level) / 2)
    p, shrink = k / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at k = 0 and k = n the bound is exactly 0 or 1; rounding must not step over it
    low = 0.0 if k == 0 else float(max(0.0, middle - half))
    high = 1.0 if k == n else float(min(1.0, middle + half))
    return Estimate(float(p), low, high, int(n))


def _probabilities(p, y, bins):
    p, y = _vector(p, "p"), _vector(y, "y")
    if len(p) != len(y):
        raise ValueError(f"calibration: {len(p)} probabilities but {len(y)} outcomes")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p: probabilities lie in 0..1, got {p.min():.3g} to {p.max():.3g}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"y: outcomes are 0 or 1, row {np.argmin(np.isin(y, (0, 1)))} is neither")
    if bins < 1:
        raise ValueError(f"bins: at least 1, got {bins}")
    return p, y, np.minimum((p * bins).astype(int), bins - 1)


def calibration(p, y, bins=10, cluster=None, n_boot=2000, seed=0):
    """Reliability table of predicted probabilities `p` (n,) against outcomes `y` (n,) in {0, 1}.

    -> DataFrame(bin_mid, mean_p, frequency, ci_low, ci_high, n), one row per bin that holds
    anything, equal widths over 0..1 (paper Fig. 9). Intervals of the frequency: Wilson, or with
    `cluster` (rows that are not independent, as both orders of one question) the wider of Wilson
    over clusters and the cluster bootstrap. `n` counts rows, or clusters where given.
    """
    p, y, which = _probabilities(p, y, bins)
    codes, _ = _codes(cluster, len(p))
    rows = []
    for b in np.unique(which):
        inside = which == b
        k, n = y[inside].sum(), int(inside.sum())
        if cluster is None:
            frequency, low, high, units = wilson(k, n)
        else:
            frequency, low, high, units = bootstrap_mean(
                y[inside], codes[inside], n_boot=n_boot, seed=seed)
            # a bin where everything agrees has a bootstrap of zero width, hence Wilson's floor
            floor = wilson(units * frequency, units)
            low, high = np.fmin(low, floor.low), np.fmax(high, floor.high)
        rows.append(((b + 0.5) / bins, p[inside].mean(), frequency, low, high, units))
    names = ["bin_mid", "mean_p", "frequency", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=names)


def ece(p, y, bins=10, cluster=None, n_boot=1000, seed=0, level=0.95):
    """Expected calibration error, sum over bins of n_bin / n |frequency - mean_p| -> Estimate.

    The plug-in value is biased upwards, since noise in a bin counts as miscalibration, and badly so
    near perfect calibration. So the lower bound subtracts the noise that would arise if every bin
    within two standard errors of calibration were calibrated: it is 0 for about 95 % or more of
    perfectly calibrated data. The upper bound adds the spread of the resamples below their mean and
    leaves the bias in, so it is conservative. Compare two kinds of labels only at equal n.
    """
    p, y, which = _probabilities(p, y, bins)
    codes, n = _codes(cluster, len(p))
    unit = np.zeros((n, bins))  # summed y - p per unit and bin: all that the error depends on
    np.add.at(unit, (codes, which), y - p)
    rows = np.bincount(codes)
    gap = unit.sum(0) / len(p)
    draws = np.concatenate(
        [w @ unit / (w @ rows)[:, None] for w in resample(n, n_boot, seed)])
    noise = draws - gap
    clear = np.where(np.abs(gap) > 2 * noise.std(0), gap, 0)
    value = np.abs(gap).sum()
    _, excess = interval(np.abs(clear + noise).sum(1) - np.abs(clear).sum(), n, level)
    again = np.abs(draws).sum(1)
    shortfall, _ = interval(again - again.mean(), n, level)
    low, high = np.clip([value - excess, value - shortfall], 0, 1)
    return Estimate(float(value), float(low), float(high), n)
