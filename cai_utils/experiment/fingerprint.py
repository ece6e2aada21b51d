"""Fingerprints of values, files and code: what stored rows and models were made from."""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import math
import types
from pathlib import Path

from cai_utils.experiment.dependencies import (
    ALL,
    Graph,
    module_file,
    named_in,
    of_source,
    ours,
    plain_python,
)
from cai_utils.experiment.files import PACKAGE
from cai_utils.experiment.writing import whole


def file_digest(path) -> str:
    """sha256 of a file's content, or of the names and contents of all files of a folder."""
    return total(path, file_digests(path))


def file_digests(path) -> dict[str, str]:
    """{name: sha256} of a file, or of all files of a folder with their paths in it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is part of a key, but there is no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = {}
    for file in files:
        with open(file, "rb") as opened:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            found[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def total(path, digests: dict[str, str]) -> str:
    """The `file_digest` that belongs to the `file_digests` of a path."""
    if Path(path).is_file():
        return digests[Path(path).name]
    listed = "".join(f"{name} {sha}\n" for name, sha in digests.items())
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()


def canonical(value, name="key"):
    """`value` as JSON that is equal exactly when the values are.

    Paths stand for the *content* behind them, dataclasses for their fields, modules and functions
    for their code. Raises ValueError for anything else, naming the part of the key.
    """
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such number
        return {"float": repr(float(value))}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {whole(str(k)): canonical(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [canonical(v, f"{name}[{i}]") for i, v in enumerate(value)]
        # Long lists (all the prompts of a run) would make the record unreadable.
        return items if len(items) <= 40 else {"items": len(items), "sha256": _sha256(items)}
    if isinstance(value, set | frozenset):
        return sorted((canonical(v, name) for v in value), key=json.dumps)
    if isinstance(value, Path):
        return {"path": value.name, "sha256": file_digest(value)}
    if isinstance(value, types.ModuleType | types.FunctionType):
        return {"code": value.__name__, "sha256": code_digest(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {type(value).__name__: canonical(fields, name)}
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return canonical(value.tolist(), name)
    raise ValueError(
        f"{name} is a {type(value).__name__}, which has no fingerprint; put its name, its "
        "parameters or the Path of its folder into the key instead"
    )


def digest(value) -> str:
    """sha256 of `canonical(value)`."""
    return _sha256(canonical(value))


def _sha256(plain) -> str:
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def notebook_cells(path, parameters: bool = True) -> list[str]:
    """Sources of the code cells of a notebook, with or without its parameters cell."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    cells = [c for c in cells if c["cell_type"] == "code"]
    if not parameters:
        cells = [c for c in cells if "parameters" not in c["metadata"].get("tags", [])]
    # A cell's source is one string or a list of lines, as the notebook format allows both.
    return ["".join(cell["source"]) for cell in cells]


def reached_by(*sources: str, text: str = "") -> dict[tuple[str, str], str]:
    """{(module, name): syntax tree} of what Python `sources` use or `text` names."""
    return Graph(PACKAGE).reached([*named_in(text), *(c for s in sources for c in of_source(s))])


def modules_of(*sources: str, text: str = "") -> list[Path]:
    """Files of cai_utils behind `reached_by`: when one of them is newer, a run may be stale."""
    names = {module for module, _ in reached_by(*sources, text=text)}
    return sorted(module_file(name, PACKAGE) for name in names)


def _reached(function, seen: set) -> tuple[set[tuple], list]:
    """What a function of a notebook refers to in cai_utils, and its bytecode."""
    starts, bytecode = set(), []
    if isinstance(function, types.ModuleType):
        return {(function.__name__, ALL)}, bytecode
    if isinstance(function, functools.partial):
        for item in _items([function.func, function.args, function.keywords]):
            deeper, more = _reached(item, seen)
            starts |= deeper
            bytecode += more
        given = [function.args, function.keywords]
        return starts, [*bytecode, *([_plain(given)] if any(given) else [])]
    if hasattr(function, "__func__"):  # a bound method: what defines it, and whose it is
        owner = function.__self__
        starts |= _reached(owner if isinstance(owner, type) else type(owner), seen)[0]
        function = function.__func__
    named = function if getattr(function, "__module__", None) else type(function)
    module = getattr(named, "__module__", None) or ""
    if ours(module):
        name = getattr(named, "__qualname__", type(function).__qualname__)
        return starts | {(module, name.split(".")[0])}, bytecode
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return starts, bytecode
    seen.add(id(code))
    values = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    scope = {
        **function.__globals__,
        **{k: c.cell_contents for k, c in values.items() if _filled(c)},
    }
    defaults = [function.__defaults__, function.__kwdefaults__]
    bytecode += [_plain(defaults)] if any(defaults) else []
    for item in _items(defaults):
        deeper, more = _reached(item, seen)
        starts |= deeper
        bytecode += more
    stack = [code]
    while stack:
        block = stack.pop()
        constants = [c for c in block.co_consts if not isinstance(c, types.CodeType)]
        stack += [c for c in block.co_consts if isinstance(c, types.CodeType)]
        bytecode.append([block.co_code.hex(), [_constant(c) for c in constants], block.co_names])
        for root, *attributes in _chains(block):
            value = scope.get(root)
            if isinstance(value, types.ModuleType):
                starts.add((value.__name__, *attributes, ALL))
            elif ours(root):  # an import inside the function
                starts |= {(root, name) for name in attributes or [ALL]}
            for item in _items(value):
                item = inspect.unwrap(item) if callable(item) else item  # functools.cache
                inside = getattr(item, "__module__", None) or type(item).__module__ or ""
                own = isinstance(item, types.FunctionType) and inside == module
                if ours(inside) or own or isinstance(item, functools.partial):
                    deeper, more = _reached(item, seen)
                    starts |= deeper
                    bytecode += more
    return starts, bytecode


def _items(value):
    """The value itself, or what a container holds, at any depth: PMs in a dict count by their
    class."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple | set | frozenset):
        return [value]
    return [i for item in value if not isinstance(item, types.ModuleType) for i in _items(item)]


def _plain(value):
    """The text of plain values, and the types alone of what has no stable text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    plain = value is None or isinstance(value, str | bytes | int | float | bool)
    return repr(value) if plain else type(value).__name__


def _chains(code) -> list[list[str]]:
    """The names that bytecode loads from outside, each with the attributes taken of it at once."""
    chains, open_chain = [], False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "IMPORT_NAME"):
            chains.append([step.argval])
            open_chain = True
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") and open_chain:
            chains[-1].append(step.argval)
        elif not step.opname.startswith("STORE"):  # `from cai_utils import a, b` stores in between
            open_chain = False
    return chains


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True


def _constant(value) -> str:
    # The order of a frozenset of strings changes from process to process.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def code_digest(function) -> str:
    """Fingerprint of what `function` does: its bytecode, and every definition of cai_utils that
    it reaches (`dependencies`).

    Definitions count by their syntax tree without docstrings, so that comments, layout and their
    order change nothing. Values that the function reads from its surroundings do not count: those
    belong into the key.
    """
    starts, bytecode = _reached(function, set())
    found = Graph(PACKAGE).reached(starts)
    return _sha256([sorted([*node, text] for node, text in found.items()),
                    sorted(json.dumps(o) for o in bytecode)])


def notebook_code(path, params: dict, text: str = "") -> dict[str, str]:
    """{what: sha256} of what a notebook does with these parameters: its code cells ("cells"), and
    each definition ("module.name") that they, the parameters or `text` lead to.

    Prose and comments do not count, nor does the parameters cell, whose values are `params`.
    """
    source = "\n".join(notebook_cells(path, parameters=False))
    found = reached_by(source, text=f"{text} {json.dumps(params, default=str)}")
    cells = [ast.dump(node) for node in ast.parse(plain_python(source)).body]
    return {"cells": _sha256(cells)} | {
        ".".join(node): _sha256(code) for node, code in sorted(found.items())}
