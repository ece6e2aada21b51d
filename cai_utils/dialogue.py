"""Conversations: lists of messages, and their text forms.

A conversation is `[{"role": "user" | "assistant", "content": str}, ...]`. Its plain text form is
the transcript of the paper (Bai et al. 2022, arXiv 2212.08073)::

    "\\n\\nHuman: ...\\n\\nAssistant: ..."

Contents are written verbatim. Outer whitespace is removed where text becomes a message
(`parse_transcript`, `with_response`), so that messages round-trip.
"""

from __future__ import annotations

import re

SPEAKERS = {"user": "Human", "assistant": "Assistant"}

# The transcript as a chat template, for tokenizers that are used in other tools. It ends a finished
# conversation with eos, as training does (`tokens.encode`); `uses_transcript` recognises it.
TEMPLATE = (
    "{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}"
    "{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)

_ROLES = {speaker: role for role, speaker in SPEAKERS.items()}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def transcript(messages, add_generation_prompt=False):
    """Messages -> the paper's transcript, which begins with "\\n\\nHuman:".

    With `add_generation_prompt` it ends in "\\n\\nAssistant:" without a trailing space: the
    completion brings its own. ValueError on a role other than user or assistant, on an empty list,
    and on a generation prompt asked for after an assistant message.
    """
    _check(messages, add_generation_prompt)
    text = "".join(f"\n\n{SPEAKERS[m['role']]}: {m['content']}" for m in messages)
    return text + "\n\nAssistant:" if add_generation_prompt else text


def parse_transcript(text):
    """The paper's transcript -> messages, contents stripped of outer whitespace.

    An empty last assistant turn is a generation prompt and is dropped. Two turns of one speaker in
    a row are kept (hh-rlhf has some). ValueError when the text does not begin with a turn.
    """
    text = "\n\n" + text.lstrip()
    if not _TURN.match(text):
        raise ValueError(
            f"not a transcript: {text[2:62]!r} should begin with 'Human:' or 'Assistant:'"
        )
    parts = _TURN.split(text)[1:]
    messages = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def uses_transcript(tokenizer):
    """Whether this model reads conversations as "Human: / Assistant:" text: it has no chat template
    (a base LM), or one that renders the transcript (the miniature)."""
    template = getattr(tokenizer, "chat_template", None)
    return not template or "Human:" in str(template)


def render(conversation, tokenizer, add_generation_prompt=True):
    """A conversation -> the text a model reads: its own chat template, else the transcript.

    A `str` passes through. For text that ends with a finished response (scoring, training) pass
    `add_generation_prompt=False`. ValueError as in `transcript`.
    """
    if isinstance(conversation, str):
        return conversation
    _check(conversation, add_generation_prompt)
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return transcript(conversation, add_generation_prompt)


def with_response(prompt, text):
    """The prompt's messages followed by one assistant message, its outer whitespace stripped.

    Returns a new list; `prompt` is not changed.
    """
    return [*prompt, {"role": "assistant", "content": text.strip()}]


def _check(messages, add_generation_prompt):
    if not messages:
        raise ValueError("an empty conversation: give at least one message")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in SPEAKERS or "content" not in m:
            raise ValueError(
                f"message {i} is {m!r}: it needs 'content' and a 'role' of 'user' or 'assistant'"
            )
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(
            "the conversation already ends with an assistant message: pass "
            "add_generation_prompt=False, or drop that message to sample a new one"
        )
