"""Parameters' values: names, and numbers and booleans where the notebook has them.

Values come from YAML files and the command line (`yaml12`), from papermill, whose YAML leaves 5e-4
as text, and from people, who put numbers in quotes. The rule, at any depth:

- where the notebook has a number, a text that spells a number is that number, any other is refused,
  unless the parameter's own line names it in quotes (`few_shot = 2  # ...; "constitution": ...`);
- where it has a boolean, likewise (true, false, yes, no, on, off);
- where it has a text, a text stays as it is;
- where it has null or nothing, a text that YAML 1.1 alone leaves as text (5e-4) is a number;
- a whole number written as 1e3 is an int where the notebook has an int, or null.
"""

from __future__ import annotations

import ast
import difflib
import math
import re

from cai_utils.experiment import yaml12

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

_NOT_IN_NAMES = r"[/\\\x00-\x1f\x7f\ud800-\udfff]"


def check_name(value, what) -> str:
    """`value` itself, which is to be the name of a file or folder; ValueError, naming `what`, where
    it cannot be one or would lead to another folder."""
    text = value if isinstance(value, str) else ""
    wrong = text.strip() in ("", ".", "..") or text[0] == "-" or re.search(_NOT_IN_NAMES, text)
    if wrong or len(text.encode()) > 200:
        raise ValueError(f"{what}={value!r:.90} cannot be the name of a file or folder: give 1 to "
                         "200 bytes without / and \\, not '.' or '..', no dash at the beginning")
    return text


def unknown(kind: str, name: str, known: list[str]) -> ValueError:
    """The error for a name that is none of the known ones, with the nearest of them."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known) or 'none'}")


def fitted(values: dict, defaults: dict, lines: dict | None = None, where: str = "") -> dict:
    """`values` {name: value} by the rule above. defaults: {name: value} of the notebook; lines:
    {name: the source of its assignment, with the comment}; where: begins the messages.

    ValueError, one line with the parameter, its value and what is allowed, for a text where a
    number or boolean belongs, for true where a number does, and for NaN.
    """
    lines = lines or {}
    return {name: _fitted(where + name, value, defaults.get(name), lines.get(name, ""), top=True)
            for name, value in values.items()}


def _fitted(place, value, default, line, top=False):
    if isinstance(value, dict):
        # A new key beside others (another size) is of their kind, where they are of one kind.
        known, kinds = (default, _kinds(default)) if isinstance(default, dict) else ({}, ())
        other = None if str in kinds and len(kinds) > 1 else default
        return {key: _fitted(f"{place}.{key}", v, known.get(key, other), line)
                for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(
            _fitted(f"{place}[{i}]", v, default, line) for i, v in enumerate(value))
    kinds = _kinds(default)
    if isinstance(value, str):
        value = _read(place, value, kinds, default, line)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{place}: NaN is not a number to compute with; null means none")
    if value is True and kinds and kinds <= {int, float}:
        raise ValueError(f"{place}: true (or yes, on) is no number; give one")
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole and (kinds == {int} or (top and default is None)) else value


def _read(place, text, kinds, default, line):
    """The value that a text stands for."""
    if kinds and kinds <= {int, float}:
        kind, found = "number", yaml12.number(text)
    elif kinds == {bool}:
        kind, found = "boolean", _BOOLEANS.get(text.lower())
    else:
        return yaml12.number(text) if str not in kinds and yaml12.text_in_yaml11(text) else text
    if found is None and f'"{text}"' not in line:
        raise ValueError(f"{place}={text!r} is a text; give a {kind} (it is {default!r} where "
                         "nothing else is said)")
    return text if found is None else found


def _kinds(value) -> set[type]:
    """The types of a plain value, or of those in dicts and lists."""
    if isinstance(value, dict | list | tuple):
        inside = value.values() if isinstance(value, dict) else value
        return {kind for part in inside for kind in _kinds(part)}
    return {type(value)}


def lines_of(source: str) -> dict[str, str]:
    """{name: source lines} of the assignments in a parameters cell, comments included."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        for target in getattr(node, "targets", None) or [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                found[target.id] = "\n".join(lines[node.lineno - 1:node.end_lineno])
    return found
