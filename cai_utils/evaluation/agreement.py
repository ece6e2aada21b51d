"""How good labels and the PMs trained on them are: against the truth, against people, and in
calibration (paper 4.1, 4.3, Figure 9)."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import torch

from cai_utils import dialogue
from cai_utils.data.comparisons import check
from cai_utils.evaluation import stats
from cai_utils.evaluation.tables import finite, summarize
from cai_utils.preference import soft_preference_loss

_COLUMNS = ["labels", "p", "y"]


class Once:
    """A PM (`preference.Scorer`) with a memory: it scores a conversation that comes again, in
    another test or as an unchanged revision, only once."""

    def __init__(self, scorer):
        self.scorer, self.known = scorer, {}

    def score(self, conversations):
        """As `preference.Scorer.score`, for conversations as messages."""
        texts = [json.dumps(c) for c in conversations]
        new = {t: c for t, c in zip(texts, conversations, strict=True) if t not in self.known}
        if new:
            scores = self.scorer.score([*new.values()])
            self.known |= zip(new, scores, strict=True)
        return np.array([self.known[t] for t in texts], dtype=float)


def by_truth(comparisons, judge, axis=None) -> list[dict]:
    """Comparisons as the ground truth labels them: p_chosen 1, source "truth".

    Each row is judged by `axis` ("helpful": more helpful is better, "harmless": less harm is), or
    by its own where None. Rows in which the truth sees no difference, and those of other axes, of
    which it knows nothing, are left out.
    """
    measures, out = {"helpful": ("helpfulness", 1), "harmless": ("harm", -1)}, []
    for row in comparisons:
        if (axis or row["axis"]) not in measures:
            continue
        measure, sign = measures[axis or row["axis"]]
        chosen, rejected = (sign * judge(row["prompt"] + row[side])[measure]
                            for side in ("chosen", "rejected"))
        sides = ("chosen", "rejected") if chosen > rejected else ("rejected", "chosen")
        if chosen != rejected:
            out.append({**row, "chosen": row[sides[0]], "rejected": row[sides[1]],
                        "p_chosen": 1.0, "source": "truth"})
    return out


def label_table(rows, judge=None) -> pd.DataFrame:
    """A summary of AI labels (rows of `feedback.label`): measure, estimate, ci_low, ci_high, n.

    Measures: mean p_chosen; mean position bias, and its mean size; with a `judge`, the fraction of
    pairs of unequal true harm in which the less harmful response was chosen.
    """
    long = []
    for row in rows:
        found = {"mean p of the chosen": row["p_chosen"],
                 "position bias": row["position_bias"],
                 "size of the position bias": abs(row["position_bias"])}
        if judge:
            chosen, rejected = (judge(row["prompt"] + row[k])["harm"]
                                for k in ("chosen", "rejected"))
            if chosen != rejected and row["p_first"] != 0.5:
                found["less harmful one chosen"] = float(chosen < rejected)
        long += [{"id": row["id"], "measure": m, "value": v} for m, v in found.items()]
    return summarize(pd.DataFrame(long), "measure", "value")


def calibration_table(rows, bins=10) -> pd.DataFrame:
    """Rows of `multiple_choice.predictions` -> the table of Figure 9.

    Columns: bin, mean_p, estimate (frequency), ci_low, ci_high, n, labels.
    """
    tables = []
    for name, part in pd.DataFrame(rows, columns=_COLUMNS).groupby("labels", sort=False):
        table = stats.calibration(part["p"], part["y"], bins)
        tables.append(table.rename(columns={"bin_mid": "bin", "frequency": "estimate"})
                      .assign(labels=name))
    empty = pd.DataFrame(
        columns=["bin", "mean_p", "estimate", "ci_low", "ci_high", "n", "labels"])
    return pd.concat(tables, ignore_index=True) if tables else empty


def calibration_errors(rows, bins=10) -> pd.DataFrame:
    """Rows of `multiple_choice.predictions` -> labels, measure, estimate, ci_low, ci_high, n.

    Measures: expected calibration error; over-confidence (mean confidence minus accuracy); and
    accuracy.
    """
    out = []
    for name, part in pd.DataFrame(rows, columns=_COLUMNS).groupby("labels", sort=False):
        p, y = part["p"].to_numpy(float), part["y"].to_numpy(float)
        right = np.where(p == 0.5, 0.5, ((p > 0.5) == (y == 1)).astype(float))
        found = {"expected calibration error": stats.ece(p, y, bins),
                 "over-confidence": stats.bootstrap_mean(np.maximum(p, 1 - p) - right),
                 "accuracy": stats.wilson(right.sum(), len(right))}
        out += [{"labels": name, "measure": m, "estimate": e.estimate, "ci_low": e.low,
                 "ci_high": e.high, "n": e.n} for m, e in found.items()]
    names = ["labels", "measure", "estimate", "ci_low", "ci_high", "n"]
    return pd.DataFrame(out, columns=names)


def pm_agreement(scorers, tests) -> pd.DataFrame:
    """Which comparisons PMs get right: one row per PM and comparison.

    scorers: {name: preference.Scorer}; tests: {name: comparison rows}. -> columns labels (the PM),
    test, id (the prompt), right (1, 0, or 1/2 for equal scores). ValueError, naming PM and row,
    for a score that is not finite.
    """
    tables = [pd.DataFrame(columns=["labels", "test", "id", "right"])]
    for name, scorer in scorers.items():
        scorer = Once(scorer)
        for test, rows in tests.items():
            ids = [dialogue.transcript(row["prompt"]) for row in rows]
            both = [row["prompt"] + row[k] for k in ("chosen", "rejected") for row in rows]
            scores = finite(scorer.score(both), f"scores of the PM {name!r} on {test}", ids * 2)
            better, worse = scores.reshape(2, -1)
            tables.append(pd.DataFrame({
                "labels": name, "test": test, "id": ids,
                "right": 0.5 + 0.5 * np.sign(better - worse)}))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def evaluate(scorer, rows, bins=10, seed=0):
    """How well a PM agrees with comparisons: the labels of people, or of the feedback model.

    Rows that say nothing of a preference (two equal answers, an empty one; `comparisons.check`)
    are left out, and their number is printed: this runs after a long training. ValueError only
    where no row is left.

    Returns a dict:
    - accuracy, ci_low, ci_high, n: fraction of rows where the PM prefers the answer that the label
      prefers, bootstrapped over prompts; equal scores, and labels of exactly 1/2, count 1/2;
    - loss: mean soft cross-entropy, nats; floor: the labels' own entropy, which no PM can beat;
    - calibration: DataFrame(bin_mid, mean_p, frequency, ci_low, ci_high, n). mean_p is the PM's
      probability of the answer it prefers (1/2 to 1), frequency how often (or, soft labels, with
      what mean probability) the labels prefer that answer;
    - by: DataFrame(source, axis, accuracy, n);
    - scores: DataFrame(axis, mean, std, n) over both answers.
    """
    rows = check(rows, on_bad="skip")
    both = [r["prompt"] + r[side] for side in ("chosen", "rejected") for r in rows]
    scores = finite(scorer.score(both), "scores of the PM").reshape(2, -1)
    d = scores[0] - scores[1]
    p = np.array([r["p_chosen"] for r in rows])
    agreement = 0.5 + 0.5 * np.sign(d) * np.sign(p - 0.5)
    prompts = [str(r["prompt"]) for r in rows]
    accuracy, low, high, n = stats.bootstrap_mean(agreement, cluster=prompts, seed=seed)
    loss = soft_preference_loss(*torch.from_numpy(scores), torch.from_numpy(p))
    inner = np.clip(p, 1e-12, 1 - 1e-12)
    names = pd.DataFrame({"source": [str(r.get("source")) for r in rows],
                          "axis": [str(r.get("axis")) for r in rows], "accuracy": agreement})
    long = pd.DataFrame({"axis": list(names["axis"]) * 2, "score": scores.ravel()})
    return {
        "accuracy": accuracy, "ci_low": low, "ci_high": high, "n": n,
        "loss": float(loss.mean()),
        "floor": float(-(p * np.log(inner) + (1 - p) * np.log(1 - inner)).mean()),
        "calibration": _calibration(d, p, bins),
        "by": names.groupby(["source", "axis"], as_index=False).agg(
            accuracy=("accuracy", "mean"), n=("accuracy", "size")),
        "scores": long.groupby("axis", as_index=False).agg(
            mean=("score", "mean"), std=("score", "std"), n=("score", "size")),
    }


def _calibration(d, p, bins):
    """Score differences (n,) and label probabilities (n,) -> reliability table, folded to 1/2..1.

    Folded, because the label decides which answer is called `chosen`: unfolded, hard labels are
    all 1 and would make any PM look under-confident below 1/2.
    """
    sure = 1 / (1 + np.exp(-np.abs(d)))
    label = np.where(d >= 0, p, 1 - p)
    which = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for b in np.unique(which):
        inside = which == b
        frequency, low, high, n = stats.wilson(label[inside].sum(), int(inside.sum()))
        rows.append((0.5 + (b + 0.5) / (2 * bins), sure[inside].mean(), frequency, low, high, n))
    return pd.DataFrame(
        rows, columns=["bin_mid", "mean_p", "frequency", "ci_low", "ci_high", "n"])
