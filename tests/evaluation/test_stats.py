import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_utils.evaluation import stats


def coverage(runs, make, truth):
    """Share of `runs` simulated experiments whose interval holds the truth."""
    hits = 0
    for i in range(runs):
        e = make(np.random.default_rng(1000 + i))
        hits += e.low <= truth <= e.high
    return hits / runs


def test_bootstrap_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(0).normal(3, 2, 400)
    e = stats.bootstrap_mean(x)
    half = 1.966 * x.std(ddof=1) / 20
    assert e.estimate == pytest.approx(x.mean()) and e.n == 400
    assert e.low == pytest.approx(x.mean() - half, abs=0.03)
    assert e.high == pytest.approx(x.mean() + half, abs=0.03)
    assert stats.bootstrap_mean(x) == e != stats.bootstrap_mean(x, seed=1)


def test_an_interval_over_runs_covers_prompts_and_runs():
    """Two policies of three runs each on the same 50 prompts, whose true difference is 1; one run
    of each alone says nothing about the spread of runs."""
    def both(rng, runs):
        prompt = rng.normal(0, 1, 50)
        sides = [mean + prompt + rng.normal(0, 0.3, (runs, 1)) + rng.normal(0, 1, (runs, 50))
                 for mean in (2, 1)]
        found = stats.bootstrap_mean(sides[0].mean(0) - sides[1].mean(0), n_boot=200)
        return found, stats.with_runs(found, *(side.mean(1) for side in sides))

    assert 0.93 <= coverage(300, lambda rng: both(rng, 3)[1], 1) <= 1
    assert coverage(300, lambda rng: both(rng, 3)[0], 1) < 0.85  # over prompts alone
    plain, wide = both(np.random.default_rng(0), 1)
    assert plain == wide


def test_the_spread_of_runs_by_hand():
    plain = stats.Estimate(2.0, 1.0, 3.0, 20)
    found = stats.with_runs(plain, [1.0, 2.0, 3.0])  # standard error 1 / sqrt(3), t(2) = 4.303
    half = (1 + 4.303**2 / 3) ** 0.5
    assert found.low == pytest.approx(2 - half, abs=1e-3)
    assert found.high == pytest.approx(2 + half, abs=1e-3) and found.n == 20
    assert stats.with_runs(plain, [2.0, 2.0]) == stats.with_runs(plain, [2.0]) == plain


@pytest.mark.parametrize("n", [8, 40])
def test_bootstrap_mean_covers(n):
    def make(r):
        return stats.bootstrap_mean(r.normal(1, 1, n), n_boot=400)

    assert 0.92 <= coverage(600, make, 1) <= 0.98


def test_clusters_widen_the_interval_and_cover():
    def data(rng):
        return np.repeat(rng.normal(0, 1, 40), 5) + rng.normal(0, 0.3, 200)

    prompt = np.repeat([f"p{i}" for i in range(40)], 5)

    def clustered(r):
        return stats.bootstrap_mean(data(r), cluster=prompt, n_boot=400)

    assert 0.9 <= coverage(200, clustered, 0) <= 0.99
    # the naive interval takes 200 rows for independent and is far too narrow
    assert coverage(100, lambda r: stats.bootstrap_mean(data(r), n_boot=300), 0) < 0.75
    assert clustered(np.random.default_rng(0)).n == 40


def test_unequal_clusters_weigh_by_rows():
    e = stats.bootstrap_mean([0, 0, 0, 1], cluster=["a", "a", "a", "b"])
    assert e.estimate == 0.25 and e.n == 2 and e.low <= 0 and e.high >= 1


def test_one_long_text_among_the_clusters_takes_no_memory_for_the_others():
    cluster = [f"Question {i // 2}?" for i in range(800)] + ["long " * 20_000] * 2
    tracemalloc.start()
    assert stats.bootstrap_mean(np.ones(802), cluster, n_boot=10).n == 401
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # bytes; as an array of texts 320 MB


def test_many_means_are_those_of_one_at_a_time():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(25), 2)
    x = np.stack([rng.normal(0, 1, 50), rng.integers(0, 2, 50), np.ones(50)])
    estimate, low, high, n = stats.bootstrap_means(x, cluster)
    for r in range(2):
        assert stats.bootstrap_mean(x[r], cluster) == pytest.approx(
            (estimate[r], low[r], high[r], n))
    assert (estimate[2], low[2], high[2]) == pytest.approx(stats.wilson(25, 25)[:3])
    estimate, low, high, n = stats.bootstrap_means(x[1:2])
    assert (estimate[0], low[0], high[0], n) == pytest.approx(stats.wilson(x[1].sum(), 50))
    estimate, low, high, n = stats.bootstrap_means([[0], [1], [0.3]])  # of one unit
    for r in (0, 1):
        assert (estimate[r], low[r], high[r], n) == pytest.approx(stats.wilson(r, 1))
    assert np.isnan([low[2], high[2]]).all()
    with pytest.raises(ValueError, match="x, line 1: row 0 is nan"):
        stats.bootstrap_means([[0, 1], [np.nan, 1]])


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 100)
    a, b = base + 0.5 + rng.normal(0, 0.1, 100), base
    e = stats.paired_difference(a, b)
    assert e.low > 0.4 and e.high < 0.6 and e.estimate == pytest.approx((a - b).mean())
    flipped = stats.paired_difference(b, a)
    assert flipped.estimate == pytest.approx(-e.estimate) and flipped.high < 0


def test_one_unit_has_no_interval():
    e = stats.bootstrap_mean([1.0, 2.0], cluster=["p", "p"])
    assert e.estimate == 1.5 and np.isnan(e.low) and np.isnan(e.high)


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81 of 263 -> .2553 to .3662; 0 of 20 -> 0 to .1611
    e = stats.wilson(81, 263)
    assert (round(e.low, 4), round(e.high, 4)) == (0.2553, 0.3662)
    e = stats.wilson(0, 20)
    assert e.low == 0 and round(e.high, 4) == 0.1611
    assert stats.wilson(20, 20).high == 1


@given(st.integers(1, 500), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_wilson_is_symmetric_and_holds_the_estimate(n, share):
    k = round(share * n)
    e, other = stats.wilson(k, n), stats.wilson(n - k, n)
    assert 0 <= e.low <= e.estimate <= e.high <= 1 and e.low < e.high
    assert e.low == pytest.approx(1 - other.high) and e.high == pytest.approx(1 - other.low)


def test_calibration_table_by_hand():
    p = [0.05, 0.15, 0.15, 0.95, 1.0, 0.95, 0.95]
    y = [0, 1, 0, 1, 1, 1, 0]
    t = stats.calibration(p, y, bins=10)
    assert list(t.columns) == ["bin_mid", "mean_p", "frequency", "ci_low", "ci_high", "n"]
    assert list(t.bin_mid) == pytest.approx([0.05, 0.15, 0.95])
    assert list(t.n) == [1, 2, 4]
    assert list(t.frequency) == [0, 0.5, 0.75]
    assert t.mean_p.iloc[2] == pytest.approx((0.95 * 3 + 1) / 4)
    assert t.ci_low.iloc[1] == pytest.approx(stats.wilson(1, 2).low)
    assert (t.ci_low <= t.frequency).all() and (t.frequency <= t.ci_high).all()


def test_calibration_with_clusters_counts_clusters():
    rng = np.random.default_rng(0)
    p = np.repeat(rng.random(300), 2)
    y = np.repeat(rng.random(300), 2) < p
    alone = stats.calibration(p, y, bins=5)
    together = stats.calibration(p, y, bins=5, cluster=np.repeat(np.arange(300), 2))
    assert list(together.n * 2) == list(alone.n)
    wider = (together.ci_high - together.ci_low) / (alone.ci_high - alone.ci_low)
    assert wider.mean() == pytest.approx(2**0.5, abs=0.15)


def test_ece_by_hand_and_its_interval():
    e = stats.ece([0.2, 0.2, 0.2, 0.2, 0.9, 0.9], [1, 0, 0, 0, 0, 1], bins=2)
    assert e.estimate == pytest.approx(4 / 6 * 0.05 + 2 / 6 * 0.4)

    def over_confident(rng):  # says .1 or .9 where .25 and .75 are true: an error of .15
        p = rng.choice([0.1, 0.9], 400)
        y = rng.random(400) < np.where(p > 0.5, 0.75, 0.25)
        return stats.ece(p, y, n_boot=300)

    def calibrated(rng):
        p = rng.random(400)
        return stats.ece(p, rng.random(400) < p, n_boot=300)

    def slightly_off(rng):  # every bin is wrong by about one standard error
        p = rng.choice(np.arange(0.15, 0.9, 0.1), 400)
        return stats.ece(p, rng.random(400) < p + 0.07, n_boot=300)

    assert coverage(150, over_confident, 0.15) >= 0.9
    assert coverage(150, calibrated, 0.0) >= 0.9
    assert coverage(150, slightly_off, 0.07) >= 0.9


@pytest.mark.parametrize("call, says", [
    (lambda: stats.bootstrap_mean([]), "no rows"),
    (lambda: stats.bootstrap_mean([1, np.nan]), "row 1 is nan"),
    (lambda: stats.bootstrap_mean([[1], [2]]), "shape"),
    (lambda: stats.bootstrap_mean([1, 2], cluster=["a"]), "1 labels for 2 rows"),
    (lambda: stats.bootstrap_mean([1, 2], cluster=["a", None]), "row 1 has no label"),
    (lambda: stats.paired_difference([1, 2], [1]), "a has 2 rows and b 1"),
    (lambda: stats.wilson(3, 2), "k = 3 of n = 2"),
    (lambda: stats.wilson(0, 0), "not a proportion"),
    (lambda: stats.calibration([0.5, 1.5], [0, 1]), "0..1"),
    (lambda: stats.calibration([0.5], [0.5]), "0 or 1"),
    (lambda: stats.ece([0.5], [0, 1]), "1 probabilities but 2"),
])
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
