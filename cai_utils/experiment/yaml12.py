"""YAML as people write parameters: the core schema of YAML 1.2 (section 10.3), which has 5e-4 as a
number, 012 as twelve, and 12:30 and 2026-01-01 as text.

PyYAML reads YAML 1.1. Of it are kept 1_000, 0b101 and `<<`, which mean nothing else; and yes, no,
on, off: booleans as the value of a name (`both_orders: no`), but text in a list or as a key.
"""

from __future__ import annotations

import re

import yaml

_BOOL, _WORD = "tag:yaml.org,2002:bool", "!word"
_INT = re.compile(r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0b_*[01][01_]*)|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
                    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


class UniqueLoader(yaml.SafeLoader):
    """YAML 1.1 that refuses a key written twice, of which the first would be lost silently."""

    def compose_mapping_node(self, anchor):
        # Here `<<: *other` is not yet its keys, which may be overridden.
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the field {name!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


class Loader(UniqueLoader):
    """Reads YAML with the types above."""

    yaml_implicit_resolvers = {}  # none of YAML 1.1

    def construct_document(self, node):
        _decide([node])
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)  # `<<` first: its values are values of this mapping
        _decide(value for _, value in node.value)
        return super().construct_mapping(node, deep)


def _decide(nodes):
    """yes, no, on, off at these places are booleans."""
    for node in nodes:
        if node.tag == _WORD:
            node.tag = _BOOL


def _integer(loader, node):
    text = node.value.replace("_", "")
    return int(text, 0 if re.search("[xob]", text) else 10)


for _tag, _pattern, _first in (
    (_BOOL, "true|True|TRUE|false|False|FALSE", "tTfF"),
    (_WORD, "yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "yYnNoO"),
    ("tag:yaml.org,2002:null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", _INT.pattern, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT.pattern, "-+.0123456789"),
    ("tag:yaml.org,2002:merge", "<<", "<"),
):
    Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
Loader.add_constructor(_WORD, yaml.SafeLoader.construct_scalar)
Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back as the same: a text such as "5e-4" in quotes."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def load(text):
    """The value of a YAML text; yaml.YAMLError where it is none, or has a key twice."""
    return yaml.load(text, Loader)


def dump(value) -> str:
    """`value` (JSON's types, infinities and NaN) as YAML that `load` reads back."""
    return yaml.dump(value, Dumper=Dumper)


def number(text: str) -> int | float | None:
    """The number that a text spells, as above; None where it spells none."""
    return load(text) if _INT.fullmatch(text) or _FLOAT.fullmatch(text) else None


def text_in_yaml11(text: str) -> bool:
    """Whether YAML 1.1 (papermill's -f and -y) leaves a number as text, as it does with 5e-4."""
    return number(text) is not None and isinstance(yaml.safe_load(text), str)
