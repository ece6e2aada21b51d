"""Parameters: the values in a notebook's parameters cell, and what a profile changes of them.

`params/<profile>/_common.yaml` is for every notebook of a profile, `<notebook>.yaml` for one,
and the command line for one run. Only names that the notebook declares are allowed.
"""

from __future__ import annotations

import ast
import contextlib
import glob
import importlib
import json
import re
import sys
from pathlib import Path

import yaml

from cai_utils.experiment import rules, secrets, yaml12
from cai_utils.experiment.kinds import check_name, fitted, lines_of, unknown


# ---------------------------------------------------------------- what params name
def load_function(path):
    """ "module:function" -> the function; None for None (a profile without a ground truth).

    ValueError when there is no such module or function.
    """
    if path is None:
        return None
    module, _, name = str(path).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path!r} names no function: write 'module:function', as in "
            f"'cai_utils.miniature.judge:judge' ({error})"
        ) from error


def for_size(value, size, *otherwise):
    """A parameter's value for a model size: the value itself, or its entry where it is a dict
    {size: value}. ValueError when the dict lacks the size and nothing is given for it."""
    if not isinstance(value, dict):
        return value
    if size not in value and otherwise:
        return otherwise[0]
    if size not in value:
        raise ValueError(f"a parameter has values for {', '.join(map(str, value))}, none for size "
                         f"{size!r}: add it in params/")
    return value[size]


def source(run, spec, made_by="00_miniature"):
    """A data spec of params: `data/...` is a file that notebook `made_by` makes in the run folder,
    anything else is what `cai_utils.data` reads. Of {split: spec} each is looked up. ValueError for
    one that leads out of the run folder."""
    if isinstance(spec, dict):
        return {split: source(run, part, made_by) for split, part in spec.items()}
    if not str(spec).startswith("data/"):
        return spec
    path, bracket, part = str(spec).partition("[")  # a slice stays behind it
    for name in path.split("/"):
        check_name(name, f"data spec {spec!r}: a part")
    found = run.need(path, made_by)
    return f"{found}[{part}" if bracket else found


# ---------------------------------------------------------------- profiles and their values
GRID = "grid"  # key of a notebook's YAML that tells the Snakefile which runs there are


def profiles(root) -> list[str]:
    """Names of the folders of `params/`; params/accelerate/ is not a profile."""
    found = (p.name for p in (Path(root) / "params").glob("*") if p.is_dir())
    return sorted(name for name in found if name != "accelerate")


def notebooks(root) -> list[str]:
    """Names (without .ipynb) of the notebooks in `notebooks/`."""
    return sorted(p.stem for p in (Path(root) / "notebooks").glob("*.ipynb"))


def check_profile(root, profile: str) -> str:
    """`profile` itself; ValueError listing the known ones when there is no such folder."""
    if profile not in profiles(root):
        raise unknown("profile", str(profile), profiles(root))
    return profile


def read_params(path) -> dict:
    """A parameter file; {} when it is missing. ValueError naming the file when it is not valid."""
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        values = yaml12.load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        said = secrets.hidden(" ".join(str(error).split()))
        raise ValueError(f"{path} is not valid YAML: {said}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold 'name: value' lines, not a {type(values).__name__}")
    secrets.check(values, where=f"{path}: ")
    return values


def parse_override(text: str) -> tuple[str, object]:
    """`"lr=1e-4"` -> `("lr", 0.0001)`; the value is YAML (`yaml12`).

    The name may lead into a parameter that is a dict: `settings.ppo.lr=1e-4`.
    """
    name, equals, value = text.partition("=")
    for part in (text, value.strip("'\" ")):
        secrets.check(part, "a value", "the command line: ")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", name):
        raise ValueError(f"{text!r} is not a parameter; write name=value")
    try:
        return name, yaml12.load(value)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "no YAML"
        raise ValueError(f"the value of {text!r} is not valid YAML; quote it ({why})") from None


def as_override(name: str, value) -> str:
    """What `parse_override` reads back as the same: `method=rl_cai`, but `size="1e5"`."""
    plain = f"{name}={value}"
    with contextlib.suppress(ValueError):
        read = parse_override(plain)[1]
        if read == value and type(read) is type(value):
            return plain
    return f"{name}={json.dumps(value, ensure_ascii=False)}"


def _with_entry(name: str, value, path: list[str], entry):
    """A copy of the dict `value` in which `path` leads to `entry`."""
    if not path:
        return entry
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}.{path[0]} cannot be set: {name} is {value!r}, not a dict")
    value = dict(value or {})
    # Keys that YAML reads as numbers ({1: ...}) are found by their text.
    key = next((k for k in value if str(k) == path[0]), path[0])
    value[key] = _with_entry(f"{name}.{path[0]}", value.get(key), path[1:], entry)
    return value


def defaults(notebook_path) -> dict:
    """{name: value} of the notebook's cell tagged `parameters`; None for a value that is not a
    literal.

    Read from the syntax tree, as papermill's own inspection misses some values over several lines.
    """
    return _assigned(_cell(notebook_path))


def _cell(notebook_path) -> str:
    """Source of the cell tagged `parameters`."""
    notebook = json.loads(Path(notebook_path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return "".join(cell["source"])
    raise ValueError(f"{notebook_path} has no cell with the tag 'parameters'; give it one")


def _fitted(notebook_path, values: dict) -> dict:
    """`values` with the notebook's kinds of numbers; ValueError as `kinds.fitted` and
    `rules.check`."""
    source, name = _cell(notebook_path), Path(notebook_path).stem
    known = _assigned(source)
    values = fitted(values, known, lines_of(source), f"{name}: ")
    rules.check(name, values, known, f"{name}: ")
    return values


def _assigned(source: str) -> dict:
    values = {}
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                values[target.id] = None
                with contextlib.suppress(ValueError, TypeError):
                    values[target.id] = ast.literal_eval(node.value)
    return values


def declared(notebook_path) -> list[str]:
    """Names that the notebook's cell tagged `parameters` assigns."""
    return list(defaults(notebook_path))


def from_namespace(root, notebook: str, namespace) -> dict:
    """The parameters of a notebook: what its parameters cell declares, as it stands in
    `namespace` (the notebook's `globals()`, or a dict of parameters alone).

    ValueError, with the nearest names, for a parameter that the notebook does not declare: in a
    dict, or in the cell that papermill adds; and for a text where a number belongs (`kinds`). Where
    there is no such notebook, all of it is taken.
    """
    path = Path(root) / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        if "__name__" in namespace:
            raise unknown("notebook", notebook, notebooks(root))
        secrets.check(dict(namespace), where=f"{notebook}: ")
        return dict(namespace)
    names = declared(path)
    secrets.check({n: namespace[n] for n in names if n in namespace}, where=f"{notebook}: ")
    common = Path(root) / "params" / str(namespace.get("profile")) / "_common.yaml"
    given = _injected() if "__name__" in namespace else namespace
    # papermill -f hands on whole files: what is for other notebooks too, and the Snakefile's grid.
    passed = [*names, *read_params(common), GRID] if "__name__" in namespace else names
    for name in given:
        if name not in passed:
            error = unknown("parameter", name, names)
            raise ValueError(f"{notebook}: {error} (its parameters cell)")
    return _fitted(path, {name: namespace[name] for name in names if name in namespace})


def _injected() -> list[str]:
    """Names in the cells that papermill added to this notebook; [] outside of IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    cells = shell.user_ns.get("In", []) if shell else []
    return [name for cell in cells if cell.startswith("# Parameters\n") for name in _assigned(cell)]


def known_sizes(common: dict) -> list[str] | None:
    """Sizes of a profile: `series` of its _common.yaml, or else its `sizes`; None: any."""
    sizes = common.get("series", common.get("sizes"))
    return None if sizes is None else [str(s) for s in sizes]


def check_sizes(root, params: dict, where: str = "") -> None:
    """ValueError when a size, or an item of `sizes`, is not one of the profile's."""
    common = Path(root) / "params" / params["profile"] / "_common.yaml"
    known = known_sizes(read_params(common))
    asked = params.get("sizes", [])
    if "sizes" in params and (not isinstance(asked, list | tuple) or not asked):
        raise ValueError(f"{where}sizes={asked!r}: give a list of at least one size, as [xs, s]")
    single = (params.get(name) for name in ("size", "pm_size", "kinds_size"))
    asked = [*asked, *(size for size in single if size is not None)]
    for size in asked:
        if known is not None and str(size) not in known:
            error = unknown("size", str(size), known)
            raise ValueError(f"{where}{error} (params/{params['profile']}/_common.yaml)")


def merge_params(root, notebook: str, profile: str, overrides: dict | None = None) -> dict:
    """What a notebook gets: _common.yaml, then its own YAML, then `overrides`.

    An override `a.b` sets one entry of the dict `a`, which otherwise stays as the profile (or
    else the notebook) has it. Common values reach a notebook only if it declares them; a value of
    its own YAML or an override that it does not declare is a ValueError, since it would silently do
    nothing; so is a text where the notebook has a number (`kinds`).
    """
    root, overrides = Path(root), dict(overrides or {})
    secrets.check(overrides, where="the command line: ")
    check_profile(root, profile)
    if notebook not in notebooks(root):
        raise unknown("notebook", notebook, notebooks(root))
    cell = defaults(root / "notebooks" / f"{notebook}.ipynb")
    if "profile" not in cell:
        raise ValueError(f"the parameters cell of {notebook} must declare 'profile'; add it")
    secrets.check(cell, where=f"notebooks/{notebook}.ipynb: ")
    notebook_file = f"params/{profile}/{notebook}.yaml"
    specific = read_params(root / notebook_file)
    grid = specific.pop(GRID, None)
    if grid is not None:
        rules.check_grid(notebook, grid, cell, f"{notebook_file}: ")
        check_sizes(root, {"profile": profile, **({"sizes": grid["sizes"]} if "sizes" in grid
                                                  else {})}, f"{notebook_file}: grid: ")
    common = read_params(root / "params" / profile / "_common.yaml")
    for source, values in ((notebook_file, specific), ("the command line", overrides)):
        if values.get("profile", profile) != profile:
            raise ValueError(f"{source} sets profile={values['profile']}; use --profile for that")
        for name in values:
            name = name.partition(".")[0] if values is overrides else name
            if name not in cell:
                error = unknown("parameter", name, list(cell))
                raise ValueError(f"{source}: {error} (the parameters cell of {notebook})")
        check_sizes(root, {**values, "profile": profile}, f"{source}: ")
    merged = {name: value for name, value in common.items() if name in cell}
    merged |= {"profile": profile, **specific}
    for text, value in overrides.items():
        name, *path = text.split(".")
        merged[name] = _with_entry(name, merged.get(name, cell[name]), path, value)
    return _fitted(root / "notebooks" / f"{notebook}.ipynb", merged)


def grid_of(root, profile: str, notebook: str) -> dict:
    """The `grid` of a notebook in a profile, {plural of a parameter: values}: the runs that the
    batch makes of it. {} where there is none."""
    return read_params(Path(root) / "params" / profile / f"{notebook}.yaml").get(GRID) or {}


def files_named(root, value) -> list[Path]:
    """The user's own files and folders that a parameter's value names, at any depth: a path that
    exists, absolute or from the project's root, also with a slice (`mine.jsonl[:100]`) or the split
    of a data set (`folder#train`) behind it, behind `gguf:`, and one for each size where it holds
    `{size}` (`models/mine-{size}`).
    """
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [path for part in parts for path in files_named(root, part)]
    if not isinstance(value, str) or not re.search(r"[/.#]", value) or "\n" in value:
        return []
    name = re.sub(r"\[[^\]]*\]$", "", value.removeprefix("gguf:"))
    paths = [Path(root) / Path(text).expanduser() for text in (name, name.partition("#")[0])]
    if "{size}" in name:
        pattern = "*".join(map(glob.escape, str(paths[-1]).split("{size}")))
        return [Path(found) for found in sorted(glob.glob(pattern))]
    return [p for p in paths if p.exists() and p.resolve() != Path(root).resolve()][:1]


def all_params(root, notebook: str, profile: str, overrides: dict | None = None) -> dict:
    """Every parameter of a notebook with its value: `merge_params` over the notebook's own."""
    merged = merge_params(root, notebook, profile, overrides)
    return {**defaults(Path(root) / "notebooks" / f"{notebook}.ipynb"), **merged}
