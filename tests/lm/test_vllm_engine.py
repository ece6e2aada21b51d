"""vLLM behind the two functions of a `Sampler`: against the `Sampler`, with a stand-in for the
package, and where it is installed with vLLM itself."""

import importlib.util
import os
import random
import shutil

import fake_vllm
import numpy as np
import pytest
import torch

from cai_utils.experiment import fingerprint, journal
from cai_utils.lm import backends, models
from cai_utils.lm.sampling import PromptTooLong, Sampler

XS = models.SHIPPED / "xs"
PROMPTS = [[{"role": "user", "content": text}] for text in (
    "How do I pick a lock?", "What is the capital of France?", "Tell me about the cat.")]
REAL = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
LIMITS = ";kv_cache_memory_bytes=300000000;enforce_eager=true"


@pytest.fixture(scope="module")
def ours():
    return Sampler(*models.load(XS, dtype="float32"))


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=REAL)])
def engine(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            fake_vllm.install(patch)
        sampler = backends.from_spec(f"vllm:{XS};dtype=float32{LIMITS}")
        yield sampler
        sampler.close()


@pytest.mark.parametrize("stop", [(), (".",), ("e", "</s>"), "<eos>"])
def test_greedy_completions_are_those_of_the_sampler(ours, engine, stop):
    if isinstance(stop, str):  # a special token
        stop = (ours.tokenizer.eos_token,)
    how = dict(temperature=0, max_new_tokens=24, stop=stop, progress=False)
    for (a,), (b,) in zip(ours.generate(PROMPTS, **how), engine.generate(PROMPTS, **how),
                          strict=True):
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)


def test_a_row_is_the_same_in_another_batch(engine):
    whole = engine.generate(PROMPTS, n=3, seed=5, max_new_tokens=8)
    part = engine.generate(PROMPTS[1:], n=2, seed=5, max_new_tokens=8, rows=[1, 2])
    assert [[c.token_ids for c in row[:2]] for row in whole[1:]] == [
        [c.token_ids for c in row] for row in part]
    assert len({tuple(c.token_ids) for row in whole for c in row}) > 3
    other = engine.generate(PROMPTS, n=3, seed=6, max_new_tokens=8)
    assert [c.token_ids for c in other[0]] != [c.token_ids for c in whole[0]]


def test_logprobs_are_those_after_temperature(ours, engine):
    (c,), = engine.generate(PROMPTS[:1], temperature=0.7, seed=1, max_new_tokens=8)
    prompt = ours._text_ids(ours._texts(PROMPTS[:1]))[0]
    with torch.no_grad():
        logits = ours.model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits / 0.7, -1).gather(1, torch.tensor(c.token_ids)[:, None])
    assert c.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    (c,), = engine.generate(PROMPTS[:1], top_p=0.5, seed=1, max_new_tokens=8)
    assert c.logprobs == [] and c.token_ids


@pytest.mark.parametrize("choices", [
    [" (A)", " (B)"], [" help me now", " harm", " (C) nothing"],
    [[" (A)", " (B)", " (C)"], [" help me", " help you"]]])
def test_choices_are_scored_as_by_the_sampler(ours, engine, choices):
    texts = ["Which one?\n(A) help\n(B) harm\n\nThe answer is:", "Hello there:"]
    expected = ours.choice_logprobs(texts, choices)
    assert engine.choice_logprobs(texts, choices) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="text 0: the tokens of choice ' h"):
        engine.choice_logprobs(texts, [" h", " h e"])


def test_long_prompts(ours, engine):
    text = "How do I pick a lock? " * 300
    assert engine.context == ours.context and not engine.fits([text], 1)[0]
    with pytest.raises(PromptTooLong, match="input 1: .* tokens fill the model's context of 1024"):
        engine.generate(["How", text])
    ids = ours._text_ids([text])[0][: ours.context - 3]
    (c,), = engine.generate([ours.tokenizer.decode(ids)], temperature=0, stop="nothing like it")
    assert len(c.token_ids) <= 3


def test_finished_samples_are_kept(engine, tmp_path, monkeypatch):
    how = dict(n=2, seed=3, max_new_tokens=6)
    expected = engine.generate(PROMPTS, **how)
    inner, done = engine._finished, []

    def breaks(asked):
        for k, found in enumerate(inner(asked)):
            if k == 4:
                raise KeyboardInterrupt
            yield found

    def counted(asked):
        done.append(len(asked))
        return inner(asked)

    monkeypatch.setattr(engine, "_finished", breaks)
    with pytest.raises(KeyboardInterrupt), journal.recording(tmp_path / "j", "here"):
        engine.generate(PROMPTS, **how)
    monkeypatch.setattr(engine, "_finished", counted)
    with journal.recording(tmp_path / "j", "here"):
        again = engine.generate(PROMPTS, **how)
    assert done == [2]
    assert [[c.token_ids for c in row] for row in again] == [
        [c.token_ids for c in row] for row in expected]


def test_new_weights_and_two_engines(engine, ours, tmp_path):
    model, tokenizer = models.load(XS, dtype="float32")
    with torch.no_grad():
        for weight in model.parameters():  # the output head, which is the embeddings, among them
            weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    how = dict(temperature=0, max_new_tokens=8)
    other = backends.from_spec(f"vllm:{tmp_path};dtype=float32{LIMITS}")
    engine.reload(tmp_path)
    (a,), = Sampler(model, tokenizer).generate(PROMPTS[:1], **how)
    (b,), (c,) = engine.generate(PROMPTS[:1], **how)[0], other.generate(PROMPTS[:1], **how)[0]
    assert a.token_ids == b.token_ids == c.token_ids
    assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
    other.close()
    engine.reload(XS)
    (b,), = engine.generate(PROMPTS[:1], **how)
    assert b.token_ids == ours.generate(PROMPTS[:1], **how)[0][0].token_ids


def test_a_gguf_file_is_unpacked_and_random_states_stay(tmp_path, monkeypatch):
    fake_vllm.install(monkeypatch)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    loaded, opened = models.load(XS, dtype="float32"), []
    monkeypatch.setattr(models, "load", lambda spec, **how: opened.append(spec) or loaded)

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    sampler = backends.from_spec(f"vllm:{tmp_path / 'x.gguf'}")
    assert states() == before and opened == [tmp_path / "x.gguf"]
    (c,), = sampler.generate(PROMPTS[:1], temperature=0, max_new_tokens=8)
    assert c.token_ids == Sampler(*loaded).generate(PROMPTS[:1], temperature=0, max_new_tokens=8
                                                    )[0][0].token_ids
    assert not os.path.exists(fake_vllm.CALLS[0]["model"])


def test_what_vllm_is_asked_for(monkeypatch):
    with pytest.raises(ValueError, match=r"vllm:.*xs: the package vllm is not installed: pip"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            backends.from_spec(f"vllm:{XS}")
    fake_vllm.install(monkeypatch)
    sampler = backends.from_spec("vllm:miniature/xs;tensor_parallel_size=2;dtype=bfloat16;"
                                 "gpu_memory_utilization=0.5")
    asked = fake_vllm.CALLS[0]
    assert (asked["model"], asked["dtype"]) == (str(XS), "bfloat16")
    assert asked["tensor_parallel_size"] == 2 and asked["gpu_memory_utilization"] == 0.5
    assert asked["logprobs_mode"] == "processed_logprobs" and asked["enable_prefix_caching"]
    assert asked["generation_config"] == "vllm" and asked["trust_remote_code"] is False
    del sampler
    assert fake_vllm.CALLS[-1] == "shutdown"

    def fails(**_):
        raise RuntimeError("1 error\n of vLLM")

    monkeypatch.setattr(fake_vllm.sys.modules["vllm"], "LLM", fails)
    with pytest.raises(ValueError, match="xs: vLLM does not start with it: 1 error of vLLM"):
        backends.from_spec(f"vllm:{XS}")


@pytest.mark.parametrize("spec, message", [
    ("vllm:x;tensor_paralel_size=2", "unknown option 'tensor_paralel_size'; nearest: tensor_par"),
    ("vllm:x;max_num_seqs=many", "max_num_seqs='many' is not a whole number above 0"),
    ("vllm:x;gpu_memory_utilization=-1", "gpu_memory_utilization='-1' is not a number above 0"),
    ("vllm:x;enforce_eager=2", "enforce_eager='2' is not true or false"),
    ("vllm:", "give vllm:MODEL"), ("vllm:server:http://h/v1#m", "give vllm:MODEL"),
])
def test_faulty_specs(spec, message):
    with pytest.raises(ValueError, match=f"^{spec.split(';')[0]}.*{message}"):
        models.resolve(spec)


def test_a_spec_stands_for_its_model(tmp_path):
    folder = shutil.copytree(XS, tmp_path / "model")
    plain = models.resolve(f"vllm:{folder}")
    fast = models.resolve(f"vllm:{folder};gpu_memory_utilization=0.3")
    assert models.resolve(str(fast)) == fast and str(fast).endswith(";gpu_memory_utilization=0.3")
    digest = fingerprint.digest(plain)
    assert fingerprint.digest(fast) == digest
    assert fingerprint.digest(models.resolve(f"vllm:{folder};dtype=float32")) != digest
    assert models.parameters(str(plain)) == models.parameters(XS)
    assert models.load(plain)[0].num_parameters() == models.load(XS)[0].num_parameters()
    stamp = models.fingerprint(plain)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert fingerprint.digest(models.resolve(f"vllm:{folder}")) != digest
    assert models.fingerprint(plain) != stamp
