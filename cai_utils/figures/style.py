"""How figures look: the style, the colors of policies, model sizes and other series, the notes.

Policies have the colors of `experiment.registry` (Okabe and Ito), other series Tol's muted set,
model sizes viridis. Each can be told apart with any common color blindness, and the marker says the
same again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from cai_utils.experiment.registry import POLICIES

STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8,
    "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5, "legend.title_fontsize": 6.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "lines.linewidth": 1.3,
    "lines.markersize": 4.5, "figure.dpi": 150,
    "text.parse_math": False,  # a dollar in a label is a dollar
}  # fmt: skip
_user = {}  # the rc parameters of the user's style file, on top of STYLE

METHODS = {p.label: (p.color, p.marker) for p in POLICIES.values()}  # the same in every figure
# Colors that look like a policy's come last: one figure may show both.
OTHER = ["#332288", "#cc6677", "#88ccee", "#882255", "#44aa99", "#ddaa33", "#117733", "#999933",
         "#aa4499"]  # fmt: skip
MARKERS = "osD^vPX<>"
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))]
SIZES = ["xs", "s", "m", "l"]
BARS = "bars: 95 % bootstrap intervals over prompts"


def use():
    """Use the project's style for whatever is drawn from here on (the plots do so anyway)."""
    mpl.rcParams.update({**STYLE, **_user})


@contextmanager
def on_top(name):
    """Within it, plots are drawn with a user's style as well: a .mplstyle file, or the name of one
    of matplotlib's styles. Yields its rc parameters. ValueError where there is no such style.

    It sets fonts, lines, grids and the like; the colors of policies stand in the registry.
    """
    faults = []  # matplotlib only logs what it cannot read, and draws without it
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: faults.append(" ".join(record.getMessage().split()))
    logging.getLogger("matplotlib").addHandler(handler)
    try:
        rc = plt.style.library.get(str(name)) or mpl.rc_params_from_file(
            Path(name), use_default_template=False)
    except OSError:
        raise ValueError(f"{name} is no file, and no style of matplotlib: "
                         + ", ".join(plt.style.available)) from None
    finally:
        logging.getLogger("matplotlib").removeHandler(handler)
    if faults:
        raise ValueError(f"{name}: {faults[0]}")
    if rc.get("text.usetex"):
        raise ValueError(f"{name}: remove text.usetex; labels are plain text, and TeX would read "
                         "marks in them as commands")
    _user.update({key: rc[key] for key in rc if key != "backend"})
    try:
        yield dict(_user)
    finally:
        _user.clear()


def figure(draw):
    """Draw in the project's style, lay out while that style holds, and close in pyplot."""
    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with mpl.rc_context({**STYLE, **_user}):
            fig = draw(*args, **kwargs)
            fig.draw_without_rendering()  # ticks are made when first drawn
        plt.close(fig)
        return fig
    return wrapped


def _key(name):
    return re.sub("[^a-z0-9]", "", str(name).lower())


def _policies():
    """{key of a name: label of the policy whose color it has}: policies, by label and by name, and
    PMs, which look like the policy that they reward ("helpful PM" like helpful RLHF)."""
    known = {"harmless": "SL-CAI", "harmlesspm": "SL-CAI"}  # this PM rewards none
    for policy in POLICIES.values():
        reward = policy.reward or ""
        pm = reward.removeprefix("pm_") if reward.startswith("pm_") else None
        for name in (policy.label, policy.name, *([pm, f"{pm} PM"] if pm else ())):
            known.setdefault(_key(name), policy.label)
    return known


_KNOWN = _policies()
_RANK = {_key(label): rank for rank, label in enumerate(METHODS)}


def looks(names):
    """{name: (color, marker)}: those of policies and their PMs, others in order of appearance."""
    free = itertools.cycle(zip(OTHER, MARKERS))
    return {name: METHODS[_KNOWN[_key(name)]] if _key(name) in _KNOWN else next(free)
            for name in dict.fromkeys(names)}


def ordered(names):
    """Policies in the paper's order, then the rest as they come."""
    return sorted(dict.fromkeys(names), key=lambda name: _RANK.get(_key(name), len(_RANK)))


def sizes_of(df):
    """{size: (color, marker, dashes, label)}, small to large, larger is darker."""
    names = list(dict.fromkeys(df["size"]))
    known = set(names) <= set(SIZES)
    count = df.groupby("size")["parameters"].first() if "parameters" in df else None
    if count is not None:
        names.sort(key=lambda size: count[size])
    elif known:
        names.sort(key=SIZES.index)
    place = {size: SIZES.index(size) if known else i for i, size in enumerate(names)}
    span = max(3, len(names) - 1)
    return {size: (mpl.colormaps["viridis"](0.82 * (1 - place[size] / span)),
                   MARKERS[place[size] % 9], DASHES[place[size] % 4],
                   str(size) if count is None else f"{size} ({count_text(count[size])})")
            for size in names}


def count_text(n):
    """Parameters as people write them: 101376 -> 0.1M, 52e9 -> 52B."""
    scale, unit = (1e9, "B") if n >= 1e9 else (1e6, "M") if n >= 5e4 else (1, "")
    return f"{n / scale:.2g}{unit}" if n / scale < 100 else f"{n / scale:.0f}{unit}"
