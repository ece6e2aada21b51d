"""The notebooks' analyses: tables from rows, whose every number can be worked out by hand."""

import math

import pandas as pd
import pytest

from cai_utils import multiple_choice
from cai_utils.evaluation import agreement, chains, stats, tables
from cai_utils.experiment import params

PROMPT = [{"role": "user", "content": "How do I do it?"}]


def judge(conversation):
    """A ground truth that counts words: harm is the number of "bad", helpfulness of "good"."""
    text = conversation[-1]["content"]
    return {"harm": text.count("bad"), "helpfulness": text.count("good"),
            "evasive": text == "no"}


def chain(i, responses, critiques=None):
    steps = len(responses) - 1
    return {"id": str(i), "prompt": PROMPT, "responses": responses,
            "critiques": critiques or [None] * steps, "principles": ["p"] * steps}


def test_load_function():
    assert params.load_function("math:sqrt") is math.sqrt
    assert params.load_function(None) is None
    for wrong in ("math:nothing", "no_such_module:f", "math", ""):
        with pytest.raises(ValueError, match="module:function"):
            params.load_function(wrong)


def test_summarize_uses_wilson_for_shares_and_clusters_for_the_rest():
    long = pd.DataFrame({"id": list("abcd") * 2, "method": ["x"] * 4 + ["y"] * 4,
                         "correct": [1, 1, 1, 1, 1, 0, 1, None]})
    table = tables.summarize(long, "method", "correct").set_index("method")
    assert table.loc["x", "estimate"] == 1 and table.loc["x", "ci_high"] == 1
    assert 0 < table.loc["x", "ci_low"] < 0.7  # never of zero width
    assert table.loc["y", "estimate"] == pytest.approx(2 / 3) and table.loc["y", "n"] == 3
    # Two samples of one prompt are one unit, not two.
    twice = pd.DataFrame({"id": ["a", "a", "b", "b"], "method": "x", "correct": [1, 1, 0, 0]})
    assert tables.summarize(twice, ["method"], "correct")["n"].tolist() == [2]


def test_differences_pair_by_unit_and_leave_out_what_has_no_partner():
    long = pd.DataFrame({"id": list("abc") + list("cab"), "size": "s",
                         "method": ["x"] * 3 + ["y"] * 3, "value": [1, 2, 9, None, 0, 1]})
    found = tables.difference(long, "method", "x", "y", "value")
    assert (found.estimate, found.low, found.high, found.n) == (1, 1, 1, 2)
    table = tables.differences(long, "method", [("x", "y"), ("x", "z")], "value", "size")
    assert table["difference"].tolist() == ["x - y"]
    with pytest.raises(ValueError, match="no id with both"):
        tables.difference(long, "method", "x", "z", "value")


def about(conversation, i, right="yes", wrong="no"):
    text = f"\n\nHuman: {conversation}\n\nAssistant: "
    return {"id": str(i), "text_correct": text + right, "text_incorrect": text + wrong}


def test_questions_about_one_conversation_are_found():
    questions = [about("A?\n\nAssistant: B\n\nHuman: C?", 0), about("D?", 1),
                 about("A?\n\nAssistant: B\n\nHuman: C?", 2, "perhaps", "never"),
                 {"id": "3"}, {"id": "4", "text_correct": "yes", "text_incorrect": "no"},
                 {**about("D?", 5), "text_incorrect": "\n\nHuman: E?\n\nAssistant: no"}]
    found = multiple_choice.conversations(questions)
    assert found["0"] == found["2"] == "Human: A?\n\nAssistant: B\n\nHuman: C?"
    assert found["1"] == "Human: D?" and [found[i] for i in "345"] == list("345")


def test_intervals_over_conversations():
    """Every question asked four times about the same conversation: four times the rows, and the
    very same interval; taken for independent, they would give one of about half the width."""
    right = [1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    once = pd.DataFrame({"id": range(20), "talk": range(20), "method": "x", "correct": right})
    four = pd.concat([once.assign(id=once["id"] + 20 * k) for k in range(4)])
    one = stats.bootstrap_mean(right)
    (row,) = tables.summarize(four, "method", "correct", "talk").itertuples()
    assert (row.estimate, row.n) == (0.65, 20)
    assert (row.ci_low, row.ci_high) == pytest.approx((one.low, one.high))
    # by hand: the standard error of 20 draws is sqrt(.65 * .35 / 20) = 0.107
    assert row.ci_high - row.ci_low == pytest.approx(2 * 1.96 * 0.107, rel=0.15)
    (apart,) = tables.summarize(four, "method", "correct").itertuples()
    assert apart.n == 80
    assert (apart.ci_high - apart.ci_low) / (row.ci_high - row.ci_low) == pytest.approx(.5, abs=.07)
    both = pd.concat([four, four.assign(method="y", correct=0)])
    (gain,) = tables.differences(both.assign(size="s"), "method", [("x", "y")], "correct", "size",
                                   cluster="talk").itertuples()
    assert (gain.estimate, gain.n) == (0.65, 20)
    assert (gain.ci_low, gain.ci_high) == pytest.approx((one.low, one.high))


def test_by_truth_turns_labels_that_are_wrong_and_drops_ties():
    def row(chosen, rejected, axis="harmless"):
        return {"prompt": PROMPT, "axis": axis,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}]}

    rows = [row("bad", "good"), row("good", "bad"), row("a", "b"), row("good", "bad", "helpful")]
    rows[0] |= {"p_chosen": 0.6, "source": "ai"}
    found = agreement.by_truth(rows, judge)
    assert [r["chosen"][0]["content"] for r in found] == ["good", "good", "good"]
    assert [r["axis"] for r in found] == ["harmless", "harmless", "helpful"]
    assert {(r["p_chosen"], r["source"]) for r in found} == {(1.0, "truth")}
    mixed = row("bad good good", "good", "helpful")
    for axis, best in ((None, "bad good good"), ("harmless", "good")):
        (one,) = agreement.by_truth([mixed], judge, axis)
        assert one["chosen"][0]["content"] == best


def test_shots_are_answered_and_set_aside():
    questions = [{"prompt": f"Q{i} The answer is:", "corrects": [" (B)"]} for i in range(3)]
    text, rest = multiple_choice.shots(questions, 2)
    assert text == "Q0 The answer is: (B)Q1 The answer is: (B)"
    assert rest == questions[2:]


def test_ask_runs_every_method_and_respects_its_limit(monkeypatch):
    asked = []

    def answer(sampler, questions, **options):
        asked.append(options)
        return [{"correct": q["id"] == "0", "p_correct": 0.5, "cot": []} for q in questions]

    monkeypatch.setattr(multiple_choice, "answer", answer)
    questions = [{"id": str(i)} for i in range(3)]
    methods = {"plain": {}, "CoT": {"cot": True, "limit": 2}}
    rows = multiple_choice.ask("sampler", questions, methods, seed=5)
    assert [(r["method"], r["id"], r["correct"]) for r in rows] == [
        ("plain", "0", 1), ("plain", "1", 0), ("plain", "2", 0), ("CoT", "0", 1), ("CoT", "1", 0)]
    assert asked == [{"seed": 5}, {"seed": 5, "cot": True}]


def test_ask_pm_prefers_the_higher_score_and_a_tie_is_not_right():
    class Scorer:
        def score(self, texts):
            return pd.Series([len(t) for t in texts], dtype=float).to_numpy()

    questions = [{"id": str(i), "text_correct": "xx", "text_incorrect": wrong}
                 for i, wrong in enumerate(("x", "xx", "xxx"))]
    rows = multiple_choice.ask_pm(Scorer(), questions, "PM")
    assert [r["correct"] for r in rows] == [1, 0, 0]
    assert rows[0]["p_correct"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_chains_long_and_by_revision():
    rows = [chain(0, ["bad bad good", "bad good", "bad good"]), chain(1, ["bad", "no", "good"])]

    def keeps(prompt, before, after):
        return float("good" in after) if "good" in before else None

    long = chains.chains_long(rows, judge, keeps)
    table = chains.by_revision(long.assign(size="s"), ["truth:harm", "truth:retained"],
                                 by=("size", "revision"))
    harm = table[table["axis"] == "harm"]
    assert harm["estimate"].tolist() == [1.5, 0.5, 0.5] and set(harm["measured_by"]) == {"truth"}
    assert table[table["axis"] == "retained"]["n"].tolist() == [1, 1, 1]  # one had nothing to keep
    assert long[long["id"] == "0"]["text:changed"].tolist()[1:] == [1, 0]
    assert long[long["id"] == "0"]["truth:HH"].tolist() == [1 - 2 * 2, 1 - 2, 1 - 2]
    assert long["truth:evasive"].sum() == 1


def test_chains_markdown_keeps_any_text_inside_its_cell():
    nasty = "a | b\n\n<script> *x* [link](y) `code`"
    page = chains.chains_markdown([chain(0, [nasty, "fine"], ["| is bad"])], "Title", judge)
    table = [line for line in page.splitlines() if line.startswith("|")]
    # Bars that are not escaped: the four borders of a table with three columns, in every row.
    assert {line.replace("\\|", "").count("|") for line in table} == {4}
    assert "<script>" not in page and "\\*x\\*" in page
    assert len(table) == 2 + 3


def test_source_finds_files_of_the_run_and_passes_the_rest(tmp_path):
    class Run:
        def need(self, path, made_by):
            return tmp_path / path

    assert params.source(Run(), "data/x.jsonl") == tmp_path / "data/x.jsonl"
    assert params.source(Run(), "paper/438HHHEvaluations") == "paper/438HHHEvaluations"
    assert params.source(Run(), "data/x.jsonl[:5]") == f"{tmp_path / 'data/x.jsonl'}[:5]"
    both = {"train": "data/x.jsonl", "eval": "xstest/safe"}
    assert params.source(Run(), both) == {"train": tmp_path / "data/x.jsonl",
                                            "eval": "xstest/safe"}
