"""Readers of the paper's published prompt files: JSON -> entries of a constitution, and the forms
of its comparison questions.

What the files say, and what is inferred. `RLMadisonPrecogFewShotPrompts.json` shows whole questions
with chain of thought, a `{}` where the principle goes. `RLMadisonFewShotPrompts.json` has bare
pairs of responses; the form without chain of thought is that of section 4.1, which the published
questions of `evals/438HHHEvaluations.jsonl` have, one of the principles in it. Inferred are: the
letters of those pairs (they alternate), that examples ask for the principle of their question, and
that they follow each other with nothing in between.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from cai_utils import dialogue
from cai_utils.data import question_form
from cai_utils.data.fetch import local
from cai_utils.experiment.files import read_rows, refuse_pointer

QUESTIONS = "evals/438HHHEvaluations.jsonl"
COT_SHOTS = "RLMadisonPrecogFewShotPrompts.json"


# One reader for each file: (JSON, path) -> (section of the constitution, entries).
def _critiques(data, path):
    entries = []
    for name, item in data.items():
        for key in ("prompt", "edit_request"):
            if not item.get(key):
                raise ValueError(f"{path}: principle {name!r}: missing field '{key}'")
        ask = item["prompt"][0] if isinstance(item["prompt"], list) else item["prompt"]
        entries.append({
            "id": name,
            "critique_request": _between(ask, "CritiqueRequest:", "Critique:", path, name),
            "revision_request": _between(
                item["edit_request"], "RevisionRequest:", "Revision:", path, name
            ),
        })
    return "critiques", entries


def _between(text, start, end, path, name):
    text = text.strip()
    if not (text.startswith(start) and text.endswith(end)):
        raise ValueError(f"{path}: principle {name!r}: expected '{start} ... {end}'")
    return text[len(start) : -len(end)].strip()


def _comparisons(data, path):
    return "comparisons", [
        {"id": f"comparison{i}", "principle": text} for i, text in enumerate(data)  # verbatim
    ]


def _critique_shots(data, path):
    pattern = re.compile(
        r"(?P<turns>.*)\n\nCritiqueRequest: (?P<critique_request>.*)\n\nCritique: (?P<critique>.*)"
        r"\n\nRevisionRequest: (?P<revision_request>.*)\n\nRevision: (?P<revision>.*)",
        re.DOTALL,
    )
    entries = []
    for i, text in enumerate(data):
        # Most examples end with the opening of a next human turn, which only marks their end.
        match = pattern.fullmatch(text.strip().removesuffix("\n\nHuman:"))
        if match is None:
            raise ValueError(f"{path}: example {i} is not a critique and revision as published")
        entry = match.groupdict()
        *prompt, last = dialogue.parse_transcript(entry.pop("turns"))
        entries.append({"prompt": prompt, "response": last["content"], **entry})
    return "critique", entries


def _comparison_shots(data, path):
    # Published as a better and a worse response; the letters alternate so that neither is favoured.
    entries = []
    for i, item in enumerate(data):
        for key in ("prompt", "corrects", "incorrects"):
            if not item.get(key):
                raise ValueError(f"{path}: example {i}: missing field '{key}'")
        pair = [item["corrects"][0].strip(), item["incorrects"][0].strip()]
        a, b = pair if i % 2 == 0 else pair[::-1]
        prompt = dialogue.parse_transcript(item["prompt"])
        entries.append({"prompt": prompt, "a": a, "b": b, "answer": "AB"[i % 2]})
    return "comparison", entries


def _cot_shots(data, path):
    entries = []
    for i, item in enumerate(data):
        text = item["prompt"][0] if isinstance(item["prompt"], list) else item["prompt"]
        _, entry = question_form.parse(text.rstrip(), reasoned=True) or (None, {})
        if entry.pop("principle", None) != "{}":
            raise ValueError(f"{path}: example {i} is not a reasoned choice as published")
        turns = [{**turn, "content": turn["content"].strip()} for turn in entry.pop("prompt")]
        answer = entry.pop("letter")
        entry = {key: value.strip() for key, value in entry.items()}
        entries.append({"prompt": turns, **entry, "answer": answer, "published": text})
    return "comparison_cot", entries


def read(path):
    """One of the published files -> (section of the constitution, entries). ValueError, naming the
    file, for what is not as published."""
    refuse_pointer(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return READERS[path.name](data, path)


def question_forms(folder) -> dict:
    """{"comparison", "comparison_cot": the published form, None where its file is missing}.

    The first is read from the 438 questions: `evals/` beside `folder`, `folder` itself, or
    CAI_DATA_DIR; the second from the examples with chain of thought in `folder`.
    """
    folder, forms = Path(folder), {"comparison": None, "comparison_cot": None}
    places = [folder.parent / QUESTIONS, folder / Path(QUESTIONS).name,
              local(f"constitutional_harmlessness_paper/{QUESTIONS}")]
    path = next((place for place in places if place and place.is_file()), None)
    if path:
        found = question_form.common([str(row.get("prompt")) for row in read_rows(path)])
        forms["comparison"] = found and found[0]
    if (folder / COT_SHOTS).is_file():
        texts = [e["published"] for e in read(folder / COT_SHOTS)[1]]
        found = question_form.common([text.rstrip() for text in texts], reasoned=True)
        forms["comparison_cot"] = found and found[0]
    return forms


READERS = {
    "CritiqueRevisionInstructions.json": _critiques,
    "CritiqueRevisionFewShotPrompts.json": _critique_shots,
    "RLMadisonInstructions.json": _comparisons,
    "RLMadisonFewShotPrompts.json": _comparison_shots,
    COT_SHOTS: _cot_shots,
}
