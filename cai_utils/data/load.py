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
  "redteam") alone (completions with human labels: `xstest.load_completions`);
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

from cai_utils.data import formats, hh_rlhf
from cai_utils.data.fetch import local, paper_file, xstest_file
from cai_utils.experiment.files import read_rows


def load_prompts(spec, split=None, limit=None, seed=0, strict=False) -> list[dict]:
    """Prompts: {"id", "prompt": messages ending with the user's, ...other fields of the file}.

    A file's `prompt` may be messages, a transcript ("\\n\\nHuman: ..."; a generation prompt at its
    end is dropped), or the text of one user turn. From hh-rlhf the prompt is what chosen and
    rejected have in common: their messages up to the last human turn; malformed rows as in
    `load_comparisons`. From red-team-attempts it is the row's `transcript` up to the last human
    turn; other fields (`rating`, `task_description`, `tags`, ...) are kept, and rows without a
    human turn or with two turns of one role in a row are skipped with a count. They have no split.
    `split` keeps "train" or "eval" rows.

    ValueError, naming file and row, for a prompt that is missing or does not end with the user.
    """
    spec, part = _for_split(spec, split)
    rows, where = _open(spec)
    if hh_rlhf.recognise(rows):
        rows = [
            {"id": row["id"], "prompt": row["prompt"], "split": row["split"]}
            for row in hh_rlhf.comparisons(rows, where, None, strict)
        ]
    elif rows and "prompt" not in rows[0] and "transcript" in rows[0]:
        rows = hh_rlhf.red_team_prompts(rows, where, strict)
    else:
        rows = [formats.validate(formats.Prompt, {"id": i, **row}, f"{where}, row {i + 1}")
                for i, row in enumerate(rows)]
    return _choose(rows, where, split, limit, seed, part)


def load_comparisons(spec, split=None, limit=None, seed=0, axis=None, strict=False) -> list[dict]:
    """Comparisons: `prompt`, `chosen`, `rejected` (messages), `p_chosen`, `source`, `axis`,
    `principle`, `split` (ARCHITECTURE.md, Rows; trl's preference format).

    hh-rlhf rows (`chosen` and `rejected` transcripts) become human comparisons with p_chosen = 1,
    the axis taken from the subset's name unless `axis` gives it. Malformed rows of hh-rlhf, those
    with an empty last answer, with two turns of one role in a row, or without a common prompt, are
    **skipped**, and a warning counts each kind; with `strict=True` the first one raises ValueError
    with its line number.

    Rows of other files need `prompt`, `chosen`, `rejected`; p_chosen defaults to 1, source to
    "human". ValueError, naming file and row, for what is missing or out of range.
    """
    spec, part = _for_split(spec, split)
    rows, where = _open(spec)
    if hh_rlhf.recognise(rows):
        if axis is None:
            axis = next((a for a in ("helpful", "harmless") if a in where.lower()), None)
        if axis not in formats.AXES:
            raise ValueError(f"{where}: name what these comparisons judge: axis='helpful' or "
                             "axis='harmless'")
        rows = hh_rlhf.comparisons(rows, where, axis, strict)
    else:
        rows = [formats.validate(formats.Comparison, row, f"{where}, row {i + 1}", axis=axis)
                for i, row in enumerate(rows)]
    return _choose(rows, where, split, limit, seed, part)


def load_questions(spec, limit=None, seed=0) -> list[dict]:
    """Multiple-choice questions in the fields of the paper's evaluations: `prompt`, `corrects`,
    `incorrects`, and `text_correct`, `text_incorrect` where the file has them; `id` is added.

    The 438 questions of the paper's Figure 4 are 221 of an earlier evaluation and 217 new ones
    (section 2). The published file has no field for that, and its order does not show it either:
    questions about one conversation stand far apart. They are read as one set.

    ValueError, naming file and row, for a missing field or an option both right and wrong.
    """
    spec, part = _for_split(spec, None)
    rows, where = _open(spec)
    out = []
    for i, row in enumerate(rows):
        at = f"{where}, row {i + 1}"
        row = formats.validate(formats.Question, {"id": str(i), **row}, at)
        if set(row["corrects"]) & set(row["incorrects"]):
            raise ValueError(f"{at}: an option is in both corrects and incorrects")
        out.append(row)
    return _choose(out, where, None, limit, seed, part)


def _for_split(spec, split) -> tuple[str, slice | None]:
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
                         "xstest.load_completions")
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
