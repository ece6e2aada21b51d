"""Packed rows: every token is read as in a row alone, or the model is found not to allow it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    BloomConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from cai_utils.lm import packing
from cai_utils.lm.packing import Example

SIZE = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64)
GPT2 = dict(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)
KINDS = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=1),
    "gpt_neox": GPTNeoXConfig(**SIZE, hidden_dropout=0.3),
    "gpt2": GPT2Config(**GPT2),  # with dropout, which a check must not see
    "mistral": MistralConfig(**SIZE, num_key_value_heads=1, sliding_window=20),
}
ROWS = [  # two rows, of three examples and of one, which is longest and shares nothing
    [Example([5, 6, 7], ([8, 9], [10])), Example([11, 12, 13, 14]), Example([4], ([5, 6], [7, 5]))],
    [Example([], ([3, 9, 17, 25, 40, 8], [9, 8, 30, 31, 32, 33, 34]))],
]


def model_of(kind, attention="eager", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModel.from_config(KINDS[kind], attn_implementation=attention, dtype=dtype)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_is_read_behind_its_prompt_alone(kind, attention):
    base = model_of(kind, attention).double()
    assert packing.can_pack(base, 20) and base.training
    base.eval()
    batch, starts = packing.pack(ROWS)
    examples = [e for row in ROWS for e in row]
    at, want = [], []
    for start, e in zip(starts, examples, strict=True):
        place = start
        for part in (e.prompt, *e.answers):
            if not part:
                continue
            row = part if part is e.prompt else e.prompt + part
            states = base(input_ids=torch.tensor([row])).last_hidden_state[0]
            want.append(states[len(row) - len(part) :])
            at += range(place, place + len(part))
            place += len(part)
    found = packing.read(base, **batch, at=torch.tensor(at))
    torch.testing.assert_close(found, torch.cat(want), atol=1e-6, rtol=1e-5)
    grads = []
    for states in (found, torch.cat(want)):
        base.zero_grad()
        (states * torch.linspace(-1, 1, 16)).square().sum().backward(retain_graph=True)
        grads.append([p.grad.clone() for p in base.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_models_that_would_be_misread_are_found_out():
    assert not packing.can_pack(model_of("mistral"), 21)  # its window ends within a row
    for config in (BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2),
                   GPTNeoConfig(vocab_size=61, hidden_size=16, num_layers=2, num_heads=2,
                                attention_types=[[["local"], 2]], window_size=8)):
        assert not packing.can_pack(AutoModel.from_config(config), 9)
    llama = model_of("llama")
    plain = llama.forward
    llama.forward = lambda attention_mask=None, **given: plain(**given)
    assert not packing.can_pack(llama, 20)  # it does not heed the mask
    assert packing.can_pack(model_of("llama", dtype=torch.bfloat16), 20)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(ids, ids)
def test_a_pair_is_its_rows_with_the_longest_beginning_that_leaves_each_a_token(chosen, rejected):
    example = packing.pair(chosen, rejected)
    assert [example.prompt + answer for answer in example.answers] == [chosen, rejected]
    first, second = example.answers
    assert first and second
    assert first[0] != second[0] or 1 in (len(first), len(second))
