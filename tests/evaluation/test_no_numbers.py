"""What every measurement says of nothing, one unit, no difference, and what is no number."""

import random
import warnings

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import transformers

from cai_utils import feedback, multiple_choice, preference
from cai_utils.evaluation import (
    agreement,
    chains,
    elo,
    harm_scores,
    paper_samples,
    samples,
    stats,
    tables,
)
from cai_utils.lm.sampling import PromptTooLong

ASK = [{"role": "user", "content": "q"}]
NAMES = ["estimate", "ci_low", "ci_high", "n"]


class Scorer:
    """Scores that are given."""

    def __init__(self, value):
        self.value = value

    def score(self, conversations):
        return np.full(len(conversations), self.value)


def sample(model="a", id_="1", **more):
    return {"id": id_, "kind": "benign", "prompt": ASK, "response": "yes", "model": model,
            "size": "s", "step": 0, "rank_in_file": 1, **more}


def comparison(p_chosen=1.0):
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    return {"id": "1", "prompt": ASK, "chosen": answers[0], "rejected": answers[1],
            "p_chosen": p_chosen, "position_bias": 0.0, "p_first": p_chosen, "source": "ai",
            "axis": "helpful"}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("make", [
    lambda: agreement.label_table([]), lambda: agreement.calibration_table([]),
    lambda: agreement.calibration_errors([]),
    lambda: tables.summarize(agreement.pm_agreement({}, {}), ["labels", "test"], "right"),
    lambda: tables.differences(pd.DataFrame(), "model", [("a", "b")], "harm", ["size"]),
    lambda: chains.by_revision(chains.chains_long([]), ["PM:HH"]),
    lambda: chains.by_revision(chains.chains_long([]), []),
    lambda: samples.truth_table(samples.judged([], None)),
    lambda: samples.compared(samples.judged([], None), [("a", "b")]),
    lambda: samples.scored_table(samples.scored([], {"HH": Scorer(0)}), [("a", "b")]),
])
def test_nothing_makes_a_table_without_rows(make):
    table = make()
    assert not len(table) and set(NAMES) <= set(table)


@pytest.mark.parametrize("make", [
    lambda: agreement.label_table([comparison()]),
    lambda: agreement.label_table([comparison(0.5)]),
    lambda: agreement.calibration_table([{"labels": "a", "p": 1.0, "y": 1}]),
    lambda: agreement.calibration_errors([{"labels": "a", "p": 0.5, "y": 1}]),
    lambda: samples.scored_table(samples.scored([sample()], {"HH": Scorer(1e300)}), [("a", "b")]),
    lambda: tables.summarize(pd.DataFrame({"id": ["1"], "g": ["a"], "v": [0.3]}), "g", "v"),
    lambda: paper_samples.by_model(pd.DataFrame(paper_samples.measured(
        [sample()], {"HH": Scorer(0.5)})), {"evasive": "e", "PM:HH": "h"}),
    lambda: chains.by_revision(chains.chains_long([{
        "id": "1", "prompt": ASK, "responses": ["a"]}], scorers={"HH": Scorer(1.0)}),
        ["PM:HH"], ("revision",)),
])
def test_one_unit_has_an_estimate_and_no_interval_but_that_of_a_share(make):
    table = make()
    assert len(table) and np.isfinite(table["estimate"].astype(float)).all()
    assert (table["n"] == 1).all()
    assert (table["ci_low"].isna() == table["ci_high"].isna()).all()
    for row in table.to_dict("records"):
        assert "nan" not in tables.number(row)


def test_one_comparison_and_labels_that_say_nothing(capsys):
    for p, right in ((1.0, 0.5), (0.5, 0.5)):  # equal scores
        found = agreement.evaluate(Scorer(0.0), [comparison(p)])
        assert found["accuracy"] == right and found["n"] == 1 and np.isnan(found["ci_low"])
    table = pd.DataFrame([{"g": "a", "estimate": 0.5, "ci_low": np.nan, "ci_high": np.nan, "n": 1}])
    tables.report(table, "g")
    assert capsys.readouterr().out == "a: 0.50, no interval, n = 1\n"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("call, says", [
    (lambda bad: samples.scored([sample(), sample(id_="2")], {"HH": bad}), r"PM:HH: 2 of 2.*id 1"),
    (lambda bad: paper_samples.measured([sample()], {"HH": bad}), "PM:HH: 1 of 1"),
    (lambda bad: chains.chains_long([{"id": "7", "prompt": ASK, "responses": ["a"]}],
                                    scorers={"HH": bad}), r"PM:HH: 1 of 1.*id 7"),
    (lambda bad: agreement.pm_agreement({"soft": bad}, {"human": [comparison()]}),
     "scores of the PM 'soft' on human: 2 of 2"),
    (lambda bad: agreement.evaluate(bad, [comparison()]), "scores of the PM: 2 of 2"),
    (lambda bad: harm_scores.evaluate(bad, [{"messages": comparison()["prompt"]
                                             + comparison()["chosen"], "score": 1.0}]), "1 of 1"),
    (lambda bad: samples.judged([sample()], lambda _: dict.fromkeys(
        samples.MEASURES, bad.value)), "harm by the judge: 1 of 1.*id 1"),
    (lambda bad: paper_samples.measured([sample()], judge=lambda _: {"harm": float(bad.value)}),
     "judge:harm: 1 of 1"),
])
def test_a_score_that_is_no_number_is_named(call, says, value):
    with pytest.raises(ValueError, match=says):
        call(Scorer(value))


def test_an_infinite_value_is_named_and_one_that_does_not_exist_is_left_out():
    long = pd.DataFrame({"id": ["1", "2"], "g": ["a", "a"], "v": [1.0, np.inf]})
    with pytest.raises(ValueError, match=r"column 'v': 1 of 2.*id 2"):
        tables.summarize(long, "g", "v")
    assert tables.summarize(long.replace(np.inf, np.nan), "g", "v")["n"].tolist() == [1]


def test_statistics_of_no_variance():
    assert stats.bootstrap_mean([2.0, 2.0, 2.0])[:3] == (2, 2, 2)
    assert stats.paired_difference([1.0, 2.0], [1.0, 2.0])[:3] == (0, 0, 0)
    found = stats.ece([0.5] * 4, [0, 1, 0, 1])
    assert found.estimate == 0 and 0 <= found.low <= found.high <= 1
    assert len(stats.calibration([0.01, 0.99], [0, 1])) == 2  # 8 of 10 bins are empty


def games(wins):
    return [{"a": a, "b": b, "prompt_id": p, "wins_a": w} for (a, b), w in wins.items()
            for p in range(4)]


def test_who_won_or_lost_everything_has_no_finite_score():
    some = games({("b", "c"): 0.5})
    assert "finite" not in elo.fit(some, n_boot=20)
    with pytest.warns(UserWarning, match="set by the ridge"):
        table = elo.fit(some + games({("a", "b"): 1.0}), anchor="b", n_boot=20).set_index("model")
    assert np.isfinite(table[["elo", "ci_low", "ci_high"]]).all(axis=None)
    assert table["finite"].to_dict() == {"a": False, "b": True, "c": True}
    with pytest.warns(UserWarning, match="set by the ridge"):
        assert not elo.fit(games({("a", "b"): 0.0}), n_boot=20)["finite"].any()


def test_gaps_of_any_size_one_prompt_and_one_player():
    conversations = [[*ASK, {"role": "assistant", "content": text}] for text in "ab"]

    class Far:
        def score(self, given):
            return np.array([1e4 if c[-1]["content"] == "a" else -1e4 for c in given])

    compare = elo.pm_compare({"helpfulness": Far()})
    assert compare(*conversations, "helpfulness", None) == 1
    assert 0 <= compare(*conversations[::-1], "helpfulness", None) < 1e-300
    one = elo.fit([{"a": "a", "b": "b", "prompt_id": 1, "wins_a": 0.5}], n_boot=20)
    assert one["ci_low"].isna().all() and one["elo"].abs().max() == 0
    with pytest.raises(ValueError, match="1 player with samples on benign prompts: add a second"):
        elo.elo_table([sample()], compare, "helpfulness", ["benign"], [("a", "s", 0)])
    both = [sample(), sample("b")]
    table = elo.elo_table(both, lambda *_: 0.5, "helpfulness", ["benign"], [("a", "s", 0)])
    assert table["estimate"].tolist() == [0, 0] and "nan" not in str(
        samples.wide(table.assign(kind="k", measure="m")).values)


def test_pairs_that_are_all_equal_end_before_the_labels(capsys):
    same = [sample(), sample()]
    with pytest.raises(ValueError, match="no pair of responses is left.*raise temperature"):
        feedback.response_pairs(same)
    pairs = feedback.response_pairs([*same, sample(id_="2"), sample(id_="2", response="no")])
    assert len(pairs) == 1 and "1 of 2 pairs left out" in capsys.readouterr().out


def test_damaged_weights_are_named_by_the_scorer_and_the_letters(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_labels=1, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config)
    torch.nn.init.constant_(model.score.weight, np.nan)
    talk = [*ASK, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ValueError, match=r"Llama.*: 2 of 2 scores are not finite .*0, 1.*damaged"):
        preference.Scorer(model, tiny.tokenizer()).score([talk, talk])

    class Nothing:
        def choice_logprobs(self, texts, choices, progress=None):
            return np.full((len(texts), 2), np.nan)  # 0/0

    with pytest.raises(ValueError, match="no probability to any option of 1 of 1 texts"):
        multiple_choice.letter_probabilities(
            Nothing(), ["q"], [" (A)", " (B)"], cot=False, n_samples=1, seed=0, temperature=1,
            max_new_tokens=1, stop=(), progress=None)


def test_games_that_a_judge_cannot_compare_are_left_out_and_counted(capsys, monkeypatch):
    def label(sampler, pairs, constitution, seed):
        if "long" in pairs[0]["responses"]:
            raise PromptTooLong("too long")
        return [{"p_first": 0.5}]

    monkeypatch.setattr(paper_samples.feedback, "label", label)
    compare = paper_samples.feedback_compare(None, None)
    games = {m: {i: [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]]
                 for i, text in enumerate(texts)}
             for m, texts in (("a", ["x", "long"]), ("b", ["y", "z"]))}
    played = elo.tournament(
        games, lambda a, b, axis, rng: compare(a, b, axis, random.Random(0)), "harmlessness")
    assert [game["prompt_id"] for game in played] == [0]
    assert "harmlessness: 1 games are left out" in capsys.readouterr().out
