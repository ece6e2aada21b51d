"""The registry of policies."""

import pytest

from cai_utils.experiment import registry


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'rl'; nearest: rl_cai; "
                                         "known: helpful_rlhf"):
        registry.method("rl")
