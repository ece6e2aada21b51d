"""Readers of the paper's published prompt files: JSON -> entries of a constitution."""

from __future__ import annotations

import re

from cai_utils import dialogue


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
        {"id": f"comparison{i}", "principle": text.strip()} for i, text in enumerate(data)
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
    pattern = re.compile(
        r".*?\n\nH: (?P<turns>.*)\n\n\{\}"
        r"\n \(A\) \[\[\[(?P<a>.*)\]\]\]\n \(B\) \[\[\[(?P<b>.*)\]\]\]"
        r"\n\nAssistant: Let's think step by step:(?P<reasoning>.*)"
        r"\n\nHuman:\nSo the answer is: \((?P<answer>[AB])\)",
        re.DOTALL,
    )
    entries = []
    for i, item in enumerate(data):
        text = item["prompt"][0] if isinstance(item["prompt"], list) else item["prompt"]
        match = pattern.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{path}: example {i} is not a reasoned choice as published")
        entry = {k: v.strip() for k, v in match.groupdict().items()}
        turns = re.split(r"\n\n([HA]):", "\n\nH: " + entry.pop("turns"))[1:]
        prompt = [
            {"role": "user" if who == "H" else "assistant", "content": text.strip()}
            for who, text in zip(turns[::2], turns[1::2], strict=True)
        ]
        entries.append({"prompt": prompt, **entry})
    return "comparison_cot", entries


READERS = {
    "CritiqueRevisionInstructions.json": _critiques,
    "CritiqueRevisionFewShotPrompts.json": _critique_shots,
    "RLMadisonInstructions.json": _comparisons,
    "RLMadisonFewShotPrompts.json": _comparison_shots,
    "RLMadisonPrecogFewShotPrompts.json": _cot_shots,
}
