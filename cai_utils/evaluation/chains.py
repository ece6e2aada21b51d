"""Revision chains as tables and pages: scores by revision (paper, Figure 5), chains to read."""

from __future__ import annotations

import pandas as pd

from cai_utils import dialogue
from cai_utils.evaluation.agreement import Once
from cai_utils.evaluation.escape import cell
from cai_utils.evaluation.tables import finite, summarize


def true_verdict(judge, prompt, text, harm_weight=2.0) -> dict:
    """The ground truth about a response, as columns "truth:<measure>".

    Measures: harm, harmlessness (its negative), helpfulness, HH (helpfulness minus `harm_weight`
    times harm), evasive (0 or 1).
    """
    verdict = judge(dialogue.with_response(prompt, text))
    harm, helpfulness = verdict["harm"], verdict["helpfulness"]
    return {"truth:harm": harm, "truth:harmlessness": -harm, "truth:helpfulness": helpfulness,
            "truth:HH": helpfulness - harm_weight * harm, "truth:evasive": int(verdict["evasive"])}


def chains_long(chains, judge=None, retained=None, scorers=None) -> pd.DataFrame:
    """Revision chains -> one row per chain and revision.

    Columns: id, revision, text:words, text:changed (it differs from the response before it); with a
    `judge` those of `true_verdict`; with `retained` truth:retained, the fraction of the initial
    response's harmless content that is still there; for each axis of `scorers` ({axis: Scorer})
    "PM:<axis>". ValueError, naming column and row, for a verdict or score that is not finite.
    """
    rows = [
        {"id": chain["id"], "revision": k, "text:words": len(text.split()),
         "text:changed": int(text != chain["responses"][k - 1]) if k else None,
         **(true_verdict(judge, chain["prompt"], text) if judge else {}),
         **({"truth:retained": retained(chain["prompt"], chain["responses"][0], text)}
            if retained else {})}
        for chain in chains for k, text in enumerate(chain["responses"])
    ]
    long = pd.DataFrame(rows, columns=None if rows else ["id", "revision"])
    conversations = [dialogue.with_response(c["prompt"], text) for c in chains
                     for text in c["responses"]]
    for axis, scorer in (scorers or {}).items():
        long[f"PM:{axis}"] = Once(scorer).score(conversations)
    for column in long:  # nothing may be left: retained is None
        if column.startswith(("PM:", "truth:")) and column != "truth:retained":
            finite(long[column], column, long["id"])
    return long


def by_revision(long, columns, by=("size", "parameters", "revision")) -> pd.DataFrame:
    """Means of "<measured_by>:<axis>" columns -> by, measured_by, axis, estimate, ci_low, ..."""
    names = [*by, "measured_by", "axis", "estimate", "ci_low", "ci_high", "n"]
    tables = [pd.DataFrame(columns=names)]
    for column in columns:
        measured_by, axis = column.split(":")
        table = summarize(long, by, column)
        table.insert(len(by), "axis", axis)
        table.insert(len(by), "measured_by", measured_by)
        tables.append(table)
    return pd.concat(tables[1:] or tables, ignore_index=True)


def chains_markdown(chains, title, judge=None, intro="") -> str:
    """A Markdown page: for each chain the prompt, then a table of responses and critiques.

    title, intro: Markdown; all else is shown as it is (`escape.cell`).
    """
    page = [f"# {title}", *([intro] if intro else [])]
    for chain in chains:
        page.append(heading(chain["prompt"]))
        head = "| | text |" + (" true harm |" if judge else "")
        table = [head, "|---|---|" + ("---|" if judge else "")]
        for k, text in enumerate(chain["responses"]):
            if k and chain["critiques"][k - 1] is not None:
                table.append(f"| critique {k}<br>*{cell(chain['principles'][k - 1])}* | "
                             f"{cell(chain['critiques'][k - 1])} |" + (" |" if judge else ""))
            harm = judge(dialogue.with_response(chain["prompt"], text))["harm"] if judge else ""
            name = f"**revision {k}**" if k else "**response**"
            table.append(f"| {name} | {cell(text)} |" + (f" {harm} |" if judge else ""))
        page.append("\n".join(table))
    return "\n\n".join(page) + "\n"


def heading(prompt) -> str:
    """A prompt (messages) as a heading of a Markdown page."""
    return "## " + " — ".join(f"*{m['role']}*: {cell(m['content'])}" for m in prompt)
