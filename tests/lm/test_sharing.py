"""Shared prefixes and memory: what is computed once, and batches that do not fit."""

import numpy as np
import pytest
import torch
from test_sampling import CONFIGS, TOKENIZER, make_model, plain_choice_logprobs, reference

from cai_utils.lm import engine, kvcache
from cai_utils.lm.kvcache import shared_prefixes
from cai_utils.lm.sampling import Sampler

FIRST, SECOND = "the cat sat on a mat. ", "a dog: (A) or (B). q "
# Ragged, some shorter than what the longest has of its own, one the prefix itself, one apart.
PROMPTS = [FIRST + x for x in ("a", "bc", "the end is near. " * 2, "", "zz top.")]
PROMPTS += [SECOND + x for x in ("a", "xyz", "q. " * 9, "mm")] + ["b", "nothing shared at all"]


@pytest.fixture
def eager_sharing(monkeypatch):
    """Shares wherever a token is saved, so that tiny prompts do."""
    monkeypatch.setattr(kvcache, "_SHARE_FROM", 0)
    monkeypatch.setattr(kvcache, "_SHARE_PART", 0)


def count_tokens(model):
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, kwargs.get("input_ids")][0].numel()),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("batch_tokens", [10**6, 200])
@pytest.mark.parametrize(
    "kind, attention",
    [*((kind, "eager") for kind in CONFIGS), ("llama", "sdpa"), ("mistral", "sdpa")],
)
def test_greedy_is_generate_with_shared_prefixes(eager_sharing, kind, attention, batch_tokens):
    model = make_model(kind, attention)
    seen = count_tokens(model)
    out, tokens = {}, {}
    for share in (True, False):
        sampler = Sampler(model, TOKENIZER, batch_tokens=batch_tokens, share_prefixes=share)
        seen.clear()
        out[share] = sampler.generate(PROMPTS, n=2, temperature=0, max_new_tokens=8)
        tokens[share] = sum(seen)
        assert not sampler.engine._shared and not sampler.engine._prefixes
    assert tokens[True] < tokens[False] - 60
    for prompt, one, other in zip(PROMPTS, out[True], out[False], strict=True):
        expected = reference(model, prompt, 8)
        assert [c.token_ids for c in one] == [c.token_ids for c in other] == [expected] * 2, prompt


@pytest.mark.parametrize("kind", CONFIGS)
def test_choices_with_shared_prefixes_are_scored_as_by_plain_passes(eager_sharing, kind):
    model = make_model(kind, sharp=1.0)
    choices = [" (A)", " (B)", " (A"]  # all begin with the token " ("
    seen = count_tokens(model)
    got = Sampler(model, TOKENIZER).choice_logprobs(PROMPTS, choices)
    shared = sum(seen)
    seen.clear()
    alone = Sampler(model, TOKENIZER, share_prefixes=False).choice_logprobs(PROMPTS, choices)
    assert shared < sum(seen) - 60
    np.testing.assert_allclose(got, alone, atol=1e-4)
    sequences = [TOKENIZER(c)["input_ids"] for c in choices]
    for prompt, row in zip(PROMPTS, got, strict=True):
        want = plain_choice_logprobs(model, TOKENIZER(prompt)["input_ids"], sequences)
        np.testing.assert_allclose(row, want, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_long_prompts_are_prefilled_with_sdpa_and_nothing_changes(monkeypatch, kind):
    model = make_model(kind)
    used = []
    model.register_forward_pre_hook(lambda *_: used.append(model.config._attn_implementation))
    plain = Sampler(model, TOKENIZER).generate(PROMPTS, temperature=0, max_new_tokens=6)
    assert set(used) == {"eager"}
    used.clear()
    monkeypatch.setattr(engine, "_SDPA_FROM", 8)
    long = Sampler(model, TOKENIZER).generate(PROMPTS, temperature=0, max_new_tokens=6)
    assert set(used) == {"eager", "sdpa"} and model.config._attn_implementation == "eager"
    assert [r[0].token_ids for r in long] == [r[0].token_ids for r in plain]


def test_sampling_is_the_same_with_and_without_sharing(eager_sharing):
    model = make_model("llama")
    one, other = (
        Sampler(model, TOKENIZER, share_prefixes=share).generate(PROMPTS, n=3, max_new_tokens=9)
        for share in (True, False)
    )
    assert [[c.token_ids for c in row] for row in one] == [
        [c.token_ids for c in row] for row in other
    ]


def test_what_is_shared():
    def prompts(*prefixes, n=10, own=20):
        return [(*b, *[1000 * i + k for k in range(own)]) for b in prefixes
                for i in range(1, n + 1)]  # fmt: skip

    a, b = tuple(range(100)), tuple(range(50)) + tuple(range(500, 550))
    assert shared_prefixes([]) == [] and shared_prefixes([a]) == []
    ((shared, group),) = shared_prefixes(prompts(a))
    assert shared == 100 and group == sorted(prompts(a))
    # Two long prefixes rather than the short one that both have ...
    assert sorted(k for k, _ in shared_prefixes(prompts(a, b))) == [100, 100]
    # ... unless too few prompts stand behind each.
    ((shared, group),) = shared_prefixes(prompts(a, b, n=4, own=1) + [(*a[:50], 9)])
    assert shared == 50 and len(group) == 9
    # It does not pay: too few tokens, or too small a part of them.
    assert shared_prefixes(prompts(a[:20])) == []
    assert shared_prefixes(prompts(a[:4], n=100, own=100)) == []
    # A prefix that is a prompt itself, and prompts each of which is a prefix of the next.
    assert shared_prefixes([a, *prompts(a)])[0][0] == 99
    assert sorted(k for k, _ in shared_prefixes([a, *prompts(a, b)])) == [99, 100]
    assert shared_prefixes([tuple(range(k)) for k in range(1, 3000)]) == []


def test_a_prompt_that_is_the_prefix_itself_can_stand_alone_in_a_batch(eager_sharing):
    model = make_model("llama")
    prompts = [FIRST, *(FIRST + x * 20 for x in "abc")]
    out = Sampler(model, TOKENIZER, batch_tokens=60).generate(
        prompts, temperature=0, max_new_tokens=5)
    assert [row[0].token_ids for row in out] == [reference(model, p, 5) for p in prompts]
    small = Sampler(model, TOKENIZER, batch_tokens=60).choice_logprobs(prompts, ["x", "y"])
    whole = Sampler(model, TOKENIZER).choice_logprobs(prompts, ["x", "y"])
    np.testing.assert_allclose(small, whole, atol=1e-5)


def test_many_prefixes_are_each_computed_once(eager_sharing):
    model = make_model("llama")
    seen = count_tokens(model)
    prompts = [FIRST + a * 6 + b * (1 + i) for a in "abcdefgh" for i, b in enumerate("stuvwxyz")]
    tokens = []
    for batch_tokens in (10**6, 400):
        seen.clear()
        sampler = Sampler(model, TOKENIZER, batch_tokens=batch_tokens)
        sampler.generate(prompts, temperature=0, max_new_tokens=1)
        tokens.append(sum(seen))
    assert tokens[1] < 1.3 * tokens[0]


def record_shapes(model):
    """(rows, tokens) of each pass."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    return seen


def test_samples_of_a_prompt_share_its_computation():
    model = make_model("llama")
    seen, prefills = record_shapes(model), []
    for n in (1, 4):
        seen.clear()
        Sampler(model, TOKENIZER).generate(PROMPTS, n=n, max_new_tokens=2)
        prefills.append(sum(rows * tokens for rows, tokens in seen if tokens > 1))
    assert prefills[0] == prefills[1]


def test_batches_keep_to_the_budget_and_finished_rows_leave_them():
    model = make_model("llama", sharp=0.1)  # near uniform: some rows end by themselves
    seen, prompts = record_shapes(model), ["ab " * k for k in range(1, 19)]
    whole = Sampler(model, TOKENIZER).generate(prompts, max_new_tokens=25, seed=5)
    steps = [rows for rows, tokens in seen if tokens == 1]
    still = sum(len(row[0].token_ids) == 25 for row in whole)
    assert still < 15 and steps == sorted(steps, reverse=True)
    assert steps[0] == len(prompts) and still <= steps[-1] <= still / 0.8
    seen.clear()
    longest = max(len(TOKENIZER(p)["input_ids"]) for p in prompts) + 25
    small = Sampler(model, TOKENIZER, batch_tokens=3 * longest)
    again = small.generate(prompts, max_new_tokens=25, seed=5)
    assert [row[0].token_ids for row in again] == [row[0].token_ids for row in whole]
    starts = [shape for shape in seen if shape[1] > 1]
    assert len(starts) > 3 and starts[0][0] == 3  # the longest first, and no more than fit
    assert all(rows * (tokens + 25) <= 3 * longest for rows, tokens in starts)
    assert [tokens for _, tokens in starts] == sorted((t for _, t in starts), reverse=True)


def out_of_memory_above(model, rows, error):
    def hook(module, args, kwargs):
        if len(kwargs["input_ids"]) > rows:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError, MemoryError,
    lambda text: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    lambda text: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_halved(error):
    model = make_model("llama")
    inputs = PROMPTS + list("abcdefghijk")
    whole = Sampler(model, TOKENIZER).generate(inputs, n=2, temperature=0, max_new_tokens=6)
    scores = Sampler(model, TOKENIZER).choice_logprobs(inputs, [".", "xy"])
    out_of_memory_above(model, 3, error)
    sampler = Sampler(model, TOKENIZER)
    before = sampler.engine.batch_tokens
    got = sampler.generate(inputs, n=2, temperature=0, max_new_tokens=6)
    assert [[c.token_ids for c in r] for r in got] == [[c.token_ids for c in r] for r in whole]
    assert sampler.engine.batch_tokens < before
    got = Sampler(model, TOKENIZER).choice_logprobs(inputs, [".", "xy"])
    np.testing.assert_allclose(got, scores, atol=1e-5)


def test_a_row_that_does_not_fit_alone_is_an_error():
    model = make_model("llama")
    out_of_memory_above(model, 0, torch.OutOfMemoryError)
    with pytest.raises(MemoryError, match="single row of 13 tokens: shorten"):
        Sampler(model, TOKENIZER).generate(["abc"], max_new_tokens=11)
    model = make_model("llama")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        Sampler(model, TOKENIZER).generate(["abc"])
