"""Rows from files and from published data: prompts, comparisons, multiple-choice questions.

A `spec` names where rows come from:

- a file: .jsonl, .json, .csv (these also with .gz behind it) or .parquet, with the fields of the
  row kinds below, in any of the forms of `conversations`;
- a data set of the Hugging Face hub, `ORG/NAME`, `ORG/NAME#SPLIT`, or a folder of data files, as
  `hub` reads them;
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

import math
import os
import random
import re

from cai_utils.data import conversations, formats, hh_rlhf, hub
from cai_utils.data.fetch import PAPER_EVALS, local, paper_file, xstest_file
from cai_utils.experiment.files import read_rows
from cai_utils.experiment.params import check_name


def load_prompts(spec, split=None, limit=None, seed=0, strict=False) -> list[dict]:
    """Prompts: {"id", "prompt": messages ending with the user's, ...other fields of the file}.

    A file's `prompt` may be messages (a system message first, or none), a transcript
    ("\\n\\nHuman: ..."; a generation prompt at its end is dropped), or the text of one user turn.
    Without one, it is what `chosen` and `rejected` have in common: their messages up to the last
    human turn; malformed rows as in `load_comparisons`. From red-team-attempts it is the row's
    `transcript` up to the last human turn that is not empty; other fields (`rating`,
    `task_description`, `tags`, ...) are kept, and rows without a human turn or with two turns of
    one role in a row are skipped with a count. They have no split.
    `split` keeps "train" or "eval" rows.

    ValueError, naming file and row, for a prompt that is missing, no text and no messages, or does
    not end with the user, and for an id that is a list or there twice.
    """
    spec, part = _for_split(spec, split)
    rows, where = _open(spec, split)
    if hh_rlhf.recognise(rows):
        rows = [
            {"id": row["id"], "prompt": row["prompt"], "split": row["split"]}
            for row in hh_rlhf.comparisons(rows, where, None, strict)
        ]
    elif not _has(rows, "prompt") and _has(rows, "transcript"):
        rows = hh_rlhf.red_team_prompts(rows, where, strict)
    else:
        pairs = not _has(rows, "prompt") and _has(rows, "chosen") and _has(rows, "rejected")
        _need(rows, where, *(("chosen", "rejected") if pairs else ("prompt",)))
        rows = conversations.usable(rows, lambda i, row: formats.validate(
            formats.Prompt, _with_id(i, row), f"{where}, row {i + 1}"), where, strict)
        _distinct_ids(rows, where)
    return _choose(rows, where, split, limit, seed, part)


def load_comparisons(spec, split=None, limit=None, seed=0, axis=None, strict=False) -> list[dict]:
    """Comparisons: `prompt`, `chosen`, `rejected` (messages), `p_chosen`, `source`, `axis`,
    `principle`, `split` (ARCHITECTURE.md, Rows; trl's preference format).

    Rows need `chosen` and `rejected`, and `prompt` unless these are whole conversations; p_chosen
    defaults to 1, source to "human". `axis`, any text, is what they judge: that of rows that name
    none. hh-rlhf rows (`chosen` and `rejected` transcripts) take it from the subset's name unless
    it is given. Whole conversations that are malformed, those with an empty last answer, with two
    turns of one role in a row, or without a common prompt, are **skipped**, and a warning counts
    each kind; with `strict=True` the first one raises ValueError with its number.

    ValueError, naming file and row, for what is missing or out of range. A pair of two equal
    answers is kept here; `comparisons.check` finds it.
    """
    spec, part = _for_split(spec, split)
    rows, where = _open(spec, split)
    if hh_rlhf.recognise(rows):
        axis = axis or hh_rlhf.named(where, ("helpful", "harmless"))
        if not axis:
            raise ValueError(f"{where}: name what these comparisons judge: axis='helpful', "
                             "axis='harmless' or another")
        rows = hh_rlhf.comparisons(rows, where, axis, strict)
    else:
        _need(rows, where, "chosen", "rejected")
        rows = conversations.usable(rows, lambda i, row: formats.validate(
            formats.Comparison, row, f"{where}, row {i + 1}", axis=axis), where, strict)
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
    rows, where = _open(spec, None)
    _need(rows, where, "prompt", "corrects", "incorrects")
    out = []
    for i, row in enumerate(rows):
        at = f"{where}, row {i + 1}"
        row = formats.validate(formats.Question, _with_id(i, row), at)
        if set(row["corrects"]) & set(row["incorrects"]):
            raise ValueError(f"{at}: an option is in both corrects and incorrects")
        out.append(row)
    _distinct_ids(out, where)
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


def _with_id(i, row):
    row = {"id": str(i), **row}
    if row["id"] in (None, "") or row["id"] != row["id"]:  # null or NaN, of all rows alike
        row["id"] = str(i)
    return row


def _distinct_ids(rows, where):
    """ValueError for an id that two rows have: results are paired by it."""
    seen = {}
    for i, row in enumerate(rows):
        if seen.setdefault(row["id"], i) != i:
            both = f"{seen[row['id']] + 1} and {i + 1}"
            raise ValueError(f"{where}: usable rows {both} have the same id {row['id']!r:.80}: "
                             "give each its own, or leave ids out")


def _has(rows, field):
    return any(row.get(field) is not None for row in rows)


def _need(rows, where, *fields):
    """ValueError where no row has a field, with those that there are."""
    for field in fields:
        if not any(field in row for row in rows):
            there = ", ".join(dict.fromkeys(name for row in rows for name in row))
            raise ValueError(f"{where}: missing column {field!r}; there are: {there}")


def _open(spec, split) -> tuple[list[dict], str]:
    """The raw rows of a spec, and its name in messages."""
    if spec.startswith("paper/"):
        rows, where = _paper(spec)
    elif spec.startswith("hh-rlhf/"):
        rows, where = _hh_source(spec)
    elif spec.startswith("xstest/"):
        rows, where = _xstest(spec)
    elif hub.recognise(spec):
        rows, where = hub.read(spec, split), spec
    else:
        rows, where = read_rows(spec), spec
        if rows and {"prompt", "label", "focus", "note"} <= {*rows[0]}:
            rows = _with_kinds(rows)
    if not rows:
        raise ValueError(f"{where}: the file has no rows")
    return rows, where


def _paper(spec):
    name = spec.removeprefix("paper/").removesuffix(".jsonl")
    for part in name.split("/"):
        check_name(part, f"data spec {spec!r}: a part")
    try:
        path = paper_file(f"evals/{name}.jsonl")
    except FileNotFoundError as error:
        folder = local("constitutional_harmlessness_paper/evals")
        there = sorted(path.stem for path in folder.glob("*.jsonl")) if folder else []
        if name in PAPER_EVALS:
            raise
        known = ", ".join(f"paper/{name}" for name in dict.fromkeys([*PAPER_EVALS, *there]))
        raise FileNotFoundError(f"{error}. The names are: {known}") from None
    return read_rows(path), str(path)


def _xstest(spec):
    label = spec.removeprefix("xstest/")
    if label not in ("prompts", "safe", "unsafe"):
        raise ValueError(f"{spec!r}: as prompts there are xstest/prompts, xstest/safe and "
                         "xstest/unsafe; the completions of a model are read by "
                         "xstest.load_completions")
    path = xstest_file("xstest_prompts.csv")
    rows = [row for row in _with_kinds(read_rows(path)) if label in ("prompts", row.get("label"))]
    if not rows:
        raise ValueError(f"{path}: no row is labelled {label}")
    return rows, str(path)


def _with_kinds(rows):
    """XSTest's prompts with our `kind`."""
    kinds = {"safe": "sensitive", "unsafe": "redteam"}
    return [{"kind": kinds.get(row.get("label")), **row} for row in rows]


def _hh_source(spec):
    _, subset, *split = spec.split("/")
    attempts = spec == "hh-rlhf/red-team-attempts"
    known = f"its subsets are {', '.join(hh_rlhf.SUBSETS)}"
    if not attempts and split not in (["train"], ["test"]):
        raise ValueError(f"{spec!r}: write hh-rlhf/<subset>/<train or test>, for example "
                         f"hh-rlhf/harmless-base/test, or hh-rlhf/red-team-attempts; {known}")
    check_name(subset, f"data spec {spec!r}: a part")
    name = f"{spec}/red_team_attempts.jsonl" if attempts else f"{spec}.jsonl"
    for path in filter(None, (local(name + ending) for ending in (".gz", ""))):
        return read_rows(path), str(path)
    folder = os.environ.get("CAI_DATA_DIR") or "unset"
    mend = (f"set CAI_DATA_DIR ({folder}) to a folder that holds {name}.gz, or go online"
            + f"; {known}, and hh-rlhf/red-team-attempts" * (subset not in hh_rlhf.SUBSETS))
    return hub.fetch(spec, "load_dataset", "Anthropic/hh-rlhf", data_dir=subset,
                     split=split[0] if split else "train", mend=mend).to_list(), spec


def _choose(rows, where, split, limit, seed, part=None):
    """The rows of a split, and `limit` of them at random, in file order."""
    if split is not None and split not in ("train", "eval"):
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
