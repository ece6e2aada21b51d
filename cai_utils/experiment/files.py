"""Reading and writing: rows, JSON, atomic files, and the root of the repository."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import uuid
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def read_rows(path) -> list[dict]:
    """The rows of a .jsonl, .jsonl.gz, .csv or .parquet file.

    FileNotFoundError when it is missing; ValueError for another ending, and for a line that is not
    a JSON object, with its number. Empty lines are skipped.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    name = path.name.lower()
    if name.endswith(".csv"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    if name.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if not name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: cannot read this kind of file; give .jsonl, .jsonl.gz, .csv or "
                         ".parquet")
    rows = []
    with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a row has to be a JSON object")
            rows.append(row)
    return rows


def write_rows(path, rows) -> None:
    """Writes rows as .jsonl or .jsonl.gz, atomically (a temporary file, then a rename).

    ValueError for another ending, and for a row that holds NaN or an infinity, which JSON has not.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: rows are written as .jsonl or .jsonl.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(
            temporary, "wt", encoding="utf-8", newline="\n"
        ) as file:
            for number, row in enumerate(rows, 1):
                wrong = [name for name, value in row.items() if not _finite(value)]
                if wrong:
                    raise ValueError(f"{path}, row {number} (id {row.get('id')}): "
                                     f"{', '.join(wrong)}: not a finite number")
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def repo_root() -> Path:
    """The root of the repository: `CAI_ROOT`, or found by walking up from the working folder.

    Raises FileNotFoundError when there is none (`CAI_ROOT` names no folder, or cai_utils is
    installed somewhere else and the working folder is outside the repository).
    """
    named = os.environ.get("CAI_ROOT")
    if named:
        if not Path(named).is_dir():
            raise FileNotFoundError(f"CAI_ROOT={named} is not a folder; unset it or correct it")
        return Path(named).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, PACKAGE.parent):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "cai-lab"' in project.read_text(encoding="utf-8"):
            return folder
    raise FileNotFoundError(
        f"{here} is not inside a clone of cai-lab; go there, or set CAI_ROOT to its folder"
    )


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it takes the place of `path`.

    A reader sees the old file or the new one, never a part, even when the writer is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last because writers (matplotlib, pandas, gzip) choose the format by it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value):
    """`value` with None for NaN and infinities, at any depth: JSON (RFC 8259) has no such numbers,
    and other readers than Python's refuse a file that holds them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def _finite(value) -> bool:
    """Whether no NaN or infinity is in `value`."""
    if isinstance(value, dict | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def write_json(path, value, default=str) -> None:
    """Write `value` as indented JSON, atomically; what JSON does not know becomes what `default`
    makes of it, NaN and infinities null."""
    plain = finite(json.loads(json.dumps(value, default=default)))
    with atomic(path) as temporary:
        text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path) -> dict:
    """The JSON object in a file; {} where the file is missing, no JSON, or not an object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save_figure(figure, folder, name: str, rc: dict | None = None) -> Path:
    """Write <name>.png (200 dpi) and .pdf of a matplotlib figure; the path of the PNG.

    No date and no program name inside: the same table gives the same bytes. `rc`: matplotlib's
    rc parameters of a user's style.
    """
    import matplotlib

    # Type 42 keeps the text of a PDF editable; some publishers refuse matplotlib's default, type 3.
    rc = {"savefig.dpi": 200, "savefig.bbox": "tight", "pdf.fonttype": 42, **(rc or {})}
    pdf = {"CreationDate": None, "Creator": None, "Producer": None}
    with matplotlib.rc_context(rc):
        for suffix, metadata in (("pdf", pdf), ("png", {"Software": None})):
            with atomic(Path(folder) / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, metadata=metadata)
    return Path(folder) / f"{name}.png"
