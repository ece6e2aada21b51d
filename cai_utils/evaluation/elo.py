"""Elo scores of models from pairwise comparisons of their responses (paper 3.3 and 4.3).

`tournament` plays the games, `fit` turns them into scores, `elo_table` and `frontier` make the
tables of Figures 2, 3 and 8. The judge (simulated crowdworkers, preference models) is a `compare`
function.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from cai_utils import dialogue
from cai_utils.evaluation import stats
from cai_utils.experiment import registry
from cai_utils.seeds import stream

ELO = 400 / np.log(10)  # Elo points per unit of log-odds
_BLOCK = 4_000_000  # numbers of the matrices of fits at once (32 MB)
NONE_SEEN = -np.log(0.025)  # expected count of an event that is unseen with p = 2.5 %


def tournament(samples, compare, axis="helpfulness", pairs=None, per_prompt=1, seed=0):
    """Play models against each other on the prompts that both answered.

    samples: {model: {prompt_id: [conversation, ...]}}.
    compare(conversation_a, conversation_b, axis, rng) -> the probability, or the outcome 0, 0.5
    (tie) or 1, that a wins; None for a game that cannot be played, which is left out and counted.
    The order of the two is drawn for every game, so that a judge's position bias adds noise and no
    bias.
    pairs: list of (model, model); default every pair. per_prompt: games of a pair on one prompt;
    they use different samples as long as there are any.
    -> list of {"a", "b", "prompt_id", "axis", "wins_a"}, the same for the same seed whichever
    other models take part. Raises ValueError for an unknown model, a pair with no prompt in
    common, a prompt without samples, or an outcome outside 0..1.
    """
    if per_prompt < 1:
        raise ValueError(f"per_prompt: at least 1, got {per_prompt}")
    if pairs is None:
        pairs = list(itertools.combinations(samples, 2))
    outcomes, unplayed = [], 0
    for a, b in pairs:
        for model in (a, b):
            if model not in samples:
                raise ValueError(f"pairs: no samples of model {model!r}; there are: "
                                 + ", ".join(map(str, samples)))
        if a == b:
            raise ValueError(f"pairs: {a!r} cannot play against itself")
        shared = [p for p in samples[a] if p in samples[b]]
        if not shared:
            raise ValueError(f"samples: {a!r} and {b!r} have no prompt in common; "
                             "sample both on the same prompts")
        for prompt in shared:
            rng = stream(seed, axis, a, b, prompt)
            if not samples[a][prompt] or not samples[b][prompt]:
                raise ValueError(f"samples: prompt {prompt!r} has no sample of {a!r} or {b!r}")
            order_a = rng.permutation(len(samples[a][prompt]))
            order_b = rng.permutation(len(samples[b][prompt]))
            for game in range(per_prompt):
                one = samples[a][prompt][order_a[game % len(order_a)]]
                two = samples[b][prompt][order_b[game % len(order_b)]]
                swap = rng.random() < 0.5
                wins = compare(two, one, axis, rng) if swap else compare(one, two, axis, rng)
                if wins is None:
                    unplayed += 1
                    continue
                wins = float(wins)
                if not 0 <= wins <= 1:
                    raise ValueError(f"compare: {wins} for {a!r} against {b!r} on prompt "
                                     f"{prompt!r}; expected a number from 0 to 1")
                outcomes.append({"a": a, "b": b, "prompt_id": prompt, "axis": axis,
                                 "wins_a": 1 - wins if swap else wins})
    if unplayed:
        print(f"{axis}: {unplayed} games are left out, which the judge could not compare")
    return outcomes


def _aggregate(outcomes):
    """Outcome rows -> models, edges (E, 2) with first < second, prompts (P, E) won and played."""
    table = pd.DataFrame(outcomes)
    if not len(table):
        raise ValueError("outcomes: no games, so there is nothing to fit; run tournament() first")
    for column in ("a", "b", "prompt_id", "wins_a"):
        if column not in table:
            raise ValueError(f"outcomes: no column {column!r}")
    wins = table["wins_a"].to_numpy(dtype=float)
    bad = np.flatnonzero(~((wins >= 0) & (wins <= 1)))
    if len(bad):
        raise ValueError(f"outcomes: row {bad[0]} has wins_a = {wins[bad[0]]}; expected 0..1")
    if "axis" in table and table["axis"].nunique() > 1:
        axes = ", ".join(sorted(map(str, table["axis"].unique())))
        raise ValueError(f"outcomes: several axes at once ({axes}); fit each one alone")
    models = list(dict.fromkeys(itertools.chain(*zip(table["a"], table["b"]))))
    number = {model: i for i, model in enumerate(models)}
    a, b = table["a"].map(number).to_numpy(), table["b"].map(number).to_numpy()
    if (a == b).any():
        raise ValueError(f"outcomes: row {np.argmax(a == b)} plays a model against itself")
    first = np.where(a < b, wins, 1 - wins)
    code = np.minimum(a, b) * len(models) + np.maximum(a, b)
    edge_codes, edge = np.unique(code, return_inverse=True)
    prompt, prompts = pd.factorize(table["prompt_id"])
    shape = (len(prompts), len(edge_codes))
    cell = prompt * shape[1] + edge
    won = np.bincount(cell, first, minlength=shape[0] * shape[1]).reshape(shape)
    played = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    return models, np.stack(divmod(edge_codes, len(models)), 1), won, played


def _fitted(edges, won, played, n_models, ridge):
    """`_newton` for as many fits at once as fit into the memory of a block."""
    n = max(1, _BLOCK // n_models**2)
    return np.concatenate([_newton(edges, won[i:i + n], played[i:i + n], n_models, ridge)
                           for i in range(0, len(won), n)])


def _newton(edges, won, played, n_models, ridge):
    """Ridge Bradley-Terry fits, all at once: won, played (B, E) -> log-odds (B, M) with mean 0.

    Maximises sum_e w log s + (n - w) log(1 - s) - ridge / 2 |theta|^2, s = sigmoid(theta_i -
    theta_j). Damped Newton: the step is shortened to log(1 + r) / r, r the largest change of any
    difference, which descends from anywhere because |f'''| <= f'' for the logistic loss.
    """
    design = np.zeros((len(edges), n_models))
    design[np.arange(len(edges)), edges[:, 0]] = 1
    design[np.arange(len(edges)), edges[:, 1]] = -1
    a, b, each = *edges.T, np.arange(n_models)
    hessian = np.zeros((len(won), n_models, n_models))
    theta = np.zeros((len(won), n_models))
    for _ in range(200):
        s = 1 / (1 + np.exp(-theta @ design.T))
        gradient = (won - played * s) @ design - ridge * theta
        weight = played * s * (1 - s)
        hessian[:, a, b] = hessian[:, b, a] = -weight
        hessian[:, each, each] = weight @ np.abs(design) + ridge
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        r = np.abs(step @ design.T).max(1, keepdims=True)
        theta = theta + step * np.where(r > 1e-9, np.log1p(r) / np.maximum(r, 1e-9), 1)
        if r.max() < 1e-7:
            return theta
    raise RuntimeError("elo: the Bradley-Terry fit did not converge; is ridge > 0?")


def fit(outcomes, anchor=None, n_boot=500, seed=0, ridge=0.01, policy=None):
    """Bradley-Terry maximum likelihood in Elo points: P(a beats b) = 1 / (1 + 10^(-(a - b) / 400)).

    outcomes: rows of `tournament`, or a DataFrame with a, b, prompt_id, wins_a; a tie (0.5) counts
    as half a win for each, a probability as that part of a win.
    anchor: the model put at 0 (its own interval is then [0, 0] and the others' are those of the
    difference to it); without one the mean of all models is 0.
    policy(model) names what several models are training runs of; the table then has one row each,
    with their mean score and all their games. Default: each model is one of its own.
    -> DataFrame(model, elo, ci_low, ci_high, n), in order of appearance, n = games; with `policy`
    also `runs`.

    Intervals (95 %) resample prompts, since all games on one prompt share its difficulty, and cover
    the runs where there are several (`stats.with_runs`).

    ridge: a Gaussian prior of precision `ridge` on each log-odds score. Without it a model that
    always wins would have an infinite score; with it the score is finite, and for models that win
    and lose it changes next to nothing (a prior spread of 10 log-odds, 1737 Elo). Where some models
    beat others in all their games, maximum likelihood has no finite estimate, and how far they are
    apart is set by the ridge alone: a warning says so, the interval is widened to the gap at which,
    with 2.5 % probability, none of as many prompts would have gone the other way, and the table has
    a column `finite`, False for every model whose difference to the anchor (without one: any
    difference) maximum likelihood puts at infinity.

    Raises ValueError for no games, several axes, an unknown anchor, or models that cannot be
    compared because no chain of games connects them.
    """
    if ridge <= 0:
        raise ValueError(f"ridge: must be above 0, got {ridge}")
    models, edges, won, played = _aggregate(outcomes)
    m, n_prompts = len(models), len(won)
    if anchor is not None and anchor not in models:
        raise ValueError(f"anchor: {anchor!r} played no game; models: "
                         + ", ".join(map(str, models)))
    total_won, total = won.sum(0), played.sum(0)
    beats = np.zeros((m, m))
    beats[edges[:, 0], edges[:, 1]] = total_won
    beats[edges[:, 1], edges[:, 0]] = total - total_won
    groups, group = connected_components(beats > 0, directed=False)
    if groups > 1:
        names = "; ".join(", ".join(str(models[i]) for i in np.flatnonzero(group == g))
                          for g in range(groups))
        raise ValueError(f"outcomes: no games connect these groups of models: {names}. "
                         "Let at least one model of each play one of the other")

    def scores(w, n):
        theta = _fitted(edges, w, n, m, ridge) * ELO
        return theta - (theta[:, [models.index(anchor)]] if anchor is not None else 0)

    names, which, mean = _policies(models, policy)
    runs = np.bincount(which)
    each = scores(total_won[None], total[None])[0]
    if n_boot:
        draws = [scores(w @ won, w @ played) for w in stats.resample(n_prompts, n_boot, seed)]
        low, high = stats.interval(np.concatenate(draws) @ mean, n_prompts)
    else:
        low = high = np.full(len(names), np.nan)
    games = np.bincount(edges.ravel(), np.repeat(total, 2), minlength=m)
    table = pd.DataFrame({"model": names, "elo": each @ mean, "ci_low": low, "ci_high": high,
                          "n": np.bincount(which, games).astype(int)})
    if policy:
        table["runs"] = runs
    _, rank = connected_components(beats > 0, directed=True, connection="strong")
    one_sided = rank[edges[:, 0]] != rank[edges[:, 1]]
    if one_sided.any():
        i, j = edges[np.argmax(one_sided)]
        warnings.warn(f"elo: some models beat others in all their games ({models[i]!r} and "
                      f"{models[j]!r}, for one); how far they are apart is set by the ridge, "
                      "only the near end of the interval by the data", stacklevel=2)
        unseen = min(0.5, NONE_SEEN / n_prompts)
        near = np.where(total_won > 0, total * (1 - unseen), total * unseen)
        near = scores(np.where(one_sided, near, total_won)[None], total[None])[0] @ mean
        table["ci_low"], table["ci_high"] = np.minimum(low, near), np.maximum(high, near)
        finite = rank == rank[models.index(anchor)] if anchor is not None else np.zeros(m, bool)
        table["finite"] = np.bincount(which, ~finite) == 0
    for i in np.flatnonzero(runs > 1):
        found = stats.Estimate(*table.loc[i, ["elo", "ci_low", "ci_high", "n"]])
        found = stats.with_runs(found, each[which == i])
        table.loc[i, ["ci_low", "ci_high"]] = found.low, found.high
    return table


def _policies(models, policy):
    """Names of the policies that models are runs of, the policy of each model (M,), and the matrix
    (M, P) that takes the mean over runs."""
    names = [policy(model) for model in models] if policy else models
    which, names = pd.factorize(pd.Index(names, dtype=object, tupleize_cols=False))
    mean = np.zeros((len(models), len(names)))
    mean[np.arange(len(models)), which] = 1 / np.bincount(which)[which]
    return list(names), which, mean


def pm_compare(scorers):
    """A judge for `tournament` that uses preference models: the probability sigmoid(difference of
    scores).

    scorers: {axis: preference.Scorer or folder of a PM}. A conversation is scored once.
    """
    from cai_utils import preference  # these import all that trains PMs
    from cai_utils.evaluation.agreement import Once

    loaded = {axis: Once(s if hasattr(s, "score") else preference.Scorer(s))
              for axis, s in scorers.items()}

    def compare(a, b, axis, rng):
        # One at a time: a score does not hang on the conversations that are scored beside it.
        first, second = (float(loaded[axis].score([conversation])[0]) for conversation in (a, b))
        return 1 / (1 + math.exp(min(second - first, 700)))  # exp(710) is no float

    return compare


def players(samples, kinds) -> dict:
    """Samples of these kinds of prompts -> the samples of `tournament`, its models named (model,
    size, step), and (model, size, step, run) for further runs of a policy than the first, run 0."""
    out = {}
    for s in samples:
        if s["kind"] in kinds:
            name = (s["model"], s["size"], s["step"], *([s["run"]] if s.get("run") else []))
            games = out.setdefault(name, {})
            conversation = dialogue.with_response(s["prompt"], s["response"])
            games.setdefault(s["id"], []).append(conversation)
    return out


def pairings(names, panel) -> list[tuple]:
    """Pairs of players: each of `names` against each of `panel`, and the panel among itself.

    With many snapshots most of all pairs would be between near-equal policies; a panel that plays
    against all puts them on one scale with fewer games.
    """
    panel = [p for p in panel if p in names]
    inside = itertools.combinations(panel, 2)
    return [*inside, *((name, p) for name in names if name not in panel for p in panel)]


def elo_table(samples, compare, axis, kinds, panel, anchor=None, n_boot=500, seed=0):
    """Elo scores of every (model, size, step) in the samples on one axis, the mean of its runs,
    from games on prompts of these kinds. panel and anchor: (model, size, step), of their first run.

    -> columns model, method (its name), size, step, axis, estimate, ci_low, ci_high, n (games),
    runs, and `finite` where `fit` has it; 0 is the `anchor`'s score (None: the mean), and intervals
    are those of the difference to it. Raises ValueError as `tournament` and `fit`, and for one
    player.
    """
    games = players(samples, kinds)
    if len(games) < 2:
        raise ValueError(f"Elo on {axis}: {len(games)} player with samples on {', '.join(kinds)} "
                         "prompts: add a second model, size or step to compare with")

    def ask(a, b, axis, rng):  # judges take Python's generator, tournaments have numpy's
        return compare(a, b, axis, random.Random(int(rng.integers(2**63))))

    outcomes = tournament(games, ask, axis, pairings(list(games), panel), seed=seed)
    if anchor is not None and anchor not in games:
        raise ValueError(f"anchor: {anchor} has no samples on {', '.join(kinds)} prompts")
    scores = fit(outcomes, anchor=anchor, n_boot=n_boot, seed=seed, policy=lambda p: p[:3])
    parts = pd.DataFrame(list(scores["model"]), columns=["model", "size", "step"])
    return parts.assign(
        method=[registry.label(m) for m in parts["model"]], axis=axis,
        **scores.drop(columns="model").rename(columns={"elo": "estimate"}),
    )


def frontier(table) -> pd.DataFrame:
    """Both axes of `elo_table` side by side, as in Figure 2: columns method, size, step, for each
    axis its estimate (named like the axis), _low, _high and _games, n, the smaller _games, and
    runs; `finite` where the table has it, False if it is on either axis."""
    keys = ["method", "size", "step"]
    sides = []
    for axis in ("helpfulness", "harmlessness"):
        part = table[table["axis"] == axis].set_index(keys)
        sides.append(part[["estimate", "ci_low", "ci_high", "n"]].set_axis(
            [axis, f"{axis}_low", f"{axis}_high", f"{axis}_games"], axis=1))
    both = sides[0].join(sides[1], how="inner").reset_index()
    if "finite" in table:
        infinite = table[table["finite"].eq(False)].set_index(keys).index
        both["finite"] = ~both.set_index(keys).index.isin(infinite)
    runs = table.groupby(keys)["runs"].min()
    return both.assign(n=both[["helpfulness_games", "harmlessness_games"]].min(axis=1),
                       runs=both[keys].merge(runs, on=keys, how="left")["runs"])
