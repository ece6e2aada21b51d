"""Parameters that name functions and files."""

import math

import pytest

from cai_utils.experiment import params


def test_load_function():
    assert params.load_function("math:sqrt") is math.sqrt
    assert params.load_function(None) is None
    for wrong in ("math:nothing", "no_such_module:f", "math", ""):
        with pytest.raises(ValueError, match="module:function"):
            params.load_function(wrong)


def test_source_finds_files_of_the_run_and_passes_the_rest(tmp_path):
    class Run:
        def need(self, path, made_by):
            return tmp_path / path

    assert params.source(Run(), "data/x.jsonl") == tmp_path / "data/x.jsonl"
    assert params.source(Run(), "paper/438HHHEvaluations") == "paper/438HHHEvaluations"
    assert params.source(Run(), "data/x.jsonl[:5]") == f"{tmp_path / 'data/x.jsonl'}[:5]"
    both = {"train": "data/x.jsonl", "eval": "xstest/safe"}
    assert params.source(Run(), both) == {"train": tmp_path / "data/x.jsonl",
                                            "eval": "xstest/safe"}


def test_own_files_are_found_at_any_depth(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    (tmp_path / "models").mkdir()
    named = {"a": "mine.jsonl[:10]", "b": [{"train": str(tmp_path / "models")}], "c": "xs",
             "d": "hh-rlhf/harmless-base/test", "e": 1e-3, "f": ".",
             "g": "models#train[:3]"}
    assert params.files_named(tmp_path, named) == [
        tmp_path / "mine.jsonl", tmp_path / "models", tmp_path / "models"]
    for name in ("models/own-xs", "models/own-s", "models/[1]-s", "models/1-s"):
        (tmp_path / name).mkdir()
    (tmp_path / "models/x.gguf").write_text("")
    assert params.files_named(tmp_path, ["models/own-{size}", "gguf:models/x.gguf",
                                         "models/[1]-{size}", "miniature/{size}"]) == [
        tmp_path / name for name in ("models/own-s", "models/own-xs", "models/x.gguf",
                                     "models/[1]-s")]


@pytest.mark.parametrize("text, value", [
    ("lr=5e-4", 0.0005), ("lr={xs: 5e-4}", {"xs": 0.0005}), ("clamp=[4e-1, 0.6]", [0.4, 0.6]),
    ("lora={lora_dropout: 5e-2}", {"lora_dropout": 0.05}), ("names=[no, on]", ["no", "on"]),
    ("kinds=no", False), ("at=12:30", "12:30"),
])
def test_numbers_are_read_at_any_depth(tmp_path, text, value):
    name = text.partition("=")[0]
    assert params.parse_override(text) == (name, value)
    (tmp_path / "own.yaml").write_text(text.replace("=", ": ", 1))
    assert params.read_params(tmp_path / "own.yaml") == {name: value}


@pytest.mark.parametrize("value", ["rl_cai", "1e5", "012", "no", "true", "null", "", "[x", "a: b",
                                   "ä $(x) 'y' \"z\"", 5, 5e-4, 1e22, True, None, [1, "1e5"]])
def test_values_of_a_grid_arrive_as_they_are(value):
    found = params.parse_override(params.as_override("size", value))[1]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("sizes", [3, [], "xs"])
def test_sizes_are_a_list(tmp_path, sizes):
    with pytest.raises(ValueError, match=r"sizes=.*give a list of at least one size"):
        params.check_sizes(tmp_path, {"profile": "mini", "sizes": sizes})


@pytest.mark.parametrize("spec", ["data/../../x.jsonl", "data//etc/x.jsonl", "data/..\\x.jsonl"])
def test_files_of_a_run_are_below_its_folder(spec):
    with pytest.raises(ValueError, match="data spec .*cannot be the name"):
        params.source(None, spec)
