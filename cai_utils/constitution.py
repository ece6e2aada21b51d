"""Constitutions: principles, few-shot examples, and reproducible draws of principles.

A constitution is one YAML file::

    name: tone
    critiques:                 # for critique -> revision (section 3.1 of the paper)
      - id: polite
        critique_request: Say where the assistant is impolite.
        revision_request: Rewrite the response so that it is polite.
    comparisons:               # for AI feedback (section 4.1)
      - id: polite
        principle: Choose the more polite response.
    few_shot:                  # optional; `prompt` is one user message or a list of messages
      critique: [{prompt, response, critique_request, critique, revision_request, revision}]
      comparison: [{prompt, a, b, answer: A, principle}]
      comparison_cot: [{prompt, a, b, answer: B, principle, reasoning}]

A comparison example without `principle` borrows that of the question that it precedes. The
published JSON files of the paper (principles and few-shot prompts) are read as they are, and so is
the form of their comparison questions (`data.paper_prompts`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cai_utils.data import formats
from cai_utils.data.paper_prompts import READERS, question_forms, read
from cai_utils.data.question_form import QuestionForm
from cai_utils.experiment import yaml12
from cai_utils.seeds import stable_int

FOLDER = Path(__file__).parent / "constitutions"
_SHOTS = ("critique", "comparison", "comparison_cot")


@dataclass(frozen=True)
class Constitution:
    """Principles for critiques and for comparisons, and the examples shown before them.

    forms: the published forms of comparison questions, "comparison" and "comparison_cot", None for
    one whose file is missing; empty for a constitution that is asked in the project's own form.
    """

    name: str
    critiques: list[dict] = field(default_factory=list)
    comparisons: list[dict] = field(default_factory=list)
    few_shot: dict[str, list[dict]] = field(default_factory=lambda: {s: [] for s in _SHOTS})
    forms: dict[str, QuestionForm | None] = field(default_factory=dict)


def load(name_or_path) -> Constitution:
    """A constitution by name (`default`, `miniature`: those in `cai_utils/constitutions/`), from a
    YAML file, from a folder with the paper's JSON files, or from one of those files alone.

    FileNotFoundError when there is no such file; ValueError, with the file, the entry and the
    field, when something is missing, empty, doubled or unknown.
    """
    name = str(name_or_path)
    path = FOLDER / f"{name}.yaml"
    if not re.fullmatch(r"[\w-]+", name) or not path.exists():
        path = Path(name)
    if path.is_dir():
        return _published(path, [f for f in READERS if (path / f).exists()])
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(
            f"no constitution {name!r}: give one of {known}, a YAML file, or a folder with the "
            "paper's JSON files"
        )
    if path.name in READERS:
        return _published(path.parent, [path.name])
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), yaml12.UniqueLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    return _check(data, path)


def draw(
    principles: list[dict], seed: int, row, step: int, n_principles: int | None = None
) -> dict:
    """One principle for (seed, row, step), uniformly and independently of every other draw.

    `n_principles` restricts the draw to the first n (Figure 6 of the paper). ValueError when there
    are no principles, or fewer than n.
    """
    if not principles:
        raise ValueError("the constitution has no principles of this kind: add some to its file")
    n = len(principles) if n_principles is None else n_principles
    if not 1 <= n <= len(principles):
        raise ValueError(
            f"n_principles={n}: the constitution has {len(principles)} principles, give 1 to that"
        )
    return principles[stable_int("principle", seed, row, step, bits=62) % n]


def _check(data, path) -> Constitution:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a constitution is a mapping with `name` and principles")
    few_shot = data.get("few_shot") or {}
    if not isinstance(few_shot, dict) or set(few_shot) - set(_SHOTS):
        raise ValueError(f"{path}: few_shot is a mapping of {', '.join(_SHOTS)}")
    checked = formats.validate(formats.ConstitutionFile, data, path)
    sections = {s: _as_written(data.get(s), checked.get(s)) for s in ("critiques", "comparisons")}
    for section, entries in sections.items():
        seen = set()
        for i, entry in enumerate(entries):
            if entry["id"] in seen:
                raise ValueError(f"{path}: {section}[{i}]: the id {entry['id']!r} is there twice")
            seen.add(entry["id"])
    if not any(sections.values()):
        raise ValueError(f"{path}: no principles: give 'critiques', 'comparisons' or both")
    found = checked.get("few_shot") or {}
    shots = {s: _as_written(few_shot.get(s), found.get(s)) for s in _SHOTS}
    return Constitution(checked["name"], few_shot=shots, **sections)


def _as_written(given, checked) -> list[dict]:
    """Checked entries with their fields in the file's order, empty ones left out."""
    return [{key: entry[key] for key in old if entry[key] is not None}
            for old, entry in zip(given or [], checked or [], strict=True)]


def _published(folder, names) -> Constitution:
    if not names:
        raise FileNotFoundError(
            f"{folder}: none of the paper's files is here ({', '.join(READERS)})"
        )
    principles, shots = {}, {s: [] for s in _SHOTS}
    for name in names:
        section, entries = read(Path(folder) / name)
        (shots if section in shots else principles)[section] = entries
    forms = question_forms(folder) if "comparisons" in principles else {}
    return Constitution("paper", few_shot=shots, forms=forms, **principles)
