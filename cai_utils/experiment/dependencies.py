"""What a piece of code depends on inside this package, definition by definition.

A node is (module, name): a function, a class as a whole, or a constant. Its edges are the names in
its syntax tree, without docstrings and annotations of arguments, that lead to other definitions of
the package. Two names are special: ALL is a module with everything in it (one that is passed around
as an object, or imported with `*`), RUN what a module does when it is imported.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from cai_utils.experiment.files import PACKAGE

ALL, RUN = "*", "import"
# Where results go and how they are drawn, not what is in them: a change there makes nothing stale.
# Of experiment/ only what reads rows and takes parameters apart counts.
OUTSIDE = re.compile(r"cai_utils\.(experiment(?!\.(files|params)\b)|figures|__main__)(\.|$)")
# "cai_utils.miniature.judge" or "cai_utils.miniature.judge:judge", as code and params name them.
NAME = re.compile(r"(cai_utils(?:\.\w+)+)(?::(\w+))?")

DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ASSIGNMENT = ast.Assign | ast.AnnAssign | ast.AugAssign


def ours(name: str) -> bool:
    """Whether a dotted name lies in this package."""
    return name.split(".")[0] == "cai_utils"


def module_file(name: str, package: Path | None = None) -> Path | None:
    """The source file of a module of this package, or None if `name` is none."""
    parts = name.split(".")
    base = (package or PACKAGE).joinpath(*parts[1:])
    files = (base.with_suffix(".py") if parts[1:] else base / "__init__.py", base / "__init__.py")
    return next((f for f in files if ours(name) and f.is_file()), None)


class Module:
    """The definitions and imports of one source text, and the statements that run on import.

    definitions: name -> the statements that bind it. imports: name -> (module, name in it), None
    for a module itself. modules: every module that is imported. package: for relative imports.
    """

    def __init__(self, source, package: str = ""):
        self.package, self.definitions, self.imports, self.modules = package, {}, {}, []
        self.others = {}  # local name -> what it is in a package that is not ours
        self.statements = [Strip().visit(node) for node in ast.parse(source).body]
        self.statements = [node for node in self.statements if not _skipped(node)]
        for node in self.statements:
            # Imports may stand in a `try`.
            for inner in [node] if isinstance(node, DEFINITION) else ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    self._import(inner)
            for name in _bound(node):
                self.definitions.setdefault(name, []).append(node)
        self.running = [node for node in self.statements if self._runs(node)]

    def _import(self, node) -> None:
        bound, modules = imported(node, self.package)
        self.imports |= bound
        self.modules += modules
        base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        self.others |= {a.asname or a.name.split(".")[0]: base + a.name for a in node.names}

    def _runs(self, node) -> bool:
        """Whether a statement does more on import than bind a name."""
        if isinstance(node, DEFINITION):
            # A decorator of this package may register what it decorates.
            return bool(_names(node.decorator_list) & {*self.imports, *self.definitions})
        if isinstance(node, ASSIGNMENT):
            targets = [n for t in _targets(node) for n in ast.walk(t)]
            return any(isinstance(n, ast.Attribute | ast.Subscript) for n in targets)
        return not isinstance(node, ast.Import | ast.ImportFrom)

    @functools.cache  # noqa: B019 (modules live as long as the process)
    def part(self, name: str) -> tuple[str, frozenset]:
        """Text and `references` of a definition, of ALL, or of RUN."""
        nodes = {ALL: self.statements, RUN: self.running}.get(name)
        nodes = self.definitions.get(name, []) if nodes is None else nodes
        texts = [ast.dump(node) for node in nodes]
        outside = sorted(_names(nodes) & {*self.others} - {*self.imports})
        others = [f"{name} = {self.others[name]}" for name in outside]
        text = "\n".join([*(sorted(texts) if name == ALL else texts), *others])
        return text, references(nodes, self.imports, self.definitions, self.package)


@functools.cache
def parsed(source: bytes, package: str) -> Module:
    return Module(source, package)


class Strip(ast.NodeTransformer):
    """Removes docstrings and the annotations of arguments and results from a syntax tree."""

    def _definition(self, node):
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = node.body[1:] or [ast.Pass()]
        if hasattr(node, "returns"):
            node.returns = None
        return self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _definition

    def visit_arg(self, node):
        node.annotation = None
        return node


def _skipped(node) -> bool:
    """A docstring, or a block that does not run on import."""
    if isinstance(node, ast.If):
        typing_only = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        return "__main__" in ast.unparse(node.test) or (typing_only and not node.orelse)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bound(node) -> set[str]:
    """The names that a statement of a module binds."""
    if isinstance(node, DEFINITION):
        return {node.name}
    if isinstance(node, ASSIGNMENT):
        return _names(_targets(node), ast.Store)
    if not hasattr(node, "body"):
        return set()
    inside = {n.name for n in ast.walk(node) if isinstance(n, DEFINITION)}
    return inside | _names([node], ast.Store)


def _targets(assignment) -> list:
    return getattr(assignment, "targets", None) or [assignment.target]


def _names(nodes, context=ast.expr_context) -> set[str]:
    found = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {n.id for n in found if isinstance(n.ctx, context)}


def imported(node, package: str):
    """An import statement -> ({local name: (module, name in it)}, [modules it imports])."""
    if isinstance(node, ast.Import):
        names = [alias for alias in node.names if ours(alias.name)]
        bound = {a.asname or "cai_utils": a.name if a.asname else "cai_utils" for a in names}
        return {name: (module, None) for name, module in bound.items()}, [a.name for a in names]
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, *([base] if base else [])])
    if not ours(base):
        return {}, []
    return ({a.asname or a.name: (base, ALL if a.name == "*" else a.name) for a in node.names},
            [base, *(f"{base}.{a.name}" for a in node.names)])  # fmt: skip


def references(nodes, imports, definitions, package="") -> frozenset:
    """What syntax trees name: chains (module, name, attribute, ...); module "" is their own."""
    found, imports = set(), dict(imports)
    inside = [n for node in nodes for n in ast.walk(node)]
    for node in inside:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound, modules = imported(node, package)
            imports |= bound
            found |= {(module, RUN) for module in modules}
    for node in inside:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = NAME.fullmatch(node.value)
            found |= {(match[1], match[2] or ALL)} if match else set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        chain, root = [], node
        while isinstance(root, ast.Attribute):
            chain, root = [root.attr, *chain], root.value
        if isinstance(root, ast.Name):
            if root.id in imports:
                module, name = imports[root.id]
                found.add((module, *([name] if name else []), *chain))
            if root.id in definitions:
                found.add(("", root.id))
        else:
            stack += ast.iter_child_nodes(node)
    # A name of `from x import *` cannot be told apart: everything of x counts.
    return frozenset(found | {(m, ALL) for m, name in imports.values() if name == ALL})


class Graph:
    """The package as it is on disk now: `reached(starts)` follows every reference."""

    def __init__(self, package: Path | None = None):
        self.folder, self.modules = package or PACKAGE, {}

    def module(self, name: str) -> Module | None:
        """A module of the package; None for one that does not exist or does not count."""
        if name not in self.modules:
            file = None if OUTSIDE.match(name) else module_file(name, self.folder)
            package = name if file and file.name == "__init__.py" else name.rpartition(".")[0]
            self.modules[name] = parsed(file.read_bytes(), package) if file else None
        return self.modules[name]

    def follow(self, module: str, *names: str) -> tuple[str, str]:
        """(module, a, b, ...) -> the definition that module.a.b is or belongs to."""
        for name in names:
            known = self.module(module)
            if name in (ALL, RUN) or (known and name in known.definitions):
                return module, name
            if known and name in known.imports:
                source, inside = known.imports[name]
                if (source, inside) == (module, name):  # a submodule that its package imports
                    module = f"{module}.{name}"
                elif inside is None:
                    module = source
                else:
                    found, definition = self.follow(source, inside)
                    if definition != ALL or inside == ALL:
                        return found, definition
                    module = found
            elif OUTSIDE.match(f"{module}.{name}") or module_file(f"{module}.{name}", self.folder):
                module = f"{module}.{name}"
            else:
                break
        return module, ALL

    def reached(self, starts) -> dict[tuple[str, str], str]:
        """{(module, name): text} of all that `starts`, chains as in `references`, lead to."""
        found, waiting = {}, list(starts)
        while waiting:
            module, name = self.follow(*waiting.pop())
            known = self.module(module)
            if (module, name) in found or known is None:
                continue
            text, inside = known.part(name)
            found[module, name] = text
            waiting += [(chain[0] or module, *chain[1:]) for chain in inside]
            # Whoever uses a module also runs it, its packages and what it imports.
            waiting += [(module, RUN)] if name != RUN else [
                (other, RUN) for other in [*known.modules, module.rpartition(".")[0]] if other]
            if name == ALL:
                waiting += [(source, inside or ALL) for source, inside in known.imports.values()]
        return found


def named_in(text: str) -> list[tuple[str, str]]:
    """The modules and functions of the package that a text (parameters) names."""
    return [(match[1], match[2] or ALL) for match in NAME.finditer(text)]


def plain_python(source: str) -> str:
    """The code of a notebook's cell without IPython's magics, which are no Python."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def of_source(source: str) -> list[tuple]:
    """What Python `source` (the code cells of a notebook) uses of the package."""
    try:
        module = Module(plain_python(source))
    except SyntaxError:  # left to the notebook to report
        return []
    return [chain for chain in module.part(ALL)[1] if chain[0]]
