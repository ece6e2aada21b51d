"""Preference models: the soft loss, what is trained on, calibration, scoring, mixing, bad rows."""

import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sft import CHATML, WORDS, make_model, make_tokenizer, pieces, say

from cai_utils import dialogue, preference
from cai_utils.data import comparisons
from cai_utils.evaluation import agreement
from cai_utils.lm import models

numbers = st.floats(-8, 8)


def comparison(prompt, chosen, rejected, p=1.0, **more):
    answer = [[{"role": "assistant", "content": c}] for c in (chosen, rejected)]
    return {"prompt": say(prompt), "chosen": answer[0], "rejected": answer[1], "p_chosen": p,
            "source": "ai", "axis": "harmless", "principle": None, **more}


@given(numbers, numbers, st.floats(0.01, 0.99))
def test_loss_is_cross_entropy_and_smallest_at_the_target(a, b, p):
    loss = preference.soft_preference_loss(torch.tensor([a]), torch.tensor([b]), torch.tensor([p]))
    q = 1 / (1 + math.exp(b - a))
    assert loss.item() == pytest.approx(-p * math.log(q) - (1 - p) * math.log(1 - q), abs=1e-4)
    logit = math.log(p / (1 - p))
    d = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    at_target = preference.soft_preference_loss(d, torch.zeros(1), p)
    at_target.sum().backward()
    assert abs(d.grad.item()) < 1e-9
    assert at_target.item() <= loss.item() + 1e-5
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert at_target.item() == pytest.approx(entropy, abs=1e-9)


def test_hard_labels_are_the_special_case_and_extreme_scores_stay_finite():
    d = torch.tensor([-1000.0, -1.0, 0.0, 2.0, 1000.0])
    hard = preference.soft_preference_loss(d, torch.zeros(5), 1.0)
    assert torch.allclose(hard, -torch.nn.functional.logsigmoid(d))
    assert torch.isfinite(preference.soft_preference_loss(d, -d, torch.full((5,), 0.7))).all()


@pytest.mark.parametrize("template", [None, CHATML])
def test_pairs_are_tokenized_as_in_sampling_and_end_in_eos(template):
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    row = comparison("a b", "good c", "bad", 0.8)
    data = preference.tokenize(comparisons.check([row]), tokenizer)
    # the chat template writes no bos, and a tokenizer's own is for plain text
    prompt = tokenizer(dialogue.render(row["prompt"], tokenizer),
                       add_special_tokens=not template)["input_ids"]
    for side, words in (("chosen_ids", ["good", "c"]), ("rejected_ids", ["bad"])):
        ids = data[side][0]
        assert ids[: len(prompt)] == prompt
        assert ids.count(tokenizer.bos_token_id) == (not template)
        tail = [t.strip() for t in pieces(tokenizer, ids[len(prompt):])]
        assert [t for t in tail if t] == [*words, "<eos>"]
    assert data["p_chosen"] == [0.8]


def test_a_long_prompt_is_cut_alike_on_both_sides(capsys):
    tokenizer = make_tokenizer()
    rows = [comparison("a " * 30 + "b", "good c d", "bad"), comparison("a", "good " * 40, "bad")]
    data = preference.tokenize(comparisons.check(rows), tokenizer, max_length=16)
    assert len(data["chosen_ids"]) == 1 and "1 of 2" in capsys.readouterr().out
    chosen, rejected = data["chosen_ids"][0], data["rejected_ids"][0]
    assert len(chosen) == 16 and len(rejected) == 14 and chosen[:12] == rejected[:12]
    assert chosen[0] == tokenizer.bos_token_id and chosen[-1] == tokenizer.eos_token_id


QUALITY = {"good": 1.2, "ok": 0.3, "no": -0.4, "bad": -1.1}


def labelled(n, seed, soft):
    """Pairs whose label probability is known: sigmoid of the difference of two words' qualities."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        a, b = rng.choice(list(QUALITY), 2, replace=False)
        p = 1 / (1 + math.exp(QUALITY[b] - QUALITY[a]))
        if not soft:
            p = float(rng.random() < p)
        if p < 0.5:
            a, b, p = b, a, 1 - p
        fill = rng.choice(WORDS[:7], 3)
        rows.append(comparison(fill[0], f"{a} {fill[1]}", f"{b} {fill[2]}", p))
    return rows


@pytest.fixture(scope="module")
def pm(tmp_path_factory):
    """A PM trained on soft labels of known probability: (folder, metrics, tokenizer)."""
    folder = tmp_path_factory.mktemp("pm")
    tokenizer = make_tokenizer()
    base = make_model(folder / "base", tokenizer)
    evaluate = partial(agreement.evaluate, rows=labelled(200, 1, soft=True))
    metrics = preference.train(base, labelled(600, 0, soft=True), folder / "out", epochs=3,
                               batch_size=16, lr=3e-3, evaluate=evaluate)
    return folder / "out", metrics, tokenizer


def test_soft_labels_of_known_probability_are_recovered(pm):
    folder, metrics, _ = pm
    held_out = labelled(300, 2, soft=True)
    scorer = preference.Scorer(folder)
    chosen = scorer.score([r["prompt"] + r["chosen"] for r in held_out])
    rejected = scorer.score([r["prompt"] + r["rejected"] for r in held_out])
    predicted = 1 / (1 + np.exp(rejected - chosen))
    truth = np.array([r["p_chosen"] for r in held_out])
    assert np.abs(predicted - truth).mean() < 0.05
    result = agreement.evaluate(scorer, held_out)
    table = result["calibration"]
    assert (np.abs(table["frequency"] - table["mean_p"])[table["n"] >= 20] < 0.05).all()
    assert result["floor"] <= result["loss"] < result["floor"] + 0.02
    assert result["ci_low"] <= result["accuracy"] <= result["ci_high"]
    assert metrics["eval"]["accuracy"] > 0.9 and metrics["log"][-1]["accuracy"] > 0.9


def test_hard_labels_drawn_at_known_probability_are_recovered(tmp_path):
    base = make_model(tmp_path / "base", make_tokenizer())
    preference.train(base, labelled(1500, 0, soft=False), tmp_path / "out", epochs=1,
                     batch_size=16, lr=3e-3)
    table = agreement.evaluate(
        preference.Scorer(tmp_path / "out"), labelled(600, 1, soft=True))["calibration"]
    error = (np.abs(table["frequency"] - table["mean_p"]) * table["n"]).sum() / table["n"].sum()
    assert error < 0.05


def test_scores_are_centred_and_the_saved_folder_gives_the_same(pm):
    folder, metrics, tokenizer = pm
    rows = labelled(600, 0, soft=True)
    both = [r["prompt"] + r[side] for r in rows for side in ("chosen", "rejected")]
    scores = preference.Scorer(folder).score(both)
    assert abs(scores.mean()) < 1e-5
    assert scores.std() == pytest.approx(metrics["score_std"], rel=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["score_mean"] == pytest.approx(metrics["score_mean"])
    model, again = models.load(folder, head="score")
    live = preference.Scorer(model, again).score(both)
    assert np.allclose(live, scores, atol=1e-6)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (folder / "training.json").exists() and not folder.with_name("out.partial").exists()


def test_long_scoring_shows_progress(pm, monkeypatch):
    shown = []
    bar = nullcontext(SimpleNamespace(update=shown.append))
    monkeypatch.setattr(preference.journal, "progress",
                        lambda total, unit: shown.append(total) or bar)
    row = labelled(600, 0, soft=True)[0]
    preference.Scorer(pm[0], batch_tokens=1).score([row["prompt"] + row["chosen"]] * 5)
    assert shown == [5, 1, 1, 1, 1, 1]


def test_order_and_batching_do_not_matter(pm):
    folder, _, _ = pm
    rng = np.random.default_rng(0)
    talks = [say("a", " ".join(rng.choice(WORDS, rng.integers(1, 30)))) for _ in range(60)]
    talks += [say("a", "b", "c", "good"), say("a", "")]  # several turns; a policy that says nothing
    scores = preference.Scorer(folder).score(talks)
    order = rng.permutation(len(talks))
    assert np.allclose(preference.Scorer(folder).score([talks[i] for i in order]), scores[order],
                       atol=1e-5)
    alone = preference.Scorer(folder, batch_tokens=1)
    assert np.allclose(alone.score(talks), scores, atol=1e-5)
    texts = [dialogue.transcript(t) for t in talks[:-1]]
    assert np.allclose(alone.score(texts), scores[:-1], atol=1e-5)
    assert len(set(np.round(scores, 6))) > 50


def test_the_score_is_read_at_eos_also_where_eos_is_the_pad_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    base = make_model(tmp_path / "base", tokenizer)
    preference.train(base, labelled(32, 0, soft=True), tmp_path / "out", centre=False)
    model, again = models.load(tmp_path / "out", head="score")
    assert again.pad_token_id != again.eos_token_id
    talk = say("a", "good b")
    ids = again(dialogue.render(talk, again, add_generation_prompt=False))["input_ids"]
    ids = torch.tensor([ids + [again.eos_token_id]])
    with torch.no_grad():
        at_eos = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    got = preference.Scorer(tmp_path / "out").score([talk, say("a", "good b c d e f g")])[0]
    assert got == pytest.approx(at_eos, abs=1e-5)


def test_weight_decides_between_contradictory_rows(tmp_path):
    base = make_model(tmp_path / "base", make_tokenizer())
    rows = [comparison("a", "good", "bad", weight=4.0)] * 40
    rows += [comparison("a", "bad", "good", weight=1.0)] * 40
    preference.train(base, rows, tmp_path / "out", batch_size=16, epochs=8, lr=3e-3)
    good, bad = preference.Scorer(tmp_path / "out").score([say("a", "good"), say("a", "bad")])
    assert 1 / (1 + math.exp(bad - good)) == pytest.approx(0.8, abs=0.05)


def test_training_goes_on_from_a_pm_and_keeps_its_head(pm, tmp_path):
    folder, _, _ = pm
    preference.train(folder, labelled(16, 3, soft=True), tmp_path / "out", lr=0.0, centre=False)
    talks = [say("a", w) for w in QUALITY]
    before = preference.Scorer(folder)
    assert np.allclose(preference.Scorer(tmp_path / "out").score(talks), before.score(talks),
                       atol=1e-5)


def test_a_batch_read_in_parts_is_the_same_training(tmp_path):
    base = make_model(tmp_path / "base", make_tokenizer())
    rows = labelled(32, 0, soft=True)
    got = [preference.train(base, rows, tmp_path / f"out{parts}", batch_size=8, lr=3e-3, epochs=2,
                            gradient_accumulation=parts) for parts in (1, 4)]
    assert got[0]["steps"] == got[1]["steps"] == 8
    assert got[0]["train_loss"] == pytest.approx(got[1]["train_loss"], rel=1e-4)
    talks = [say("a", word) for word in QUALITY]
    whole, parts = (preference.Scorer(tmp_path / f"out{n}").score(talks) for n in (1, 4))
    assert np.ptp(whole) > 0.02
    np.testing.assert_allclose(parts, whole, atol=1e-3 * np.ptp(whole))


def test_a_language_model_is_no_scorer(tmp_path):
    base = make_model(tmp_path / "base", make_tokenizer())
    with pytest.raises(ValueError, match="not a preference model"):
        preference.Scorer(base)


def test_lora_pm_trains_its_head_and_is_saved_merged(tmp_path):
    base = make_model(tmp_path / "base", make_tokenizer())
    rows = [comparison("a", "good", "bad"), comparison("b", "good c", "bad c")] * 24
    preference.train(base, rows, tmp_path / "out", batch_size=8, epochs=4, lr=1e-2,
                     lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert not list((tmp_path / "out").glob("adapter*"))
    assert agreement.evaluate(preference.Scorer(tmp_path / "out"), rows)["accuracy"] == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.55, 0.95), st.floats(0.2, 0.8))
def test_mix_gives_each_source_its_share_of_the_signal(n_human, n_ai, p, share):
    human = [comparison("a", "good", f"bad {i}", source="human") for i in range(n_human)]
    ai = [comparison("a", "good", f"bad {i}", p) for i in range(n_ai)]
    rows = comparisons.mix(human, ai, 0, ai_share=share)
    assert len(rows) == n_human + n_ai
    table = comparisons.balance_table(rows).set_index("source")
    assert table.loc["ai", "signal"] == pytest.approx(share)
    assert np.mean([r["weight"] for r in rows]) == pytest.approx(1)
    by_rows = comparisons.mix(human, ai, 0, ai_share=share, balance="rows")
    total = sum(r["weight"] for r in by_rows if r["source"] == "ai")
    assert total / len(by_rows) == pytest.approx(share)


def test_mix_draws_n_rows_without_replacement_and_reproducibly():
    human = [comparison(f"a {i}", "good", "bad", source="human") for i in range(50)]
    ai = [comparison(f"b {i}", "good", "bad", 0.7) for i in range(50)]
    rows = comparisons.mix(human, ai, 1, n=40, ai_share=0.25)
    assert sum(r["source"] == "ai" for r in rows) == 10 and len(rows) == 40
    assert len({r["prompt"][0]["content"] for r in rows}) == 40
    assert rows == comparisons.mix(human, ai, 1, n=40, ai_share=0.25)
    assert rows != comparisons.mix(human, ai, 2, n=40, ai_share=0.25)
    assert "weight" not in human[0]
    first = [r["source"] for r in rows[:12]]
    assert "human" in first and "ai" in first
    with pytest.raises(ValueError, match="ai_rows: 54 rows asked for, 50 given"):
        comparisons.mix(human, ai, 1, n=60, ai_share=0.9)
    with pytest.raises(ValueError, match="human_rows: 0 rows"):
        comparisons.mix([], ai, 1)


BAD = [
    (comparison("a", "", "bad"), "empty answer"),
    (comparison("a", "good", " \n"), "empty answer"),
    (comparison("a", "good", "good "), "identical"),
    ({**comparison("a", "good", "bad"), "prompt": []}, "no common prompt"),
    ({**comparison("a", "good", "bad"), "prompt": say("a", "b")}, "no common prompt"),
    ({"chosen": say("a", "b"), "rejected": say("c", "d")}, "no common prompt"),
    ({**comparison("a", "good", "bad"), "chosen": say("b", "good")}, "not one assistant turn"),
    ({"prompt": say("a"), "chosen": "good", "rejected": "bad"}, "lists of messages"),
    ({**comparison("a", "good", "bad"), "prompt": 2 * say("a")}, "user, assistant, ..., user"),
    ({**comparison("a", "good", "bad"), "prompt": "a"}, "'prompt' must be a list of messages"),
    ({**comparison("a", "good", "bad"), "prompt": say(" ")}, "an empty prompt"),
    ({**comparison("a", "good", "bad"), "prompt": say(3)}, "'prompt' must be a list of messages"),
    ({**comparison("a", "good", "bad"), "chosen": None}, "lists of messages"),
    ({**comparison("a", "good", "bad"), "chosen": [None]}, "lists of messages"),
    ({**comparison("a", "good", "bad"), "chosen": say("a", 7)[1:]}, "lists of messages"),
    (comparison("a", "good", None), "empty answer"),
    ("a row", "not a row"),
    (comparison("a", "good", "bad", "0.7"), "p_chosen"),
    (comparison("a", "good", "bad", weight="1"), "weight"),
    (comparison("a", "good", "bad", 1.5), "p_chosen"),
    (comparison("a", "good", "bad", float("nan")), "p_chosen"),
    (comparison("a", "good", "bad", weight=-1.0), "weight"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_a_malformed_row_is_named_or_skipped_with_a_count(row, reason, capsys):
    fine = comparison("a", "good", "bad")
    with pytest.raises(ValueError, match=f"row 1: .*{reason}"):
        comparisons.check([fine, row])
    assert len(comparisons.check([fine, row, fine], on_bad="skip")) == 2
    assert "1 of 3 rows left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no comparison left"):
        comparisons.check([row], on_bad="skip")


def test_an_implicit_prompt_is_found():
    row = {"chosen": say("a", "b", "c", "good"), "rejected": say("a", "b", "c", "bad")}
    (got,) = comparisons.check([row])
    assert got["prompt"] == say("a", "b", "c") and got["p_chosen"] == 1
    assert got["chosen"] == say("a", "good")[1:]


def test_an_evaluation_after_training_leaves_out_what_says_nothing(capsys):
    class ByLength:
        def score(self, talks):
            return np.array([float(len(t[-1]["content"])) for t in talks])

    rows = [comparison(f"a {i}", "good good", "bad") for i in range(3)]
    bad = [comparison("b", "same", "same "), comparison("c", "", "bad")]
    got, wanted = (agreement.evaluate(ByLength(), some) for some in (rows + bad, rows))
    assert got["n"] == wanted["n"] == 3 and got["loss"] == wanted["loss"]
    assert "2 of 5 rows left out (the two answers are identical: 1, an empty answer: 1)" in (
        capsys.readouterr().out)
    with pytest.raises(ValueError, match="no comparison left"):
        agreement.evaluate(ByLength(), bad)


def test_a_system_message_is_trained_on_as_the_template_shows_it():
    system = {"role": "system", "content": "c d"}
    row = {**comparison("a b", "good", "bad"), "prompt": [system, *say("a b")]}
    data = preference.tokenize(comparisons.check([row]), tokenizer := make_tokenizer(CHATML))
    shown = tokenizer("<start>system c d<eos>\n<start>user a b<eos>\n<start>assistant",
                      add_special_tokens=False)["input_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        ids = [i for i in data[side][0] if i != tokenizer.bos_token_id]
        assert ids[: len(shown)] == shown
    with pytest.raises(ValueError, match="no system role"):  # this one gives it to the assistant
        preference.tokenize(comparisons.check([row]), make_tokenizer())


def test_the_truth_says_nothing_of_other_axes():
    def judge(talk):
        return {"harm": len(talk[-1]["content"]), "helpfulness": 0}

    rows = [comparison("a", "good", "bad"), comparison("a", "good", "bad", axis="honest")]
    (row,) = agreement.by_truth(rows, judge)
    assert row["chosen"] == rows[0]["rejected"] and row["source"] == "truth"


def test_ties_and_even_labels_count_one_half():
    class Flat:
        def score(self, talks):
            return np.zeros(len(talks))

    class ByLength:
        def score(self, talks):
            return np.array([float(len(t[-1]["content"])) for t in talks])

    rows = [comparison(f"a {i}", "good good", "bad") for i in range(6)]
    assert agreement.evaluate(Flat(), rows)["accuracy"] == 0.5
    assert agreement.evaluate(ByLength(), rows)["accuracy"] == 1
    result = agreement.evaluate(ByLength(), rows + [comparison("b", "yes", "no", 0.5)] * 2
                                 + [comparison("c", "good good", "bad", 0.2)] * 2)
    assert result["accuracy"] == pytest.approx((6 + 1 + 0) / 10)
    assert result["scores"].set_index("axis").loc["harmless", "n"] == 20
    # 1/(1+e^-d) against the labels, folded: eight confident predictions, six of them right
    sure = result["calibration"].iloc[-1]
    assert sure["n"] == 8 and sure["frequency"] == pytest.approx((6 + 0.2 * 2) / 8)
