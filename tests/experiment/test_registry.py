"""The registry of policies."""

import pytest

from cai_utils.experiment import registry


def test_further_runs_have_names_of_their_own():
    assert registry.further("s", 0) == "s" and registry.further("s", 2) == "s_seed2"
    assert registry.is_further("rl_rl_cai_s_seed2") and not registry.is_further("rl_rl_cai_s")
    with pytest.raises(ValueError, match="size 's_seed2' ends as the names of further runs"):
        registry.further("s_seed2", 0)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'rl'; nearest: rl_cai; "
                                         "known: helpful_rlhf"):
        registry.method("rl")
