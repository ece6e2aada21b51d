"""Rows of Anthropic/hh-rlhf (Bai et al. 2022, arXiv 2204.05862; red-teaming: Ganguli et al. 2022,
arXiv 2209.07858): transcripts as published, read as comparisons and prompts of ours.

Some published rows are malformed: an empty last answer, two turns of one role in a row, two answers
to different prompts.
"""

from __future__ import annotations

import re
from pathlib import Path

from cai_utils.data.conversations import Malformed, conversation, usable, whole

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SPLITS = {r"\btrain\b": "train", r"\btest\b": "eval"}  # hh-rlhf's names -> ours


def recognise(rows) -> bool:
    """Whether the rows are hh-rlhf's: pairs of whole transcripts, and no prompts."""
    return not any(row.get("prompt") for row in rows) and any(
        all(re.match(r"\s*Human:", row[side]) if isinstance(row.get(side), str) else False
            for side in ("chosen", "rejected")) for row in rows)


def named(where, patterns):
    """The first of `patterns` found in the name of a file, else of its folder, and so on upwards;
    or None.

    hh-rlhf's files are <subset>/<split>: folders above them are the user's, and say less.
    """
    found = (p for part in reversed(Path(where).parts) for p in patterns
             if re.search(p, part.lower()))
    return next(found, None)


def comparisons(rows, where, axis, strict):
    """hh-rlhf's transcripts as comparisons; malformed rows are skipped with a warning.

    `where`: the spec or file, whose name holds the split; `axis`: what they judge, None for
    prompts. With `strict`, ValueError with the line of the first malformed row.
    """
    split = SPLITS.get(named(where, SPLITS))

    def comparison(i, row):
        pair = whole(*(_transcript(row.get(side)) for side in ("chosen", "rejected")))
        return {"id": str(i), **pair, "p_chosen": 1.0, "source": "human", "axis": axis,
                "principle": None, "split": split}

    return usable(rows, comparison, where, strict, "line")


def red_team_prompts(rows, where, strict):
    """Transcripts of red-teaming as prompts: the conversation up to the last human turn that says
    something; malformed rows as in `comparisons`."""
    def prompt(i, row):
        messages = _transcript(row.get("transcript"))
        while messages and (messages[-1]["role"] != "user" or not messages[-1]["content"]):
            messages.pop()
        if not messages:
            raise Malformed("no human turn")
        roles = [m["role"] for m in messages]
        if roles[0] != "user" or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
            raise Malformed("two turns of one role in a row")
        return {"id": str(i), **{k: v for k, v in row.items() if k != "transcript"},
                "prompt": messages}

    return usable(rows, prompt, where, strict)


def _transcript(text):
    try:
        return conversation(text)
    except (AttributeError, TypeError, ValueError):
        raise Malformed("a text that is not a transcript") from None
