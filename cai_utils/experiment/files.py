"""Reading and writing: rows, JSON, and the root of the repository; `writing` has the rest."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

# Names that were always here; of `writing` nothing counts in the fingerprints of what is made.
from cai_utils.experiment.writing import NotWritten as NotWritten
from cai_utils.experiment.writing import atomic, lone, repaired, whole, write_text
from cai_utils.experiment.writing import remove_stale as remove_stale
from cai_utils.experiment.writing import save_figure as save_figure

PACKAGE = Path(__file__).resolve().parents[1]
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_rows(path) -> list[dict]:
    """The rows of a .jsonl, .json, .csv or .parquet file; all but the last may be gzipped (.gz).

    JSON: one object a line (empty lines are skipped), or one array of objects. Text is UTF-8, with
    or without a byte order mark. NaN and infinities, which pandas writes for missing numbers, are
    None (`without_nan`); an escape of half a character is U+FFFD (`writing.whole`).
    FileNotFoundError when the file is missing; ValueError, naming the file and where there is one
    the line, for another ending or encoding, a Git LFS pointer, a damaged file, and a line that is
    not a JSON object or has more cells than the CSV has columns.
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
        value = without_nan(json.loads(text))
        return repaired(value) if "\\u" in text else value  # an escape may name half a character
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

    U+FFFD stands for each lone surrogate (`writing.whole`). ValueError for another ending, and for
    a row that holds NaN or an infinity, which JSON has not; NotWritten where the disk is full.
    """
    with rows_beside(path, rows):
        pass


@contextmanager
def rows_beside(path, rows):
    """`write_rows` in two steps: yields (the temporary file, complete; how many lone surrogates
    were replaced), which takes its place at the end."""
    path, marks = Path(path), 0
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: rows are written as .jsonl or .jsonl.gz")
    opener = gzip.open if path.name.endswith(".gz") else open
    with atomic(path) as temporary:
        with opener(temporary, "wt", encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(rows, 1):
                wrong = [name for name, value in row.items() if not _finite(value)]
                if wrong:
                    raise ValueError(f"{path}, row {number} (id {row.get('id')}): "
                                     f"{', '.join(wrong)}: not a finite number")
                line = json.dumps(row, ensure_ascii=False, allow_nan=False)
                marks += lone(line)
                file.write(whole(line) + "\n")
        yield temporary, marks


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


def plain(value, default=str):
    """`value` as JSON that is read back equal: what JSON does not know becomes what `default` makes
    of it, NaN and infinities None, lone surrogates U+FFFD."""
    text = whole(json.dumps(value, default=default, ensure_ascii=False))
    return finite(json.loads(text))


def write_json(path, value, default=str) -> None:
    """Write `plain(value, default)` as indented JSON, atomically; NotWritten where the disk is
    full."""
    text = json.dumps(plain(value, default), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path) -> dict:
    """The JSON object in a file; {} where the file is missing, no JSON, or not an object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
