"""The figure of what policies say."""

from __future__ import annotations

import textwrap

from cai_utils.evaluation.statements import SHARES
from cai_utils.figures import panels, style

KINDS = ("redteam", "sensitive", "benign")
SHOWN = 5  # measures side by side


@style.figure
def policy_statements(df, note="bars: 95 % intervals over prompts; distinct answers, commonest "
                               "sentence: among the answers of one model to one kind of prompt"):
    """Shares of the answers of which a measure holds: a row per kind of prompt, a column per
    measure, in each the methods below each other, and their sizes in colors.

    Columns: method, size, kind, measure, estimate, ci_low, ci_high; optionally parameters. Of the
    measures that are shares (`statements.SHARES`) the first SHOWN are drawn.
    """
    names = ["method", "size", "kind", "measure"]
    df = panels.check(df, "policy_statements", ["estimate"], names, names)
    there, kinds = {*df["measure"]}, [*dict.fromkeys(df["kind"])]
    shares = [measure for measure in SHARES if measure in there][:SHOWN]
    if not shares:
        raise ValueError("policy_statements: column 'measure' has none of " + ", ".join(SHARES))
    kinds.sort(key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
    methods, sizes = style.ordered(df["method"]), style.sizes_of(df)
    fig, axes = panels.grid(len(kinds), len(shares), max(1.4, 0.5 + 0.2 * len(methods)),
                            7 / max(2, len(shares)), sharex=True, sharey=True)
    for row, kind in zip(axes, kinds, strict=True):
        for ax, measure in zip(row, shares, strict=True):
            part = df[(df["kind"] == kind) & (df["measure"] == measure)]
            for i, (size, (color, marker, _, text)) in enumerate(sizes.items()):
                d = part[part["size"] == size]
                at = d["method"].map(methods.index) + (i - (len(sizes) - 1) / 2) * 0.24
                ax.hlines(at, d["ci_low"], d["ci_high"], color=color, linewidth=1
                          ).set_gid("interval")
                ax.plot(d["estimate"], at, marker, color=color, markersize=3.5, label=text)
            ax.set(yticks=range(len(methods)), yticklabels=methods,
                   ylim=(len(methods) - 0.5, -0.5), xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
        row[0].set_ylabel(f"{kind} prompts")
    for ax, measure in zip(axes[0], shares, strict=True):
        ax.set_title(textwrap.fill(measure, 18), fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("Share")
    panels.legend(fig, axes, panels.runs_note(note, df))
    return fig
