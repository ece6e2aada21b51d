"""Tables from rows, whose every number can be worked out by hand."""

import pandas as pd
import pytest

from cai_utils.evaluation import stats, tables


def test_summarize_uses_wilson_for_shares_and_clusters_for_the_rest():
    long = pd.DataFrame({"id": list("abcd") * 2, "method": ["x"] * 4 + ["y"] * 4,
                         "correct": [1, 1, 1, 1, 1, 0, 1, None]})
    table = tables.summarize(long, "method", "correct").set_index("method")
    assert table.loc["x", "estimate"] == 1 and table.loc["x", "ci_high"] == 1
    assert 0 < table.loc["x", "ci_low"] < 0.7  # never of zero width
    assert table.loc["y", "estimate"] == pytest.approx(2 / 3) and table.loc["y", "n"] == 3
    # Two samples of one prompt are one unit, not two.
    twice = pd.DataFrame({"id": ["a", "a", "b", "b"], "method": "x", "correct": [1, 1, 0, 0]})
    assert tables.summarize(twice, ["method"], "correct")["n"].tolist() == [2]


def test_runs_of_a_policy_widen_its_intervals():
    rows = [{"id": i, "run": run, "model": model, "harm": base + run * spread}
            for i in range(30) for run in range(3)
            for model, base, spread in (("a", 2.0, 0.5), ("b", 1.0, 0.0))]
    long = pd.DataFrame(rows)
    table = tables.summarize(long, "model", "harm").set_index("model")
    assert table["runs"].tolist() == [3, 3] and table["n"].tolist() == [30, 30]
    half = 4.303 * 0.5 / 3**0.5  # nothing varies over prompts
    assert table.loc["a", "ci_high"] - 2.5 == pytest.approx(half, abs=1e-3)
    assert table.loc["b", "ci_high"] == 1
    (gap,) = tables.differences(long.assign(size="s"), "model", [("a", "b")], "harm",
                                "size").itertuples()
    assert gap.estimate == 1.5 and gap.ci_low == pytest.approx(1.5 - half, abs=1e-3)
    shares = long.assign(harm=((long["model"] == "a") & (long["run"] > 0)).astype(int))
    gap = tables.difference(shares, "model", "a", "b", "harm")
    assert gap[:3] == pytest.approx((2 / 3, 2 / 3 - 4.303 / 3, 1), abs=1e-3)  # no share is above 1
    never = long[long["model"] == "b"].assign(harm=0)
    (row,) = tables.summarize(never, "model", "harm").itertuples()
    assert row.ci_high == pytest.approx(stats.wilson(0, 30).high)  # of 30 prompts, not of 90 rows


def test_differences_pair_by_unit_and_leave_out_what_has_no_partner():
    long = pd.DataFrame({"id": list("abc") + list("cab"), "size": "s",
                         "method": ["x"] * 3 + ["y"] * 3, "value": [1, 2, 9, None, 0, 1]})
    found = tables.difference(long, "method", "x", "y", "value")
    assert (found.estimate, found.low, found.high, found.n) == (1, 1, 1, 2)
    table = tables.differences(long, "method", [("x", "y"), ("x", "z")], "value", "size")
    assert table["difference"].tolist() == ["x - y"]
    with pytest.raises(ValueError, match="no id with both"):
        tables.difference(long, "method", "x", "z", "value")


def test_intervals_over_conversations():
    """Every question asked four times about the same conversation: four times the rows, and the
    very same interval; taken for independent, they would give one of about half the width."""
    right = [1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    once = pd.DataFrame({"id": range(20), "talk": range(20), "method": "x", "correct": right})
    four = pd.concat([once.assign(id=once["id"] + 20 * k) for k in range(4)])
    one = stats.bootstrap_mean(right)
    (row,) = tables.summarize(four, "method", "correct", "talk").itertuples()
    assert (row.estimate, row.n) == (0.65, 20)
    assert (row.ci_low, row.ci_high) == pytest.approx((one.low, one.high))
    # by hand: the standard error of 20 draws is sqrt(.65 * .35 / 20) = 0.107
    assert row.ci_high - row.ci_low == pytest.approx(2 * 1.96 * 0.107, rel=0.15)
    (apart,) = tables.summarize(four, "method", "correct").itertuples()
    assert apart.n == 80
    assert (apart.ci_high - apart.ci_low) / (row.ci_high - row.ci_low) == pytest.approx(.5, abs=.07)
    both = pd.concat([four, four.assign(method="y", correct=0)])
    (gain,) = tables.differences(both.assign(size="s"), "method", [("x", "y")], "correct", "size",
                                   cluster="talk").itertuples()
    assert (gain.estimate, gain.n) == (0.65, 20)
    assert (gain.ci_low, gain.ci_high) == pytest.approx((one.low, one.high))
