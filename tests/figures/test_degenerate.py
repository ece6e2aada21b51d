"""Every figure of every degenerate table is drawn without a warning, or refused by name."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest

from cai_utils.figures import gallery, panels, plots, redraw, style

SPLITS = dict(source="published samples", split="test", question="evasive", read_by="rule",
              measure="kappa")
ROW = dict(method="SL-CAI", size="s", parameters=1e5, step=0, axis="harmlessness", task="t",
           measured_by="PM", revision=1, chance=0.5, labels="plain", bin=0.5, mean_p=0.5,
           tokens=1e5, split="train", loss=2.0, episode=8, kind="lamda", measure="words",
           estimate=0.5, ci_low=0.4, ci_high=0.6, n=3, source="a", human="full refusal",
           helpfulness=1.0, helpfulness_low=0.5, helpfulness_high=1.5, harmlessness=1.0,
           harmlessness_low=0.5, harmlessness_high=1.5, **dict.fromkeys(plots.RL_AXES, 1.0),
           **dict.fromkeys(plots.READ, 3.0))
ENDS = [c for c in ROW if c.endswith(("_low", "_high"))]
NUMBERS = ["estimate", "mean_p", "loss", *plots.ELO_AXES, *plots.RL_AXES, *plots.READ]
FIGURES = [*redraw.DRAWINGS, "rl_rl_cai_s", "rl_truth_rl_cai_s"]


def row_of(name):
    """A row that figure `name` can draw."""
    own = {"chains_truth": dict(measured_by="truth", axis="harm"), "refusal_agreement": SPLITS,
           "fig07_critique_ablation": dict(method="critiqued", axis="harmlessness"),
           "rl_truth_rl_cai_s": dict(kind="redteam", measure="harm"),
           "policy_statements": dict(kind="redteam", measure="objects")}
    row = {**ROW, **own.get(name, {})}
    return {k: v for k, v in row.items() if name != "rl_truth_rl_cai_s" or k != "axis"}


def drawn(name, table, folder):
    """The figure of a table under every name that it is drawn from; a warning is an error."""
    for each in redraw.tables_of(name):
        table.to_csv(folder / f"{each}.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return redraw.draw(name, folder)


def texts(fig):
    return " ".join(t.get_text() for t in fig.findobj(panels.plt.Text)).replace("\n", " ")


@pytest.mark.parametrize("name", FIGURES)
def test_degenerate_tables_are_drawn_or_refused(name, tmp_path):
    one = pd.DataFrame([row_of(name)])
    many = pd.concat([one] * 2, ignore_index=True)
    first = {"fig09_calibration": "bin", "published_models": "method",
             "refusal_agreement": "source", "refusal_confusion": "source",
             "pretraining_curves": "tokens", "rl_rl_cai_s": "episode"}
    for column in dict.fromkeys([first.get(name, "size"), "bin"]):  # rows differ in their key
        many[column] = [0.1, 0.9] if column == "bin" else [1, 2]
    numbers = [c for c in NUMBERS if c in one and c in redraw.drawing(name).numbers]
    huge = 1.0 if "mean_p" in numbers else 1e12
    for table in (  # all equal; one row, without intervals; huge values
        many, one.assign(**dict.fromkeys(ENDS, np.nan)),
        one.assign(**dict.fromkeys([*numbers, *ENDS], huge)),
    ):
        assert "Nothing to draw" not in texts(drawn(name, table, tmp_path))
    # No number: left out and said, or the figure says that there is none.
    for table in (one.iloc[:0], pd.DataFrame(), one.assign(**dict.fromkeys(numbers, np.nan))):
        assert re.search(r"Nothing to draw. \w+: none of [01] rows has a number",
                         texts(drawn(name, table, tmp_path)))
    part = many.copy()
    part.loc[1, numbers] = np.nan
    assert "1 of 2 rows have no number and are left out" in texts(drawn(name, part, tmp_path))
    with pytest.raises(ValueError, match="not a finite number"):
        drawn(name, one.assign(**dict.fromkeys(numbers, np.inf)), tmp_path)


def test_a_dollar_in_a_label_is_a_dollar(tmp_path):
    label = r"a $\frac$ $x_1$ b"
    fig = drawn("fig09_calibration", pd.DataFrame([{**ROW, "labels": label}]), tmp_path)
    assert label in texts(fig)
    (tmp_path / "tex.mplstyle").write_text("text.usetex: True\n")
    with pytest.raises(ValueError, match="text.usetex"), style.on_top(tmp_path / "tex.mplstyle"):
        pass


def test_scores_that_are_not_finite_are_named_under_the_figure(tmp_path):
    table = pd.DataFrame([{**ROW, "finite": True}, {**ROW, "method": "RL-CAI", "finite": False}])
    for name in ("fig02_elo_frontier", "fig03_elo_scaling", "fig08_elo_training"):
        assert "shown is the regularised one: RL-CAI (s)" in texts(drawn(name, table, tmp_path))


@pytest.mark.parametrize("change, shows", [
    ({"ci_low": np.nan, "ci_high": np.nan}, "+0.500, no interval | 3 | no interval |"),
    ({"estimate": np.nan, "ci_low": np.nan, "ci_high": np.nan, "n": 0}, "no number | 0 |"),
])
def test_a_gallery_of_numbers_that_do_not_exist(tmp_path, change, shows):
    for name in redraw.tables_of("fig05_revisions"):
        pd.DataFrame([row_of(name)]).to_csv(tmp_path / f"{name}.csv", index=False)
    table = pd.DataFrame([{"difference": "a - b", "estimate": 0.5, "ci_low": 0.4, "ci_high": 0.6,
                           "n": 3, **change}])
    table.to_csv(tmp_path / "fig05_differences.csv", index=False)
    (tmp_path / "rl_rl_cai_s.csv").write_text("\n")  # no rows: pandas wrote nothing
    assert shows in gallery.write("Title", tmp_path, tmp_path).read_text()
    (tmp_path / "fig05_differences.csv").write_text("\n")
    assert "0 rows" in gallery.write("Title", tmp_path, tmp_path).read_text()


def test_a_name_that_begins_with_an_underscore_stands_in_the_legend():
    table = pd.DataFrame({"size": ["xs", "s"] * 2, "parameters": [10, 20] * 2,
                          "method": ["_mine"] * 2 + ["plain"] * 2, "estimate": 0.5, "ci_low": 0.4,
                          "ci_high": 0.6})
    figure = plots.fig04_harm_identification(table)
    assert " _mine" in [text.get_text() for text in figure.legends[0].get_texts()]
