"""What the notebooks' analyses share: rows of a stage in, tidy tables with intervals out.

Every table has `estimate`, `ci_low`, `ci_high`, `n` (DESIGN section 5); a "long" table has one row
per prompt and what was measured on it, from which such a table is summarised.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import numpy as np
import pandas as pd

from cai_utils import dialogue, feedback, models, stats
from cai_utils.provenance import atomic


# ------------------------------------------------------------------------- what params name
def load_function(path):
    """ "module:function" -> the function; None for None (a profile without a ground truth).

    ValueError when there is no such module or function.
    """
    if path is None:
        return None
    module, _, name = str(path).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path!r} names no function: write 'module:function', as in "
            f"'cai_utils.miniature.judge:judge' ({error})"
        ) from error


def for_size(value, size):
    """A parameter's value for a model size: the value itself, or its entry where it is a dict
    {size: value}. ValueError when the dict lacks the size."""
    if not isinstance(value, dict):
        return value
    if size not in value:
        raise ValueError(f"a parameter has values for {', '.join(map(str, value))}, none for size "
                         f"{size!r}: add it in params/")
    return value[size]


def source(run, spec, made_by="00_miniature"):
    """A data spec of params: `data/...` is a file that notebook `made_by` makes in the run folder,
    anything else is what `cai_utils.data` reads. {split: spec} is taken apart."""
    if isinstance(spec, dict):
        return {split: source(run, own, made_by) for split, own in spec.items()}
    if not str(spec).startswith("data/"):
        return spec
    path, bracket, part = str(spec).partition("[")  # a slice stays behind it
    found = run.need(path, made_by)
    return f"{found}[{part}" if bracket else found


def parameters(spec, runs_dir=None) -> int:
    """Number of parameters of a causal LM without its embeddings, read from its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where, options = models.source(spec, runs_dir)
    config = AutoConfig.from_pretrained(where, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(p) for table in tables if table is not None for p in table.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def trained(run, name: str, size: str, make, **key) -> Path:
    """The folder models/<name>/<size>, made by `make(folder) -> metrics` unless it is there and was
    made from the same `key` and code (as in `Run.rows`).

    Its metrics go to data/training_<name>_<size>.jsonl and its loss curve to W&B.
    """
    folder, rows = run.model(name, size), f"training_{name}_{size}"
    if not (folder / "config.json").is_file():
        run.data(rows).unlink(missing_ok=True)
    (metrics,) = run.rows(rows, lambda: [make(folder)], code=make, **key)
    for logged in metrics.get("log", ()):
        run.log({f"{name}/{size}/{k}": v for k, v in logged.items()})
    print(f"{name} {size}: loss {metrics['train_loss']:.3f}, {metrics['steps']} steps, "
          f"{metrics['seconds']:.0f} s")
    return folder


# ---------------------------------------------------------------------------------- estimates
def summarize(long, by, value, cluster="id") -> pd.DataFrame:
    """Mean of column `value` for each group of `by`, rows without a value left out.

    95 % intervals: Wilson for 0/1 values measured once per `cluster`, else bootstrap over clusters;
    `n` counts clusters.
    """
    by, rows = [by] if isinstance(by, str) else list(by), []
    for group, d in long.dropna(subset=[value]).groupby(by, sort=False):
        x = d[value].astype(float)
        if x.isin((0, 1)).all() and not d[cluster].duplicated().any():
            found = stats.wilson(x.sum(), len(x))
        else:
            found = stats.bootstrap_mean(x, cluster=d[cluster])
        rows.append({**dict(zip(by, group, strict=True)), "estimate": found.estimate,
                     "ci_low": found.low, "ci_high": found.high, "n": found.n})
    return pd.DataFrame(rows, columns=[*by, "estimate", "ci_low", "ci_high", "n"])


def difference(long, column, a, b, value, unit="id", cluster=None) -> stats.Estimate:
    """Mean of `value` where `column` is `a` less where it is `b`, paired by `unit`; units that miss
    one of the two are left out. `cluster` names a column that is the same for units which are not
    independent; those are resampled together. ValueError when no unit has both."""
    sides = [long[long[column] == side].dropna(subset=[value]).groupby(unit)[value].mean()
             for side in (a, b)]
    both = pd.concat(sides, axis=1, join="inner").astype(float)
    if not len(both):
        raise ValueError(f"no {unit} with both {column} = {a!r} and {column} = {b!r}")
    groups = long.groupby(unit)[cluster].first()[both.index] if cluster else None
    return stats.paired_difference(both.iloc[:, 0], both.iloc[:, 1], groups)


def differences(long, column, pairs, value, by, unit="id", cluster=None) -> pd.DataFrame:
    """`difference` of every pair (a, b) within every group of `by`; pairs that a group lacks are
    left out. Columns: by, difference ("a - b"), estimate, ci_low, ci_high, n."""
    by, rows = [by] if isinstance(by, str) else list(by), []
    for group, d in long.groupby(by, sort=False):
        for a, b in pairs:
            if {a, b} <= set(d[column]):
                e = difference(d, column, a, b, value, unit, cluster)
                rows.append({**dict(zip(by, group, strict=True)), "difference": f"{a} - {b}",
                             "estimate": e.estimate, "ci_low": e.low, "ci_high": e.high, "n": e.n})
    return pd.DataFrame(rows, columns=[*by, "difference", "estimate", "ci_low", "ci_high", "n"])


def report(df, by, digits=2):
    """Print each row of a table in words: its labels, the estimate and its 95 % interval."""
    by = [by] if isinstance(by, str) else list(by)
    for _, row in df.iterrows():
        label = ", ".join(f"{row[c]}" if isinstance(row[c], str) else f"{c} {row[c]:g}" for c in by)
        print(f"{label}: {row['estimate']:.{digits}f} "
              f"[{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}], n = {row['n']:g}")


def by_truth(comparisons, judge) -> list[dict]:
    """Comparisons as the ground truth would label them, by their axis; those where it sees no
    difference are left out."""
    key, sign = {"helpful": ("helpfulness", 1), "harmless": ("harm", -1)}, []
    for row in comparisons:
        name, better = key[row["axis"]]
        verdicts = [judge(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        sign.append(better * (verdicts[0][name] - verdicts[1][name]))
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} if s < 0 else r
               for r, s in zip(comparisons, sign, strict=True)]
    return [r for r, s in zip(swapped, sign, strict=True) if s]


# ---------------------------------------------------------------------------------- questions
def shots(questions, n):
    """Take the first n questions as answered examples -> (few-shot text, the other questions)."""
    text = "".join(q["prompt"] + q["corrects"][0] for q in questions[:n])
    return text, questions[n:]


def conversations(questions) -> dict:
    """{a question's id: the conversation that its options answer}, where it gives their texts.

    That is what `text_correct` and `text_incorrect` have before their last answer. Questions about
    one conversation are not independent, and are resampled together: the 438 published ones are
    about 188. A question without such texts, or whose two have no common beginning, stands for
    itself, by its id.
    """
    found = {}
    for q in questions:
        before = {str(q.get(k, "")).rpartition("\n\nAssistant:")[0].strip()
                  for k in ("text_correct", "text_incorrect")}
        found[q["id"]] = (before.pop() if len(before) == 1 else "") or q["id"]
    return found


def ask(sampler, questions, methods, **common) -> list[dict]:
    """Answers of one model to questions by several methods: {name: arguments of feedback.answer}.

    A method's `limit` asks it the first so many questions only. Returns a row per question and
    method: id, method, correct (0/1), p_correct, position_bias (both orders only), cot.
    """
    rows = []
    for method, own in methods.items():
        own, began = dict(own), time.time()
        asked = questions[: own.pop("limit", None)]
        found = feedback.answer(sampler, asked, **{**common, **own})
        rows += [{"id": q["id"], "method": method, "correct": int(a["correct"]),
                  "p_correct": a["p_correct"], "position_bias": a.get("position_bias"),
                  "cot": a["cot"]} for q, a in zip(asked, found, strict=True)]
        print(f"  {method}: {len(asked)} questions, {time.time() - began:.0f} s", flush=True)
    return rows


def ask_pm(scorer, questions, method) -> list[dict]:
    """A PM's choice between `text_correct` and `text_incorrect` of each question: rows of `ask`."""
    both = [q[k] for k in ("text_correct", "text_incorrect") for q in questions]
    right, wrong = scorer.score(both).reshape(2, -1)
    return [{"id": q["id"], "method": method, "correct": int(gap > 0),
             "p_correct": float(1 / (1 + np.exp(-gap)))}
            for q, gap in zip(questions, right - wrong, strict=True)]


# ------------------------------------------------------------------------------------- chains
def true_verdict(judge, prompt, text, harm_weight=2.0) -> dict:
    """What the ground truth says of a response: truth:harm, truth:harmlessness (its negative),
    truth:helpfulness, truth:HH (helpfulness less `harm_weight` times harm), truth:evasive."""
    v = judge(dialogue.with_response(prompt, text))
    return {"truth:harm": v["harm"], "truth:harmlessness": -v["harm"],
            "truth:helpfulness": v["helpfulness"],
            "truth:HH": v["helpfulness"] - harm_weight * v["harm"],
            "truth:evasive": int(v["evasive"])}


def chains_long(chains, judge=None, retained=None, scorers=None) -> pd.DataFrame:
    """Revision chains -> one row per chain and revision.

    Columns: id, revision, text:words, text:changed (it differs from the response before it); with a
    `judge` those of `true_verdict`; with `retained` truth:retained, the share of the initial
    response's harmless content that is still there; for each axis of `scorers` ({axis: Scorer})
    "PM:<axis>".
    """
    rows = [
        {"id": chain["id"], "revision": k, "text:words": len(text.split()),
         "text:changed": int(text != chain["responses"][k - 1]) if k else None,
         **(true_verdict(judge, chain["prompt"], text) if judge else {}),
         **({"truth:retained": retained(chain["prompt"], chain["responses"][0], text)}
            if retained else {})}
        for chain in chains for k, text in enumerate(chain["responses"])
    ]
    long = pd.DataFrame(rows)
    talks = [dialogue.with_response(c["prompt"], text) for c in chains for text in c["responses"]]
    for axis, scorer in (scorers or {}).items():
        long[f"PM:{axis}"] = scorer.score(talks)
    return long


def by_revision(long, columns, by=("size", "parameters", "revision")) -> pd.DataFrame:
    """Means of "<measured_by>:<axis>" columns -> by, measured_by, axis, estimate, ci_low, ..."""
    tables = []
    for column in columns:
        measured_by, axis = column.split(":")
        table = summarize(long, by, column)
        table.insert(len(by), "axis", axis)
        table.insert(len(by), "measured_by", measured_by)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def chains_markdown(chains, title, judge=None, intro="") -> str:
    """A page to read: for each chain the prompt, then a table of responses and critiques."""
    page = [f"# {title}", *([intro] if intro else [])]
    for chain in chains:
        page.append("## " + " — ".join(f"*{m['role']}*: {cell(m['content'])}"
                                       for m in chain["prompt"]))
        head = "| | text |" + (" true harm |" if judge else "")
        table = [head, "|---|---|" + ("---|" if judge else "")]
        for k, text in enumerate(chain["responses"]):
            if k and chain["critiques"][k - 1] is not None:
                table.append(f"| critique {k}<br>*{chain['principles'][k - 1]}* | "
                             f"{cell(chain['critiques'][k - 1])} |" + (" |" if judge else ""))
            harm = judge(dialogue.with_response(chain["prompt"], text))["harm"] if judge else ""
            name = f"**revision {k}**" if k else "**response**"
            table.append(f"| {name} | {cell(text)} |" + (f" {harm} |" if judge else ""))
        page.append("\n".join(table))
    return "\n\n".join(page) + "\n"


def cell(text) -> str:
    """Text that stays inside one cell of a Markdown table and is not read as markup."""
    for mark in "\\|*_`#<>[]":
        text = text.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, "\\" + mark))
    return "<br>".join(line.strip() for line in text.strip().splitlines() if line.strip()) or "–"


def save_page(run, text, name) -> Path:
    """Write a Markdown page beside the figures: figures/<profile>/<name>.md."""
    path = run.root / "figures" / run.profile / f"{name}.md"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
