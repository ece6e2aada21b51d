"""Absolute harmfulness (paper 4.5): the L2 head finds the scale and the order of given scores."""

from functools import partial

import numpy as np
import pytest
import torch
from test_sft import WORDS, make_model, make_tokenizer, say

from cai_utils import harmfulness, preference
from cai_utils.evaluation import harm_scores

SCORES = {"good": 0.5, "ok": 1.5, "no": 2.5, "bad": 3.75}


def rows(n, seed, noise=0.0):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        word = str(rng.choice(list(SCORES)))
        fill = rng.choice(WORDS[:7], 3)
        score = SCORES[word] + noise * rng.normal()
        out.append({"messages": say(fill[0], f"{fill[1]} {word} {fill[2]}"), "score": score})
    return out


def test_scores_are_learned_in_their_own_units(tmp_path):
    base = make_model(tmp_path / "base", make_tokenizer())
    evaluate = partial(harm_scores.evaluate, rows=rows(200, 1))
    metrics = harmfulness.train(base, rows(600, 0, noise=0.3), tmp_path / "out", epochs=3,
                                batch_size=16, lr=3e-3, evaluate=evaluate)
    assert metrics["eval"]["error"] < 0.25 and metrics["eval"]["correlation"] > 0.95
    again = harm_scores.evaluate(preference.Scorer(tmp_path / "out"), rows(200, 1))
    assert again["error"] == pytest.approx(metrics["eval"]["error"], abs=1e-4)
    assert again["ci_low"] <= again["error"] <= again["ci_high"] and again["n"] == 200
    talks = [say("a", f"b {word} c") for word in SCORES]
    np.testing.assert_allclose(preference.Scorer(tmp_path / "out").score(talks),
                               list(SCORES.values()), atol=0.4)


def test_the_loss_is_half_the_squared_error():
    class Model:
        training = False

        def __call__(self, **inputs):
            return type("Output", (), {"logits": torch.tensor([[1.0], [3.0]])})()

    inputs = {"input_ids": None, "attention_mask": None, "target": torch.tensor([0.0, 1.0])}
    loss = harmfulness.AbsoluteTrainer.compute_loss(None, Model(), inputs)
    assert loss.item() == pytest.approx((1 + 4) / 2 / 2)


@pytest.mark.parametrize("row, reason", [
    ({"messages": say("a"), "score": 1}, "row 1: 'messages'"),
    ({"messages": say("a", "b"), "score": None}, "row 1: 'score'"),
    ({"messages": say("a", "b"), "score": float("nan")}, "row 1: 'score'"),
])
def test_a_malformed_row_is_named(row, reason):
    with pytest.raises(ValueError, match=reason):
        harmfulness.check([{"messages": say("a", "b"), "score": 1.0}, row])
