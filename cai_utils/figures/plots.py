"""One function per figure: a tidy table in, a matplotlib Figure out, in one style.

Every function draws what is in the table and nothing else, with the interval of every number, and
leaves the Figure closed in pyplot: end a notebook cell with it to show it once. All raise
ValueError naming the column that is missing, empty or not finite, or the rows that repeat.
`ci_low` and `ci_high` belong to every table, `n` may.
"""

from __future__ import annotations

import itertools

from cai_utils.data.xstest import COMPLIANCE, FULL, PARTIAL
from cai_utils.evaluation.refusal_agreement import READ
from cai_utils.figures import panels, style

ELO_AXES = {"helpfulness": "Helpfulness Elo", "harmlessness": "Harmlessness Elo"}
PM_AXES = {"harmlessness": "Harmlessness PM score", "helpfulness": "Helpfulness PM score",
           "HH": "HH PM score"}
TRUE_AXES = {"harm": "True harm (0 to 4)", "harmlessness": "True harmlessness",
             "helpfulness": "True helpfulness (0 to 4)", "HH": "True HH score",
             "evasive": "Evasive share", "retained": "Harmless content kept"}
RL_AXES = {"objective/scores": "PM score", "objective/kl": "KL to the start (nats)",
           "objective/entropy": "Entropy (nats)", "val/response_length": "Response length (tokens)"}
EPISODES = "RL training sequences"


def _elo_note(df, note):
    """The note, with the number of runs where there are several, and the names of those without a
    finite maximum-likelihood score (`elo.fit`)."""
    note = panels.runs_note(note, df)
    if "finite" not in df or not df["finite"].eq(False).any():
        return note
    rows = df[df["finite"].eq(False)]
    names = dict.fromkeys(f"{m} ({size})" for m, size in zip(rows["method"], rows["size"]))
    return (f"{note}; no finite maximum-likelihood score (they, or others, won all their games), "
            f"shown is the regularised one: {', '.join(names)}")


@style.figure
def fig02_elo_frontier(df, note="crosses: 95 % bootstrap intervals over prompts; "
                                "lines: checkpoints of RL, the last one large"):
    """Paper Fig. 2. One panel per size; a method with several `step`s is a curve.

    Columns: method, size, step, helpfulness, helpfulness_low, helpfulness_high, harmlessness,
    harmlessness_low, harmlessness_high.
    """
    ends = [f"{axis}_{end}" for axis in ELO_AXES for end in ("low", "high")]
    df = panels.check(df, "fig02_elo_frontier", ["step", *ELO_AXES], ["method", "size"],
                      ["method", "size", "step"], ends)
    sizes, methods = style.sizes_of(df), style.looks(style.ordered(df["method"]))
    fig, axes = panels.grid(1, len(sizes), height=2.7, sharex=True, sharey=True)
    for (ax, size), (method, (color, marker)) in itertools.product(
            zip(axes[0], sizes), methods.items()):
        d = df[(df["method"] == method) & (df["size"] == size)].sort_values("step")
        if not len(d):
            continue
        x, y = d["helpfulness"], d["harmlessness"]
        thin = dict(color=color, linewidth=0.9, alpha=0.55, zorder=2, gid="interval")
        ax.hlines(y, d["helpfulness_low"], d["helpfulness_high"], **thin)
        ax.vlines(x, d["harmlessness_low"], d["harmlessness_high"], **thin)
        ax.plot(x, y, color=color, marker=marker, markersize=3, zorder=3)
        ax.plot(x.iloc[-1:], y.iloc[-1:], color=color, marker=marker, markersize=7, zorder=4,
                markeredgecolor="white", markeredgewidth=0.6, label=panels.shown(method))
    for ax, size in zip(axes[0], sizes.values()):
        ax.set(xlabel=ELO_AXES["helpfulness"], title=size[3] if len(sizes) > 1 else None)
    axes[0, 0].set_ylabel(ELO_AXES["harmlessness"])
    panels.legend(fig, axes, _elo_note(df, note))
    return fig


@style.figure
def fig03_elo_scaling(df, note=style.BARS):
    """Paper Fig. 3. Columns: method, size, parameters, axis, estimate (Elo), ci_low, ci_high."""
    name, names = "fig03_elo_scaling", ["method", "size", "axis"]
    df = panels.check(df, name, ["parameters", "estimate"], names, names)
    df = panels.rename(df, name, "axis", ELO_AXES)
    fig, axes = panels.grid(1, 2)
    for ax, label in zip(axes[0], ELO_AXES.values()):
        if (df["axis"] == label).any():
            panels.by_size(ax, df[df["axis"] == label], "method")
        ax.set(xlabel="Parameters", ylabel=label)
    panels.legend(fig, axes, _elo_note(df, note))
    return fig


@style.figure
def fig04_harm_identification(df, chance=0.5, note="bars: 95 % intervals over conversations"):
    """Paper Fig. 4. Columns: size, parameters, method, estimate (accuracy), ci_low, ci_high."""
    names = ["size", "method"]
    df = panels.check(df, "fig04_harm_identification", ["parameters", "estimate"], names, names)
    fig, axes = panels.grid(1, 1, height=2.6)
    panels.by_size(axes[0, 0], df, "method", chance)
    axes[0, 0].set_ylabel("Accuracy")
    panels.legend(fig, axes, panels.surface_note(note, df["method"]))
    return fig


def _measures(df, figure):
    """Add `label`, what a row measures -> the table, and the labels of its PM and truth rows."""
    df = panels.rename(df, figure, "measured_by", {"PM": "PM", "truth": "truth"})
    true = df["measured_by"] == "truth"
    pm = panels.rename(df[~true], figure, "axis", PM_AXES)["axis"]
    truth = df.loc[true, "axis"].map(lambda axis: TRUE_AXES.get(axis, f"True {axis}"))
    rows = []
    for found, known in ((pm, PM_AXES), (truth, TRUE_AXES)):
        names = [name for name in known.values() if name in set(found)]
        rows.append(names + [name for name in dict.fromkeys(found) if name not in names])
    label = pm.reindex(df.index).fillna(truth.reindex(df.index))
    return df.assign(label=label), [row for row in rows if row]


@style.figure
def fig05_revisions(df, note=style.BARS):
    """Paper Fig. 5, with a second row of panels for rows with measured_by = "truth".

    Columns: size, parameters, revision, axis (harmlessness, helpfulness, HH), measured_by (PM or
    truth), estimate, ci_low, ci_high. Truth rows may have any axis; `harm` is true harm.
    """
    name, names = "fig05_revisions", ["size", "axis", "measured_by"]
    df = panels.check(df, name, ["parameters", "revision", "estimate"], names,
                      [*names, "revision"])
    df, rows = _measures(df, name)
    if len(rows) == 1 and len(rows[0]) == 4:  # side by side they would be too small to read
        rows = [rows[0][:2], rows[0][2:]]
    sizes, cols = style.sizes_of(df), max(map(len, rows))
    fig, axes = panels.grid(len(rows), cols)
    span = panels.extent(df["revision"])
    labels = itertools.chain(*(row + [None] * (cols - len(row)) for row in rows))
    for ax, label in zip(axes.ravel(), labels):
        if label is None:
            ax.set_axis_off()
            continue
        for i, (size, (color, marker, _, text)) in enumerate(sizes.items()):
            d = df[(df["label"] == label) & (df["size"] == size)]
            panels.line(ax, d, "revision", text, color, marker,
                        shift=panels.dodge(i, len(sizes), span))
        panels.whole_axis(ax, "Number of revisions", df["revision"])
        ax.set_ylabel(label)
    panels.legend(fig, axes, note)
    return fig


@style.figure
def fig07_critique_ablation(df, note=style.BARS):
    """Paper Fig. 7: one panel per size, a second row for rows with measured_by = "truth".

    Columns: size, parameters, revision, method (critiqued or direct), measured_by (PM or truth),
    estimate, ci_low, ci_high; optionally axis. Without it PM rows are the harmlessness score and
    truth rows are true harm.
    """
    name, names = "fig07_critique_ablation", ["size", "method", "measured_by", "axis"]
    if "axis" not in df and "measured_by" in df:
        df = df.assign(axis=df["measured_by"].map({"PM": "harmlessness"}).fillna("harm"))
    df = panels.check(df, name, ["parameters", "revision", "estimate"], names,
                      [*names, "revision"])
    ways = {"critiqued": "critiqued revisions", "direct": "direct revisions"}
    df, rows = _measures(panels.rename(df, name, "method", ways), name)
    labels, sizes = list(itertools.chain(*rows)), style.sizes_of(df)
    fig, axes = panels.grid(len(labels), len(sizes), sharey="row", sharex=True)
    span = panels.extent(df["revision"])
    for (row, label), (col, size) in itertools.product(enumerate(labels), enumerate(sizes)):
        ax = axes[row, col]
        for i, method in enumerate(ways.values()):
            d = df[(df["label"] == label) & (df["size"] == size) & (df["method"] == method)]
            panels.line(ax, d, "revision", method, style.OTHER[i], "os"[i], style.DASHES[i],
                        panels.dodge(i, 2, span))
        last = row == len(labels) - 1
        panels.whole_axis(ax, "Number of revisions" if last else "", df["revision"])
        ax.set(title=sizes[size][3] if row == 0 else None, ylabel=label if col == 0 else None)
    panels.legend(fig, axes, note)
    return fig


def _runs(df):
    """(method, size, label, color, marker, dashes) of every run there is, in the paper's order."""
    sizes, methods = style.sizes_of(df), style.looks(style.ordered(df["method"]))
    alone = len(sizes) == 1
    there = set(zip(df["method"], df["size"]))
    return [(method, size, method if alone else f"{method}, {text}", color, marker,
             "-" if alone else dashes)
            for method, (color, marker) in methods.items()
            for size, (_, _, dashes, text) in sizes.items() if (method, size) in there]


@style.figure
def fig08_elo_training(df, note=style.BARS):
    """Paper Fig. 8. Columns: method, size, step (RL episodes), axis, estimate (Elo), ci_low,
    ci_high. Color is the method, dashes the size."""
    name, names = "fig08_elo_training", ["method", "size", "axis"]
    df = panels.check(df, name, ["step", "estimate"], names, [*names, "step"])
    df, runs = panels.rename(df, name, "axis", ELO_AXES), _runs(df)
    fig, axes = panels.grid(1, 2)
    span = panels.extent(df["step"])
    for ax, label in zip(axes[0], ELO_AXES.values()):
        for i, (method, size, *look) in enumerate(runs):
            d = df[(df["axis"] == label) & (df["method"] == method) & (df["size"] == size)]
            panels.line(ax, d, "step", *look, panels.dodge(i, len(runs), span))
        ax.set(xlabel=EPISODES, ylabel=label)
    panels.legend(fig, axes, _elo_note(df, note))
    return fig


@style.figure
def fig09_calibration(df, note="bars: 95 % intervals of the frequency in each bin"):
    """Paper Fig. 9. Columns: labels (their kind), bin, mean_p, estimate (frequency), ci_low,
    ci_high."""
    df = panels.check(df, "fig09_calibration", ["bin", "mean_p", "estimate"], ["labels"],
                      ["labels", "bin"])
    fig, axes = panels.grid(1, 1, height=3)
    panels.calibration_panel(axes[0, 0], df, "labels")
    axes[0, 0].set_aspect("equal")
    panels.legend(fig, axes, note)
    return fig


@style.figure
def fig12_identify_classify(df, note="bars: 95 % intervals over questions"):
    """Paper Fig. 12, one panel per task. Columns: task (it titles the panel), chance, size,
    parameters, method, estimate (accuracy), ci_low, ci_high."""
    names = ["task", "size", "method"]
    df = panels.check(df, "fig12_identify_classify", ["parameters", "chance", "estimate"], names,
                      names)
    parts = list(df.groupby("task", sort=False))
    fig, axes = panels.grid(1, len(parts), height=2.6)
    for ax, (task, d) in zip(axes[0], parts):
        panels.by_size(ax, d, "method", d["chance"].iloc[0])
        ax.set(ylabel="Accuracy", title=str(task))
    panels.legend(fig, axes, panels.surface_note(note, df["method"]))
    return fig


@style.figure
def accuracy_by_size(df, calibration=None, chance=0.5,
                     note="bars: 95 % intervals over comparisons"):
    """Accuracy of preference models by size, with their calibration in a last panel.

    df: size, parameters, method (what the PM was trained on), estimate, ci_low, ci_high; optionally
    axis (what it was tested on): one panel each. calibration: the columns of fig09, with `labels`
    the same names as `method`.
    """
    name, names = "accuracy_by_size", ["size", "method"] + (["axis"] if "axis" in df else [])
    df = panels.check(df, name, ["parameters", "estimate"], names, names)
    parts = list(df.groupby("axis", sort=False)) if "axis" in df else [(None, df)]
    fig, axes = panels.grid(1, len(parts) + (calibration is not None), height=2.6)
    for ax, (tested, d) in zip(axes[0], parts):
        panels.by_size(ax, d, "method", chance)
        ax.set(ylabel="Accuracy", title=None if tested is None else f"{tested} comparisons")
    shown = axes[0, : len(parts)]
    limits = [ax.get_ylim() for ax in shown]
    for ax in shown:  # one scale, that of the widest panel
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    if calibration is not None:
        d = panels.check(calibration, f"{name}, calibration", ["bin", "mean_p", "estimate"],
                         ["labels"], ["labels", "bin"])
        panels.calibration_panel(axes[0, -1], d, "labels")
        axes[0, -1].set_title("calibration")
    panels.legend(fig, axes, panels.surface_note(note, df["method"]))
    return fig


@style.figure
def pretraining_curves(df, note=None):
    """Loss of the series while it is pretrained, one panel per split.

    Columns: size, tokens, loss (nats per token), split; optionally ci_low and ci_high (nan where
    there is none), parameters. Without an interval, a curve of 20 points or more gets its running
    mean and the interval of that.
    """
    ends = [column for column in ("ci_low", "ci_high") if column in df]
    df = panels.check(df, "pretraining_curves", ["tokens", "loss"], ["size", "split"],
                      ["size", "split", "tokens"], ends)
    sizes, splits = style.sizes_of(df), list(dict.fromkeys(df["split"]))
    fig, axes = panels.grid(1, len(splits), sharey=True)
    windows = set()
    for (ax, split), (size, (color, _, dashes, text)) in itertools.product(
            zip(axes[0], splits), sizes.items()):
        d = df[(df["split"] == split) & (df["size"] == size)].sort_values("tokens")
        if len(d):
            own = len(ends) == 2 and d[ends].notna().any(axis=None)
            windows.add(panels.running(ax, d["tokens"] / 1e6, d["loss"], text, color, dashes,
                                       *([d[c] for c in ends] if own else []), log=True))
    for ax, split in zip(axes[0], splits):
        panels.loss_axis(ax)
        ax.set(xlabel="Tokens (millions)", title=str(split) if len(splits) > 1 else None)
    axes[0, 0].set_ylabel("Loss (nats per token)")
    panels.legend(fig, axes, note or panels.band_note(windows))
    return fig


@style.figure
def rl_curves(df, note=None):
    """RL runs: PM score, KL, entropy and length by episode, from the history of `ppo.train`.

    Columns: method, size, episode and objective/scores, objective/kl, objective/entropy,
    val/response_length (trl's names), one row per iteration; or the short names reward, kl,
    entropy, length. Color is the method, dashes the size.
    """
    short = dict(zip(("reward", "kl", "entropy", "length"), RL_AXES))
    df = df.rename(columns={old: new for old, new in short.items() if new not in df})
    df = panels.check(df, "rl_curves", ["episode", *RL_AXES], ["method", "size"],
                      ["method", "size", "episode"], ())
    fig, axes = panels.grid(2, 2, height=1.9, sharex=True)
    windows = set()
    for ax, (column, label) in zip(axes.ravel(), RL_AXES.items()):
        for method, size, text, color, _, dashes in _runs(df):
            d = df[(df["method"] == method) & (df["size"] == size)].sort_values("episode")
            windows.add(panels.running(ax, d["episode"], d[column], text, color, dashes))
        ax.set(ylabel=label, xlabel=EPISODES if ax in axes[-1] else None)
    panels.legend(fig, axes, note or panels.band_note(windows))
    return fig


@style.figure
def rl_truth(df, note=style.BARS):
    """What the ground truth says along RL training, one panel per axis.

    Columns: method, size, step (RL episodes), axis (any text; it labels the panel), estimate,
    ci_low, ci_high.
    """
    names = ["method", "size", "axis"]
    df = panels.check(df, "rl_truth", ["step", "estimate"], names, [*names, "step"])
    parts = list(df.groupby("axis", sort=False))
    fig, axes = panels.grid(-(-len(parts) // 2), min(2, len(parts)), height=1.9)
    for ax in axes.ravel()[len(parts):]:
        ax.set_axis_off()
    runs, span = _runs(df), panels.extent(df["step"])
    for ax, (axis, part) in zip(axes.ravel(), parts):
        for i, (method, size, *look) in enumerate(runs):
            d = part[(part["method"] == method) & (part["size"] == size)]
            panels.line(ax, d, "step", *look, panels.dodge(i, len(runs), span))
        ax.set(xlabel=EPISODES, ylabel=str(axis))
    panels.legend(fig, axes, note)
    return fig


@style.figure
def sl_cai_n(df, note=style.BARS):
    """SL-CAI trained on revisions up to the n-th, one panel per axis.

    Columns: revision (without such a column: n), axis (any text; it labels the panel), estimate,
    ci_low, ci_high; optionally size, one line each.
    """
    names = ["axis"] + (["size"] if "size" in df else [])
    x = "revision" if "revision" in df else "n"
    df = panels.check(df, "sl_cai_n", [x, "estimate"], names, [*names, x])
    parts = list(df.groupby("axis", sort=False))
    cols = 2 if len(parts) == 4 else min(3, len(parts))
    fig, axes = panels.grid(-(-len(parts) // cols), cols, height=1.9)
    for ax in axes.ravel()[len(parts):]:
        ax.set_axis_off()
    sizes = style.sizes_of(df) if "size" in df else {}
    for ax, (axis, part) in zip(axes.ravel(), parts):
        if not sizes:
            panels.line(ax, part, x, "SL-CAI", *style.METHODS["SL-CAI"])
        for i, (size, (color, marker, _, text)) in enumerate(sizes.items()):
            panels.line(ax, part[part["size"] == size], x, text, color, marker,
                        shift=panels.dodge(i, len(sizes), panels.extent(df[x])))
        panels.whole_axis(ax, "SL-CAI-n: number of revisions", df[x])
        ax.set_ylabel(str(axis))
    panels.legend(fig, axes, note)
    return fig


@style.figure
def published_models(df, note="bars: 95 % intervals over prompts; of shares the wider of bootstrap "
                              "and Wilson; how well evasive answers are read: refusal_agreement"):
    """Models side by side, one panel per measure, prompt sets apart.

    Columns: method, kind (the prompt set), measure (any text; it labels the panel), estimate,
    ci_low, ci_high.
    """
    names = ["method", "kind", "measure"]
    df = panels.check(df, "published_models", ["estimate"], names, names)
    methods, parts = style.ordered(df["method"]), list(df.groupby("measure", sort=False))
    fig, axes = panels.grid(1, len(parts), height=2.4, sharey=True)
    kinds = style.looks(df["kind"])
    names = {"lamda": "LaMDA", "instructgpt": "InstructGPT", "palms": "PALMS"}
    for (ax, (measure, part)), (i, (kind, (color, marker))) in itertools.product(
            zip(axes[0], parts), enumerate(kinds.items())):
        d = part[part["kind"] == kind]
        at = d["method"].map(methods.index) + (i - (len(kinds) - 1) / 2) * 0.2
        ax.hlines(at, d["ci_low"], d["ci_high"], color=color, linewidth=1.2).set_gid("interval")
        ax.plot(d["estimate"], at, marker, color=color, label=f"{names.get(kind, kind)} prompts")
        ax.set(xlabel=str(measure), yticks=range(len(methods)), yticklabels=methods,
               ylim=(len(methods) - 0.5, -0.5))
    panels.legend(fig, axes, note)
    return fig


@style.figure
def refusal_agreement(df, note="bars: 95 % bootstrap intervals over prompts (XSTest: over types of "
                               "prompts); prompts that were not used to write the rule. XSTest's "
                               "labels are by people, those of the samples by language models. "
                               "Prompt alone: what most of the other models did; two other models "
                               "or fewer make a poor guess"):
    """Kappa of readings of refusals with labels, one panel per question, test prompts alone.

    Columns: question, source, split, read_by, measure, estimate, ci_low, ci_high.
    """
    names = ["question", "source", "read_by", "split", "measure"]
    df = panels.check(df, "refusal_agreement", ["estimate"], names, names)
    df = df[(df["measure"] == "kappa") & (df["split"] == "test")]
    rows, looks = list(dict.fromkeys(df["source"])), style.looks(df["read_by"])
    parts = list(df.groupby("question", sort=False))
    fig, axes = panels.grid(1, len(parts), max(2.4, 0.6 * len(rows)), sharex=True, sharey=True)
    for (ax, (question, part)), (i, (reader, (color, marker))) in itertools.product(
            zip(axes[0], parts), enumerate(looks.items())):
        d = part[part["read_by"] == reader]
        at = d["source"].map(rows.index).astype(float)
        at += (i - (len(looks) - 1) / 2) * 0.8 / len(looks)
        ax.hlines(at, d["ci_low"], d["ci_high"], color=color, linewidth=1.2).set_gid("interval")
        ax.plot(d["estimate"], at, marker, color=color, label=reader)
        ax.set(xlabel=f"Kappa, {question}", yticks=range(len(rows)), yticklabels=rows,
               ylim=(len(rows) - 0.5, -0.5))
    panels.legend(fig, axes, note)
    return fig


@style.figure
def refusal_confusion(df, note="numbers: labelled responses to prompts that were not used to write "
                               "the rule; colors: their share of a label's; 95 % intervals of "
                               "agreement: table refusal_agreement"):
    """What the rule says of responses (columns), by their label (rows); a panel per source.

    Columns: source, human (a label of XSTest), and the number of responses for each of
    `refusal_agreement.READ`.
    """
    import seaborn  # takes a second, so only where it draws

    labels, read = [COMPLIANCE, PARTIAL, FULL], list(READ)
    names = ["source", "human"]
    df = panels.check(df, "refusal_confusion", read, names, names, ())
    sources = list(dict.fromkeys(df["source"]))
    fig, axes = panels.grid(1, len(sources), 2.2, sharex=True, sharey=True)
    for ax, source in zip(axes[0], sources, strict=True):
        d = df[df["source"] == source].set_index("human")
        found = d.reindex(labels)[read].fillna(0)
        seaborn.heatmap(found.div(found.sum(axis=1).clip(lower=1), axis=0), annot=found, fmt=".0f",
                        vmin=0, vmax=1, cmap="Blues", cbar=False, linewidths=1, ax=ax,
                        xticklabels=[text.replace(" ", "\n", 1) for text in read],
                        yticklabels=["none", "partial", "full"])
        ax.tick_params(axis="y", labelrotation=0)
        ax.set(title=source, xlabel="The rule: the response ...",
               ylabel="Refusal (label)" if ax is axes[0, 0] else None)
    panels.legend(fig, axes, note)
    return fig
