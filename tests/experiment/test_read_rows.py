"""Files of rows as people have them, faults that are named, and JSON that any reader takes."""

import codecs
import gzip
import json
import math

import nbformat
import pandas as pd
import pytest

from cai_utils.experiment import execute, files, fingerprint, journal
from cai_utils.lm import training

ROWS = [{"a": "café", "b": 1}, {"a": "\u2028", "b": None}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
BOM = codecs.BOM_UTF8.decode()


@pytest.mark.parametrize("name, text", [
    ("r.jsonl", BOM + LINES), ("r.jsonl", LINES.replace("\n", "\n" + BOM)),
    ("r.jsonl.gz", BOM + LINES), ("r.json", LINES), ("r.json", json.dumps(ROWS, indent=2)),
    ("r.json.gz", BOM + json.dumps(ROWS)), ("r.jsonl", "\n [\n" + json.dumps(ROWS)[1:]),
    ("r.jsonl", LINES.replace("\n", "\r\n")),
])
def test_json_in_other_dress_gives_the_same_rows(tmp_path, name, text):
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert files.read_rows(tmp_path / name) == ROWS


def test_csv_with_a_byte_order_mark_gzipped_and_with_a_very_long_cell(tmp_path):
    text = BOM + "a,b\n" + "é" * 200_000 + ",1,\n"
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert files.read_rows(tmp_path / "r.csv.gz") == [{"a": "é" * 200_000, "b": "1"}]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet"])
def test_nan_and_infinities_are_read_as_none_and_can_be_written(tmp_path, name):
    table = pd.DataFrame({"id": ["x", "y"], "length": [math.nan, 1.5], "cost": [math.inf, 2.0]})
    if name == "r.parquet":
        table.to_parquet(tmp_path / name)
    else:
        rows = [json.dumps(row) for row in table.to_dict("records")]
        text = f"[{', '.join(rows)}]" if name == "r.json" else "\n".join(rows)
        (tmp_path / name).write_text(text.replace("Infinity", "1e999"))
    rows = files.read_rows(tmp_path / name)
    assert rows == [{"id": "x", "length": None, "cost": None},
                    {"id": "y", "length": 1.5, "cost": 2.0}]
    files.write_rows(tmp_path / "out.jsonl", rows)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
WHOLE = gzip.compress(LINES.encode(), mtime=0)


@pytest.mark.parametrize("name, data, fault", [
    ("r.jsonl", LINES.encode("latin-1", "replace"), "r.jsonl, line 1: not UTF-8 .*0xe9.*Latin-1"),
    ("r.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "r.jsonl, line 2: not UTF-8 .*Latin-1"),
    ("r.csv", b"a,b\n1,2\ncaf\xe9,3\n", "r.csv, line 3: not UTF-8 .*Latin-1"),
    ("r.jsonl.gz", gzip.compress(b'{"a": "\xe9"}\n'), "r.jsonl.gz, line 1: not UTF-8 .*Latin-1"),
    ("r.jsonl", LINES.encode("utf-16"), "r.jsonl, line 1: not UTF-8 .*UTF-16"),
    ("r.jsonl", b'{"a": "b"}\n'.decode().encode("utf-16-le"), "r.jsonl, line 1: .*UTF-16"),
    ("r.csv", "a,b\n1,2\n".encode("utf-16-le"), "r.csv, line 1: .*UTF-16"),
    ("r.jsonl.gz", LINES.encode(), "r.jsonl.gz: not a whole gzip file"),
    ("r.jsonl.gz", WHOLE[:-12], "r.jsonl.gz: not a whole gzip file"),
    ("r.parquet", b"PAR1xxxx", "r.parquet: not a whole Parquet file"),
    ("r.csv", b"a,b\n1,2\nx, y,z\n", "r.csv, line 3: more cells than the 2 columns"),
    ("r.json", b'[{"a": 1},\n "b"]', "r.json, line 1: a row .* JSON object, and entry 1 .* 'b'"),
    ("r.json", b'[{"a": 1},\n oops]', "r.json, line 2: not valid JSON"),
    ("r.jsonl", b'{"a": 1}\n' + b'{"a":' * 100_000, "r.jsonl, line 2: not valid JSON .*recursion"),
    ("r.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "r.jsonl, line 2: .*digits"),
    *((f"r.{ending}", POINTER, f"r.{ending}: a Git LFS pointer.*git lfs pull")
      for ending in ("jsonl", "jsonl.gz", "json", "csv", "parquet")),
], ids=lambda value: "data" if isinstance(value, bytes) else None)
def test_a_fault_is_named_with_its_place(tmp_path, name, data, fault):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=fault):
        files.read_rows(tmp_path / name)


def test_a_pointer_in_a_folder_is_found(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "config.json").write_text("{}")
    files.refuse_pointer(tmp_path)
    (tmp_path / "inner/model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="inner/model.safetensors: a Git LFS pointer"):
        files.refuse_pointer(tmp_path)
    with pytest.raises(ValueError, match="a folder, not a file of rows"):
        files.read_rows(tmp_path)


# JSON without NaN

BAD = [math.nan, math.inf, -math.inf]


def strict(text):
    """JSON as RFC 8259 has it: Python's own reader also takes NaN and Infinity."""
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_null_for_what_is_no_number(tmp_path):
    value = {"a": BAD, "b": {"c": (1.5, math.nan)}, "d": "NaN", 1: True, "p": tmp_path, "e": 1e-300}
    files.write_json(tmp_path / "x.json", value)
    found = strict((tmp_path / "x.json").read_text())
    assert found == {"a": [None] * 3, "b": {"c": [1.5, None]}, "d": "NaN", "1": True,
                     "p": str(tmp_path), "e": 1e-300}
    assert files.read_json(tmp_path / "x.json") == found
    with pytest.raises(ValueError, match="NaN is not JSON"):
        strict(json.dumps(value, default=str).replace("Infinity", "0"))  # what was written before


def test_a_training_record_is_json(tmp_path):
    table = pd.DataFrame({"group": ["a"], "ci_low": [math.nan]})
    record = {"train_loss": math.nan, "eval": table, "n": table["group"].count(),
              "log": [{"loss": math.inf}]}
    training.write_record(tmp_path, record)
    assert strict((tmp_path / "training.json").read_text()) == {
        "train_loss": None, "eval": [{"group": "a", "ci_low": None}], "n": 1,
        "log": [{"loss": None}]}


@pytest.mark.parametrize("bad", BAD)
def test_rows_without_a_number_are_refused_by_name(tmp_path, bad):
    path = tmp_path / "labels.jsonl"
    files.write_rows(path, [{"id": "a", "p": 0.5}])
    rows = [{"id": "a", "p": None}, {"id": "b", "cot": ("x",), "p": [0.5, {"q": bad}]}]
    with pytest.raises(ValueError, match=r"labels\.jsonl, row 2 \(id b\): p: not a finite number"):
        files.write_rows(path, rows)
    assert files.read_rows(path) == [{"id": "a", "p": 0.5}]  # as it was
    files.write_rows(path, files.finite(rows))
    assert [strict(line) for line in path.read_text().splitlines()] == [
        {"id": "a", "p": None}, {"id": "b", "cot": ["x"], "p": [0.5, {"q": None}]}]


def test_a_journal_leaves_out_what_json_has_not(tmp_path):
    kept = journal.Journal(tmp_path / "x.partial", {"key": fingerprint.canonical(BAD)})
    kept.add([("a", 1.5), ("b", [math.nan]), ("c", -math.inf), ("d", None)])
    kept.close()
    for line in (tmp_path / "x.partial").read_text().splitlines():
        strict(line)
    assert set(kept.found) == {"a", "d"}
    again = journal.Journal(tmp_path / "x.partial", {"key": fingerprint.canonical(BAD)})
    assert again.found == {"a": 1.5, "d": None}
    again.close()


def test_keys_tell_numbers_that_json_has_not_apart():
    values = (*BAD, None, 0.0)
    keys = [json.dumps(fingerprint.canonical(value), allow_nan=False) for value in values]
    assert len(set(keys)) == 5
    assert fingerprint.canonical(math.nan) == fingerprint.canonical(float("nan"))  # not equal


def test_executed_notebooks_are_json(tmp_path):
    book = nbformat.v4.new_notebook()
    book.metadata["papermill"] = {"parameters": {"clip": math.inf}}
    output = nbformat.v4.new_output("display_data", {"application/json": {"x": math.nan}})
    book.cells = [nbformat.v4.new_code_cell("1", outputs=[output])]
    path = tmp_path / "x.ipynb"
    nbformat.write(book, path)
    execute._strict(path)
    found = strict(path.read_text())
    assert found["metadata"]["papermill"] == {"parameters": {"clip": None}}
    assert found["cells"][0]["outputs"][0]["data"] == {"application/json": {"x": None}}
    nbformat.validate(nbformat.read(path, as_version=4))
    before = path.read_bytes()
    execute._strict(path)
    assert path.read_bytes() == before
    execute._strict(tmp_path / "none.ipynb")
