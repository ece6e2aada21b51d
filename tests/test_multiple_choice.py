"""Multiple-choice questions: examples, conversations, several ways to ask, and PMs as answerers.

The probabilities of the letters are tested in test_feedback.py.
"""

import math

import pandas as pd
import pytest

from cai_utils import multiple_choice


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


def test_shots_are_answered_and_set_aside():
    questions = [{"prompt": f"Q{i} The answer is:", "corrects": [" (B)"]} for i in range(3)]
    text, rest = multiple_choice.shots(questions, 2)
    assert text == "Q0 The answer is: (B)\n\nQ1 The answer is: (B)"  # each a paragraph
    assert rest == questions[2:]
    apart = [{**q, "prompt": "\n\n" + q["prompt"]} for q in questions]
    assert multiple_choice.shots(apart, 2)[0] == "\n\n" + text


def test_ask_runs_every_method_and_respects_its_limit(monkeypatch):
    asked = []

    def answer(sampler, questions, **options):
        asked.append(options)
        return [{"correct": q["id"] == "0", "p_correct": 0.5, "answer": " (B)",
                 "probs": {" (A)": 0.4, " (B)": 0.6}, "cot": []} for q in questions]

    monkeypatch.setattr(multiple_choice, "answer", answer)
    questions = [{"id": str(i)} for i in range(3)]
    methods = {"plain": {}, "CoT": {"cot": True, "limit": 2}}
    rows = multiple_choice.ask("sampler", questions, methods, seed=5)
    assert [(r["method"], r["id"], r["correct"]) for r in rows] == [
        ("plain", "0", 1), ("plain", "1", 0), ("plain", "2", 0), ("CoT", "0", 1), ("CoT", "1", 0)]
    assert all(r["answer"] == " (B)" and r["probs"][" (A)"] == 0.4 for r in rows)
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
