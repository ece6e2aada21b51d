"""Fingerprints of values, files and code: what stored rows and models were made from."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
import types
from pathlib import Path

from cai_utils.experiment.files import PACKAGE

# Plumbing decides where results go, not what is in them: a change to it makes no result stale.
PLUMBING = {
    "cai_utils", "cai_utils.__main__", "cai_utils.experiment", "cai_utils.experiment.run",
    "cai_utils.experiment.params", "cai_utils.experiment.provenance",
    "cai_utils.experiment.journal", "cai_utils.experiment.launch", "cai_utils.experiment.files",
    "cai_utils.experiment.fingerprint",
}  # fmt: skip


def file_digest(path) -> str:
    """sha256 of a file's content, or of the names and contents of all files of a folder."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is part of a key, but there is no such file or folder")
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()} {file_digest(file)}\n".encode())
    return total.hexdigest()


def canonical(value, name="key"):
    """``value`` as JSON that is equal exactly when the values are.

    Paths stand for the *content* behind them, dataclasses for their fields, modules and functions
    for their code. Raises ValueError for anything else, naming the part of the key.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(k): canonical(v, f"{name}.{k}") for k, v in value.items()}
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
    """sha256 of ``canonical(value)``."""
    return _sha256(canonical(value))


def _sha256(plain) -> str:
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def module_file(name: str) -> Path | None:
    """The source file of a module of this package, or None if ``name`` is none."""
    parts = name.split(".")
    if parts[0] != "cai_utils":
        return None
    base = PACKAGE.joinpath(*parts[1:])
    for file in (
        base.with_suffix(".py") if parts[1:] else base / "__init__.py",
        base / "__init__.py",
    ):
        if file.is_file():
            return file
    return None


NAME = re.compile(r"cai_utils(?:\.\w+)+")


def _imports(source: str, package: str = "") -> set[str]:
    """Modules of cai_utils that Python ``source`` imports, or names in a string of its own.

    What comments and docstrings mention does not count.
    """
    # IPython's magics are no Python; a cell that does not parse is left to the notebook to report.
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names if NAME.fullmatch(a.name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "cai_utils.miniature.judge:judge", a function that is loaded by its name
            names |= {m.group() for m in [NAME.match(node.value)] if m and " " not in node.value}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base.split(".")[0] == "cai_utils":
                names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def notebook_cells(path) -> list[str]:
    """Sources of the code cells of a notebook."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    # A cell's source is one string or a list of lines, as the notebook format allows both.
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def modules_of(*sources: str, text: str = "") -> list[Path]:
    """Files of cai_utils that Python ``sources`` use or ``text`` names, followed through imports.

    Without the plumbing. For the Snakefile, which reruns a notebook when one of them changes.
    """
    found, names = {}, set(NAME.findall(text)).union(*map(_imports, sources))
    while names:
        name = names.pop()
        file = module_file(name)
        # `cai_utils.judge.score` names a function: its module is one step up.
        if file is None and "." in name:
            names.add(name.rpartition(".")[0])
            continue
        if file is None or name in found or name in PLUMBING:
            continue
        found[name] = file
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        names |= _imports(file.read_text(encoding="utf-8"), package)
    return sorted(set(found.values()))


def _reached(function, seen: set) -> tuple[set[str], list]:
    """Modules of cai_utils that a notebook's function reaches, and its own bytecode."""
    names, own = set(), []
    if isinstance(function, types.ModuleType):
        return {function.__name__}, own
    if hasattr(function, "func"):  # functools.partial
        return _reached(function.func, seen)
    function = getattr(function, "__func__", function)  # a bound method
    module = getattr(function, "__module__", None) or type(function).__module__ or ""
    if module.split(".")[0] == "cai_utils":
        return {module}, own
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return names, own
    seen.add(id(code))
    values = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    scope = {
        **function.__globals__,
        **{k: c.cell_contents for k, c in values.items() if _filled(c)},
    }
    stack = [code]
    while stack:
        block = stack.pop()
        constants = [c for c in block.co_consts if not isinstance(c, types.CodeType)]
        stack += [c for c in block.co_consts if isinstance(c, types.CodeType)]
        own.append([block.co_code.hex(), [_constant(c) for c in constants], block.co_names])
        for name in {*block.co_names, *block.co_freevars} & scope.keys():
            value = scope[name]
            inside = getattr(value, "__module__", None) or type(value).__module__ or ""
            ours = isinstance(value, types.ModuleType) or inside.split(".")[0] == "cai_utils"
            if ours or (isinstance(value, types.FunctionType) and inside == module):
                deeper, more = _reached(value, seen)
                names |= deeper
                own += more
    return names, own


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
    """Fingerprint of what ``function`` does: its bytecode and every module of cai_utils it uses.

    Modules count by their syntax tree, so comments and layout change nothing. Values that it reads
    from its surroundings do not count: those belong into the key.
    """
    names, own = _reached(function, set())
    files = modules_of(text="\n".join(names))
    trees = {f.relative_to(PACKAGE).as_posix(): ast.dump(ast.parse(f.read_bytes())) for f in files}
    return _sha256([sorted(trees.items()), sorted(json.dumps(o) for o in own)])
