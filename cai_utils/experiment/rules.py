"""What each parameter of the notebooks may be: its kind and its range, checked before any work.

`kinds` makes numbers of texts first. A rule is for a name, or for one notebook ("03 n_train"); it
holds where the value in the notebook's own parameters cell keeps it, so that a notebook of yours
may use the name for something else.
"""

from __future__ import annotations

import functools
import os
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from cai_utils.experiment import registry
from cai_utils.experiment.kinds import check_name, unknown


class Rule(NamedTuple):
    kind: Any  # what pydantic validates, strictly
    text: str  # what is allowed, behind "give"
    by_size: bool = False  # may be a mapping with a value for each size that runs


# ---------------------------------------------------------------- kinds of single values
def _distinct(values):
    if len({*map(str, values)}) < len(values):
        raise ValueError("one of them is there twice")
    return values


def _with_size(text):
    """A model spec, in which nothing but {size} stands in braces."""
    try:
        text.format(size="")
    except (LookupError, AttributeError) as error:
        raise ValueError("only {size} may stand in braces") from error
    return text


def _clamp(values):
    low, high = values
    if not low <= 0.5 <= high:
        raise ValueError("1/2 has to lie between them")
    return values


def _with_hhh(values):
    if not values.get("hhh"):
        raise ValueError("the task hhh has to be among them")
    return values


_Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
_Name = Annotated[str, AfterValidator(lambda value: check_name(value, "it"))]
_Key = Annotated[str | int, AfterValidator(lambda value: (check_name(str(value), "it"), value)[1])]
_Spec = Annotated[_Text, AfterValidator(_with_size)]
_Data = _Text | Annotated[dict[Literal["train", "eval"], _Text], Field(min_length=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_SplitsOrNone = dict[Literal["train", "eval"], _Text | None]


def _each(keys, kind):
    """A mapping with exactly these keys."""
    return Annotated[dict[Literal[*keys], kind], Field(min_length=len(keys))]


_BothSplits = _each(("train", "eval"), _Text)


def _one_or_more(kind):
    return Annotated[list[kind], Field(min_length=1), AfterValidator(_distinct)]


def _by(rule, keys="size"):
    return Rule(rule.kind | Annotated[dict[str | int, rule.kind], Field(min_length=1)],
                f"{rule.text}, or {{{keys}: such a value}}", keys == "size")


def _or_null(rule):
    return Rule(rule.kind | None, f"{rule.text}, or null")


FLAG = Rule(bool | Literal[0, 1], "true or false")
COUNT = Rule(Annotated[int, Field(ge=1)], "a whole number from 1 up")
COUNT_OR_0 = Rule(Annotated[int, Field(ge=0)], "a whole number from 0 up")
SEED = Rule(Annotated[int, Field(ge=0, lt=2**32)], "a whole number from 0 to 4294967295")
POSITIVE = Rule(Annotated[float, Field(gt=0)], "a number above 0")
NOT_NEGATIVE = Rule(Annotated[float, Field(ge=0)], "a number from 0 up")
TEXT = Rule(_Text, "a text")
TEXTS = Rule(_one_or_more(_Text), "a list of at least one text, none twice")
NAME = Rule(_Name, "a name that can be a file name")
SPEC = Rule(_Spec, "a model spec, in which {size} may stand (cai_utils/lm/models.py)")
DATA = Rule(_Data, "a data spec, or one each for train and eval (cai_utils/data/load.py)")
SIZE = Rule(_Key, "a model size")
FUNCTION = Rule(Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], "'module:function'")
ARGUMENTS = Rule(dict[_Text, Any], "a mapping, argument: value")
SCORERS = Rule(dict[_Name, _Name], "a mapping, axis: name of a PM")
SPLIT_COUNTS = Rule(_each(("train", "eval"), COUNT.kind),
                    "{train: count, eval: count}, whole numbers from 1 up")

RULES = {
    # every notebook
    "profile": NAME, "seed": SEED, "size": SIZE, "pm_size": SIZE, "kinds_size": SIZE,
    "sizes": Rule(_one_or_more(_Key), "a list of at least one size, as [xs, s], none twice"),
    "pretrained": SPEC, "constitution": TEXT, "lora": _or_null(ARGUMENTS),
    "judge": _or_null(FUNCTION), "retained": _or_null(FUNCTION), "worker": _or_null(FUNCTION),
    "text_judge": _or_null(FUNCTION), "critic": _or_null(SPEC), "feedback": _or_null(SPEC),
    "feedback_cot": _or_null(SPEC), "judge_model": _or_null(TEXT), "reader": _or_null(TEXT),
    "helpful": _or_null(NAME), "pm": NAME, "pms": SCORERS,
    # sampling
    "stop": Rule(list[Annotated[str, Field(min_length=1)]], "a list of texts"),
    "max_new_tokens": COUNT, "cot_tokens": COUNT, "temperature": NOT_NEGATIVE,
    "cot_samples": COUNT, "cot_samples_many": COUNT, "samples_helpful": COUNT,
    "both_orders": FLAG, "few_shot": FLAG, "n_revisions": COUNT_OR_0,
    "n_boot": COUNT_OR_0,  # 0: no intervals
    "clamp": Rule(Annotated[list[_Share], Field(min_length=2, max_length=2),
                            AfterValidator(_clamp)],
                  "[low, high] with 0 <= low <= 1/2 <= high <= 1"),
    # data
    "prompts": Rule(_SplitsOrNone, "a data spec each for train and eval"),
    "prompts_redteam": DATA, "prompts_helpful": DATA, "demonstrations": _or_null(TEXT),
    "pretraining": _or_null(TEXT), "questions": TEXT,
    "n_train": _by(_or_null(COUNT)), "n_eval": _or_null(COUNT), "n_prompts": _by(_or_null(COUNT)),
    "n_helpful": _by(_or_null(COUNT)), "n_human": _by(COUNT_OR_0), "n_questions": _or_null(COUNT),
    "n_demonstrations": _or_null(COUNT_OR_0), "n_pretraining": _or_null(COUNT_OR_0),
    "n_shown": _or_null(COUNT_OR_0),
    "n_answers": _or_null(COUNT), "long_limit": _or_null(COUNT_OR_0),
    "many_limit": _or_null(COUNT_OR_0),
    # training
    "pm_epochs": POSITIVE, "pm_batch_size": COUNT, "pm_lr": _by(POSITIVE),
    "pm_accumulation": _by(COUNT), "sft_epochs": POSITIVE, "sft_batch_size": COUNT,
    "sft_lr": _by(POSITIVE), "sft_accumulation": _by(COUNT), "max_length": COUNT,
    "num_processes": COUNT, "up_to": FLAG, "rl_seed": COUNT_OR_0, "n_seeds": COUNT,
    "revisions": Rule(_one_or_more(COUNT.kind), "a list of whole numbers from 1 up, none twice"),
    "pretraining_share": Rule(Annotated[float, Field(ge=0, lt=1)], "a number from 0 to below 1"),
    "ai_share": Rule(Annotated[float, Field(gt=0, lt=1)], "a number between 0 and 1"),
    "settings": Rule(dict[_Text, dict[_Text, Any] | None], "a mapping, trainer: {field: value}"),
    "method": Rule(Literal[*registry.methods()], f"one of {', '.join(registry.methods())}"),
    "methods": _or_null(Rule(_one_or_more(Literal[*registry.methods()]),
                             f"a list of {', '.join(registry.methods())}")),
    "baselines": _or_null(Rule(list[_Name], "a list of policies")),
    "pm_judge": Rule(_each(("helpfulness", "harmlessness"), _Name),
                     "{helpfulness: a PM, harmlessness: a PM}"),
    "prompt_sets": TEXTS, "models": TEXTS,
    "xstest_models": Rule(list[_Text], "a list of texts"),
    # where a notebook has something else by the name
    "00 pretrain": FLAG, "00 tokens": _or_null(Rule(dict[str | int, COUNT.kind],
                                                    "a mapping, size: tokens")),
    "00 n_redteam": SPLIT_COUNTS, "00 n_helpful": SPLIT_COUNTS, "00 n_comparisons": SPLIT_COUNTS,
    "00 n_questions": Rule(_each(("hhh", "identify", "classify"), COUNT.kind),
                           "{hhh: n, identify: n, classify: n}"),
    "00 n_demonstrations": COUNT, "00 n_pretraining": COUNT,
    "01 questions": Rule(Annotated[dict[_Name, _Text | None], AfterValidator(_with_hhh)],
                         "a mapping, task: data spec or null"),
    "01 few_shot": _by(Rule(COUNT_OR_0.kind | Literal["constitution"],
                            "a whole number from 0 up, or \"constitution\""), "task"),
    "01 n_questions": _by(_or_null(COUNT), "task"),
    "01 cot_samples": COUNT_OR_0,
    "01 pms": Rule(list[_Name], "a list of kinds of PMs, as [hh, harmless]"),
    "02 kinds": Rule(Annotated[dict[_Name, _one_or_more(_Text)], Field(min_length=1)],
                     "a mapping, PM: list of axes"),
    "02 comparisons": Rule(Annotated[dict[_Text, _BothSplits], Field(min_length=1)],
                           "a mapping, axis: {train: data spec, eval: data spec}"),
    "03 n_train": Rule(COUNT_OR_0.kind | None | dict[str | int, COUNT_OR_0.kind | None],
                       "a whole number from 0 up, or null, or {size: such a value, none: 0}"),
    "08 comparisons": Rule(dict[_Text, _SplitsOrNone | None],
                           "a mapping, axis: {train: data spec, eval: data spec}"),
    "08 kinds": FLAG,
}


def rule_of(notebook: str, name: str) -> Rule | None:
    """The rule for a parameter of a notebook; None where there is none."""
    return RULES.get(f"{notebook[:2]} {name}", RULES.get(name))


def check(notebook: str, values: dict, defaults: dict, where: str = "") -> None:
    """ValueError, one line with parameter, value and what is allowed, for the first value that is
    not. defaults: of the notebook; where: begins the message."""
    rules = {name: rule for name in defaults if (rule := rule_of(notebook, name))
             and fault(rule, defaults[name]) is None}
    for name, value in values.items():
        why = fault(rules[name], value) if name in rules else None
        if why is not None:
            raise ValueError(f"{where}{name}={value!r:.90}: give {rules[name].text}{why}")
    values = {**defaults, **values}
    why = _misfit(rules, values)
    if why and not _misfit(rules, defaults):  # a notebook of yours may mean other sizes
        raise ValueError(where + why)


def _misfit(rules, values) -> str | None:
    """Which value does not go with `sizes`, and the mend; None where all do."""
    sizes = values["sizes"] if "sizes" in rules else None
    for name in ("size", "kinds_size") if sizes else ():
        if name in rules and str(values[name]) not in map(str, sizes):
            return (f"{name}={values[name]!r} is not in sizes={sizes}: give {name}, too, "
                    f"as {name}={sizes[-1]}")
    sizes = sizes or ([values["size"]] if "size" in rules else [])
    for name, rule in rules.items():
        if rule.by_size and isinstance(values[name], dict):
            lacking = [size for size in sizes if size not in values[name]]
            if lacking:
                return (f"{name}={values[name]!r:.90}: it has no value for size {lacking[0]!r}; "
                        "add it")
    return None


def check_grid(notebook: str, grid, defaults: dict, where: str) -> None:
    """ValueError for a `grid` {plural of a parameter: list of its values} that is none."""
    if not isinstance(grid, dict):
        raise ValueError(f"{where}grid={grid!r:.90}: give a mapping, as methods: [rl_cai]")
    for plural, values in grid.items():
        name = str(plural).removesuffix("s")
        if name not in defaults or name == plural:
            known = [f"{name}s" for name in defaults]
            raise ValueError(f"{where}grid: {unknown('parameters', plural, known)}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}grid.{plural}={values!r:.90}: give a list of values")
        for value in values:
            check(notebook, {name: value}, {name: defaults[name]}, f"{where}grid.{plural}: ")


def fault(rule: Rule, value) -> str | None:
    """What is wrong with a value, in brackets or ""; None where it is allowed."""
    try:
        _adapter(rule).validate_python(_plain(value))
    except ValidationError as error:
        own = [e["ctx"]["error"] for e in error.errors() if e["type"] == "value_error"]
        return f" ({own[0]})" if own else ""
    return None


@functools.cache
def _adapter(rule):
    return TypeAdapter(rule.kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _plain(value):
    """What a notebook may have besides YAML's kinds: tuples as lists, paths as texts."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
