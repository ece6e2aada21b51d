"""Reading and writing: rows, JSON, atomic files, and the root of the repository."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import os
import re
import uuid
import zlib
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_rows(path) -> list[dict]:
    """The rows of a .jsonl, .json, .csv or .parquet file; all but the last may be gzipped (.gz).

    JSON: one object a line (empty lines are skipped), or one array of objects. Text is UTF-8, with
    or without a byte order mark. NaN and infinities, which pandas writes for missing numbers, are
    None (`without_nan`). FileNotFoundError when the file is missing; ValueError, naming the file
    and where there is one the line, for another ending or encoding, a Git LFS pointer, a damaged
    file, and a line that is not a JSON object or has more cells than the CSV has columns.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file of rows")
    refuse_pointer(path)
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    opener = gzip.open if name.endswith(".gz") else open
    name = name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json", ".csv")):
        raise ValueError(f"{path}: cannot read this kind of file; give .jsonl, .json or .csv, also "
                         "with .gz behind it, or .parquet")
    read, newline = (_csv_rows, "") if name.endswith(".csv") else (_json_rows, None)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            return read(file, path)
    except UnicodeDecodeError:
        with opener(path, "rb") as file:
            raise ValueError(_not_utf8(path, file)) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch it again") from None


def refuse_pointer(path) -> None:
    """ValueError where a file, or one in a folder, is the pointer that Git LFS leaves in place of
    the file itself."""
    path = Path(path)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file() or file.stat().st_size > 1024:  # a pointer has three short lines
            continue
        with open(file, "rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{file}: a Git LFS pointer, not the file itself: run `git lfs "
                                 "pull` in its repository, or download the file")


def _json_rows(file, path):
    rows = []
    for number, line in enumerate(file, 1):
        line = line.lstrip("\ufeff")  # joined files have byte order marks inside, too
        if not line.strip():
            continue
        if not rows and line.lstrip().startswith("["):
            rows = _json(line + file.read(), path, number)
            for i, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: a row has to be a JSON object, and "
                                     f"entry {i} of this array is {row!r:.60}")
            return rows
        row = _json(line, path, number)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row has to be a JSON object")
        rows.append(row)
    return rows


def _json(text, path, number):
    try:
        return without_nan(json.loads(text))
    except (ValueError, RecursionError) as error:  # also: too many digits, nested too deeply
        why = "it looks like UTF-16: save it as UTF-8" if "\0" in text else error
        number += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{path}, line {number}: not valid JSON ({why})") from error


def _csv_rows(file, path):
    csv.field_size_limit(2**31 - 1)  # a long conversation is one cell
    reader, rows = csv.DictReader(file), []
    try:
        for row in reader:
            if any(row.pop(None, ())):
                raise ValueError(f"{path}, line {reader.line_num}: more cells than the "
                                 f"{len(reader.fieldnames)} columns; quote texts with commas")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    if rows and "\0" in "".join(reader.fieldnames):
        raise ValueError(f"{path}, line 1: it looks like UTF-16: save it as UTF-8")
    return rows


def _parquet_rows(path):
    import pyarrow.parquet

    try:
        return without_nan(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); fetch it again") from None


def _not_utf8(path, file):
    """The message for a file whose text is not UTF-8: its first such line, and what it may be."""
    for number, line in enumerate(file, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            utf16 = b"\0" in line or line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            return (f"{path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); it looks "
                    f"like {'UTF-16' if utf16 else 'Latin-1 or Windows-1252'}: save it as UTF-8")
    return f"{path}: not UTF-8: save it as UTF-8"


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


def file_name(text, what: str) -> str:
    """`text`; ValueError, calling it `what`, where it cannot be the name of a file inside a folder:
    empty, with a path separator or a control character, `..`, over 200 bytes."""
    fine = isinstance(text, str) and text not in ("", ".", "..") and not re.search(
        r"[/\\\x00-\x1f\x7f\ud800-\udfff]", text) and len(text.encode()) <= 200
    if not fine:
        raise ValueError(f"{what} {text!r:.80} cannot be the name of a file: give one without "
                         "slashes and control characters, of at most 200 bytes")
    return text


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


def without_nan(value):
    """A row, or a list of them, with None for NaN and infinities. In `p_chosen`, `weight` and
    `score` they stay, and loaders refuse them: None would mean that nothing was said."""
    if isinstance(value, list):
        return [without_nan(row) for row in value]
    if not isinstance(value, dict):
        return finite(value)
    return {key: v if key in ("p_chosen", "weight", "score") else finite(v)
            for key, v in value.items()}


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
