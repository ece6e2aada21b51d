"""Rows of Anthropic/hh-rlhf (Bai et al. 2022, arXiv 2204.05862; red-teaming: Ganguli et al. 2022,
arXiv 2209.07858): transcripts as published, read as comparisons and prompts of ours.

Some published rows are malformed: an empty last answer, two turns of one role in a row, two answers
to different prompts.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter

from cai_utils import dialogue

SPLITS = {"train": "train", "test": "eval"}  # hh-rlhf's names -> ours


def recognise(rows) -> bool:
    """Whether the rows are hh-rlhf's: whole transcripts, and no `prompt` field."""
    return "prompt" not in rows[0] and all(
        isinstance(rows[0].get(k), str) for k in ("chosen", "rejected")
    )


def comparisons(rows, where, axis, strict):
    """hh-rlhf's transcripts as comparisons; malformed rows are skipped with a warning.

    `where`: the spec or file, whose name holds the split; `axis`: "helpful" or "harmless", None for
    prompts. With `strict`, ValueError with the line of the first malformed row.
    """
    split = next((ours for theirs, ours in SPLITS.items() if re.search(rf"\b{theirs}\b", where)),
                 None)
    out, malformed = [], Counter()
    for i, row in enumerate(rows):
        try:
            prompt, chosen, rejected = _pair(row)
        except ValueError as error:
            if strict:
                raise ValueError(f"{where}, line {i + 1}: {error}") from error
            malformed[str(error)] += 1
            continue
        out.append({
            "id": str(i), "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "p_chosen": 1.0, "source": "human", "axis": axis, "principle": None, "split": split,
        })
    _warn(malformed, where, len(rows))
    return out


def red_team_prompts(rows, where, strict):
    """Transcripts of red-teaming as prompts: the conversation up to the last human turn; malformed
    rows as in `comparisons`."""
    out, malformed = [], Counter()
    for i, row in enumerate(rows):
        try:
            try:
                messages = dialogue.parse_transcript(row["transcript"])
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ValueError("a text that is not a transcript") from None
            while messages and messages[-1]["role"] != "user":
                messages.pop()
            roles = [m["role"] for m in messages]
            if not messages or not messages[-1]["content"]:
                raise ValueError("no human turn")
            if roles[0] != "user" or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
                raise ValueError("two turns of one role in a row")
        except ValueError as error:
            if strict:
                raise ValueError(f"{where}, row {i + 1}: {error}") from error
            malformed[str(error)] += 1
            continue
        out.append({"id": str(i), **{k: v for k, v in row.items() if k != "transcript"},
                    "prompt": messages})
    _warn(malformed, where, len(rows))
    return out


def _warn(malformed, where, n):
    """Warn of the rows that were skipped, with how many of each kind."""
    if malformed:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(malformed.items()))
        warnings.warn(f"{where}: skipped {sum(malformed.values())} of {n} rows: {kinds}",
                      stacklevel=4)


def _pair(row):
    """(prompt, chosen, rejected) of one hh-rlhf row; ValueError with what is wrong with it."""
    pair = []
    for side in ("chosen", "rejected"):
        try:
            messages = dialogue.parse_transcript(row[side])
        except (KeyError, TypeError, ValueError):
            raise ValueError("a text that is not a transcript") from None
        # parse_transcript drops an empty last assistant turn; the one before it may be empty too.
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise ValueError("an empty last answer")
        pair.append(messages)
    chosen, rejected = pair
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("no common prompt")
    roles = [m["role"] for m in chosen]
    if roles[0] != "user" or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
        raise ValueError("two turns of one role in a row")
    return chosen[:-1], chosen[-1:], rejected[-1:]
