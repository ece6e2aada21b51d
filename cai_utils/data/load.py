"""Rows from files and from published data: prompts, comparisons, multiple-choice questions.

A `spec` names where rows come from:

- a file: .jsonl, .jsonl.gz, .csv or .parquet, with the fields of the row kinds below;
- `hh-rlhf/<subset>/<split>`, for example `hh-rlhf/harmless-base/test`: the human comparisons of
  Anthropic/hh-rlhf, from the folder that the environment variable CAI_DATA_DIR names
  (`$CAI_DATA_DIR/hh-rlhf/harmless-base/test.jsonl.gz`), else from the Hugging Face hub;
- `hh-rlhf/red-team-attempts`: the transcripts of Ganguli et al. 2022, from
  `$CAI_DATA_DIR/hh-rlhf/red-team-attempts/red_team_attempts.jsonl.gz`, else from the hub (prompts);
- `xstest/prompts`: the 450 prompts of XSTest, from `$CAI_DATA_DIR/xstest/`, else from its
  publisher, or `xstest/safe` (250 legitimate ones, kind "sensitive") and `xstest/unsafe` (200, kind
  "redteam") alone (completions with human labels: `published.load_completions`);
- `paper/<name>`, for example `paper/438HHHEvaluations`: the paper's evaluation questions, from
  `$CAI_DATA_DIR/constitutional_harmlessness_paper/evals/`, else from the publisher's repository at
  a pinned commit, cached by pooch.

A slice behind it, as in `hh-rlhf/harmless-base/test[:1000]`, keeps those of the usable rows, in
file order, and they belong to whatever split is asked for. {"train": spec, "eval": spec} names one
for each split; slices of one file must not overlap there. `limit` keeps that many rows, drawn at
random from the seed, in file order.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re

from cai_utils import dialogue
from cai_utils.data import hh_rlhf
from cai_utils.data.fetch import local, paper_file, xstest_file
from cai_utils.experiment.files import read_rows


def load_prompts(spec, split=None, limit=None, seed=0, strict=False) -> list[dict]:
    """Prompts: {"id", "prompt": messages ending with the user's, ...other fields of the file}.

    A file's `prompt` may be messages, a transcript ("\\n\\nHuman: ..."; a generation prompt at its
    end is dropped), or the text of one user turn. From hh-rlhf the prompt is what chosen and
    rejected have in common: their messages up to the last human turn; rotten rows as in
    `load_comparisons`. So it is for red-team-attempts, which have one `transcript` a row; other
    fields (`rating`, `task_description`, `tags`, ...) are kept, and rows without a human turn or
    with two turns of one role in a row are skipped with a count. They have no split of their own.
    `split` keeps "train" or "eval" rows.

    ValueError, naming file and row, for a prompt that is missing or does not end with the user.
    """
    spec, part = _parted(spec, split)
    rows, where = _open(spec)
    if hh_rlhf.recognise(rows):
        rows = [
            {"id": row["id"], "prompt": row["prompt"], "split": row["split"]}
            for row in hh_rlhf.comparisons(rows, where, None, strict)
        ]
    elif rows and "prompt" not in rows[0] and "transcript" in rows[0]:
        rows = hh_rlhf.red_team_prompts(rows, where, strict)
    else:
        rows = [
            {"id": str(i), **row, "prompt": _prompt(row, f"{where}, row {i + 1}")}
            for i, row in enumerate(rows)
        ]
        for row in rows:
            row["id"] = str(row["id"])
    return _choose(rows, where, split, limit, seed, part)


def load_comparisons(spec, split=None, limit=None, seed=0, axis=None, strict=False) -> list[dict]:
    """Comparisons: `prompt`, `chosen`, `rejected` (messages), `p_chosen`, `source`, `axis`,
    `principle`, `split` (DESIGN section 5, trl's preference format).

    hh-rlhf rows (`chosen` and `rejected` transcripts) become human comparisons with p_chosen = 1,
    the axis taken from the subset's name unless `axis` gives it. Its rotten rows, those with an
    empty last answer, with two turns of one role in a row, or without a common prompt, are
    **skipped**, and a warning tells how many of each; with `strict=True` the first one is refused
    with its line number.

    Rows of other files need `prompt`, `chosen`, `rejected`; p_chosen defaults to 1, source to
    "human". ValueError, naming file and row, for what is missing or out of range.
    """
    spec, part = _parted(spec, split)
    rows, where = _open(spec)
    if hh_rlhf.recognise(rows):
        if axis is None:
            axis = next((a for a in ("helpful", "harmless") if a in where.lower()), None)
        if axis not in ("helpful", "harmless"):
            raise ValueError(f"{where}: say what these comparisons judge: axis='helpful' or "
                             "axis='harmless'")
        rows = hh_rlhf.comparisons(rows, where, axis, strict)
    else:
        rows = [_comparison(row, f"{where}, row {i + 1}", axis) for i, row in enumerate(rows)]
    return _choose(rows, where, split, limit, seed, part)


def load_questions(spec, limit=None, seed=0) -> list[dict]:
    """Multiple-choice questions in the fields of the paper's evaluations: `prompt`, `corrects`,
    `incorrects`, and `text_correct`, `text_incorrect` where the file has them; `id` is added.

    The 438 questions of the paper's Figure 4 are 221 of an earlier evaluation and 217 new ones
    (section 2). The published file has no field that says which is which, and questions about one
    and the same conversation stand far apart in it, so its order does not tell either: they are
    read as one set, and the split is not guessed.

    ValueError, naming file and row, for a missing field or an option both right and wrong.
    """
    spec, part = _parted(spec, None)
    rows, where = _open(spec)
    out = []
    for i, row in enumerate(rows):
        at = f"{where}, row {i + 1}"
        row = {k: _decoded(v) if k in ("corrects", "incorrects") else v for k, v in row.items()}
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{at}: missing field 'prompt' (a text)")
        for name in ("corrects", "incorrects"):
            texts = row.get(name)
            if not isinstance(texts, list) or not texts or not all(
                isinstance(t, str) for t in texts
            ):
                raise ValueError(f"{at}: missing field '{name}' (a list like [\" (A)\"])")
        if set(row["corrects"]) & set(row["incorrects"]):
            raise ValueError(f"{at}: an option is in both corrects and incorrects")
        out.append({"id": str(i), **row})
    return _choose(out, where, None, limit, seed, part)


def _parted(spec, split) -> tuple[str, slice | None]:
    """The spec of a split, without its slice, and the slice."""
    if not isinstance(spec, dict):
        return _sliced(spec)
    if split not in spec:
        if split is None:
            raise ValueError(f"{spec}: one spec is wanted here, not one for each split")
        raise ValueError(f"{spec}: no spec for split {split!r}")
    found = {name: _sliced(given) for name, given in spec.items()}
    if {*found} == {"train", "eval"}:
        (name, one), (other, two) = found.values()
        ends = [(p.start or 0, math.inf if p.stop is None else p.stop) for p in (one, two) if p]
        alone = len(ends) == 1  # a slice, and the whole file
        if name == other and ends and (alone or max(e[0] for e in ends) < min(e[1] for e in ends)):
            raise ValueError(f"{spec}: train and eval may have rows in common: give slices that "
                             "do not overlap")
    return found[split]


def _sliced(spec) -> tuple[str, slice | None]:
    found = re.fullmatch(r"(.+)\[([^\[\]]*)\]", str(spec))
    if not found:
        return str(spec), None
    ends = re.fullmatch(r"(\d*):(\d*)", found[2])
    if not ends:
        raise ValueError(f"{spec}: a slice is [start:stop], whole numbers from 0, either left out")
    return found[1], slice(*(int(end) if end else None for end in ends.groups()))


def _open(spec) -> tuple[list[dict], str]:
    """The raw rows of a spec, and its name in messages."""
    if spec.startswith("paper/"):
        path = paper_file(f"evals/{spec.removeprefix('paper/')}.jsonl")
        return read_rows(path), str(path)
    if re.fullmatch(r"hh-rlhf/[\w-]+/(train|test)", spec):
        return _hh_source(spec)
    if spec == "hh-rlhf/red-team-attempts":
        return _red_team_source(spec)
    if spec in ("xstest/prompts", "xstest/safe", "xstest/unsafe"):
        path, label = xstest_file("xstest_prompts.csv"), spec.removeprefix("xstest/")
        kinds = {"safe": "sensitive", "unsafe": "redteam"}
        rows = [{"kind": kinds.get(row.get("label")), **row} for row in read_rows(path)]
        rows = [row for row in rows if label in ("prompts", row.get("label"))]
        if not rows:
            raise ValueError(f"{path}: no row is labelled {label}")
        return rows, str(path)
    if spec.startswith("xstest/"):
        raise ValueError(f"{spec!r}: as prompts there are xstest/prompts, xstest/safe and "
                         "xstest/unsafe; the completions of a model are read by "
                         "published.load_completions")
    if spec.startswith("hh-rlhf/"):
        raise ValueError(f"{spec!r}: write hh-rlhf/<subset>/<train or test>, for example "
                         "hh-rlhf/harmless-base/test, or hh-rlhf/red-team-attempts")
    rows = read_rows(spec)
    if not rows:
        raise ValueError(f"{spec}: the file has no rows")
    return rows, spec


def _hh_source(spec):
    for path in filter(None, (local(spec + ending) for ending in (".jsonl.gz", ".jsonl"))):
        return read_rows(path), str(path)
    _, subset, split = spec.split("/")
    return _from_hub(spec, subset, split, f"{spec}.jsonl.gz"), spec


def _red_team_source(spec):
    """The raw rows of red-team-attempts: one JSON object a line, or one JSON array as a whole."""
    name = f"{spec}/red_team_attempts.jsonl"
    for path in filter(None, (local(name + ending) for ending in (".gz", ""))):
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            text = f.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else read_rows(path)
        return rows, str(path)
    return _from_hub(spec, "red-team-attempts", "train", f"{name}.gz"), spec


def _from_hub(spec, subset, split, file):
    import datasets

    try:
        return datasets.load_dataset("Anthropic/hh-rlhf", data_dir=subset, split=split).to_list()
    except Exception as error:  # offline, unknown subset, hub down: one message for the user
        folder = os.environ.get("CAI_DATA_DIR") or "unset"
        raise FileNotFoundError(
            f"{spec}: not in CAI_DATA_DIR ({folder}) and not loaded from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Set CAI_DATA_DIR to "
            f"a folder that holds {file}, or go online"
        ) from error


def _decoded(value):
    """Lists and messages that a CSV cell holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _prompt(row, at):
    prompt = _decoded(row.get("prompt"))
    if not prompt:
        raise ValueError(f"{at}: missing field 'prompt'")
    try:
        if isinstance(prompt, str):
            if re.match(r"\s*Human:", prompt):
                prompt = dialogue.parse_transcript(prompt)
            else:
                prompt = [{"role": "user", "content": prompt}]
        dialogue.transcript(prompt, add_generation_prompt=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}: prompt: {error}") from error
    return prompt


def _response(row, name, at):
    response = _decoded(row.get(name))
    if isinstance(response, str) and response.strip():
        return [{"role": "assistant", "content": response.strip()}]
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], dict):
        if response[0].get("role") == "assistant" and response[0].get("content"):
            return response
    raise ValueError(f"{at}: '{name}' has to be one assistant message or its text")


def _comparison(row, at, axis):
    p = row.get("p_chosen")
    try:
        p = 1.0 if p in (None, "") else float(p)
    except (TypeError, ValueError):
        p = -1.0
    if not 0.5 <= p <= 1:
        raise ValueError(f"{at}: p_chosen={row['p_chosen']!r} has to be from 0.5 to 1")
    axis = row.get("axis") or axis
    if axis not in ("helpful", "harmless"):
        raise ValueError(f"{at}: 'axis' is {axis!r}: give 'helpful' or 'harmless'")
    return {
        **row, "prompt": _prompt(row, at), "chosen": _response(row, "chosen", at),
        "rejected": _response(row, "rejected", at), "p_chosen": p,
        "source": row.get("source") or "human", "axis": axis,
        "principle": row.get("principle") or None, "split": row.get("split") or None,
    }


def _choose(rows, where, split, limit, seed, part=None):
    """The rows of a split, and `limit` of them at random, in file order."""
    if split is not None and split not in hh_rlhf.SPLITS.values():
        raise ValueError(f"split={split!r}: give 'train' or 'eval'")
    if part:
        kept = [{**row, "split": split or row.get("split")} for row in rows[part]]
        if not kept:
            raise ValueError(f"{where}: [{'' if part.start is None else part.start}:"
                             f"{'' if part.stop is None else part.stop}] of its {len(rows)} "
                             "rows holds none")
        rows = kept
    elif split is not None:
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise ValueError(f"{where}: no row has split={split!r}; name a spec or a slice for "
                             "each split: {train: SPEC[:1000], eval: SPEC[1000:]}")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit={limit}: has to be at least 1")
        if limit < len(rows):
            chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
            rows = [rows[i] for i in chosen]
    return rows


def evaluation_prompts(redteam, helpful, n, seed=0) -> list[dict]:
    """n held-out red-team prompts, then n held-out helpful ones; fewer where a file has fewer.

    redteam, helpful: specs of `load_prompts`. Rows without `kind` are "redteam" or "benign".
    """
    rows = []
    for spec, kind in ((redteam, "redteam"), (helpful, "benign")):
        rows += [{"kind": kind, **row} for row in load_prompts(spec, "eval", n, seed)]
    return rows
