"""What figures are made of: checks of a table, axes, lines with their intervals, the legend."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)
from scipy import stats as sps

from cai_utils.evaluation.shortcuts import BEST
from cai_utils.figures import style

SURFACE = "#777777"  # of the level of the best surface rule
ENOUGH = 20  # points of a curve from which a running mean says something


def check(df, figure, numbers, names=(), key=(), intervals=("ci_low", "ci_high")):
    """A copy of a table that has what the figure needs, or ValueError saying what is wrong.

    numbers, names: columns that must be full; intervals: pairs of low, high. key: the columns that
    tell rows apart; two rows of the same key would be drawn as one zigzag.

    Intervals may be nan (one unit has none); every other number has to be finite.
    """
    for column in (*names, *numbers, *intervals):
        if column not in df:
            raise ValueError(f"{figure}: the table has no column {column!r}; it has: "
                             + (", ".join(map(str, df.columns)) or "none"))
    if not len(df):
        raise ValueError(f"{figure}: the table has no rows, column {[*names, *numbers][0]!r} is "
                         "empty; run the notebook that makes it")
    df = df.copy()
    for column in (*numbers, *intervals):
        values = pd.to_numeric(df[column], errors="coerce").astype(float)
        bad = ~np.isfinite(values) if column in numbers else values.isna() & df[column].notna()
        if bad.any():
            raise ValueError(f"{figure}: column {column!r} is not a finite number in row "
                             f"{df.index[bad][0]!r} ({df[column][bad].iloc[0]!r})")
        df[column] = values
    for low, high in zip(intervals[::2], intervals[1::2]):
        if (df[low] > df[high]).any():
            row = df.index[df[low] > df[high]][0]
            raise ValueError(f"{figure}: column {low!r} is above {high!r} in row {row!r}")
    for column in names:
        if df[column].isna().any():
            raise ValueError(f"{figure}: column {column!r} is empty in row "
                             f"{df.index[df[column].isna()][0]!r}")
    if key and df.duplicated(list(key)).any():
        row = df[df.duplicated(list(key))].iloc[0]
        raise ValueError(f"{figure}: more than one row for "
                         + ", ".join(f"{c} = {row[c]}" for c in key) + "; average or split them")
    return df


def rename(df, figure, column, known):
    """Rename the values of a column by {value: axis label}; ValueError for one it lacks."""
    for value in dict.fromkeys(df[column]):
        if value not in known:
            raise ValueError(f"{figure}: column {column!r} has {value!r}; "
                             "expected one of " + ", ".join(known))
    return df.assign(**{column: df[column].map(known)})


def grid(rows, cols, height=2.3, width=None, **kw):
    """Figure and (rows, cols) axes: one column of a page wide, or a page for several panels.

    height, width: inches of a panel.
    """
    width = width or (3.4 if cols < 3 else 2.4)
    fig, axes = plt.subplots(rows, cols, figsize=(width * cols, height * rows + 0.5),
                             squeeze=False, layout="constrained", **kw)
    fig.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.03)
    return fig, axes


@style.figure
def nothing(why):
    """A figure that says why there is nothing to draw, in one sentence."""
    fig, axes = grid(1, 1, height=0.6)
    axes[0, 0].set_axis_off()
    axes[0, 0].text(0.5, 0.5, textwrap.fill(f"Nothing to draw. {why}", 60), ha="center",
                    va="center")
    return fig


@style.figure
def headed(fig, text):
    """A figure with a line of small text above its panels."""
    fig.suptitle(textwrap.fill(text, int(fig.get_figwidth() * 19)), fontsize=6.5, color="#555555")
    return fig


def line(ax, d, x, label, color, marker="o", dashes="-", shift=0.0):
    """Draw `estimate` of rows `d` against column `x`, moved by `shift`, each with its interval."""
    if not len(d):
        return
    d = d.sort_values(x)
    at, low, high = (d[c].to_numpy(float) for c in (x, "ci_low", "ci_high"))
    at = at + shift
    ax.plot(at, d["estimate"], color=color, marker=marker, linestyle=dashes, zorder=3,
            label=shown(label), markeredgecolor="white", markeredgewidth=0.5)
    ax.vlines(at, low, high, color=color, linewidth=1, alpha=0.8, zorder=2).set_gid("interval")
    ax.plot(np.tile(at, 2), np.concatenate([low, high]), "_", color=color, markersize=4, alpha=0.8,
            zorder=2)


def shown(label):
    """A name as a label of a legend: matplotlib hides those that begin with an underscore."""
    return f" {label}" if str(label).startswith("_") else label


def dodge(i, n, span):
    """How far to move the i-th of n series, so that bars at one x do not hide each other.

    span: width of the axis; neighbours are 0.9 % of it apart.
    """
    return (i - (n - 1) / 2) * 0.009 * span


def extent(values):
    """Width of an axis that holds the values, for `dodge`."""
    return (max(values) - min(values)) or 1


def legend(fig, axes, note):
    """One legend below the figure, as wide as fits, entries once, the note above them."""
    handles = {}
    for ax in np.ravel(axes):
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    title = textwrap.fill(note, int(fig.get_figwidth() * 19))
    # as few rows as fit, and these filled evenly
    fitting = {-(-len(handles) // rows) for rows in range(1, len(handles) + 1)} or {1}
    for columns in sorted(fitting, reverse=True):
        legend = fig.legend(handles.values(), handles.keys(), loc="outside lower center",
                            ncol=columns, title=title, columnspacing=1.2, handlelength=2.2)
        legend.get_title().set(multialignment="center", color="#555555")
        if legend.get_window_extent(fig.canvas.get_renderer()).width < 0.97 * fig.bbox.width:
            return legend
        if columns > 1:
            legend.remove()
    return legend


def _parameter_limits(counts):
    low, high = np.min(counts), np.max(counts)
    pad = max(1.35, (high / low) ** 0.08)
    return low / pad, high * pad


def parameter_axis(ax, counts):
    """Log axis ticked at the models themselves, leaving out labels that would touch."""
    counts = np.unique(np.asarray(counts, float))
    low, high = _parameter_limits(counts)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    panel = ax.figure.get_figwidth() / ax.get_subplotspec().get_gridspec().ncols - 0.7
    room = np.log(high / low) * 0.45 / panel  # a label is about 0.4 inches wide
    kept = []
    for c in counts[::-1]:
        if not kept or np.log(kept[-1] / c) > room:
            kept.append(c)
    ax.xaxis.set_major_locator(FixedLocator(kept[::-1]))
    ax.xaxis.set_major_formatter(FixedFormatter([style.count_text(c) for c in kept[::-1]]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Parameters")


def whole_axis(ax, label, values):
    """An axis of whole numbers, as revisions are."""
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    ax.set_xlim(min(values) - 0.3, max(values) + 0.3)


def loss_axis(ax):
    """A logarithmic y axis for losses, with plain numbers on it."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def by_size(ax, df, hue, chance=None):
    """Estimate against parameters, one line per value of column `hue`; across the panel, without
    a model, the level of chance and that of the best surface rule (`shortcuts.BEST`)."""
    low, high = _parameter_limits(df["parameters"])
    names = style.ordered(name for name in df[hue] if name != BEST)
    span = np.log(high / low) * (1 if df["parameters"].nunique() > 1 else 6)  # there is room
    for i, (name, look) in enumerate(style.looks(names).items()):
        d = df[df[hue] == name]
        apart = np.exp(dodge(i, len(names), span))
        line(ax, d.assign(parameters=d["parameters"] * apart), "parameters", name, *look)
    levels = df.loc[df[hue] == BEST, ["estimate", "ci_low", "ci_high"]].drop_duplicates()
    for level in levels.itertuples():
        ax.axhline(level.estimate, color=SURFACE, linestyle=(0, (5, 1.5)), linewidth=1.2,
                   label=BEST, zorder=1.5)
        if level.ci_low < level.ci_high:
            ax.axhspan(level.ci_low, level.ci_high, color=SURFACE, alpha=0.13, linewidth=0,
                       zorder=1).set_gid("interval")
    if chance is not None:
        ax.axhline(chance, color="#999999", linestyle=":", linewidth=1.2, label="chance")
        bottom, top = ax.get_ylim()
        ax.set_ylim(min(bottom, chance - 0.05 * (top - chance)), top)
    parameter_axis(ax, df["parameters"])


def runs_note(note, df):
    """The note, with how many runs a mean is of where `df` has several (column `runs`)."""
    runs = int(df["runs"].max()) if "runs" in df else 1
    return note if runs < 2 else (
        f"{note}; means of {runs} runs of RL, whose spread the intervals cover, too; policies "
        "without RL were trained once")


def surface_note(note, names):
    """The note, with what the best surface rule is where it is among the names."""
    about = (f"{BEST}, with its 95 % interval: the most accurate rule of one cue (length, "
             "sentences, a word, ...), chosen on other rows")
    return f"{note}; {about}" if BEST in {*names} else note


def calibration_panel(ax, df, hue):
    """Observed frequency against predicted probability, one line per value of column `hue`."""
    ax.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1.2,
            label="perfect calibration")
    for name, look in style.looks(df[hue]).items():
        line(ax, df[df[hue] == name], "mean_p", name, *look)
    ticks = np.arange(0, 1.1, 0.25)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=ticks, yticks=ticks,
           xlabel="Predicted probability", ylabel="Observed frequency")


def running(ax, x, y, label, color, dashes="-", low=None, high=None, log=False):
    """A noisy curve: the values faintly, their running mean, and a band around that mean.

    The band is the 95 % interval of the mean of a window, from the spread of the values around it.
    With `log` both are those of the logarithm, so that a falling loss keeps a band above 0; values
    of 0 or less have none and are left out.
    -> the window, 0 where the table brings its own interval, 1 where there are too few points.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    back = np.exp if log else np.asarray
    if log:
        y, low, high = (v if v is None else _log(v) for v in (y, low, high))
    window, middle = (0 if low is not None else 1), y
    if low is None and len(y) >= ENOUGH:
        window = max(3, len(y) // 10)
        middle = pd.Series(y).rolling(window, center=True, min_periods=1).mean().to_numpy()
        near = pd.Series(y - middle).rolling(3 * window, center=True, min_periods=window)
        # residuals of a mean of w points are too small by sqrt(1 - 1 / w)
        spread = near.std().to_numpy() * np.sqrt(window / (window - 1))
        count = pd.Series(y).rolling(window, center=True, min_periods=1).count().to_numpy()
        half = spread * sps.t.ppf(0.975, near.count().to_numpy() - 1) / np.sqrt(count)
        low, high = middle - half, middle + half
        ax.plot(x, back(y), color=color, linewidth=0.5, alpha=0.35)
    if low is not None:
        band = ax.fill_between(x, back(low), back(high), color=color, alpha=0.2, linewidth=0)
        band.set_gid("interval")
    ax.plot(x, back(middle), color=color, linestyle=dashes, label=shown(label))
    return window


def _log(values):
    values = np.asarray(values, float)
    return np.log(np.where(values > 0, values, np.nan))


def band_note(windows):
    """What the bands of `running` are, for the windows that were used."""
    notes = {0: "bands: 95 % intervals",
             1: f"no band: fewer than {ENOUGH} points and no interval in the table"}
    wide = sorted(w for w in windows if w > 1)
    if wide:
        span = f"{wide[0]}" if wide[0] == wide[-1] else f"{wide[0]} to {wide[-1]}"
        notes[2] = (f"lines: running mean of {span} points; bands: its 95 % interval, "
                    "points taken as independent")
    return "; ".join(notes[k] for k in (2, 0, 1) if k in {min(w, 2) for w in windows})
