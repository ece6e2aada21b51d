import itertools
import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from cai_utils.evaluation import elo


def play(strengths, n_prompts, rng, per_pair=1, ties=0.0):
    """Games between models of known Elo."""
    rows = []
    for (a, sa), (b, sb) in itertools.combinations(strengths.items(), 2):
        p = 1 / (1 + 10 ** ((sb - sa) / 400))
        for prompt in range(n_prompts):
            for _ in range(per_pair):
                wins = 0.5 if rng.random() < ties else float(rng.random() < p)
                rows.append({"a": a, "b": b, "prompt_id": prompt, "wins_a": wins})
    return rows


TRUE = {"weak": -250.0, "low": -60.0, "mid": 10.0, "high": 80.0, "strong": 220.0}


def test_fit_recovers_known_elo():
    table = elo.fit(play(TRUE, 1500, np.random.default_rng(0)), n_boot=50)
    assert list(table.columns) == ["model", "elo", "ci_low", "ci_high", "n"]
    assert list(table.model) == list(TRUE) and (table.n == 6000).all()
    assert table.elo.to_numpy() == pytest.approx(np.array(list(TRUE.values())), abs=15)
    assert table.elo.mean() == pytest.approx(0, abs=1e-6)
    assert ((table.ci_low < table.elo) & (table.elo < table.ci_high)).all()


def test_models_may_be_named_by_tuples():
    rows = [{"a": ("RL-CAI", "s", 0), "b": ("SL-CAI", "s", 1024), "prompt_id": i,
             "wins_a": float(i % 3 > 0)} for i in range(60)]
    table = elo.fit(rows, anchor=("SL-CAI", "s", 1024))
    assert list(table.model) == [("RL-CAI", "s", 0), ("SL-CAI", "s", 1024)]
    assert table.elo[0] == pytest.approx(400 * np.log10(2), abs=1) and table.elo[1] == 0


def test_the_score_of_several_runs_is_their_mean_and_covers_their_spread():
    rng = np.random.default_rng(3)
    games = play({"base": 0.0, ("x", 0): -60.0, ("x", 1): 0.0, ("x", 2): 90.0}, 200, rng)
    each = elo.fit(games, anchor="base", n_boot=100).set_index("model")
    found = elo.fit(games, anchor="base", n_boot=100, policy=lambda name: name[0][0])
    found = found.set_index("model")
    assert list(found.index) == ["b", "x"] and found["runs"].tolist() == [1, 3]
    runs = each.loc[[("x", k) for k in range(3)]]
    assert found.elo["x"] == pytest.approx(runs.elo.mean())
    assert found.n["x"] == runs.n.sum() and found.elo["b"] == 0
    width = found.ci_high["x"] - found.ci_low["x"]
    assert width > 2 * 4.303 * runs.elo.std() / 3**0.5  # and of prompts
    one = elo.fit(games, anchor="base", n_boot=100, policy=lambda name: name)
    pd.testing.assert_frame_equal(one.drop(columns="runs"), each.reset_index())


def test_many_runs_take_little_memory():
    """250 snapshots against five: as many as four methods at three sizes have in five runs."""
    rows = [{"a": a, "b": b, "prompt_id": prompt, "wins_a": (a + b + prompt) % 3 / 2}
            for a in range(250) for b in range(5) if a > b for prompt in range(2)]
    tracemalloc.start()
    table = elo.fit(rows, n_boot=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == 250 and peak < 150e6  # bytes


def test_two_models_have_a_closed_form():
    rows = [{"a": "x", "b": "y", "prompt_id": i, "wins_a": float(i < 75)} for i in range(100)]
    table = elo.fit(rows, anchor="y", ridge=1e-9).set_index("model")
    assert table.elo["x"] == pytest.approx(400 * np.log10(3), abs=0.01)
    # delta method: 400 / ln 10 / sqrt(n p q)
    assert table.ci_high["x"] - table.ci_low["x"] == pytest.approx(
        2 * 1.96 * elo.ELO / (100 * 0.75 * 0.25) ** 0.5, rel=0.15)
    assert table.elo["y"] == table.ci_low["y"] == table.ci_high["y"] == 0


def test_interval_covers_the_truth():
    runs, hits = 120, []
    for i in range(runs):
        rows = play(TRUE, 40, np.random.default_rng(i))
        table = elo.fit(rows, anchor="mid", n_boot=200, seed=i).set_index("model")
        for model in set(TRUE) - {"mid"}:
            truth = TRUE[model] - TRUE["mid"]
            hits.append(table.ci_low[model] <= truth <= table.ci_high[model])
    assert 0.91 <= np.mean(hits) <= 0.985


def test_interval_resamples_prompts_and_not_games():
    # every prompt decides all its ten games the same way: there are 30 facts, not 300
    rng = np.random.default_rng(0)
    luck = rng.random(30) < 0.6
    rows = [{"a": "x", "b": "y", "prompt_id": p, "wins_a": float(luck[p])}
            for p in range(30) for _ in range(10)]
    same = [{**row, "prompt_id": i} for i, row in enumerate(rows)]
    width = {name: (t.ci_high - t.ci_low)["x"] for name, t in (
        ("prompts", elo.fit(rows).set_index("model")),
        ("games", elo.fit(same).set_index("model")))}
    assert width["prompts"] > 2.5 * width["games"]


def test_ties_and_probabilities_count_in_proportion():
    tied = [{"a": "x", "b": "y", "prompt_id": i, "wins_a": 0.5} for i in range(20)]
    assert elo.fit(tied).elo.to_numpy() == pytest.approx(np.zeros(2), abs=1e-6)
    rng = np.random.default_rng(0)
    p = rng.random(20)
    soft = [{"a": "x", "b": "y", "prompt_id": i, "wins_a": v} for i, v in enumerate(p)]
    gap = np.subtract(*elo.fit(soft, ridge=1e-9).elo)
    assert gap == pytest.approx(400 * np.log10(p.mean() / (1 - p.mean())), abs=0.01)


def test_order_of_a_and_b_does_not_matter():
    rows = play(TRUE, 30, np.random.default_rng(1), ties=0.2)
    flipped = [{**r, "a": r["b"], "b": r["a"], "wins_a": 1 - r["wins_a"]} if i % 2 else r
               for i, r in enumerate(rows)]
    one = elo.fit(rows).set_index("model")
    two = elo.fit(flipped).set_index("model").loc[one.index]
    pd.testing.assert_frame_equal(one, two)


def test_undefeated_model_is_finite_and_says_so():
    rows = play({"x": 0.0, "y": 50.0}, 100, np.random.default_rng(0))
    rows += [{"a": "best", "b": m, "prompt_id": p, "wins_a": 1.0}
             for m in "xy" for p in range(100)]
    with pytest.warns(UserWarning, match="all their games.*best"):
        table = elo.fit(rows, anchor="x").set_index("model")
    assert 500 < table.elo["best"] < 3000
    # 100 prompts without a loss only say that fewer than about 3.7 % would be lost
    bound = 400 * np.log10((1 - 0.0369) / 0.0369)
    assert table.ci_low["best"] == pytest.approx(bound, abs=60)
    assert table.ci_high["best"] >= table.elo["best"]


def test_groups_that_never_lose_to_the_rest_are_widened_too():
    rng = np.random.default_rng(0)
    rows = play({"x": 0.0, "y": 0.0}, 50, rng) + play({"u": 0.0, "v": 0.0}, 50, rng)
    rows += [{"a": a, "b": b, "prompt_id": p, "wins_a": 0.0}
             for a in "xy" for b in "uv" for p in range(50)]
    with pytest.warns(UserWarning, match="set by the ridge"):
        table = elo.fit(rows).set_index("model")
    assert table.ci_high["x"] - table.elo["x"] > 50 < table.elo["u"] - table.ci_low["u"]
    assert table.ci_high[["x", "y"]].max() < 0 < table.ci_low[["u", "v"]].min()


def test_500_bootstraps_of_25_models_are_fast():
    rng = np.random.default_rng(0)
    strengths = {f"m{i}": float(rng.normal(0, 150)) for i in range(25)}
    rows = play(strengths, 50, rng)
    start = time.process_time()
    elo.fit(rows, n_boot=500)
    assert time.process_time() - start < 3


def quality(a, b, axis, rng):
    qa, qb = (float(c[-1]["content"]) for c in (a, b))
    return 0.5 if qa == qb else float(qa > qb)


def samples_of(levels, n_prompts=12, k=2):
    return {m: {f"p{i}": [[{"role": "user", "content": "q"},
                           {"role": "assistant", "content": str(v)}]] * k
                for i in range(n_prompts)} for m, v in levels.items()}


def test_tournament_plays_every_pair_on_every_prompt():
    samples = samples_of({"x": 1, "y": 2, "z": 2})
    rows = elo.tournament(samples, quality, axis="harmlessness", per_prompt=3)
    assert len(rows) == 3 * 12 * 3
    assert {(r["a"], r["b"], r["wins_a"]) for r in rows} == {
        ("x", "y", 0.0), ("x", "z", 0.0), ("y", "z", 0.5)}
    assert {r["axis"] for r in rows} == {"harmlessness"}
    some = elo.tournament(samples, quality, pairs=[("z", "x")])
    assert {(r["a"], r["b"], r["wins_a"]) for r in some} == {("z", "x", 1.0)}


def test_tournament_is_reproducible_and_independent_of_other_models():
    def coin(a, b, axis, rng):
        return float(rng.random() < 0.5)

    def games(levels, **kw):
        return [r for r in elo.tournament(samples_of(levels), coin, **kw)
                if {r["a"], r["b"]} == {"x", "y"}]

    two = games({"x": 1, "y": 2})
    assert two == games({"x": 1, "w": 0, "y": 2, "z": 3}) != games({"x": 1, "y": 2}, seed=1)


def test_tournament_shows_either_model_first():
    rows = elo.tournament(samples_of({"x": 1, "y": 1}, 200), lambda a, b, axis, rng: 1.0)
    assert np.mean([r["wins_a"] for r in rows]) == pytest.approx(0.5, abs=0.12)


def test_tournament_uses_different_samples_and_only_shared_prompts():
    seen = []

    def look(a, b, axis, rng):
        seen.append(a[-1]["content"] + b[-1]["content"])
        return 0.5

    def said(*texts):
        return [[{"role": "assistant", "content": t}] for t in texts]

    samples = {"x": {1: said("a", "b"), 2: said("c")}, "y": {1: said("d", "e"), 3: said("f")}}
    rows = elo.tournament(samples, look, per_prompt=2)
    assert [r["prompt_id"] for r in rows] == [1, 1]
    assert sorted("".join(seen)) == list("abde")


@pytest.mark.parametrize("call, says", [
    (lambda: elo.fit([]), "no games"),
    (lambda: elo.fit([{"a": "x", "b": "y", "wins_a": 1}]), "prompt_id"),
    (lambda: elo.fit([{"a": "x", "b": "y", "prompt_id": 0, "wins_a": 2}]), "row 0 has wins_a = 2"),
    (lambda: elo.fit([{"a": "x", "b": "x", "prompt_id": 0, "wins_a": 1}]), "against itself"),
    (lambda: elo.fit(play(TRUE, 2, np.random.default_rng(0)), anchor="nobody"), "nobody"),
    (lambda: elo.fit([{"a": a, "b": b, "prompt_id": 0, "wins_a": 0.5, "axis": "h"}
                      for a, b in ("uv", "xy")]), "u, v; x, y"),
    (lambda: elo.fit([{"a": "x", "b": "y", "prompt_id": 0, "wins_a": 0.5, "axis": axis}
                      for axis in ("one", "two")]), r"several axes at once \(one, two\)"),
    (lambda: elo.tournament(samples_of({"x": 1, "y": 2}), quality, pairs=[("x", "q")]), "'q'"),
    (lambda: elo.tournament(samples_of({"x": 1, "y": 2}), lambda *_: 2.0), "2.0 for 'x'"),
    (lambda: elo.tournament(samples_of({"x": 1, "y": 2}), lambda *_: np.nan), "nan for 'x'"),
    (lambda: elo.tournament({"x": {1: [[]]}, "y": {2: [[]]}}, quality), "no prompt in common"),
    (lambda: elo.tournament({"x": {1: []}, "y": {1: [[]]}}, quality), "no sample"),
])
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
