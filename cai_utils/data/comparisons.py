"""Comparison rows (DESIGN section 5) made fit for training a preference model: rotten rows found,
human and AI labels balanced. Reached through ``preference``."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd


def check(rows, on_bad="raise"):
    """Comparison rows -> rows that can be trained on, each with prompt, chosen, rejected, p_chosen
    and weight.

    Bad: an empty answer, identical answers, no common prompt, a p_chosen outside 0..1, a negative
    weight. ``on_bad``: "raise" a ValueError that names the first such row, or "skip" them and print
    how many, by reason. Rows without ``prompt`` whose answers are whole conversations (trl's
    implicit prompt) get the turns they share as prompt.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r}: it is 'raise' or 'skip'")
    good, reasons = [], {}
    for i, row in enumerate(rows):
        row, reason = _normal(row)
        if reason is None:
            good.append(row)
        elif on_bad == "raise":
            raise ValueError(
                f"comparison row {i}: {reason}; mend it, or leave such rows out with on_bad='skip'"
            )
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        counts = ", ".join(f"{reason}: {n}" for reason, n in reasons.items())
        print(f"preference: {sum(reasons.values())} of {len(rows)} rows left out ({counts})")
    if not good:
        raise ValueError("no comparison left to use: give rows with prompt, chosen and rejected")
    return good


def _normal(row):
    """(row in the one form that training uses, None) or (None, what is wrong with it)."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return None, "'chosen' and 'rejected' must be lists of messages"
    if not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if chosen and chosen == rejected:
            return None, "the two answers are identical"
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt or prompt[-1].get("role") != "user":
        return None, "no common prompt that ends with a user turn"
    roles = [turn.get("role") for turn in prompt]
    roles = roles[roles[0] == "system" :]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return None, "the prompt's turns are not user, assistant, ..., user in turn"
    for answer in (chosen, rejected):
        if len(answer) != 1 or answer[0].get("role") != "assistant":
            return None, "an answer is not one assistant turn after the common prompt"
        if not (answer[0].get("content") or "").strip():
            return None, "an empty answer"
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        return None, "the two answers are identical"
    p, weight = row.get("p_chosen"), row.get("weight")
    p, weight = 1.0 if p is None else p, 1.0 if weight is None else weight
    if not 0 <= p <= 1:
        return None, "p_chosen is not a probability"
    if not 0 <= weight < math.inf:
        return None, "weight is not a number from 0 up"
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "p_chosen": float(p), "weight": float(weight)}, None


def mix(human_rows, ai_rows, seed=0, n=None, *, ai_share=0.5, balance="signal"):
    """Human and AI comparisons in one shuffled list, balanced by a ``weight`` on each row (mean 1).

    n: total number of rows, drawn without replacement, ``ai_share`` of them from ``ai_rows``; None:
    all rows of both. ``balance``: "signal" gives the AI rows ``ai_share`` of the summed
    weight * |p_chosen - 1/2|, which is the gradient that a source exerts on equal scores, so that
    soft labels near 1/2 are not swamped by hard ones; "rows" gives them that share of the summed
    weight; "none" sets all weights to 1. A weight does not move the probability that a label asks
    for, only how much it counts. ValueError when a source is empty, or too small for ``n``.
    """
    if balance not in ("signal", "rows", "none"):
        raise ValueError(f"balance={balance!r}: it is 'signal', 'rows' or 'none'")
    if not 0 < ai_share < 1:
        raise ValueError(f"ai_share={ai_share}: it lies between 0 and 1")
    rng = np.random.default_rng(seed)
    n_ai = len(ai_rows) if n is None else round(n * ai_share)
    n_human = len(human_rows) if n is None else n - n_ai
    out, weights = [], []
    for name, rows, size, share in (("human_rows", human_rows, n_human, 1 - ai_share),
                                    ("ai_rows", ai_rows, n_ai, ai_share)):
        if not 0 < size <= len(rows):
            raise ValueError(f"{name}: {size} rows asked for, {len(rows)} given; "
                             "change n or ai_share")
        picked = [rows[i] for i in rng.choice(len(rows), size, replace=False)]
        force = np.mean([abs(_p(r) - 0.5) for r in picked]) if balance == "signal" else 1.0
        if force == 0:
            raise ValueError(f"{name}: every p_chosen is 1/2, so no weight can balance them")
        out += picked
        weights += [1.0 if balance == "none" else share / (size * force)] * size
    mean = sum(weights) / len(weights)
    return [{**out[i], "weight": weights[i] / mean} for i in rng.permutation(len(out))]


def balance_table(rows, by="source"):
    """What each source (or ``by="axis"``) brings to a mixed set: DataFrame(by, n, weight: mean per
    row, strength: mean |2 p_chosen - 1|, signal: its share of the summed weight * strength)."""
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
