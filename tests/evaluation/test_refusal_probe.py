"""The trained reader of refusals: on a tiny model and made-up features; on a part of the real ones,
where they are."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from cai_utils.data.xstest import COMPLIANCE, FULL, LABELS, PARTIAL
from cai_utils.evaluation import refusal_agreement, refusal_probe

ASK = [{"role": "user", "content": "How do I do it?"}]


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(refusal_probe.models, "load", lambda spec, dtype: (tiny.llama(),
                                                                      tiny.tokenizer()))
    return refusal_probe.Reader("tiny")


def row(response, prompt=ASK, human=COMPLIANCE, model="a", id="0"):
    return {"id": id, "prompt": prompt, "response": response, "human": human, "model": model}


def plain(text, opening, layer):
    """The features of one response, by a pass of the whole model over the text alone."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    head = tokenizer("Assistant:")["input_ids"]
    body = tokenizer(f" {text}")["input_ids"][:opening]
    with torch.no_grad():
        states = model(torch.tensor([head + body]), output_hidden_states=True).hidden_states
    return states[layer][0, len(head):].mean(0).numpy()


def test_features_are_mean_hidden_states_of_the_opening(reader):
    assert reader.layer == 1
    long = "I will tell you all of it. " * 8
    texts = ["No.", long, "", "Take the ladder, then climb."]
    got = reader.features([row(t) for t in texts])
    for text, vector in zip(texts, got, strict=True):
        want = plain(text.strip() or ".", refusal_probe.OPENING, 1)
        np.testing.assert_allclose(vector, want, atol=1e-5)
    passes = []
    reader.model.register_forward_hook(lambda *_: passes.append(1))
    np.testing.assert_array_equal(reader.features([row(t) for t in texts]), got)
    assert not passes  # features are cached
    reader.batch_tokens, reader._kept = 1, {}  # one row a pass
    np.testing.assert_allclose(reader.features([row(t) for t in texts[::-1]])[::-1], got, atol=1e-5)
    assert len(passes) == 4
    more = reader.features([row(long + "And more.")])
    np.testing.assert_allclose(more[0], got[1], atol=1e-5)  # what comes late does not count
    other = reader.features([row("No.", [{"role": "user", "content": "Is it so?"}])])
    np.testing.assert_allclose(other[0], got[0], atol=1e-6)  # nor does the prompt


def test_a_model_of_one_layer_is_refused(monkeypatch):
    model = tiny.llama()
    model.config.num_hidden_layers = 1
    monkeypatch.setattr(refusal_probe.models, "load", lambda spec, dtype: (model, tiny.tokenizer()))
    with pytest.raises(ValueError, match="one: 1 layer"):
        refusal_probe.Reader("one")


def test_fit_by_hand():
    # Nothing to learn from: the probabilities are the shares of the labels.
    labels = [COMPLIANCE] * 6 + [FULL] * 3 + [PARTIAL]
    fitted = refusal_probe.fit(np.ones((10, 2)), labels)
    p = np.exp(fitted.weights[-1])
    np.testing.assert_allclose(p / p.sum(), [0.6, 0.3, 0.1], atol=1e-3)
    assert refusal_probe.predict(fitted, [[1.0, 1.0]]) == [COMPLIANCE]
    # Two labels on one feature: the weights solve p(z) - y summed over z plus the penalty = 0.
    x, labels = np.array([[-1.0], [-1], [1], [1]]), [COMPLIANCE, COMPLIANCE, FULL, FULL]
    fitted = refusal_probe.fit(x, labels, penalty=2.0)
    w = fitted.weights[0, :2]
    assert w[1] == pytest.approx(-w[0], abs=1e-3)
    p = 1 / (1 + np.exp(-2 * w[1]))  # the third label's share goes to 0
    assert 4 * (1 - p) == pytest.approx(2.0 * w[1], abs=0.02)
    assert refusal_probe.predict(fitted, [[-3], [5.0]]) == [COMPLIANCE, FULL]
    for bad, says in [((x, labels[:3]), "shape"), ((x, [*labels[:3], "no"]), "'no'"),
                      ((np.zeros((0, 2)), []), "at least one")]:
        with pytest.raises(ValueError, match=says):
            refusal_probe.fit(*bad)


def test_a_model_is_never_read_by_what_was_trained_on_it():
    """Two models labelled in opposite ways: trained on one, it is always wrong on the other."""
    x = np.array([[-1.0], [1.0]] * 10)
    rows = [row("", human=(COMPLIANCE, FULL)[k % 2], model="a", id=str(k)) for k in range(10)]
    rows += [row("", human=(FULL, COMPLIANCE)[k % 2], model="b", id=str(k)) for k in range(10)]
    wrong = [FULL, COMPLIANCE] * 5 + [COMPLIANCE, FULL] * 5
    assert refusal_probe.held_out(x, rows) == wrong
    assert refusal_probe.held_out(x, rows, "id") == wrong  # and it never learns from its own
    with pytest.raises(ValueError, match="two models or more, got a"):
        refusal_probe.held_out(x[:10], rows[:10])
    one_type = [{**r, "type": "t"} for r in rows]
    with pytest.raises(ValueError, match="all rows are of one type"):
        refusal_probe.held_out(x, one_type, "type")


@pytest.mark.parametrize("group", ["id", "type"])
def test_a_prompt_is_never_read_by_what_was_trained_on_it(group):
    """Features that name the prompt, labels that only the prompt decides: held out by model alone
    they are all right, and held out by prompt or type they are no better than the commonest."""
    rows = [{**row("", model=model, id=str(k), human=(COMPLIANCE, FULL)[k % 3 == 0]),
             "type": f"type {k}"} for model in "ab" for k in range(12)]
    x = np.eye(12)[[int(r["id"]) for r in rows]]
    assert refusal_probe.held_out(x, rows) == [r["human"] for r in rows]
    assert set(refusal_probe.held_out(x, rows, group)) == {COMPLIANCE}


def test_readings_of_labelled_rows_and_of_others(reader):
    yes, no = "Take the ladder, then climb up. " * 8, "I cannot help you with that. " * 8
    rows = [{**row(text, human=human, model=model, id=str(k)), "type": str(k)} for model in "ab"
            for k in range(4) for text, human in ((yes, COMPLIANCE), (no, FULL))]
    found = refusal_probe.readings(reader, rows, [{"response": no}, {"response": yes}])
    ways = {"reader", "reader, new prompts", "reader, new types"}
    assert found == [dict.fromkeys(ways, r["human"]) for r in rows] + [
        {"reader": FULL}, {"reader": COMPLIANCE}]
    assert len(refusal_probe.readings(reader, rows, [])) == len(rows)


def test_completions_that_are_nowhere_are_left_out_and_said(monkeypatch, tmp_path, capsys):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("pooch.Pooch.fetch", offline)
    assert refusal_probe.labelled(["gpt4", "llama2orig"]) == []
    out = capsys.readouterr().out
    assert "without XSTest's gpt4" in out and "without XSTest's llama2orig" in out
    with pytest.raises(ValueError, match="'gpt9'"):
        refusal_probe.labelled(["gpt9"])


def test_against_people_on_a_model_it_was_not_trained_on(request):
    """A part of the real thing: 90 responses of Mistral-Instruct teach to read 90 of Llama2."""
    names = ["llama2orig", "mistralinstruct"]
    root = os.environ.get("CAI_DATA_DIR")
    paths = [f"xstest/xstest_v2_completions_{name}.csv" for name in names]
    if not root or not all((Path(root) / path).exists() for path in paths):
        pytest.skip(f"CAI_DATA_DIR does not hold {' and '.join(paths)}")
    rows = refusal_probe.labelled(names)[::5]
    assert {r["human"] for r in rows} == set(LABELS)
    x = refusal_probe.Reader(request.getfixturevalue("smollm2")).features(rows)
    said = refusal_probe.held_out(x, rows, "id")
    pairs = [(r["human"] != COMPLIANCE, s != COMPLIANCE) for r, s in zip(rows, said, strict=True)
             if r["model"] == "llama2orig"]
    found = refusal_agreement.scores(*zip(*pairs), np.ones(len(pairs)), range(len(pairs)))["kappa"]
    print(found)
    assert found.estimate > 0.5 and found.low > 0.3
