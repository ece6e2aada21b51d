"""The paper's published samples, measured for notebook 12 (rows of `data.paper`).

Tables have `estimate`, `ci_low`, `ci_high`, `n`; the independent unit is the prompt.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cai_utils import dialogue, feedback
from cai_utils.evaluation import chains, refusal_rule, stats
from cai_utils.evaluation.escape import cell
from cai_utils.evaluation.tables import finite, summarize
from cai_utils.experiment import registry
from cai_utils.lm.sampling import PromptTooLong


def measured(samples, scorers=None, judge=None) -> list[dict]:
    """Measurements of each sample: a row of numbers, without its text.

    Fields: id, kind, model, method (its name in figures), size, rank_in_file, words; evasive (0 or
    1, `refusal_rule.is_evasive`); with `scorers` ({axis: Scorer}) "PM:<axis>"; with a `judge` (a
    conversation -> {"harm", "helpfulness", ...}) "judge:<measure>" for each number that it returns.
    ValueError, naming measure and row, for a score or verdict that is not finite.
    """
    keep = ("id", "kind", "model", "size", "rank_in_file")
    conversations = [dialogue.with_response(s["prompt"], s["response"]) for s in samples]
    rows = []
    for s, conversation in zip(samples, conversations, strict=True):
        verdict = judge(conversation) if judge else {}
        rows.append({
            **{k: s[k] for k in keep}, "method": registry.label(s["model"]),
            "words": len(s["response"].split()),
            "evasive": int(refusal_rule.is_evasive(s["response"])),
            **{f"judge:{k}": float(v) for k, v in verdict.items()
               if isinstance(v, int | float | bool)},
        })
    for axis, scorer in (scorers or {}).items():
        for row, score in zip(rows, scorer.score(conversations), strict=True):
            row[f"PM:{axis}"] = float(score)
    for name in {k: None for row in rows for k in row if k.startswith(("PM:", "judge:"))}:
        found = [row for row in rows if name in row]
        finite([row[name] for row in found], name, [row["id"] for row in found])
    return rows


def by_model(long, measures) -> pd.DataFrame:
    """Means of measures ({column: label}) for each prompt set and model, intervals over prompts.

    Columns: kind, model, method, measure (the label), estimate, ci_low, ci_high, n (prompts).
    Rates get the wider of the bootstrap's and Wilson's interval over prompts: a rate of 0 or 1 on
    every prompt has a bootstrap interval of zero width.
    """
    tables = []
    for column, label in measures.items():
        table = summarize(long, ["kind", "model", "method"], column)
        if long[column].isin((0, 1)).all():
            floor = [stats.wilson(r.estimate * r.n, r.n) for r in table.itertuples()]
            table["ci_low"] = np.minimum(table["ci_low"], [e.low for e in floor])
            table["ci_high"] = np.maximum(table["ci_high"], [e.high for e in floor])
        tables.append(table.assign(measure=label))
    return pd.concat(tables, ignore_index=True)


def agreement_with_files(long, axis) -> pd.DataFrame:
    """Does the user's PM rank a model's answers to one prompt as that model's own PM did?

    Mean over prompts of Spearman's correlation between "PM:<axis>" and the rank in the file, signed
    so that 1 is the same order. Prompts with fewer than 3 answers, or with all scores or all ranks
    alike, are left out. Columns: kind, model, method, estimate, ci_low, ci_high, n.
    """
    rows = []
    by = ["kind", "model", "method", "id"]
    for (kind, model, method, id_), d in long.groupby(by, sort=False):
        if len(d) > 2 and min(d[f"PM:{axis}"].nunique(), d["rank_in_file"].nunique()) > 1:
            rho = d[f"PM:{axis}"].corr(-d["rank_in_file"], method="spearman")
            rows.append({"kind": kind, "model": model, "method": method, "id": id_, "rho": rho})
    return summarize(pd.DataFrame(rows, columns=[*by, "rho"]), by[:3], "rho")


def feedback_compare(sampler, constitution):
    """A judge for `elo.tournament`: an LM as feedback model (paper 4.1).

    It is asked in both orders which of two responses follows a comparison principle, drawn from the
    constitution, better; None where a question is longer than its context. ValueError for an axis
    other than harmlessness, which the principles do not cover.
    """

    def compare(a, b, axis, rng):
        if axis != "harmlessness":
            raise ValueError(f"the feedback model judges harmlessness, not {axis}: give a PM")
        pair = {"prompt": a[:-1], "responses": [a[-1]["content"], b[-1]["content"]]}
        seed = rng.randrange(2**31)
        try:
            return feedback.label(sampler, [pair], constitution, seed=seed)[0]["p_first"]
        except PromptTooLong:
            return None

    return compare


def side_by_side(samples, title) -> str:
    """A Markdown page: each prompt with one answer of every model, and what `refusal_rule` reads:
    that it is evasive, that it declines, or nothing.

    The answer is the middle one of a model's answers, by rank.
    """
    page = [f"# {title}"]
    for id_ in dict.fromkeys(s["id"] for s in samples):
        same = [s for s in samples if s["id"] == id_]
        page.append(chains.heading(same[0]["prompt"]))
        table = ["| model | answer | read as |", "|---|---|---|"]
        for model in dict.fromkeys(s["model"] for s in same):
            answers = sorted((s for s in same if s["model"] == model),
                             key=lambda s: s["rank_in_file"])
            text = answers[len(answers) // 2]["response"]
            read = ("evasive" if refusal_rule.is_evasive(text)
                    else "declines" if refusal_rule.declines(text) else "")
            table.append(f"| {cell(registry.label(model))} | {cell(text)} | {read} |")
        page.append("\n".join(table))
    return "\n\n".join(page) + "\n"
