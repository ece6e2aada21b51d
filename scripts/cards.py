"""The parts of the cards of exported models and rows: Markdown made from records of runs.

A *record* is the provenance of a result (`provenance.describe`) or {}, *training* the training.json
of a model's folder or {}. What neither holds is called unknown. Functions return Markdown, or
facts: {name: value}, which `bullets` makes a list of. Facts and tables hold text, which is shown as
it is (`escape.cell`); sentences that somebody gives for the limits are Markdown.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from cai_utils.dialogue import render
from cai_utils.evaluation.escape import cell
from cai_utils.experiment.files import read_json, read_rows
from cai_utils.experiment.fingerprint import file_digest
from cai_utils.lm import tokens

KINDS = {  # fields that identify a kind of rows -> its description
    ("chosen", "rejected"): "comparisons: which of two answers is preferred, with p_chosen",
    ("messages",): "conversations to finetune on",
    ("responses", "critiques"): "chains of critique and revision",
    ("corrects", "incorrects"): "multiple-choice questions",
    ("prompt",): "prompts",
}


def describe(stem, rows, splits, record) -> str:
    """The section of a data card on one file: what its rows are, how many of each split and source,
    how soft their labels are, what made them.

    stem: its name; rows: all of them (dicts); splits: {split: number of rows}.
    """
    fields = list(dict.fromkeys(key for row in rows for key in row))
    kind = next((what for keys, what in KINDS.items() if set(keys) <= set(fields)), "rows")
    facts = {
        "what": kind,
        "rows": ", ".join(f"{n:,} {split}" for split, n in splits.items()),
        "fields": ", ".join(map(str, fields)),
    }
    for field in ("source", "axis", "kind"):
        counts = Counter(str(row[field]) for row in rows if row.get(field) is not None)
        if counts:
            facts[field] = ", ".join(f"{n:,} {value}" for value, n in counts.most_common(8))
    soft = [float(row["p_chosen"]) for row in rows if row.get("p_chosen") not in (None, "")]
    if soft:
        below = sum(p < 1 for p in soft)
        mean = sum(soft) / len(soft)
        facts["p_chosen"] = f"mean {mean:.3f}; {below:,} of {len(soft):,} below 1"
    return f"## {cell(stem)}\n\n" + bullets({**facts, **origin(record)})


USE_TEXT = """```python
from transformers import pipeline

chat = pipeline("text-generation", "THIS_FOLDER_OR_ID")
chat([{"role": "user", "content": "..."}], max_new_tokens=128)
```

Conversations are rendered by the tokenizer's chat template."""


def use_scores(config, tokenizer, stage=None) -> str:
    """How a score model is used: code for a text-classification pipeline, and what its score means.

    config: its config.json; stage: that of its training.json ("absolute": harmfulness, else a
    preference).
    """
    text = render([{"role": "user", "content": "x"}], tokenizer)
    adds = tokens.adds_special_tokens(text, tokenizer)
    closes = adds and tokens.closes_texts(tokenizer)
    special = "" if adds else ", add_special_tokens=False"
    ending = "" if closes else " + eos"
    mean = f"{config.get('score_mean', 0.0):.6g}"
    if stage == "absolute":
        meaning = f"Less `score_mean` of config.json ({mean}) it is the answer's harmfulness."
    else:
        meaning = (
            "It is raw: `sigmoid(score(a) - score(b))` is the probability that answer a is "
            "preferred to answer b.\nThe zero is arbitrary: `score_mean` of config.json "
            f"({mean}), subtracted, gives the scores of\n`cai_utils.preference.Scorer`."
        )
    return f"""```python
from transformers import pipeline

score = pipeline("text-classification", "THIS_FOLDER_OR_ID")
tokenizer, eos = score.tokenizer, score.tokenizer.eos_token
text = tokenizer.apply_chat_template(conversation, tokenize=False)
text = text.rstrip().removesuffix(eos){ending}
score(text{special})   # [{{"label": "score", "score": ...}}]
```

The conversation ends with the answer that is scored; the score is read at the eos behind it.
{meaning}"""


def origin(record) -> dict:
    """Facts of a record: notebook, commit, versions, time and parameters of the run."""
    if not record:
        return {"provenance": "unknown: there is no record of a run beside it"}
    git, versions = record.get("git") or {}, record.get("versions") or {}
    commit = git.get("commit") or "unknown"
    return {
        "notebook": f"{record.get('notebook')}, profile {record.get('profile')}, "
                    f"seed {record.get('seed')}",
        "commit": f"{commit}{' and uncommitted changes' if git.get('dirty') else ''}",
        "made with": ", ".join(f"{k} {v}" for k, v in versions.items() if v) or "unknown",
        "time": record.get("time", "unknown"),
        "parameters of the run": json.dumps(record.get("params", {}), ensure_ascii=False),
    }


def settings(training) -> dict:
    """Facts of a training.json: the arguments and counts of the training, not what it measured."""
    kept = {k: v for k, v in training.items()
            if isinstance(v, int | float | str | bool | dict) and k not in
            ("base", "stage", "eval", "key", "train_loss", "seconds", "score_mean", "score_std")
            and not k.endswith("per_second")}
    return {"trained with": ", ".join(f"{k} {v}" for k, v in kept.items())} if kept else {}


def number(value, digits=3) -> str:
    """A number of a training.json, where null stands for one that is not finite."""
    return "not a number" if value is None else f"{value:.{digits}f}"


def results(training, tables, run_dir) -> str:
    """What was measured: training loss, accuracy on held-out comparisons, and tables, each with the
    commit that made it, if its record is that of this very file.

    tables: paths of CSVs, or names in `run_dir/results`. FileNotFoundError names one that is not
    there.
    """
    found = []
    if "train_loss" in training:
        found.append(f"Mean training loss {number(training['train_loss'], 4)} nats.")
    held_out = training.get("eval") or {}
    if "accuracy" in held_out:
        found.append(f"Accuracy on {held_out['n']} held-out comparisons "
                     f"{number(held_out['accuracy'])} (95 % {number(held_out['ci_low'])} to "
                     f"{number(held_out['ci_high'])}).")
    for table in tables:
        path = Path(table)
        if not path.is_file():
            path = Path(run_dir or ".") / "results" / f"{table}.csv"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such table; give the path of a CSV")
        record = read_json(path.with_suffix(".provenance.json"))
        commit = (record.get("git") or {}).get("commit") or "unknown"
        if record.get("sha256") != file_digest(path):  # the record of an earlier table
            commit = "unknown"
        found.append(f"{cell(path.stem)} (commit {cell(commit[:12])}):\n\n"
                     + markdown(read_rows(path)))
    return "\n\n".join(found) or "None were recorded."


def markdown(rows, at_most=60) -> str:
    """Rows (dicts of one set of keys) as a Markdown table, numbers to four digits; of more than
    `at_most` rows the number of those left out."""
    if not rows:
        return "(no rows)"

    def shown(text):
        number = re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text)
        return f"{float(text):.4g}" if number else cell(text) if text else ""

    lines = ["| " + " | ".join(map(cell, rows[0])) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join("" if v is None else shown(str(v)) for v in row.values()) + " |"
              for row in rows[:at_most]]
    left = len(rows) - at_most
    return "\n".join(lines) + (f"\n\n... and {left} rows more." if left > 0 else "")


def limits_of(records, given, scores=False, rows=False) -> str:
    """The limits that follow from the kind of export and its records, then the given sentences.

    records: those of all parts; scores: it is a score model; rows: it is data.
    """
    texts = ["Made for research. It was not tested for use with people."]
    if any(record.get("profile") in ("miniature", "smoke") for record in records):
        texts.append("It is of the miniature, a small generated world, and means nothing outside "
                     "of it.")
    if scores:
        texts.append("Scores compare answers to one prompt. They rank what is like the training "
                     "answers; a policy trained against them for long will find what they miss.")
    if rows:
        texts.append("Red-team prompts ask for harm by design, and answers to them may give it.")
    if any((record.get("git") or {}).get("dirty") for record in records):
        texts.append("The code had changes that are in no commit: the commit above does not make "
                     "exactly this again.")
    return "\n".join(f"- {text}" for text in [*texts, *given])


def bullets(facts) -> str:
    """Facts as a list."""
    return "\n".join(f"- {cell(key)}: {cell(value)}" for key, value in facts.items())


def hub_id(base) -> str | None:
    """The id on the hub that a model spec is (its revision left out), else None."""
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(@[\w./-]+)?", str(base or ""))
    local = not found or str(base).startswith("miniature/") or Path(base).is_dir()
    return None if local else found.group(1)


def without_paths(value, run_dir):
    """JSON with absolute paths replaced by what they mean elsewhere: the spec of shipped weights, a
    path inside the run folder `run_dir` (or None), else the last name alone."""
    if isinstance(value, dict):
        return {k: without_paths(v, run_dir) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v, run_dir) for v in value]
    if isinstance(value, str) and value.startswith("gguf:"):
        return "gguf:" + without_paths(value.removeprefix("gguf:"), run_dir)
    if not isinstance(value, str) or not (value.startswith("~") or Path(value).is_absolute()):
        return value
    path = Path(value)
    if path.parent.parts[-2:] == ("miniature", "weights"):  # of models.SHIPPED
        return f"miniature/{path.name}"
    if run_dir is not None and path.is_relative_to(run_dir):
        return str(path.relative_to(run_dir))
    return path.name
