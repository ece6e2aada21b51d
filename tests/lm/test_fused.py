"""The fused decoder: it is the model, or it is not used."""


import numpy as np
import pytest
import torch
from test_sampling import CONFIGS, PROMPTS, SMALL, TOKENIZER, make_model, reference
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from cai_utils.lm import fused, kvcache
from cai_utils.lm.sampling import Sampler

HEADS = dict(intermediate_size=48, num_key_value_heads=2)
FAMILIES = {
    "llama": CONFIGS["llama"], "qwen2": CONFIGS["qwen2"],
    "biases": LlamaConfig(**SMALL, **HEADS, attention_bias=True, mlp_bias=True),
    "one group": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=4),
    "qwen3": Qwen3Config(**SMALL, **HEADS, head_dim=16),
    "mistral": MistralConfig(**SMALL, **HEADS, sliding_window=None),
}
has_bf16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no AVX512-BF16")


def greedy(sampler):
    return [c.token_ids for c, in sampler.generate(PROMPTS, temperature=0, max_new_tokens=12)]


def built(name, monkeypatch):
    """A random model whose biases and norms are not those of the start."""
    monkeypatch.setitem(CONFIGS, name, FAMILIES[name])
    model = make_model(name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_model(name, monkeypatch):
    monkeypatch.setattr(kvcache, "_SHARE_FROM", 0)
    monkeypatch.setattr(kvcache, "_SHARE_PART", 0)
    model = built(name, monkeypatch)
    sampler = Sampler(model, TOKENIZER)
    prompts = [*PROMPTS, *(PROMPTS[3] + tail for tail in ("a", "bc"))]  # a shared prefix
    got = sampler.generate(prompts, temperature=0, max_new_tokens=12)
    assert sampler.engine.decoder is not None
    assert [c.token_ids for c, in got] == [reference(model, p, 12) for p in prompts]
    choices = [" (A)", " a long choice"]
    scores = sampler.choice_logprobs(prompts, choices)
    model.lm_head.register_forward_hook(lambda *_: None)  # from here on by the model itself
    want = sampler.choice_logprobs(prompts, choices)
    assert sampler.engine.decoder is None
    np.testing.assert_allclose(scores, want, atol=1e-4)


@pytest.mark.parametrize("small", [True, False])
def test_new_weights_are_seen(small, monkeypatch):
    monkeypatch.setattr(fused, "_SMALL", fused._SMALL if small else 0)
    model = make_model("llama")
    sampler = Sampler(model, TOKENIZER)
    before = greedy(sampler)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS] != before
    model.model.layers[1].self_attn.q_proj.weight.data *= -1  # as adapters are merged
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight[:] = weight.flip(0)  # the same numbers elsewhere
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
    model.model.rotary_emb.inv_freq *= 0.1
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
    assert sampler.engine.decoder is not None


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model):
    old = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = new = Doubled(48, 32, bias=False)
    new.load_state_dict(old.state_dict())


def patched(model):
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: -plain(x)


CHANGES = {
    "a hook": lambda m: m.model.norm.register_forward_hook(lambda _, args, out: 3 * out),
    "a module": replaced, "a method": patched,
    "what the decoder does not know": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_does_something_else_is_not_fused(what, late):
    model = make_model("llama")
    sampler = Sampler(model, TOKENIZER)
    if late:  # a decoder is there already
        greedy(sampler)
    CHANGES[what](model)
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
    assert sampler.engine.decoder is None


def test_a_changed_model_gets_another_decoder():
    model = make_model("llama")
    sampler = Sampler(model, TOKENIZER)
    attention, head = model.model.layers[0].self_attn, model.lm_head

    def new_head():
        model.lm_head = nn.Linear(head.in_features, head.out_features, bias=False)
        model.lm_head.weight.data = -head.weight.data

    def one_bias():
        attention.k_proj.bias = nn.Parameter(torch.randn(attention.k_proj.out_features))

    changes = (lambda: None, new_head, one_bias, lambda: setattr(attention.k_proj, "bias", None),
               lambda: [setattr(layer.self_attn, "scaling", 2.0) for layer in model.model.layers])
    for change in changes:
        change()
        assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
        assert sampler.engine.decoder is not None
    model.bfloat16()
    greedy(sampler)
    model.float()
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]


def test_without_room_for_a_copy_the_model_itself_computes(monkeypatch):
    model = make_model("llama")
    sampler = Sampler(model, TOKENIZER)
    monkeypatch.setattr(fused, "free_memory", lambda device: 100_000)
    assert greedy(sampler) == [reference(model, p, 12) for p in PROMPTS]
    assert sampler.engine.decoder is None


@has_bf16
def test_bf16_is_left_to_the_model():
    # its rows are the same in every batch
    sampler = Sampler(make_model("llama").to(torch.bfloat16), TOKENIZER)
    greedy(sampler)
    assert sampler.engine.decoder is None
