"""Responses of policies to the evaluation prompts, and how good they are.

A *sample* is a row {"id", "kind", "prompt", "response", "model", "size", "step"}: the response of a
model of one size to one prompt, after `step` episodes of RL (0: none). Where policies were trained
several times, `run` tells the runs apart. Notebooks 07, 09 and 10 use such rows.
"""

from __future__ import annotations

import pandas as pd

from cai_utils import dialogue
from cai_utils.evaluation import refusal_rule
from cai_utils.evaluation.escape import visible
from cai_utils.evaluation.tables import differences, finite, number, summarize
from cai_utils.experiment import registry
from cai_utils.experiment.registry import MEASURES, PANELS


def show_samples(samples, models_, n=3) -> None:
    """Print the models' responses to the first n prompts of each kind."""
    for kind in dict.fromkeys(s["kind"] for s in samples):
        ids = list(dict.fromkeys(s["id"] for s in samples if s["kind"] == kind))[:n]
        for id_ in ids:
            shown = [s for m in models_ for s in samples
                     if (s["kind"], s["id"], s["model"]) == (kind, id_, m)]
            if not shown:
                continue
            print(f"\n[{kind}] " + " / ".join(visible(m["content"]) for m in shown[0]["prompt"]))
            for s in shown:
                step = f", {s['step']} episodes" if s["step"] else ""
                print(f"   {registry.label(s['model'])}{step}: {visible(s['response'])}")


# ------------------------------------------------------------------------ with a ground truth
def judged(samples, judge) -> pd.DataFrame:
    """Samples with the judge's verdicts.

    Columns: id, kind, model, size, step, response, `run` where the samples have it, and one per
    measure (`registry.MEASURES`). ValueError, naming measure and row, for a verdict that is not
    finite.
    """
    keep, rows = ["id", "kind", "model", "size", "step", "response"], []
    keep += ["run"] if samples and "run" in samples[0] else []
    for s in samples:
        verdict = judge(dialogue.with_response(s["prompt"], s["response"]))
        rows.append({**{k: s[k] for k in keep}, **{m: float(verdict[m]) for m in MEASURES}})
    frame = pd.DataFrame(rows, columns=[*keep, *MEASURES])
    for measure in MEASURES:
        finite(frame[measure], f"{measure} by the judge", frame["id"])
    return frame


def truth_table(frame, by=("model", "size", "step")) -> pd.DataFrame:
    """Means of the measures of `judged` by model and kind of prompt; intervals over prompts, and
    over runs where there are several.

    Columns: *by, kind, measure, estimate, ci_low, ci_high, n, and `runs` where `frame` has `run`.
    """
    by = [*by, "kind"]
    tables = [summarize(frame, by, m).assign(measure=m) for m in MEASURES]
    columns = [*by, "measure", "estimate", "ci_low", "ci_high", "n"]
    return pd.concat(tables, ignore_index=True)[columns + ["runs"] * ("run" in frame)]


def panels_of(table, shown=PANELS) -> pd.DataFrame:
    """The rows of a `truth_table` that a figure shows, with `axis`, the title of their panel."""
    parts = [table[(table["kind"] == kind) & (table["measure"] == measure)].assign(axis=label)
             for label, (kind, measure) in shown.items()]
    return pd.concat(parts, ignore_index=True)


def compared(frame, pairs, column="model", by=("size",), shown=PANELS) -> pd.DataFrame:
    """Paired differences a - b of the measures that a figure shows, over the prompts of both.

    frame: of `judged`; pairs: (a, b), values of `column`. Columns: *by, axis, difference, estimate,
    ci_low, ci_high, n.
    """
    tables = []
    for label, (kind, measure) in shown.items():
        part = frame[frame["kind"] == kind]
        table = differences(part, column, pairs, measure, list(by))
        table.insert(len(by), "axis", label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def wide(table, index=("model", "size", "step")) -> pd.DataFrame:
    """A `truth_table` laid out for reading: a row per model, a column per kind and measure."""
    text = table.assign(
        cell=[number(row) for row in table.to_dict("records")],
        column=table["kind"] + ", " + table["measure"],
    )
    columns = sorted(set(text["column"]), key=list(text["column"]).index)
    return text.pivot_table(index=list(index), columns="column", values="cell", aggfunc="first",
                            sort=False)[columns]


# --------------------------------------------------------------------- without a ground truth
def scored(samples, scorers) -> pd.DataFrame:
    """Samples measured without a ground truth.

    Columns: id, kind, model, size, step; "PM:<axis>" for each of scorers ({axis:
    preference.Scorer}); "text:evasive" (`refusal_rule.is_evasive`); "text:words". ValueError,
    naming PM and row, for a score that is not finite.
    """
    keep = ("id", "kind", "model", "size", "step")
    conversations = [dialogue.with_response(s["prompt"], s["response"]) for s in samples]
    frame = pd.DataFrame([{k: s[k] for k in keep} for s in samples], columns=keep)
    for axis, scorer in scorers.items():
        frame[f"PM:{axis}"] = finite(scorer.score(conversations), f"PM:{axis}", frame["id"])
    frame["text:evasive"] = [int(refusal_rule.is_evasive(s["response"])) for s in samples]
    frame["text:words"] = [len(s["response"].split()) for s in samples]
    return frame


def scored_table(frame, pairs, column="model") -> pd.DataFrame:
    """Means of `scored` by size, kind of prompt and `column` ("model" or "step"), then differences
    a - b of its values on the same prompts for each (a, b) in pairs.

    Columns: measure, size, kind, group (a value of `column`, or "a - b"), estimate, ci_low,
    ci_high, n.
    """
    tables, by = [], ["size", "kind"]
    for measure in [c for c in frame if ":" in c]:
        means = summarize(frame, [*by, column], measure)
        gaps = differences(frame, column, pairs, measure, by)
        for table, name in ((means, column), (gaps, "difference")):
            tables.append(table.rename(columns={name: "group"}).assign(measure=measure))
    table = pd.concat(tables, ignore_index=True)
    table["group"] = table["group"].astype(str)
    return table[["measure", *by, "group", "estimate", "ci_low", "ci_high", "n"]]
