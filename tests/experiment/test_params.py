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
