"""A completion, and the checks of inputs that samplers and servers share."""

from __future__ import annotations

import dataclasses

from cai_utils.dialogue import render


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    text: decoded without special tokens, without the stop string and what follows it.
    token_ids, logprobs: every sampled token, the eos and those of the stop string included. The
    log-probability (nats) is that of the token under the temperature-scaled distribution before
    `top_p`; at temperature 0 under the unscaled one.
    finish_reason: "eos", "stop" (a stop string) or "length" (`max_new_tokens`, or the end of the
    model's context); from a server also "content_filter" and "tool_calls".
    """

    text: str
    token_ids: list
    logprobs: list
    finish_reason: str


def check_settings(n, temperature, top_p, max_new_tokens):
    """ValueError for settings of `generate` outside their range."""
    if n < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}:"
            " they must be at least 1, at least 1, at least 0, and in (0, 1]"
        )


def check_inputs(inputs):
    """ValueError unless inputs are a list of at least one item."""
    if isinstance(inputs, str) or len(inputs) == 0:
        raise ValueError("give a list of at least one conversation or text")


def render_all(inputs, tokenizer, name="input"):
    """Conversations and texts -> texts; ValueError for a conversation, naming its row."""
    texts = []
    for r, item in enumerate(inputs):
        try:
            texts.append(render(item, tokenizer))
        except ValueError as error:
            raise ValueError(f"{name} {r}: {error}") from None
    return texts


def check_texts(texts):
    """ValueError for an empty text, naming its row."""
    for r, text in enumerate(texts):
        if not text:
            raise ValueError(f"input {r} is an empty prompt; give it at least one token")


def check_choices(texts, choices):
    """One list of choices for each text; ValueError for other counts and for an empty list."""
    choices = list(choices)
    if choices and isinstance(choices[0], str):
        choices = [choices] * len(texts)
    if len(choices) != len(texts) or not all(choices):
        raise ValueError(
            f"{len(choices)} lists of choices for {len(texts)} texts, or an empty one: give "
            "one non-empty list for all texts, or one for each"
        )
    return choices
