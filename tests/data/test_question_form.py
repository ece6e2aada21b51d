"""The form of a comparison question: read from texts of our own in the published shapes."""

import pytest

from cai_utils import multiple_choice
from cai_utils.data import question_form

TALK = [{"role": "user", "content": "Hi {}"}, {"role": "assistant", "content": " Yes? "},
        {"role": "user", "content": "A\n\nB"}]
PLAIN = ("\n\nLook at this:\n\nHuman: Hi {}\n\nAssistant:  Yes? \n\nHuman: A\n\nB"
         "\n\n\nWhich is kinder? Options:\n (A) [[[one [1]]]]\n (B) [[[two\n\nparts]]]"
         "\n\nSo it is:")
REASONED = ("\n\nHuman: Look at this (H, A):\n\nH: Hi {}\n\nA:  Yes? \n\nH: A\n\nB\n\n{}"
            "\n (A) [[[one [1]]]]\n (B) [[[two\n\nparts]]]\n\nAssistant: Let us see:\n(A) is kind."
            "\n\nHuman:\nThus: (A)")


@pytest.mark.parametrize("text, reasoned", [(PLAIN, False), (REASONED, True)])
def test_a_question_is_taken_apart_and_put_together_again(text, reasoned):
    form, parts = question_form.parse(text, reasoned)
    reasoning, letter = parts.pop("reasoning", None), parts.pop("letter", None)
    assert parts["prompt"] == TALK
    assert (parts["a"], parts["b"]) == ("one [1]", "two\n\nparts")
    rest = f"{reasoning}{form.answer_turn}{form.answer} ({letter})" if reasoned else ""
    assert form.text(**parts) + rest == text
    assert parts["principle"] == ("{}" if reasoned else "\nWhich is kinder? Options:")
    assert form.verbatim == reasoned


def test_the_project_s_own_form_is_one_of_them():
    text = multiple_choice.question_text(TALK, "x", "y", "Rule?")
    form, parts = question_form.parse(text)
    assert form == multiple_choice.OWN["comparison"]
    assert parts == {"prompt": TALK, "a": "x", "b": "y", "principle": "Rule?"}


def test_most_texts_decide_and_other_questions_are_none():
    other = PLAIN.replace("Look at this:", "See here:").replace("[1]", "[2]")
    form, principle = question_form.common([other, PLAIN, PLAIN.replace("[1]", "[3]")])
    assert form.lead == "Look at this:" and principle == "\nWhich is kinder? Options:"
    judged = PLAIN.replace("Human: A\n\nB", "Human: A\n\nAssistant: B")  # it judges an answer
    nine = PLAIN.replace("]]]\n\nSo it is:", "]]]\n (C) [[[three]]]\n\nSo it is:")
    assert question_form.parse(judged) is None and question_form.parse("Which?") is None
    assert question_form.common([PLAIN, judged]) is None and question_form.common([]) is None
    assert question_form.common([PLAIN, PLAIN]) is None  # two labels, not two responses
    assert question_form.common([nine, nine.replace("three", "four")]) is None
