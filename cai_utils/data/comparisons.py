"""Comparison rows (ARCHITECTURE.md, Rows) prepared for training a preference model: malformed rows
found, human and AI labels balanced."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cai_utils.data import formats


def check(rows, on_bad="raise"):
    """Comparison rows -> rows that can be trained on, each with prompt, chosen, rejected, p_chosen
    and weight.

    Malformed: an empty answer, identical answers, no common prompt, a p_chosen outside 0..1, a
    negative weight (`formats.trainable`). `on_bad`: "raise" a ValueError that names the first
    such row, or "skip" them and print how many, by reason.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r}: give 'raise' or 'skip'")
    good, reasons = [], {}
    for i, row in enumerate(rows):
        row, reason = formats.trainable(row)
        if reason is None:
            good.append(row)
        elif on_bad == "raise":
            raise ValueError(
                f"comparison row {i}: {reason}; correct it, or pass on_bad='skip' to leave it out"
            )
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        counts = ", ".join(f"{reason}: {n}" for reason, n in reasons.items())
        print(f"preference: {sum(reasons.values())} of {len(rows)} rows left out ({counts})")
    if not good:
        raise ValueError("no comparison left to use: give rows with prompt, chosen and rejected")
    return good


def mix(human_rows, ai_rows, seed=0, n=None, *, ai_share=0.5, balance="signal"):
    """Human and AI comparisons in one shuffled list, balanced by a `weight` on each row (mean 1).

    n: total number of rows, drawn without replacement, `ai_share` of them from `ai_rows`; None:
    all rows of both. `balance`: "signal" gives the AI rows `ai_share` of the summed
    weight * |p_chosen - 1/2|, which is the size of the gradient at equal scores, so that hard
    labels do not outweigh soft ones near 1/2; "rows" gives them that share of the summed weight;
    "none" sets all weights to 1. A weight does not change a label's target probability, only how
    much it counts. ValueError when a source is empty, or too small for `n`.
    """
    if balance not in ("signal", "rows", "none"):
        raise ValueError(f"balance={balance!r}: give 'signal', 'rows' or 'none'")
    if not 0 < ai_share < 1:
        raise ValueError(f"ai_share={ai_share}: give a number between 0 and 1")
    rng = np.random.default_rng(seed)
    n_ai = len(ai_rows) if n is None else round(n * ai_share)
    n_human = len(human_rows) if n is None else n - n_ai
    out, weights = [], []
    for name, rows, size, fraction in (("human_rows", human_rows, n_human, 1 - ai_share),
                                    ("ai_rows", ai_rows, n_ai, ai_share)):
        if not 0 < size <= len(rows):
            raise ValueError(f"{name}: {size} rows asked for, {len(rows)} given; "
                             "change n or ai_share")
        picked = [rows[i] for i in rng.choice(len(rows), size, replace=False)]
        signal = np.mean([abs(_p(r) - 0.5) for r in picked]) if balance == "signal" else 1.0
        if signal == 0:
            raise ValueError(f"{name}: every p_chosen is 1/2, so no weight can balance them")
        out += picked
        weights += [1.0 if balance == "none" else fraction / (size * signal)] * size
    mean = sum(weights) / len(weights)
    return [{**out[i], "weight": weights[i] / mean} for i in rng.permutation(len(out))]


def balance_table(rows, by="source"):
    """What each source (or `by="axis"`) contributes to a mixed set.

    -> DataFrame(by, n, weight: mean per row, strength: mean |2 p_chosen - 1|, signal: its share of
    the summed weight * strength).
    """
    frame = pd.DataFrame({
        by: [str(r.get(by)) for r in rows],
        "weight": [r.get("weight", 1.0) for r in rows],
        "strength": [abs(2 * _p(r) - 1) for r in rows],
    })
    frame["signal"] = frame["weight"] * frame["strength"]
    table = frame.groupby(by).agg(n=("weight", "size"), weight=("weight", "mean"),
                                  strength=("strength", "mean"), signal=("signal", "sum"))
    table["signal"] /= max(table["signal"].sum(), 1e-12)
    return table.reset_index()


def _p(row):
    return 1.0 if row.get("p_chosen") is None else row["p_chosen"]
