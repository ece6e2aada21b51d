"""Files of rows as people have them: other endings and encodings, and faults that are named."""

import codecs
import gzip
import json

import pytest

from cai_utils.experiment import files

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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
WHOLE = gzip.compress(LINES.encode())


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
    *((f"r.{ending}", POINTER, f"r.{ending}: a Git LFS pointer.*git lfs pull")
      for ending in ("jsonl", "jsonl.gz", "json", "csv", "parquet")),
])
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
