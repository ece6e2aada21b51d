"""Position schemes that depend on the longest row of a batch: each row is read as it is alone."""

import numpy as np
import pytest
import tiny
import torch
from families import randomize
from test_families import logprobs_of
from test_sampling import TOKENIZER, reference
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DogeConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
)

from cai_utils import preference, sft
from cai_utils.lm import architectures, kvcache
from cai_utils.lm.sampling import Sampler
from cai_utils.rl import dpo, ppo

SWITCH = 24  # tokens
SIZE = dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=512)
FACTORS = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
           "long_factor": [3.0, 4.0, 6.0, 8.0], "original_max_position_embeddings": SWITCH}
KINDS = {
    "phi3": (Phi3Config, {"original_max_position_embeddings": SWITCH}, FACTORS),
    "phimoe": (PhimoeConfig, {"original_max_position_embeddings": SWITCH, "num_local_experts": 4},
               FACTORS | {"short_mscale": 1.0, "long_mscale": 1.6}),
    "llama": (LlamaConfig, {}, FACTORS),
}
PROMPTS = ["abc", "the cat sat on", "the cat sat on a mat an", "the cat sat on a mat and",
           "the cat sat on a mat. a dog (A) or b", "the cat sat on a mat. a dog (A) or a"]
IDS = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def config_of(kind, switch=SWITCH, **more):
    cls, options, rope = KINDS[kind]
    rope = rope | {"original_max_position_embeddings": switch}
    return cls(**SIZE | options | more, rope_parameters=rope)


def model_of(kind, auto=AutoModelForCausalLM, **more):
    model = auto.from_config(config_of(kind, **more), attn_implementation="eager").eval()
    return randomize(model)


@pytest.fixture(autouse=True)
def eager_sharing(monkeypatch):
    monkeypatch.setattr(kvcache, "_SHARE_FROM", 0)
    monkeypatch.setattr(kvcache, "_SHARE_PART", 0)


def test_the_prompts_stand_on_both_sides_and_the_sides_differ():
    assert [len(ids) for ids in IDS] == [2, 14, 23, 24, 34, 34]
    model, padded = model_of("phi3"), torch.tensor([IDS[1] + [0] * 20])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([IDS[1]])).logits[0, -1]
        beside = model(input_ids=padded).logits[0, len(IDS[1]) - 1]
    assert (alone - beside).abs().max() > 0.5


@pytest.mark.parametrize("batch_tokens", [10**6, 100])
@pytest.mark.parametrize("kind, share", [("phi3", True), ("phi3", False), ("phimoe", True)])
def test_greedy_is_generate_across_the_switch(kind, share, batch_tokens):
    model = model_of(kind)
    sampler = Sampler(model, TOKENIZER, batch_tokens=batch_tokens, share_prefixes=share)
    got = sampler.generate(PROMPTS, n=2, temperature=0, max_new_tokens=18)
    for prompt, row in zip(PROMPTS, got, strict=True):
        assert [c.token_ids for c in row] == [reference(model, prompt, 18)] * 2, prompt


def test_sampling_does_not_depend_on_the_other_rows():
    model = model_of("llama")
    settings = dict(max_new_tokens=20, seed=3, temperature=1.5, stop=["b", " (A"])
    whole = Sampler(model, TOKENIZER).generate(PROMPTS, **settings)
    alone = [Sampler(model, TOKENIZER).generate([prompt], rows=[i], **settings)[0]
             for i, prompt in enumerate(PROMPTS)]
    assert [r[0].token_ids for r in whole] == [r[0].token_ids for r in alone]
    assert [(r[0].text, r[0].finish_reason) for r in whole] == [
        (r[0].text, r[0].finish_reason) for r in alone]
    for ids, (c,) in zip(IDS, whole, strict=True):  # each token as a plain pass up to it has it
        for k, token in enumerate(c.token_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + c.token_ids[:k]])).logits[0, -1]
            want = (logits / 1.5).log_softmax(-1)[token].item()
            assert c.logprobs[k] == pytest.approx(want, abs=1e-4)
    assert len({r[0].finish_reason for r in whole}) > 1


@pytest.mark.parametrize("batch_tokens", [10**6, 60])
def test_choices_are_scored_as_in_a_pass_over_the_row_alone(batch_tokens):
    model, choices = model_of("phi3"), [" (A)", " (B)", "x", "the end."]
    got = Sampler(model, TOKENIZER, batch_tokens=batch_tokens).choice_logprobs(PROMPTS, choices)
    for ids, row in zip(IDS, got, strict=True):
        want = []
        for choice in choices:
            more = TOKENIZER(choice)["input_ids"]
            with torch.no_grad():  # a model predicts from what it has read: all but the last token
                logits = model(input_ids=torch.tensor([ids + more[:-1]])).logits[0, len(ids) - 1 :]
            want.append(logits.log_softmax(-1)[range(len(more)), more].sum())
        np.testing.assert_allclose(row, torch.stack(want).log_softmax(0), atol=1e-4)


def test_scores_are_those_of_each_row_alone():
    pm = model_of("phi3", AutoModelForSequenceClassification, num_labels=1)
    rows = [ids + [5, 2] for ids in IDS]
    with torch.no_grad():
        want = [pm(input_ids=torch.tensor([row])).logits.item() for row in rows]
    got = preference.Scorer(pm, TOKENIZER).score_ids(rows)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", switch=60, vocab_size=259))
    model.save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_training_on_rows_of_both_sides_is_refused_before_it_starts(folder, tmp_path):
    long = [TALK[0], {"role": "assistant", "content": "word " * 12}]
    no = [{"role": "assistant", "content": "No"}]
    pair = [{"prompt": t[:1], "chosen": t[1:], "rejected": no, "p_chosen": 0.9}
            for t in (TALK, long)]
    message = "60 tokens with other position factors .LongRoPE.*lower max_length.* exceeds 60"
    for call in (lambda: sft.finetune(folder, [{"messages": m} for m in (TALK, long)], tmp_path),
                 lambda: preference.train(folder, pair, tmp_path),
                 lambda: dpo.train(folder, pair, [TALK[:1]], tmp_path, {"max_new_tokens": 1})):
        with pytest.raises(ValueError, match=message):
            call()
    config = dict(lr=1e-3, iterations=1, episodes=2, minibatch=2, print_every=0, max_new_tokens=60)
    with pytest.raises(ValueError, match="LongRoPE.*lower max_new_tokens"):
        ppo.train(folder, type("J", (), {"score": lambda self, c: [0.0] * len(c)})(),
                  [TALK[:1]] * 2, tmp_path / "out", config)


def test_what_is_checked_of_a_row():
    def check(config, *lengths):
        architectures.check_rows(config, lengths, "max_length")

    llama = LlamaConfig()
    check(llama, 1, 10**6)
    phi = config_of("phi3")
    assert architectures.switch_of(phi) == SWITCH and architectures.longest_of(phi) is None
    check(phi, 3, SWITCH)
    check(phi, SWITCH + 1, 400)
    dynamic = LlamaConfig(max_position_embeddings=100, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    doge = DogeConfig(keep_window_size=100)
    for config in (dynamic, doge):
        assert architectures.longest_of(config) == 100
        check(config, 3, 100)
        with pytest.raises(ValueError, match="101 tokens exceeds the 100 .*lower max_length"):
            check(config, 3, 101)


def test_a_dynamic_scheme_is_not_read_beyond_its_limit():
    """Beyond it, frequencies would stay those of the longest row that was read before."""
    config = LlamaConfig(**SIZE | {"max_position_embeddings": 40}, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    model = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    got = Sampler(model, TOKENIZER).generate(PROMPTS, temperature=0, max_new_tokens=30)
    for ids, (c,) in zip(IDS, got, strict=True):
        want, best = logprobs_of(model, ids, c.token_ids[: 40 - len(ids)])
        np.testing.assert_allclose(c.logprobs, want, atol=1e-4)
        np.testing.assert_allclose(best, want, atol=1e-4)
    pm = AutoModelForSequenceClassification.from_config(config)
    assert preference.Scorer(pm, TOKENIZER).max_length == 40
