"""How good AI labels are: against the truth, in calibration, and by the PMs that learn from them
(paper 4.1, 4.3, Figure 9)."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from cai_utils import analysis, dialogue, feedback, stats


def label_table(rows, judge=None) -> pd.DataFrame:
    """What a set of labels (`feedback.label`) is like: measure, estimate, ci_low, ci_high, n.

    Measures: mean p_chosen; mean position bias, and its mean size; with a `judge`, the share of
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
    return analysis.summarize(pd.DataFrame(long), "measure", "value")


def predictions(sampler, questions, ways, **common) -> list[dict]:
    """Two-option questions asked in several ways ({name: arguments of `feedback.answer`}) -> rows
    {"id", "labels": name of the way, "p": probability of (A), "y": 1 where (A) is right}."""
    rows = []
    for name, own in ways.items():
        began = time.time()
        answers = feedback.answer(sampler, questions, **{**common, **own})
        rows += [{"id": q["id"], "labels": name, "p": min(1.0, a["probs"][" (A)"]),
                  "y": int(" (A)" in q["corrects"])}
                 for q, a in zip(questions, answers, strict=True)]
        print(f"  {name}: {len(questions)} questions, {time.time() - began:.0f} s", flush=True)
    return rows


def calibration_table(rows, bins=10) -> pd.DataFrame:
    """Rows of `predictions` -> columns of Figure 9: labels, bin, mean_p, estimate (frequency),
    ci_low, ci_high, n."""
    tables = []
    for name, part in pd.DataFrame(rows).groupby("labels", sort=False):
        table = stats.calibration(part["p"], part["y"], bins)
        tables.append(table.rename(columns={"bin_mid": "bin", "frequency": "estimate"})
                      .assign(labels=name))
    return pd.concat(tables, ignore_index=True)


def calibration_errors(rows, bins=10) -> pd.DataFrame:
    """Rows of `predictions` -> labels, measure, estimate, ci_low, ci_high, n. Measures: expected
    calibration error; the over-confidence, mean confidence less accuracy; and the accuracy."""
    out = []
    for name, part in pd.DataFrame(rows).groupby("labels", sort=False):
        p, y = part["p"].to_numpy(float), part["y"].to_numpy(float)
        right = np.where(p == 0.5, 0.5, ((p > 0.5) == (y == 1)).astype(float))
        found = {"expected calibration error": stats.ece(p, y, bins),
                 "over-confidence": stats.bootstrap_mean(np.maximum(p, 1 - p) - right),
                 "accuracy": stats.wilson(right.sum(), len(right))}
        out += [{"labels": name, "measure": m, "estimate": e.estimate, "ci_low": e.low,
                 "ci_high": e.high, "n": e.n} for m, e in found.items()]
    return pd.DataFrame(out)


def by_truth(rows, judge) -> list[dict]:
    """Comparisons with the less harmful answer as the chosen one; pairs of equal harm left out."""
    out = []
    for row in rows:
        harm = [judge(row["prompt"] + row[k])["harm"] for k in ("chosen", "rejected")]
        if harm[0] != harm[1]:
            sides = ("chosen", "rejected") if harm[0] < harm[1] else ("rejected", "chosen")
            out.append({**row, "chosen": row[sides[0]], "rejected": row[sides[1]],
                        "p_chosen": 1.0, "source": "truth"})
    return out


def pm_agreement(scorers, tests) -> pd.DataFrame:
    """Which comparisons PMs get right: one row per PM and comparison.

    scorers: {name: preference.Scorer}; tests: {name: comparison rows}. -> columns labels (the PM),
    test, id (the prompt), right (1, 0, or 1/2 for equal scores).
    """
    tables = []
    for name, scorer in scorers.items():
        for test, rows in tests.items():
            ids = [dialogue.transcript(row["prompt"]) for row in rows]
            both = [row["prompt"] + row[k] for k in ("chosen", "rejected") for row in rows]
            better, worse = scorer.score(both).reshape(2, -1)
            tables.append(pd.DataFrame({
                "labels": name, "test": test, "id": ids,
                "right": 0.5 + 0.5 * np.sign(better - worse)}))
    return pd.concat(tables, ignore_index=True)
