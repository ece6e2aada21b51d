"""Row formats: what a row of each kind holds, validated here and nowhere else (ARCHITECTURE.md,
Rows), and the entries of a constitution.

Each kind is a `TypedDict` that pydantic validates. A row stays a plain dict: `validate` fills in
defaults, turns what a file may write in another way into messages (`conversations`), and keeps
fields that the kind does not name. A fault is a ValueError of one line that names the place, the
field and the value.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import TypedDict, get_type_hints, is_typeddict

from cai_utils import dialogue
from cai_utils.data import conversations


def _ends_with_user(messages):
    try:
        dialogue.transcript(messages, add_generation_prompt=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompt: {error}") from error
    if not str(messages[-1]["content"]).strip():
        raise ValueError("'prompt' is empty: nothing in its last message")
    return messages


def _as_label(value):
    try:
        p = 1.0 if value in (None, "") else -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        p = -1.0
    if not 0.5 <= p <= 1:
        raise ValueError(f"p_chosen={value!r} has to be from 0.5 to 1")
    return p


def _as_axis(value, info):
    axis = value or (info.context or {}).get("axis")
    if axis is None:
        raise ValueError("missing field 'axis', what is judged: give the rows one, or "
                         "axis='helpful' (or any other name) for all")
    if not isinstance(axis, str) or not axis.strip():
        raise ValueError(f"'axis' is {axis!r}: give a text such as 'helpful'")
    return axis


def _prompt_and_answer(messages):
    if isinstance(messages, list):
        messages = conversations.messages_of(messages, "messages")
    if not isinstance(messages, list) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("'messages' must be a prompt and an assistant turn")
    return messages


def _finite(value):
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise ValueError(f"'score' must be a finite number, got {value!r}")
    return value


def _as_id(value):
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"'id' is {value!r:.80}: give a text, or none")
    return value


def _as_kind(value):
    if isinstance(value, list | dict):
        raise ValueError(f"'kind' is {value!r:.80}: give a text such as 'redteam'")
    return value


def _text_or_none(value, info):
    if value is not None and not isinstance(value, str):
        raise ValueError(f"'{info.field_name}' has to be a text, not {value!r:.80}")
    return value


Messages = Annotated[
    list, BeforeValidator(conversations.prompt_of), AfterValidator(_ends_with_user)]
Options = Annotated[list[str], BeforeValidator(conversations.listed),
                    Field(min_length=1, description='a list like [" (A)"]')]
OrNone = BeforeValidator(lambda value: value or None)


class Prompt(TypedDict):
    """What a model is asked: messages that end with the user's."""

    prompt: Messages
    id: Annotated[str, BeforeValidator(lambda value: str(_as_id(value)))]
    kind: NotRequired[Annotated[Any, BeforeValidator(_as_kind)]]


class Comparison(TypedDict):
    """Two responses to one prompt, in trl's preference format (`conversations.pair`)."""

    prompt: Messages
    chosen: list
    rejected: list
    p_chosen: Annotated[float, BeforeValidator(_as_label), Field(default=1.0)]
    source: Annotated[Any, BeforeValidator(lambda value: value or "human"), Field(default="human")]
    axis: Annotated[Any, BeforeValidator(_as_axis), Field(default=None, validate_default=True)]
    principle: Annotated[Any, OrNone, Field(default=None)]
    split: Annotated[Any, OrNone, Field(default=None)]
    id: NotRequired[Annotated[Any, BeforeValidator(lambda v: v if v is None else _as_id(v))]]


class Question(TypedDict):
    """A multiple-choice question in the fields of the paper's evaluations."""

    prompt: Annotated[str, Field(pattern=r"\S", description="a text")]
    corrects: Options
    incorrects: Options
    id: Annotated[Any, BeforeValidator(_as_id)]
    text_correct: NotRequired[Annotated[Any, BeforeValidator(_text_or_none)]]
    text_incorrect: NotRequired[Annotated[Any, BeforeValidator(_text_or_none)]]


class RevisionChain(TypedDict):
    """A prompt's initial response and its revisions (paper, section 3.1)."""

    id: str
    prompt: list
    responses: list[str]  # the initial one first
    critiques: list[str]
    principles: list[str]


class Score(TypedDict):
    """A conversation and its absolute harmfulness (paper, section 4.5)."""

    messages: Annotated[Any, BeforeValidator(_prompt_and_answer), Field(default=None,
                                                                         validate_default=True)]
    score: Annotated[Any, BeforeValidator(_finite), Field(default=None, validate_default=True)]


# The entries of a constitution: texts that people write into YAML, unknown fields refused.
def _as_text(value, info):
    # YAML makes lists, dates and truth values of texts that are not quoted (`No`, `- x`).
    name = info.field_name
    if isinstance(value, bool):
        raise ValueError(f"YAML reads '{name}' as {value}; put it in quotes")
    if value is None or isinstance(value, str | int | float) and not str(value).strip():
        raise ValueError(f"missing field '{name}'")
    if not isinstance(value, str | int | float):
        what = "a text or a list of messages" if name == "prompt" else "a text"
        raise ValueError(f"'{name}' has to be {what}, not {value!r}")
    return str(value).strip()


def _as_shot_prompt(value, info):
    if isinstance(value, list):
        return value
    return [{"role": "user", "content": _as_text(value, info)}]


_ENTRY = ConfigDict(extra="forbid")
Text = Annotated[str, BeforeValidator(_as_text)]
ShotPrompt = Annotated[list, BeforeValidator(_as_shot_prompt), AfterValidator(_ends_with_user)]
Letter = Annotated[Literal["A", "B"], BeforeValidator(_as_text)]


class CritiquePrinciple(TypedDict):
    __pydantic_config__ = _ENTRY
    id: Text
    critique_request: Text
    revision_request: Text


class ComparisonPrinciple(TypedDict):
    __pydantic_config__ = _ENTRY
    id: Text
    principle: Text


class CritiqueShot(TypedDict):
    __pydantic_config__ = _ENTRY
    prompt: ShotPrompt
    response: Text
    critique_request: Text
    critique: Text
    revision_request: Text
    revision: Text


class ComparisonShot(TypedDict):
    __pydantic_config__ = _ENTRY
    prompt: ShotPrompt
    a: Text
    b: Text
    answer: Letter
    principle: NotRequired[Text | None]


class ReasonedShot(ComparisonShot):
    reasoning: Text


class Shots(TypedDict):
    __pydantic_config__ = _ENTRY
    critique: NotRequired[list[CritiqueShot] | None]
    comparison: NotRequired[list[ComparisonShot] | None]
    comparison_cot: NotRequired[list[ReasonedShot] | None]


class ConstitutionFile(TypedDict):
    __pydantic_config__ = _ENTRY
    name: Annotated[str, Field(pattern=r"\S")]
    critiques: NotRequired[list[CritiquePrinciple] | None]
    comparisons: NotRequired[list[ComparisonPrinciple] | None]
    few_shot: NotRequired[Shots | None]


@functools.cache
def _adapter(kind):
    return TypeAdapter(kind)


def validate(kind, row, where, **context) -> dict:
    """The row with the fields of its kind validated: the row's own fields in their order, then the
    defaults of those that it lacks. ValueError that begins with `where` (a file and row);
    `conversations.Malformed` as it is.

    context: values for fields that a row may leave to its caller (`axis` of a Comparison).
    """
    try:
        if kind is Comparison:
            row = {**row, **conversations.pair(row)}
        elif kind is Prompt and not row.get("prompt") and row.get("chosen"):
            row = {**row, "prompt": conversations.pair(row)["prompt"]}
        elif kind is Prompt and row.get("system"):
            prompt = conversations.prompt_of(row.get("prompt"))
            row = {**row, "prompt": conversations.with_system(prompt, row)}
        return {**row, **_adapter(kind).validate_python(row, context=context)}
    except conversations.Malformed:
        raise
    except ValidationError as error:
        raise ValueError(f"{where}: {_fault(kind, error, row)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _fields(kind, path):
    """{field: its type} of the entries at `path` inside a kind; {} where these have no fields."""
    for part in path:
        if isinstance(part, str):
            kind = get_type_hints(kind).get(part)
            while get_args(kind):  # NotRequired[list[Kind] | None] -> Kind
                kind = get_args(kind)[0]
    return get_type_hints(kind, include_extras=True) if is_typeddict(kind) else {}


def _hint(kind, path, field):
    """What a field wants to be, in brackets, where its type says so."""
    wanted = _fields(kind, path).get(field)
    found = [m.description for m in getattr(wanted, "__metadata__", ())
             if getattr(m, "description", None)]
    return f" ({found[0]})" if found else ""


def _fault(kind, error, data):
    """The first fault of a ValidationError in one line."""
    first = error.errors(include_url=False)[0]
    *path, field = first["loc"] or ("",)
    inside = list(path)
    place = ""
    for part in path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
        data = data[part]
    if path and isinstance(data, dict) and data.get("id") is not None:
        place += f" (id {data['id']!r})"
    name = f"{place.lstrip('.')}[{field}]" if isinstance(field, int) else f"'{field}'"
    place = "" if isinstance(field, int) or not place else f"{place.lstrip('.')}: "
    fault = first["type"]
    if fault == "value_error":
        return f"{place}{first['ctx']['error']}"
    if fault in ("missing", "too_short", "string_pattern_mismatch"):
        return f"{place}missing field {name}{_hint(kind, inside, field)}"
    if fault == "extra_forbidden":
        return f"{place}unknown field {name}; known: {', '.join(_fields(kind, inside))}"
    needed = [f for f, t in _fields(kind, [*inside, field]).items() if get_origin(t) != NotRequired]
    what = {"list_type": "a list", "string_type": "a text",
            "dict_type": "a mapping" + f" with {', '.join(needed)}" * bool(needed),
            "literal_error": first.get("ctx", {}).get("expected", "").replace("'", "")}
    if fault in what:
        return f"{place}{name} has to be {what[fault]}, not {first['input']!r}"
    return f"{place}{name} is {first['input']!r}: {first['msg']}"


def trainable(row):
    """(comparison as a preference model trains on it, None), or (None, what is wrong with it).

    Fields: prompt, chosen, rejected, p_chosen and weight (1 where missing). Unlike `Comparison`,
    labels lie in 0..1, and the reasons are few, so that rows can be counted by them. A row without
    `prompt` whose responses are whole conversations (trl's implicit prompt) gets the turns they
    share as prompt.
    """
    if not isinstance(row, dict):
        return None, "not a row with fields"
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if not _are_messages(chosen) or not _are_messages(rejected):
        return None, "'chosen' and 'rejected' must be lists of messages"
    if not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if chosen and chosen == rejected:
            return None, "the two answers are identical"
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif not _are_messages(prompt):
        return None, "'prompt' must be a list of messages"
    if not prompt or prompt[-1]["role"] != "user":
        return None, "no common prompt that ends with a user turn"
    if any(turn.get("content") is None for turn in prompt) or not prompt[-1]["content"].strip():
        return None, "an empty prompt"
    roles = [turn["role"] for turn in prompt]
    roles = roles[roles[0] == "system" :]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return None, "the prompt's turns are not user, assistant, ..., user in turn"
    for response in (chosen, rejected):
        if len(response) != 1 or response[0]["role"] != "assistant":
            return None, "an answer is not one assistant turn after the common prompt"
        if not (response[0].get("content") or "").strip():
            return None, "an empty answer"
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        return None, "the two answers are identical"
    p, weight = row.get("p_chosen"), row.get("weight")
    p, weight = 1.0 if p is None else p, 1.0 if weight is None else weight
    if not isinstance(p, numbers.Real) or not 0 <= p <= 1:
        return None, "p_chosen is not a probability"
    if not isinstance(weight, numbers.Real) or not 0 <= weight < math.inf:
        return None, "weight is not a number from 0 up"
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "p_chosen": float(p), "weight": float(weight)}, None


def _are_messages(value):
    """A list of messages whose contents are texts, or None."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str | None) for turn in value)
