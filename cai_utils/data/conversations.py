"""Conversations and comparisons in the forms that files have, made messages.

A prompt may be messages, a transcript ("\\n\\nHuman: ..."), or the text of one user turn; lists may
stand as text in a CSV cell. A comparison's `chosen` and `rejected` may each be one answer to
`prompt` (a message, or its text), or the whole conversation (messages, or a transcript). Then the
turns before the last are the prompt, and a `prompt` field beside them, as in UltraFeedback, has to
agree with them; a system turn of it is kept. A text `system` beside them, as in Orca's pairs, is
the system turn of `prompt`. An empty system message is none.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter

from cai_utils import dialogue

_TRANSCRIPT = re.compile(r"\s*Human:")
_LISTED = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]""")
_TURN = r"\n\r?\nAssistant:"
_ONE_ANSWER = "has to be one assistant message or its text"


class Malformed(ValueError):
    """A row of a published data set that nothing can be learned from: `usable` skips it."""


def usable(rows, make, where, strict, unit="row"):
    """`make(i, row)` of each row, without those for which it raises Malformed: these are counted in
    a warning or, with `strict`, the first is a ValueError with its number.

    ValueError where no row is left.
    """
    out, skipped = [], Counter()
    for i, row in enumerate(rows):
        try:
            out.append(make(i, row))
        except Malformed as error:
            if strict:
                raise ValueError(f"{where}, {unit} {i + 1}: {error}") from error
            skipped[str(error)] += 1
    kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(skipped.items()))
    if not out:
        raise ValueError(f"{where}: none of its {len(rows)} rows can be used: {kinds}")
    if skipped:
        warnings.warn(f"{where}: skipped {sum(skipped.values())} of {len(rows)} rows: {kinds}",
                      stacklevel=4)
    return out


def prompt_of(value) -> list[dict]:
    """What a `prompt` field holds, as messages. ValueError where it is missing, empty, or no
    conversation."""
    value = _listed(value)
    if value is None or value in ("", []):
        raise ValueError("missing field 'prompt'")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("'prompt' is empty: only spaces")
        if not _TRANSCRIPT.match(value):
            return [{"role": "user", "content": value}]
        try:
            return dialogue.parse_transcript(value)
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from error
    return messages_of(value, "prompt")


def pair(row) -> dict:
    """{"prompt", "chosen", "rejected"} of a comparison in any of the forms above: messages, one
    message, one message.

    ValueError names the field that is missing or not what it should be. Malformed for whole
    conversations that are no comparison: "an empty last answer", "no common prompt", "two turns of
    one role in a row", "an empty prompt".
    """
    both = "chosen", "rejected"
    given = row.get("prompt")
    given = None if given is None or given in ("", []) else prompt_of(given)
    # One answer alone that reads like a transcript is a text that a model wrote; so are two with
    # single line ends beside a prompt: transcripts have an empty line before each turn.
    turn = _TURN if given else "\nAssistant:"
    transcripts = all(isinstance(row.get(name), str) and _TRANSCRIPT.match(row[name])
                      and re.search(turn, row[name]) for name in both)
    chosen, rejected = (_side(row, name, transcripts) for name in both)
    alone = [len(side) == 1 and side[0]["role"] == "assistant" for side in (chosen, rejected)]
    if all(alone):
        if given is None:
            raise ValueError("missing field 'prompt'")
        return {"prompt": with_system(given, row), "chosen": chosen, "rejected": rejected}
    for name, side, other in (("chosen", chosen, alone[1]), ("rejected", rejected, alone[0])):
        if len(side) == 1 and side[0]["role"] != "assistant" or len(side) > 1 and other:
            raise ValueError(f"'{name}' {_ONE_ANSWER}; or both sides are whole conversations")
    found = whole(chosen, rejected)
    if given and not _agree(given, found["prompt"]):
        raise ValueError("'prompt' is not what 'chosen' and 'rejected' begin with: correct it, or "
                         "leave it out")
    prompt = found["prompt"]
    for message in (given or [])[:1]:
        if message["role"] == "system":
            prompt = with_system(prompt, {"system": message["content"]})
    return {**found, "prompt": with_system(prompt, row)}


def with_system(messages, row) -> list[dict]:
    """The messages, first the text that the row has as `system`. ValueError where they begin with
    another system turn."""
    text = row.get("system")
    if not isinstance(text, str) or not text.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"].split() != text.split():
        raise ValueError(f"two system texts, {messages[0]['content']!r:.60} and {text!r:.60}: "
                         "leave one out")
    return messages


def whole(chosen, rejected) -> dict:
    """Two conversations (messages) -> {"prompt", "chosen", "rejected"}; Malformed as in `pair`."""
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant" or not side[-1]["content"].strip():
            raise Malformed("an empty last answer")
    if _said(chosen[:-1]) != _said(rejected[:-1]):
        raise Malformed("no common prompt")
    prompt = chosen[:-1]
    roles = [m["role"] for m in prompt]
    turns = roles[roles[:1] == ["system"]:]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise Malformed("two turns of one role in a row")
    if not prompt[-1]["content"].strip():
        raise Malformed("an empty prompt")
    return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def conversation(transcript) -> list[dict]:
    """The messages of a transcript, without the empty human turn in which samples often end."""
    messages = dialogue.parse_transcript(transcript)
    return messages[:-1] if messages[-1:] == [{"role": "user", "content": ""}] else messages


def _side(row, name, transcripts):
    """What `chosen` or `rejected` holds: one assistant message, or a whole conversation."""
    if name not in row:
        raise ValueError(f"missing field '{name}' (one assistant message or its text)")
    value = _listed(row[name])
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and value.strip():
        if transcripts:
            return conversation(value)
        return [{"role": "assistant", "content": value.strip()}]
    if not value or not isinstance(value, list):
        raise ValueError(f"'{name}' {_ONE_ANSWER}, not {value!r:.80}")
    messages = messages_of(value, name)
    if len(messages) == 1 and not messages[0]["content"]:
        raise ValueError(f"'{name}' {_ONE_ANSWER}: it is empty")
    return messages


def messages_of(value, name) -> list[dict]:
    """The list of messages in field `name`, their contents texts; without an empty system message.
    ValueError names the message that is none."""
    if not isinstance(value, list):
        raise ValueError(f"'{name}' has to be a text or a list of messages, not {value!r:.80}")
    out = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in dialogue.ROLES:
            raise ValueError(f"{name}: message {i} is {message!r:.80}: it needs 'content' and a "
                             f"'role' of {', '.join(dialogue.ROLES)}")
        content = message.get("content")
        if isinstance(content, list) and content and all(
                isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
            message = {**message, "content": content}
        if not isinstance(content, str):
            raise ValueError(f"{name}: the content of message {i} is {content!r:.80}, not a text")
        if i or message["role"] != "system" or content.strip():
            out.append(message)
    return out


def listed(value):
    """A list that a CSV cell holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _listed(value):
    """Messages that a CSV cell holds as JSON, or as pandas writes lists and arrays of them."""
    if not isinstance(value, str) or not _LISTED.match(value) or value.rstrip()[-1] != "]":
        return value
    found = listed(value)
    if found is not value:
        return found
    try:  # an array has no commas; line ends inside of texts are escaped
        return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", value.strip()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{value!r:.80} looks like a list of messages, and is neither JSON nor "
                         "Python") from None


def _said(messages):
    return [(m["role"], m["content"]) for m in messages]


def _agree(given, prompt):
    """Whether a prompt field is the shared turns, or the text of one user turn of them."""
    def words(messages):
        return [(m["role"], m["content"].split()) for m in messages if m["role"] != "system"]

    said, shared = words(given), words(prompt)
    return said == shared or len(said) == 1 and said[0] in shared
