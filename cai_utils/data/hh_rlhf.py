"""Rows of Anthropic/hh-rlhf (Bai et al. 2022, arXiv 2204.05862; red-teaming: Ganguli et al. 2022,
arXiv 2209.07858): transcripts as published, read as comparisons and prompts of ours.

Some published rows are rotten: an empty last answer, two turns of one role in a row, two answers to
different prompts.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter

from cai_utils import dialogue

SPLITS = {"train": "train", "test": "eval"}  # hh-rlhf's names -> ours


def recognise(rows) -> bool:
    """Whether the rows are hh-rlhf's: whole transcripts, and no prompt of their own."""
    return "prompt" not in rows[0] and all(
        isinstance(rows[0].get(k), str) for k in ("chosen", "rejected")
    )


def comparisons(rows, where, axis, strict):
    """hh-rlhf's transcripts as comparisons; rotten rows skipped with a warning, or refused.

    `where`: the spec or file, whose name tells the split; `axis`: "helpful" or "harmless", None for
    prompts. ValueError with the line of the first rotten row where `strict`.
    """
    split = next((ours for theirs, ours in SPLITS.items() if re.search(rf"\b{theirs}\b", where)),
                 None)
    out, rotten = [], Counter()
    for i, row in enumerate(rows):
        try:
            prompt, chosen, rejected = _pair(row)
        except ValueError as error:
            if strict:
                raise ValueError(f"{where}, line {i + 1}: {error}") from error
            rotten[str(error)] += 1
            continue
        out.append({
            "id": str(i), "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "p_chosen": 1.0, "source": "human", "axis": axis, "principle": None, "split": split,
        })
    _tell(rotten, where, len(rows))
    return out


def red_team_prompts(rows, where, strict):
    """Transcripts of red-teaming as prompts: the conversation up to the last human turn; rotten
    rows as in `comparisons`."""
    out, rotten = [], Counter()
    for i, row in enumerate(rows):
        try:
            try:
                talk = dialogue.parse_transcript(row["transcript"])
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ValueError("a text that is not a transcript") from None
            while talk and talk[-1]["role"] != "user":
                talk.pop()
            roles = [m["role"] for m in talk]
            if not talk or not talk[-1]["content"]:
                raise ValueError("no human turn")
            if roles[0] != "user" or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
                raise ValueError("two turns of one role in a row")
        except ValueError as error:
            if strict:
                raise ValueError(f"{where}, row {i + 1}: {error}") from error
            rotten[str(error)] += 1
            continue
        out.append({"id": str(i), **{k: v for k, v in row.items() if k != "transcript"},
                    "prompt": talk})
    _tell(rotten, where, len(rows))
    return out


def _tell(rotten, where, n):
    """Warn of the rows that were skipped, with how many of each kind."""
    if rotten:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(rotten.items()))
        warnings.warn(f"{where}: skipped {sum(rotten.values())} of {n} rows: {kinds}",
                      stacklevel=4)


def _pair(row):
    """(prompt, chosen, rejected) of one hh-rlhf row; ValueError with the kind of rot."""
    talks = []
    for side in ("chosen", "rejected"):
        try:
            talk = dialogue.parse_transcript(row[side])
        except (KeyError, TypeError, ValueError):
            raise ValueError("a text that is not a transcript") from None
        # parse_transcript drops an empty last assistant turn; none may be empty before it either.
        if talk[-1]["role"] != "assistant" or not talk[-1]["content"]:
            raise ValueError("an empty last answer")
        talks.append(talk)
    chosen, rejected = talks
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("no common prompt")
    roles = [m["role"] for m in chosen]
    if roles[0] != "user" or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
        raise ValueError("two turns of one role in a row")
    return chosen[:-1], chosen[-1:], rejected[-1:]
