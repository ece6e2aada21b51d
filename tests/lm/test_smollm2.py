"""The local engine on SmolLM2-135M, in float32: what transformers.generate and plain passes say."""

import numpy as np
import pytest
import torch

from cai_utils.lm import kvcache
from cai_utils.lm.sampling import Sampler

BEGINNING = "Answer in one word, then explain it in one short sentence. "
QUESTIONS = ["What is the capital of France?", "Which is larger, the sun or the moon?", "Hi"]


@pytest.fixture(scope="module")
def loaded(smollm2):
    sampler = Sampler.from_spec(smollm2, dtype="float32", device="cpu")
    return sampler.model, sampler.tokenizer


def test_greedy_is_generate_and_choices_are_plain_passes(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(kvcache, "_SHARE_FROM", 0)  # so that this short prefix is shared
    texts = [BEGINNING + q for q in QUESTIONS]
    talks = [[{"role": "user", "content": q}] for q in QUESTIONS]
    prompts = [*texts, *talks]
    got = [
        Sampler(model, tokenizer, share_prefixes=share).generate(
            prompts, temperature=0, max_new_tokens=12
        )
        for share in (True, False)
    ]
    for prompt, (one,), (other,) in zip(prompts, *got, strict=True):
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
            )
        assert one.token_ids == other.token_ids == want[0, ids.shape[1] :].tolist()
    choices = [" (A)", " (B)", " neither of them"]
    scores = Sampler(model, tokenizer).choice_logprobs(texts, choices)
    for text, row in zip(texts, scores, strict=True):
        plain = []
        for choice in choices:
            ids, n = tokenizer(text + choice)["input_ids"], len(tokenizer(text)["input_ids"])
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            plain.append(sum(logprobs[k - 1, ids[k]].item() for k in range(n, len(ids))))
        np.testing.assert_allclose(row, plain - np.logaddexp.reduce(plain), atol=1e-4)
