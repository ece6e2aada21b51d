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


@pytest.mark.parametrize("text", ["lr={xs: 5e-4}", "clamp=[4e-1, 0.6]"])
def test_numbers_that_yaml_leaves_as_text_are_refused_at_any_depth(tmp_path, text):
    with pytest.raises(ValueError, match=r"as text; write \d\.0e-"):
        params.parse_override(text)
    (tmp_path / "own.yaml").write_text(text.replace("=", ": "))
    with pytest.raises(ValueError, match=r"YAML reads (lr\.xs|clamp\.0): .* as text"):
        params.read_params(tmp_path / "own.yaml")


@pytest.mark.parametrize("sizes", [3, [], "xs"])
def test_sizes_are_a_list(tmp_path, sizes):
    with pytest.raises(ValueError, match=r"sizes=.*give a list of at least one size"):
        params.check_sizes(tmp_path, {"profile": "mini", "sizes": sizes})
