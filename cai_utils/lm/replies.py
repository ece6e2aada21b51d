"""What a server's replies say: completions, and the log-probabilities of the tokens of a prompt.

Servers differ in what they show of a token. A character of several tokens is "" in all but its last
(vLLM), or U+FFFD in each (SGLang); others show the vocabulary's own spelling. So a choice behind a
text is told from it by token ids, or by comparing with the tokens of the text alone, and by letters
only where they spell it.
"""

from __future__ import annotations

import contextlib
import reprlib
from itertools import accumulate
from typing import NamedTuple

_TAIL = 24  # characters of a text by which its end is found among a server's tokens
_MARKS = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n"})  # raw vocabularies
_IMPOSSIBLE = -9999.0  # vLLM writes it for -inf, which JSON cannot hold


class Tokens(NamedTuple):
    """The T tokens of a prompt: what tells them apart (ids, else their letters), their letters, and
    the log-probability of each (that of the first is None)."""

    keys: list
    pieces: list
    logprobs: list


@contextlib.contextmanager
def _reading(what):
    try:
        yield
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the server's answer has {what} in a form that is not OpenAI's "
                         f"({type(error).__name__}: {error}); look at the server") from None


def first_choice(answer, chat):
    """The choice with index 0 of an answer, which may list others before it, and a single one
    without an index. ValueError for an answer that is no completion, and for other indices."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices or not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise ValueError("an answer that is no completion")
    given = [c.get("index") if isinstance(c, dict) else None for c in choices]
    found = [0] if given == [None] else given
    if not all(type(i) is int for i in found) or sorted(found) != list(range(len(found))):
        raise ValueError(f"an answer whose choices have the indices {reprlib.repr(given)}, where "
                         "that with 0 was asked for")
    choice = choices[found.index(0)]
    if not isinstance(choice.get("message" if chat else "text"), dict if chat else str):
        raise ValueError("an answer that is no completion")
    return choice


def completion(choice, as_text, strings=(), usage=None):
    """(text, log-probabilities of its tokens, finish reason) of a choice, cut at stop `strings`.

    usage: the answer's, which tells whether a message without content is an empty completion.
    ValueError for a text that is none, and for log-probabilities that are not finite numbers; where
    one is missing they all are left out.
    """
    with _reading("a completion"):
        text = choice["text"] if as_text else _content(choice, usage)
        given = choice.get("logprobs") or {}
        logprobs = given.get("token_logprobs") or [t["logprob"] for t in given.get("content") or ()]
        logprobs = [] if None in logprobs else list(logprobs)
        named = [choice[k] for k in ("stop_reason", "matched_stop") if k in choice]
    if not isinstance(text, str):
        raise ValueError(f"the server's answer is {reprlib.repr(text)}, which is no text; look at "
                         "the server (its parsers of reasoning and tools, where it is None), raise "
                         "max_new_tokens for a model that thinks first, or leave the row out")
    for logprob in logprobs:
        if not _is_number(logprob) or not _IMPOSSIBLE < logprob <= 0.01:
            raise ValueError(f"the server gives {reprlib.repr(logprob)} as log-probability of a "
                             "token that it sampled; look at the model's weights and dtype there")
    reason = choice.get("finish_reason")
    found = [at for s in strings if (at := text.find(s)) >= 0]  # some servers leave it in
    if found or any(isinstance(stop, str) for stop in named):
        text, reason = text[: min(found, default=len(text))], "stop"
    elif reason in ("abort", "error"):
        raise ValueError(f"the server broke a completion off (finish_reason {reason!r}, behind "
                         f"{text[-24:]!r}); look at the server")
    elif reason not in ("length", "content_filter", "tool_calls"):
        reason = "stop" if strings and not named else "eos"
    return text, logprobs, reason


def _content(choice, usage):
    """The content of a message. None (null) is an empty text where the answer says why: tools were
    called, a filter took it, all of it was reasoning, or nothing was made but the end (SGLang)."""
    message = choice["message"]
    reason, ended = choice.get("finish_reason"), choice.get("matched_stop")
    made = usage.get("completion_tokens") if isinstance(usage, dict) else None
    empty = (
        reason in ("tool_calls", "function_call", "content_filter")
        or message.get("reasoning_content") or message.get("reasoning")
        or reason == "stop" and (made in (0, 1) or isinstance(ended, str))
    )
    content = message.get("content")
    return "" if content is None and empty else content


def prompt_tokens(answer, way):
    """The `Tokens` of an answer's prompt, none where it tells nothing of them.

    way: the parameter by which they were asked for, "prompt_logprobs" (vLLM's, by token id) or
    "echo" (OpenAI's, whose answer has the sampled tokens behind them). ValueError for other forms.
    """
    choice = answer["choices"][0]
    with _reading("log-probabilities"):
        if way == "echo":
            given = choice.get("logprobs") or {}
            pieces, logprobs = given.get("tokens") or [], given.get("token_logprobs") or []
            made = (answer.get("usage") or {}).get("completion_tokens", 0)
            keys = choice.get("prompt_token_ids") or []
            pieces, logprobs = pieces[: len(pieces) - made], logprobs[: len(logprobs) - made]
        else:
            given = choice.get("prompt_logprobs") or answer.get("prompt_logprobs") or []
            # The prompt's own token is the first of an entry; the rest are likelier ones.
            first = [next(iter((entry or {}).items()), (None, {})) for entry in given]
            keys = [key for key, _ in first]
            pieces = [entry.get("decoded_token") or "" for _, entry in first]
            logprobs = [entry.get("logprob") for _, entry in first]
        pieces = [piece.translate(_MARKS) for piece in pieces]
    if len(pieces) != len(logprobs):
        raise ValueError(f"the server gives {len(logprobs)} log-probabilities for {len(pieces)} "
                         "tokens of a prompt; look at the server")
    return Tokens(list(keys) if len(keys) == len(pieces) else pieces, pieces, list(logprobs))


def choice_span(tokens, text, choice):
    """(first, last) of the tokens that spell a choice behind a text, by their letters; None where
    they do not spell it, or begin before it."""
    pieces = list(tokens.pieces)
    rest = "".join(pieces[1:])
    if pieces and not pieces[0] and (text + choice).endswith(rest):  # the first may have no text
        pieces[0] = (text + choice)[: len(text + choice) - len(rest)]
    whole, end = "".join(pieces), text[-_TAIL:] + choice
    at = whole.rfind(end) + len(end)
    ends = {}
    for k, length in enumerate(accumulate(map(len, pieces), initial=0)):
        # Tokens without letters begin the character that the next one shows: they are the choice's
        # before its first letter, and not behind its last, where an eos may have none.
        ends.setdefault(length, k)
    span = ends.get(at - len(choice)), ends.get(at)
    return None if end not in whole or None in span else span


def distinct(tokens, span, choice):
    """What tells the tokens of a choice from those of another: its letters, where those that are
    shown for parts of characters would not."""
    keys = tokens.keys[slice(*span)]
    unclear = any(key == "" or "\ufffd" in str(key) for key in keys)
    return list(choice) if unclear else keys


def check_logprobs(logprobs, choice):
    """ValueError unless all are log-probabilities: a label made of a NaN would be kept."""
    for logprob in logprobs:
        if not _is_number(logprob) or not _IMPOSSIBLE < logprob <= 0.01:
            raise ValueError(
                f"the server gives {reprlib.repr(logprob)} as log-probability of a token of the "
                f"choice {choice!r}, where a finite number of at most 0 is needed; look at the "
                "model's weights and dtype there, and that the server gives log-probabilities"
            )


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
