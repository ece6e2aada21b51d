"""What the networks of PPO find out of a model before they take a shorter way: whatever its
precision and however it was initialised, log-probabilities are those of a plain pass."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from cai_utils.rl import networks, packing

SIZE = dict(vocab_size=21, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1)
HEADS = {  # a config, and whether its logits are those of the head alone
    "llama": (LlamaConfig(**SIZE), True),
    "gemma2": (Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=30.0), False),
    "gemma2-uncapped": (Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=None), True),
    "cohere": (CohereConfig(**SIZE, logit_scale=0.9), False),
    "granite": (GraniteConfig(**SIZE, logits_scaling=1.1), False),
    "granite-unscaled": (GraniteConfig(**SIZE, logits_scaling=1.0), True),
}
EPISODES = [packing.Episode([1, 3, 7], [9, 4, 2]), packing.Episode([1, 3, 5, 6], [2, 8])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("start", [1e-6, 0.02, 1.0])
def test_a_head_that_scales_or_caps_is_found_out(kind, dtype, start):
    torch.manual_seed(0)
    config, plain = HEADS[kind]
    config.initializer_range = start
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    net = networks.ResponseLogprobs(model, temperature=1.0)
    assert net.plain_head == plain
    with torch.no_grad():  # as training might make them: large, where a cap shows
        model.get_output_embeddings().weight.normal_(std=4)
        got, _ = net(*packing.pack(EPISODES))
    want = []
    for e in EPISODES:
        ids = torch.tensor([e.prompt_ids + e.response_ids])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        want += [logs[len(e.prompt_ids) - 1 + i, t].item() for i, t in enumerate(e.response_ids)]
    np.testing.assert_allclose(got, want, atol=1e-4 if dtype == torch.float32 else 0.3)


def base_of(std, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, initializer_range=std)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype).base_model


def sees_all(base, monkeypatch):
    """Makes a base model carry its state along a row, as a recurrent one does."""
    plain = base.forward
    monkeypatch.setattr(base, "forward", lambda position_ids=None, **how: plain(**how))


@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.02, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_not_packed_because_nothing_shows_yet(std, dtype, monkeypatch):
    base = base_of(std, dtype)
    sees_all(base, monkeypatch)
    assert not networks.can_pack(base, "cpu")


@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.02, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_is_not_shared_because_nothing_shows_yet(std, dtype, monkeypatch):
    base = base_of(std, dtype)
    plain = base.forward

    def forgets(past_key_values=None, **how):
        return plain(**how)

    monkeypatch.setattr(base, "forward", forgets)
    assert not networks.can_share_prefix(base, "cpu")


@pytest.mark.parametrize("std, dtype", [(0.02, torch.float32), (0.3, torch.float32),
                                        (0.3, torch.bfloat16)])
def test_where_it_shows_the_short_way_is_taken(std, dtype):
    base = base_of(std, dtype)
    assert networks.can_pack(base, "cpu") and networks.can_share_prefix(base, "cpu")
