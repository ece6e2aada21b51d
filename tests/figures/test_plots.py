import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cai_utils.evaluation.shortcuts import BEST
from cai_utils.evaluation.statements import SHARES
from cai_utils.experiment.registry import POLICIES
from cai_utils.figures import panels, plots, statements, style

SIZES = {"xs": 101_376, "s": 612_345, "m": 2_234_567}
METHODS = list(style.METHODS)
RL = ["helpful RLHF", "HH RLHF", "RL-CAI", "RL-CAI with CoT"]


def frame(rows, seed=0):
    """Rows of (columns, estimate) -> a tidy table whose every number is different."""
    rng = np.random.default_rng(seed)
    half = rng.uniform(0.02, 0.05, len(rows))
    d = pd.DataFrame([row for row, _ in rows])
    d["estimate"] = [value for _, value in rows] + rng.uniform(-0.01, 0.01, len(rows))
    d["ci_low"], d["ci_high"], d["n"] = d["estimate"] - half, d["estimate"] + 1.3 * half, 100
    return d


def frontier(sizes=("s",)):
    rng = np.random.default_rng(0)
    rows = [{"method": m, "size": s, "step": k * 1024} for m in METHODS for s in sizes
            for k in range(4 if m in RL else 1)]
    d = pd.DataFrame(rows)
    for axis in ("helpfulness", "harmlessness"):
        d[axis] = rng.normal(0, 100, len(d))
        d[axis + "_low"], d[axis + "_high"] = d[axis] - 20, d[axis] + 25
    return d.assign(n=100)


def scaling():
    return frame([({"method": m, "size": s, "parameters": p, "axis": a}, i * 40 + j)
                  for i, m in enumerate(METHODS) for j, (s, p) in enumerate(SIZES.items())
                  for a in ("helpfulness", "harmlessness")])


def identification():
    return frame([({"size": s, "parameters": p, "method": m}, 0.55 + 0.1 * j + 0.02 * i)
                  for i, m in enumerate(["multiple choice", "CoT", "CoT, 5 samples", "PM (HH)"])
                  for j, (s, p) in enumerate(SIZES.items())])


def with_rule(df, **more):
    """A table with rows of the best surface rule, the same at every size."""
    rule = df.drop_duplicates([*more, "size"]).assign(
        method=BEST, estimate=0.38, ci_low=0.35, ci_high=0.41)
    return pd.concat([df, rule], ignore_index=True)


def said():
    return frame([({"method": m, "size": s, "parameters": p, "kind": k, "measure": measure},
                   0.2 + 0.1 * i) for i, m in enumerate(METHODS) for s, p in SIZES.items()
                  for k in ("benign", "redteam") for measure in SHARES])


def revisions():
    axes = [("PM", "harmlessness"), ("PM", "helpfulness"), ("PM", "HH"), ("truth", "harm"),
            ("truth", "helpfulness")]
    return frame([({"size": s, "parameters": p, "revision": r, "axis": a, "measured_by": by},
                   0.5**r + i) for i, (s, p) in enumerate(SIZES.items()) for r in range(5)
                  for by, a in axes])


def ablation():
    return frame([({"size": s, "parameters": p, "revision": r, "method": m, "measured_by": by},
                   0.5**r + i) for s, p in SIZES.items() for r in range(5)
                  for i, m in enumerate(("critiqued", "direct")) for by in ("PM", "truth")])


def training():
    return frame([({"method": m, "size": "s", "step": k * 1024, "axis": a}, 40 * i * k)
                  for i, m in enumerate(RL) for k in range(5)
                  for a in ("helpfulness", "harmlessness")])


def labels():
    return frame([({"labels": kind, "bin": b, "mean_p": 0.1 * b + 0.05}, 0.1 * b + 0.04)
                  for kind in ("multiple choice", "CoT, clamped") for b in range(10)])


def accuracies():
    return frame([({"size": s, "parameters": p, "method": m, "axis": a}, 0.6 + 0.1 * j)
                  for j, (s, p) in enumerate(SIZES.items()) for m in ("helpful", "harmless", "HH")
                  for a in ("helpful", "harmless")])


def identify_classify():
    d = frame([({"task": t, "size": s, "parameters": p, "method": m}, 0.6 + 0.1 * j)
               for j, (s, p) in enumerate(SIZES.items()) for m in ("multiple choice", "CoT")
               for t in ("harmful or harmless", "which kind of harm")])
    return d.assign(chance=np.where(d["task"] == "which kind of harm", 1 / 9, 0.5))


def real_identify():
    """One real model, and only one of the two published files."""
    return frame([({"task": "harmful or harmless", "size": "135M", "parameters": 106_203_456,
                    "method": m, "chance": 0.5}, 0.5 + 0.1 * i)
                  for i, m in enumerate(("multiple choice", "few-shot", "CoT"))])


def truth_in_training():
    return frame([({"method": m, "size": "s", "step": k * 1024, "axis": a}, i + k)
                  for i, m in enumerate(RL) for k in range(4)
                  for a in ("True harm", "True helpfulness", "Evasive share")])


def losses():
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"size": s, "tokens": t, "split": split, "loss": 2 + rng.normal(0, 0.1)}
                         for s in SIZES for split, steps in (("train", 60), ("held out", 6))
                         for t in np.linspace(1e5, 15e6, steps)])


def history(sizes=("s",)):
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"method": m, "size": s, "episode": 128 * k,
                          **{c: k + rng.normal() for c in plots.RL_AXES}}
                         for m in RL for s in sizes for k in range(1, 31)])


def supervised():
    d = frame([({"axis": a, "size": s}, i + r) for s in ("xs", "m")
               for i, a in enumerate(("True harm", "True helpfulness")) for r in range(1, 5)])
    return d.assign(n=[r for _ in range(4) for r in range(1, 5)])


def agreements():
    return frame([({"source": source, "split": split, "question": question, "read_by": by,
                    "measure": measure}, 0.1 * i + 0.05 * j)
                  for i, source in enumerate(("XSTest, gpt4", "published samples"))
                  for j, by in enumerate(("rule", "reader", "prompt alone"))
                  for question in ("evasive", "full refusal, long")
                  for split in ("development", "test") for measure in ("kappa", "precision")])


def confusions():
    return pd.DataFrame([{"source": source, "human": human, "evasive": 5 + i,
                          "declines at length": 3 * i, "does not decline": 1}
                         for source in ("XSTest, gpt4", "published samples")
                         for i, human in enumerate(("full compliance", "full refusal"))])


FIGURES = {
    "fig02": (plots.fig02_elo_frontier, frontier),
    "fig02, sizes": (plots.fig02_elo_frontier, lambda: frontier(SIZES)),
    "fig03": (plots.fig03_elo_scaling, scaling),
    "fig04": (plots.fig04_harm_identification, identification),
    "fig04, one size": (plots.fig04_harm_identification,
                        lambda: identification().query("size == 'xs'")),
    "fig04, rule": (plots.fig04_harm_identification, lambda: with_rule(identification())),
    "fig05": (plots.fig05_revisions, revisions),
    "fig07": (plots.fig07_critique_ablation, ablation),
    "fig08": (plots.fig08_elo_training, training),
    "fig09": (plots.fig09_calibration, labels),
    "accuracy": (lambda df: plots.accuracy_by_size(df, labels()), accuracies),
    "pretraining": (plots.pretraining_curves, losses),
    "rl": (plots.rl_curves, history),
    "rl, sizes": (plots.rl_curves, lambda: history(("xs", "s"))),
    "sl_cai_n": (plots.sl_cai_n, supervised),
    "fig12": (plots.fig12_identify_classify, identify_classify),
    "fig12, one task": (plots.fig12_identify_classify, real_identify),
    "rl_truth": (plots.rl_truth, truth_in_training),
    "statements": (statements.policy_statements, said),
    "refusals": (plots.refusal_agreement, agreements),
    "confusion": (plots.refusal_confusion, confusions),
}
DRAWN = {}


def drawn(name):
    """The figure of that name, drawn once for all tests that only look at it."""
    if name not in DRAWN:
        draw, make = FIGURES[name]
        DRAWN[name] = draw(make())
    return DRAWN[name]


def shown(fig):
    return [ax for ax in fig.axes if ax.axison]


def segments(ax):
    """(low, high) of every vertical interval bar in a panel."""
    bars = [c for c in ax.collections if c.get_gid() == "interval"]
    found = [s for c in bars if hasattr(c, "get_segments") for s in c.get_segments() if len(s)]
    return sorted((s[0][1], s[1][1]) for s in found if s[0][0] == s[1][0])


def heights(ax):
    """y of every marker that stands for an estimate."""
    lines = [line for line in ax.lines
             if line.get_marker() not in ("None", "_", "") and line.get_markersize() < 6]
    return sorted(y for line in lines for y in line.get_ydata())


def test_figures_are_drawn_in_one_style_and_closed():
    before = dict(mpl.rcParams)
    for name in FIGURES:
        fig = drawn(name)
        assert isinstance(fig, mpl.figure.Figure)
        assert 3.3 <= fig.get_figwidth() <= 7.3
    assert not plt.get_fignums()
    assert dict(mpl.rcParams) == before
    with mpl.rc_context():
        style.use()
        assert mpl.rcParams["axes.spines.top"] is False


@pytest.mark.parametrize("name", FIGURES)
def test_layout_is_legible(name):
    """The legend is inside the page and off the data, no text is clipped, no labels collide."""
    fig = drawn(name)
    page = fig.bbox.padded(1)
    legend = fig.legends[0].get_window_extent()
    inside = [legend] + [ax.get_tightbbox() for ax in shown(fig)]
    for box in inside:
        assert page.x0 <= box.x0 and box.x1 <= page.x1
        assert page.y0 <= box.y0 and box.y1 <= page.y1
    for ax in shown(fig):
        assert not legend.overlaps(ax.get_tightbbox())
        for axis, (lo, hi) in ((ax.xaxis, ("x0", "x1")), (ax.yaxis, ("y0", "y1"))):
            ticks = [t.label1.get_window_extent() for t in axis.get_major_ticks()
                     if t.label1.get_visible() and t.label1.get_text()]
            ticks.sort(key=lambda b: getattr(b, lo))
            for one, two in zip(ticks, ticks[1:]):
                assert getattr(one, hi) < getattr(two, lo)
        for other in shown(fig):
            assert other is ax or not ax.get_tightbbox().padded(-1).overlaps(
                other.get_tightbbox().padded(-1))


LABELS = {
    "fig02": [("Helpfulness Elo", "Harmlessness Elo")],
    "fig03": [("Parameters", "Helpfulness Elo"), ("Parameters", "Harmlessness Elo")],
    "fig04": [("Parameters", "Accuracy")],
    "fig05": [("Number of revisions", y) for y in (
        "Harmlessness PM score", "Helpfulness PM score", "HH PM score", "True harm (0 to 4)",
        "True helpfulness (0 to 4)")],
    "fig07": [("", "Harmlessness PM score"), ("", ""), ("", ""),
              ("Number of revisions", "True harm (0 to 4)"), ("Number of revisions", ""),
              ("Number of revisions", "")],
    "fig08": [("RL training sequences", "Helpfulness Elo"),
              ("RL training sequences", "Harmlessness Elo")],
    "fig09": [("Predicted probability", "Observed frequency")],
    "accuracy": [("Parameters", "Accuracy")] * 2 + [("Predicted probability",
                                                     "Observed frequency")],
    "pretraining": [("Tokens (millions)", "Loss (nats per token)"), ("Tokens (millions)", "")],
    "rl": [("", "PM score"), ("", "KL to the start (nats)"),
           ("RL training sequences", "Entropy (nats)"),
           ("RL training sequences", "Response length (tokens)")],
    "sl_cai_n": [("SL-CAI-n: number of revisions", y) for y in ("True harm", "True helpfulness")],
    "fig12": [("Parameters", "Accuracy")] * 2,
    "fig12, one task": [("Parameters", "Accuracy")],
    "rl_truth": [("RL training sequences", y) for y in (
        "True harm", "True helpfulness", "Evasive share")],
    "refusals": [(f"Kappa, {q}", "") for q in ("evasive", "full refusal, long")],
}


@pytest.mark.parametrize("name", LABELS)
def test_axes_are_labelled(name):
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in shown(drawn(name))] == LABELS[name]


@pytest.mark.parametrize("name", FIGURES)
def test_a_note_says_what_the_intervals_are(name):
    assert "95 %" in fig_note(drawn(name))


def fig_note(fig):
    return fig.legends[0].get_title().get_text().replace("\n", " ")


PANELS = {  # name: the rows behind each panel
    "fig03": [("axis", "helpfulness"), ("axis", "harmlessness")],
    "fig04": [None],
    "fig05": [("measured_by", "PM", "axis", a) for a in ("harmlessness", "helpfulness", "HH")]
    + [("measured_by", "truth", "axis", a) for a in ("harm", "helpfulness")],
    "fig07": [("measured_by", by, "size", s) for by in ("PM", "truth") for s in SIZES],
    "fig08": [("axis", "helpfulness"), ("axis", "harmlessness")],
    "fig09": [None],
    "accuracy": [("axis", "helpful"), ("axis", "harmless")],
    "sl_cai_n": [("axis", "True harm"), ("axis", "True helpfulness")],
    "fig12": [("task", "harmful or harmless"), ("task", "which kind of harm")],
    "fig12, one task": [("task", "harmful or harmless")],
    "rl_truth": [("axis", a) for a in ("True harm", "True helpfulness", "Evasive share")],
}


@pytest.mark.parametrize("name", PANELS)
def test_every_estimate_and_interval_of_the_table_is_drawn(name):
    df = FIGURES[name][1]()
    for ax, where in zip(shown(drawn(name)), PANELS[name]):
        d = df
        for column, value in zip((where or ())[::2], (where or ())[1::2]):
            d = d[d[column] == value]
        assert len(d)
        assert heights(ax) == pytest.approx(sorted(d["estimate"]))
        assert np.array(segments(ax)) == pytest.approx(
            np.array(sorted(zip(d["ci_low"], d["ci_high"]))))


@pytest.mark.parametrize("name, draw, df", [
    ("fig04", plots.fig04_harm_identification, with_rule(identification())),
    ("fig12", plots.fig12_identify_classify, with_rule(identify_classify(), task=None)),
    ("accuracy", plots.accuracy_by_size, with_rule(accuracies(), axis=None)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_the_best_surface_rule_is_a_level_with_its_interval(name, draw, df):
    fig = draw(df)
    for ax in shown(fig):
        (level,) = [line for line in ax.lines if line.get_label() == BEST]
        assert list(level.get_ydata()) == [0.38, 0.38] and ax.get_ylim()[0] < 0.35
        (band,) = [patch for patch in ax.patches if patch.get_gid() == "interval"]
        box = band.get_bbox()
        assert (box.y0, box.y1) == pytest.approx((0.35, 0.41))
        assert 0.38 not in heights(ax)  # it belongs to no model
    assert "chosen on other rows" in fig_note(fig) and "chosen" not in fig_note(drawn(name))


def test_statements_are_shares_by_kind_and_measure():
    df, fig = said(), drawn("statements")
    titles = [ax.get_title().replace("\n", " ") for ax in fig.axes[:statements.SHOWN]]
    assert titles == [*SHARES[:statements.SHOWN]]
    assert [ax.get_ylabel() for ax in fig.axes[::statements.SHOWN]] == [
        "redteam prompts", "benign prompts"]
    for i, ax in enumerate(fig.axes):
        kind = ("redteam", "benign")[i // statements.SHOWN]
        d = df[(df["kind"] == kind) & (df["measure"] == titles[i % statements.SHOWN])]
        assert sorted(x for line in ax.lines for x in line.get_xdata()) == pytest.approx(
            sorted(d["estimate"]))
        bars = [(s[0][0], s[1][0]) for c in ax.collections for s in c.get_segments()]
        assert np.array(sorted(bars)) == pytest.approx(
            np.array(sorted(zip(d["ci_low"], d["ci_high"]))))
    with pytest.raises(ValueError, match="has none of objects"):
        statements.policy_statements(df.assign(measure="mood", size=range(len(df))))


def test_frontier_draws_a_cross_for_every_checkpoint():
    df, ax = frontier(), drawn("fig02").axes[0]
    assert heights(ax) == pytest.approx(sorted(df["harmlessness"]))
    assert np.array(segments(ax)) == pytest.approx(
        np.array(sorted(zip(df["harmlessness_low"], df["harmlessness_high"]))))
    across = [s for c in ax.collections for s in c.get_segments() if s[0][1] == s[1][1]]
    assert np.array(sorted((s[0][0], s[1][0]) for s in across)) == pytest.approx(
        np.array(sorted(zip(df["helpfulness_low"], df["helpfulness_high"]))))
    curve = df[df["method"] == "RL-CAI"]
    line = next(x for x in ax.lines if x.get_color() == style.METHODS["RL-CAI"][0])
    assert list(line.get_xdata()) == list(curve["helpfulness"])


def test_agreement_shows_kappas_of_test_prompts_alone():
    df = agreements()
    df = df[(df["split"] == "test") & (df["measure"] == "kappa")]
    for ax, question in zip(drawn("refusals").axes, ("evasive", "full refusal, long")):
        d = df[df["question"] == question]
        assert sorted(x for line in ax.lines for x in line.get_xdata()) == pytest.approx(
            sorted(d["estimate"]))
        bars = [(s[0][0], s[1][0]) for c in ax.collections for s in c.get_segments()]
        assert np.array(sorted(bars)) == pytest.approx(
            np.array(sorted(zip(d["ci_low"], d["ci_high"]))))


def test_agreement_of_readers_that_not_every_question_has():
    df = agreements()
    only = (df["read_by"] == "reader") & (df["question"] == "evasive")
    assert len(plots.refusal_agreement(df[~only]).axes) == 2


def test_confusions_are_counted_in_rows_of_the_label():
    counts = [[t.get_text() for t in ax.texts] for ax in drawn("confusion").axes]
    none, partial, full = ["5", "0", "1"], ["0", "0", "0"], ["6", "3", "1"]
    assert counts == [none + partial + full] * 2


def test_other_data_make_another_figure():
    for name in ("fig03", "fig05"):
        draw, make = FIGURES[name]
        df = make()
        other = draw(df.assign(**{c: df[c] + 1 for c in ("estimate", "ci_low", "ci_high")}))
        assert heights(other.axes[0]) == pytest.approx(
            [y + 1 for y in heights(drawn(name).axes[0])])


def test_a_method_has_one_colour_everywhere_and_no_two_share_it():
    def colours(fig):
        return {t.get_text(): mpl.colors.to_hex(h.get_color()) for t, h in zip(
            fig.legends[0].get_texts(), fig.legends[0].get_lines())}

    for name in ("fig02", "fig03", "fig08", "rl"):
        found = colours(drawn(name))
        assert found == {m: style.METHODS[m][0] for m in found} and len(found) >= 4
    assert len({c for c, _ in style.METHODS.values()}) == len(METHODS)
    assert not {c for c, _ in style.METHODS.values()} & set(style.OTHER)
    assert style.looks(["new", "rl_cai_cot"])["rl_cai_cot"] == style.METHODS["RL-CAI with CoT"]
    found = style.looks(["helpful PM", "HH PM", "harmless PM", "pm"])  # PMs as what they reward
    assert [found[f"{kind} PM"] for kind in ("helpful", "HH", "harmless")] == [
        style.METHODS[label] for label in ("helpful RLHF", "HH RLHF", "SL-CAI")]


def test_every_policy_of_the_registry_has_a_look_of_its_own():
    for policy in POLICIES.values():
        look = (policy.color, policy.marker)
        assert style.looks([policy.label]) == {policy.label: look}
        assert style.looks([policy.name]) == {policy.name: look}


def test_methods_are_told_apart_without_colour_vision():
    """The closest two of the palette, seen by a deuteranope or protanope (Machado 2009, full)."""
    seen = {"deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                       [-0.011820, 0.042940, 0.968881]],
            "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]]}
    rgb = np.array([mpl.colors.to_rgb(c) for c, _ in style.METHODS.values()]) ** 2.2
    markers = [m for _, m in style.METHODS.values()]
    assert len(set(markers)) == len(markers)
    for matrix in seen.values():
        x = np.clip(rgb @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.eye(len(x))
        assert apart.min() > 0.12


def test_bands_of_noisy_curves():
    train, held_out = drawn("pretraining").axes
    assert [len([c for c in ax.collections if c.get_gid() == "interval"])
            for ax in (train, held_out)] == [3, 0]
    assert "running mean of 6 points" in fig_note(drawn("pretraining"))
    assert "no band: fewer than 20 points" in fig_note(drawn("pretraining"))
    given = losses().assign(ci_low=lambda d: d["loss"] - 0.5, ci_high=lambda d: d["loss"] + 0.5)
    fig = plots.pretraining_curves(given)
    assert [len(ax.collections) for ax in fig.axes] == [3, 3]
    assert fig_note(fig) == "bands: 95 % intervals"
    given.loc[given["split"] == "train", ["ci_low", "ci_high"]] = np.nan
    fig = plots.pretraining_curves(given)
    assert [len(ax.collections) for ax in fig.axes] == [3, 3]
    assert "running mean" in fig_note(fig)


def test_running_mean_covers_the_curve_below_the_noise():
    rng = np.random.default_rng(0)
    x = np.arange(400)
    truth = np.exp(-x / 150)
    fig, ax = plt.subplots()
    window = panels.running(ax, x, truth + rng.normal(0, 0.1, 400), "", "k")
    band = ax.collections[0].get_paths()[0]
    plt.close(fig)
    low, high = band.vertices[1:401, 1], band.vertices[402:802, 1][::-1]
    assert window == 40 and np.mean((low <= truth) & (truth <= high)) > 0.8
    assert np.median(high - low) == pytest.approx(2 * 1.96 * 0.1 / 40**0.5, rel=0.15)


def test_a_loss_of_zero_is_left_out_of_a_logarithmic_curve():
    fig, ax = plt.subplots()
    y = np.full(60, 2.0)
    y[30] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels.running(ax, np.arange(60), y, "", "k", log=True)
    assert np.isnan(ax.lines[0].get_ydata()[30])
    assert ax.lines[1].get_ydata() == pytest.approx(np.full(60, 2.0))
    plt.close(fig)


def test_rl_curves_take_short_names():
    names = dict(zip(plots.RL_AXES, ("reward", "kl", "entropy", "length")))
    fig = plots.rl_curves(history().rename(columns=names))
    assert fig.axes[0].lines[1].get_ydata() == pytest.approx(
        drawn("rl").axes[0].lines[1].get_ydata())


def test_sizes_are_ordered_by_parameters_and_labelled():
    texts = [t.get_text() for t in drawn("fig05").legends[0].get_texts()]
    assert texts == ["xs (0.1M)", "s (0.61M)", "m (2.2M)"]
    ticks = [t.get_text() for t in drawn("fig04").axes[0].get_xticklabels()]
    assert ticks == ["0.1M", "0.61M", "2.2M"] and drawn("fig04").axes[0].get_xscale() == "log"
    assert [style.count_text(n) for n in (52e9, 810e6, 135e6, 101376, 4000)] == [
        "52B", "810M", "135M", "0.1M", "4000"]


def test_close_sizes_do_not_get_colliding_ticks():
    counts = [0.8e9, 1.6e9, 3.5e9, 6.4e9, 13e9, 22e9, 52e9]
    df = frame([({"size": str(c), "parameters": c, "method": "CoT"}, 0.6) for c in counts])
    ax = plots.fig04_harm_identification(df).axes[0]
    boxes = [t.label1.get_window_extent() for t in ax.xaxis.get_major_ticks()]
    assert len(boxes) >= 3 and len(heights(ax)) == 7
    assert all(a.x1 < b.x0 for a, b in zip(sorted(boxes, key=lambda b: b.x0),
                                           sorted(boxes, key=lambda b: b.x0)[1:]))


def test_an_estimate_without_an_interval_is_drawn_alone():
    df = identification()
    df.loc[0, ["ci_low", "ci_high"]] = np.nan
    ax = plots.fig04_harm_identification(df).axes[0]
    assert len(heights(ax)) == len(df)
    assert len(segments(ax)) == len(df) - 1


NEEDED = {
    "fig02": ["method", "size", "step", "helpfulness", "harmlessness_low"],
    "fig03": ["method", "size", "parameters", "axis", "estimate", "ci_low", "ci_high"],
    "fig04": ["size", "parameters", "method", "estimate", "ci_low"],
    "fig05": ["size", "parameters", "revision", "axis", "measured_by", "estimate", "ci_high"],
    "fig07": ["size", "parameters", "revision", "method", "measured_by", "estimate", "ci_low"],
    "fig08": ["method", "size", "step", "axis", "estimate", "ci_low"],
    "fig09": ["labels", "bin", "mean_p", "estimate", "ci_low"],
    "accuracy": ["size", "parameters", "method", "estimate", "ci_low"],
    "pretraining": ["size", "tokens", "loss", "split"],
    "rl": ["method", "size", "episode", "objective/kl", "val/response_length"],
    "sl_cai_n": ["n", "axis", "estimate", "ci_low"],
    "fig12": ["task", "chance", "size", "parameters", "method", "estimate", "ci_low"],
    "rl_truth": ["method", "size", "step", "axis", "estimate", "ci_high"],
    "refusals": ["question", "source", "split", "read_by", "measure", "estimate", "ci_low"],
    "confusion": ["source", "human", "evasive"],
}


@pytest.mark.parametrize("name", NEEDED)
def test_missing_or_empty_columns_are_named(name):
    draw, make = FIGURES[name]
    df = make()
    for column in NEEDED[name]:
        with pytest.raises(ValueError, match=f"no column '{column}'"):
            draw(df.drop(columns=column))
    with pytest.raises(ValueError, match="no rows, column '[a-z_]+' is empty"):
        draw(df.iloc[:0])
    with pytest.raises(ValueError, match="no column"):
        draw(pd.DataFrame())
    assert not plt.get_fignums()


@pytest.mark.parametrize("change, says", [
    (lambda d: d.assign(estimate="high"), "'estimate' is not a finite number in row 0"),
    (lambda d: d.assign(estimate=np.nan), "'estimate' is not a finite number"),
    (lambda d: d.assign(parameters=np.inf), "'parameters' is not a finite"),
    (lambda d: d.assign(ci_low=d["ci_high"] + 1), "'ci_low' is above 'ci_high'"),
    (lambda d: d.assign(method=None), "'method' is empty in row 0"),
    (lambda d: pd.concat([d, d]), "more than one row for method = pretrained"),
    (lambda d: d.replace("harmlessness", "beauty"), "'axis' has 'beauty'; expected"),
])
def test_bad_tables(change, says):
    with pytest.raises(ValueError, match=says):
        plots.fig03_elo_scaling(change(scaling()))


def test_unknown_measures_are_named():
    with pytest.raises(ValueError, match="'measured_by' has 'gut'; expected one of PM, truth"):
        plots.fig05_revisions(revisions().replace("truth", "gut"))
    with pytest.raises(ValueError, match="'axis' has 'beauty'; expected one of harmlessness"):
        plots.fig05_revisions(revisions().replace("HH", "beauty"))
    assert plots.fig05_revisions(revisions().replace("harm", "rudeness")).axes[4].get_ylabel() \
        == "True rudeness"
