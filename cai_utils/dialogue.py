"""Conversations: lists of messages, and their text forms.

A conversation is `[{"role": "user" | "assistant", "content": str}, ...]`. Its plain text form is
the transcript of the paper (Bai et al. 2022, arXiv 2212.08073)::

    "\\n\\nHuman: ...\\n\\nAssistant: ..."

One `{"role": "system", ...}` may stand before the first turn. A chat template that has that role
renders it, `render` refuses any other; a transcript has no such turn and begins with its text, as
a paragraph.

Contents are written verbatim. Outer whitespace is removed where text becomes a message
(`parse_transcript`, `with_response`), so that messages round-trip.
"""

from __future__ import annotations

import re

import jinja2

SPEAKERS = {"user": "Human", "assistant": "Assistant"}
ROLES = ("system", *SPEAKERS)

# The transcript as a chat template, for tokenizers that are used in other tools. It ends a finished
# conversation with eos, as training does (`tokens.encode`); `uses_transcript` recognises it.
TEMPLATE = (
    "{% for m in messages %}{{ '\n\n' if m['role'] == 'system' else "
    "'\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}"
    "{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)

_ROLES = {speaker: role for role, speaker in SPEAKERS.items()}
_LEADS = {"system": "", **{role: f"{speaker}: " for role, speaker in SPEAKERS.items()}}
_SYSTEM = {}  # chat template -> whether it has a system role
_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")


def transcript(messages, add_generation_prompt=False):
    """Messages -> the paper's transcript, which begins with "\\n\\nHuman:", or with the text of a
    system message.

    With `add_generation_prompt` it ends in "\\n\\nAssistant:" without a trailing space: the
    completion brings its own. ValueError on a role other than user or assistant (or system before
    the first turn), on an empty list, and on a generation prompt asked for after an assistant
    message.
    """
    _check(messages, add_generation_prompt)
    text = "".join(f"\n\n{_LEADS[m['role']]}{m['content']}" for m in messages)
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
    `add_generation_prompt=False`. ValueError as in `transcript`, and for a system message that the
    template leaves out, refuses, or gives to the user or the assistant.
    """
    if isinstance(conversation, str):
        return conversation
    _check(conversation, add_generation_prompt)
    if getattr(tokenizer, "chat_template", None):
        if conversation[0]["role"] == "system" and not _has_system_role(tokenizer):
            raise ValueError("this model's chat template has no system role: put the text of the "
                             "system message into the first user turn, or leave it out")
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return transcript(conversation, add_generation_prompt)


def _has_system_role(tokenizer):
    """Whether the chat template shows a system message, and not as the user's or assistant's."""
    def shown(role):
        talk = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        try:
            return tokenizer.apply_chat_template(talk, tokenize=False)
        except (jinja2.TemplateError, ValueError):
            return ""

    template = str(tokenizer.chat_template)
    if template not in _SYSTEM:
        text = shown("system")
        _SYSTEM[template] = "Be brief." in text and text not in map(shown, SPEAKERS)
    return _SYSTEM[template]


def with_response(prompt, text):
    """The prompt's messages followed by one assistant message, its outer whitespace stripped.

    Returns a new list; `prompt` is not changed.
    """
    return [*prompt, {"role": "assistant", "content": text.strip()}]


def _check(messages, add_generation_prompt):
    if not messages:
        raise ValueError("an empty conversation: give at least one message")
    for i, m in enumerate(messages):
        roles = ROLES if i == 0 and len(messages) > 1 else SPEAKERS
        if not isinstance(m, dict) or m.get("role") not in roles or m.get("content") is None:
            raise ValueError(
                f"message {i} is {m!r}: it needs 'content' and a 'role' of 'user' or 'assistant'; "
                "a 'system' message may stand before the first turn"
            )
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(
            "the conversation already ends with an assistant message: pass "
            "add_generation_prompt=False, or drop that message to sample a new one"
        )
