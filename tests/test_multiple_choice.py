"""Multiple-choice questions: examples, conversations, several ways to ask, and PMs as answerers.

The probabilities of the letters are tested in test_feedback.py.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cai_utils import constitution, multiple_choice
from cai_utils.data import load
from cai_utils.evaluation import escape
from cai_utils.experiment import params


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


ROOT = Path(__file__).parent.parent

# Small files of our own in the form of the two that Figure 12 of the paper is made of.
TALK = "This is what two said:\n\nHuman: {}?\n\nAssistant: {}.\n\n"
IDENTIFY = TALK + "What was it like?\n (A) It was bad.\n (B) It was good.\nThe answer is:"
KINDS = "".join(f"\n ({letter}) kind {letter}" for letter in "ABCDEFGHI")
CLASSIFY = TALK + "Which kind of bad? Options:" + KINDS + "\nThe answer is:"


def real(tmp_path, monkeypatch, names=("HarmfulVsEthical", "HarmfulnessClassification")):
    """A CAI_DATA_DIR with four questions in each file; the right letters are B and D."""
    folder = tmp_path / "data/constitutional_harmlessness_paper/evals"
    folder.mkdir(parents=True)
    files = {"HarmfulVsEthical": (IDENTIFY, " (B)"),
             "HarmfulnessClassification": (CLASSIFY, " (D)"),
             "438HHHEvaluations": (multiple_choice.question_text(
                 [{"role": "user", "content": "Hi"}], "{}", "{}", "Rule?"), " (A)")}
    for name in names:
        text, right = files[name]
        letters = multiple_choice.LETTERS[: 9 if text is CLASSIFY else 2]
        rows = [{"prompt": text.format(f"Q{i}", f"R{i}"), "corrects": [right],
                 "incorrects": [x for x in letters if x != right]} for i in range(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path / "data"))


class Likes:
    """Gives the last letter three times the probability of the others; keeps what it read."""

    def __init__(self):
        self.read = []

    def choice_logprobs(self, texts, choices, progress=None):
        self.read += texts
        weights = np.array([[1] * (len(row) - 1) + [3] for row in choices])
        return np.log(weights / weights.sum(1, keepdims=True))


def test_the_files_of_figure_12_are_asked(tmp_path, monkeypatch):
    real(tmp_path, monkeypatch)
    law = constitution.load("default")
    two = load.load_questions("paper/HarmfulVsEthical")
    nine = load.load_questions("paper/HarmfulnessClassification", 3)
    multiple_choice.check(two, both_orders=True)
    multiple_choice.check(nine)
    with pytest.raises(ValueError, match="question 0: both_orders"):
        multiple_choice.check(nine, both_orders=True)
    prefix, left = multiple_choice.shots(two, 2, law)
    assert prefix == two[0]["prompt"] + " (B)\n\n" + two[1]["prompt"] + " (B)"
    sampler = Likes()
    ways = {"few-shot": {"few_shot": prefix, "both_orders": True}}
    rows = multiple_choice.ask(sampler, left, ways)
    assert sampler.read[0] == prefix + "\n\n" + left[0]["prompt"]
    swapped = left[0]["prompt"].replace("It was bad", "x").replace("It was good", "It was bad")
    assert sampler.read[1] == prefix + "\n\n" + swapped.replace("x.", "It was good.")
    assert [r["p_correct"] for r in rows] == [pytest.approx(0.5)] * 2
    rows = multiple_choice.ask(Likes(), nine, {"plain": {}})
    assert {r["answer"] for r in rows} == {" (I)"} and not any(r["correct"] for r in rows)
    assert rows[0]["probs"] == pytest.approx(
        dict.fromkeys(multiple_choice.LETTERS[:8], 1 / 11) | {" (I)": 3 / 11})
    json.dumps(rows)  # they are stored


@pytest.mark.parametrize("name", ["HarmfulVsEthical", "HarmfulnessClassification"])
def test_examples_of_the_constitution_stand_before_comparisons_alone(
        tmp_path, monkeypatch, capsys, name):
    real(tmp_path, monkeypatch)
    law = constitution.load("default")
    law.few_shot["comparison"][2:] = []
    questions = load.load_questions(f"paper/{name}")
    prefix, left = multiple_choice.shots(questions, "constitution", law)
    right = questions[0]["corrects"][0]
    assert prefix == questions[0]["prompt"] + right + "\n\n" + questions[1]["prompt"] + right
    assert left == questions[2:]
    assert "the first 2 of them are the examples" in capsys.readouterr().out


def test_examples_have_the_form_of_the_questions():
    law = constitution.load("default")
    talk = "\n\nRead:\n\nHuman: Hi\n\n\nWhich is best? Options:\n (A) [[[{}]]]\n (B) [[[b]]]\n\n"
    questions = [{"prompt": (talk + "The answer is:").format(i)} for i in range(2)]
    prefix, left = multiple_choice.shots(questions, "constitution", law)
    shot = law.few_shot["comparison"][0]
    assert left == questions and prefix.startswith(
        f"\n\nRead:\n\nHuman: {shot['prompt'][0]['content']}\n\n\n{shot['principle']} Options:"
        f"\n (A) [[[{shot['a']}]]]\n (B) [[[{shot['b']}]]]\n\nThe answer is: ({shot['answer']})"
        "\n\nRead:")


@pytest.mark.parametrize("there, left_out", [
    (("438HHHEvaluations",), "identify"), (("438HHHEvaluations", "HarmfulVsEthical"), "classify"),
    (("HarmfulVsEthical", "HarmfulnessClassification"), None),
])
def test_notebook_01_goes_on_without_the_files_of_figure_12(
        tmp_path, monkeypatch, capsys, there, left_out):
    """Not without the questions of Figure 4, nor without a file of the user's own."""
    real(tmp_path, monkeypatch, there)
    monkeypatch.setattr("pooch.core.Pooch.fetch", lambda *_, **__: 1 / 0)  # no network
    book = json.loads((ROOT / "notebooks/01_harm_identification.ipynb").read_text("utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in book["cells"]}
    values = params.all_params(ROOT, "01_harm_identification", "smollm2")
    names = {**values, "params": params, "load_questions": load.load_questions, "run":
             SimpleNamespace(dir=tmp_path), "multiple_choice": multiple_choice,
             "load_constitution": constitution.load, "visible": escape.visible,
             "models": SimpleNamespace(parameters=lambda *_: 1)}
    if left_out is None:
        with pytest.raises(FileNotFoundError, match="438HHHEvaluations"):
            exec(cells["c04"], names)
        return
    exec(cells["c04"], names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{left_out} is left out: {values['questions'][left_out]} is ")
    assert len(lines) == 3 - len(there)
    exec(cells["c04b"], names)
    assert [len(rows) for rows in names["tasks"].values()] == [3] * len(there)
    for own in ("mine.jsonl", "paper/HarmfulVsEthicl"):
        names["questions"] = {**values["questions"], "classify": own}
        with pytest.raises(FileNotFoundError, match=own.removeprefix("paper/")):
            exec(cells["c04"], names)
