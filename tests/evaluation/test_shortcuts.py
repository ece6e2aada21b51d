"""The audit finds a planted cue, nothing in labels that mean nothing, and names malformed rows."""

import random

import numpy as np
import pytest

from cai_utils.evaluation import cues, shortcuts

WORDS = "a stone by the river my clouds papers green seventy under maybe often light tables".split()


def text(rng, n=None):
    return " ".join(rng.choices(WORDS, k=n or rng.randint(4, 9))) + "."


def comparison(a, b, conversation="Why?", **more):
    return {"prompt": [{"role": "user", "content": conversation}],
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}], **more}


def planted(n, rate=0.9, seed=0, cue="kindly"):
    """Comparisons in which the preferred answer alone has a word, in `rate` of them; else the
    other has."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        a, b = text(rng), text(rng)
        with_it = [f"{words.rstrip('.')} {cue}." for words in (a, b)]
        a, b = (with_it[0], b) if rng.random() < rate else (a, with_it[1])
        rows.append(comparison(a, b, f"Question {i}?"))
    return rows


def question(a, b, right=0, n=0):
    letters = [" (A)", " (B)"]
    return {"prompt": f"\n\nHuman: Read this.\n\nH: Number {n}?\n\nWhich?\n (A) {a}\n (B) {b}\n\n"
                      "Assistant: The answer is:",
            "corrects": [letters[right]], "incorrects": [letters[1 - right]], "id": n}


def single(answer, label, rng, n):
    options = rng.sample(("harmful", "harmless"), 2)
    row = question(*options, right=options.index(label), n=n)
    return {**row, "prompt": row["prompt"].replace("\n\nWhich?", f"\n\nA: {answer}\n\nWhich?")}


@pytest.mark.parametrize("trained", [False, True])
def test_a_planted_cue_is_found(trained):
    rows = planted(150)
    table = shortcuts.audit(rows, planted(150, seed=1) if trained else None)
    assert list(table) == shortcuts.COLUMNS
    best, classifier = table.iloc[0], table.iloc[1]
    assert (best["rule"], classifier["rule"]) == (shortcuts.BEST, shortcuts.CLASSIFIER)
    assert best["direction"] == "word 'kindly': with it" and best["n"] == 150
    truth = np.mean(["kindly" in row["chosen"][0]["content"] for row in rows])
    assert best["estimate"] == pytest.approx(truth)
    assert 0.8 < best["ci_low"] < truth < best["ci_high"] < 0.97
    assert classifier["estimate"] > 0.8 and classifier["ci_low"] > 0.7
    assert set(table["chosen_on"]) == {"training split" if trained else "other rows of the set"}
    kept = shortcuts.top(table, 2)
    assert len(kept) == 6 and {"characters", "words"} < {*kept["rule"]}
    credit = [row["correct"] for row in shortcuts.best(rows, planted(150, seed=1))]
    assert np.mean(credit) == pytest.approx(truth)


def test_directions_come_from_the_training_split():
    table = shortcuts.audit(planted(100, rate=0.1), planted(100, rate=0.9, seed=1))
    assert table["direction"][0] == "word 'kindly': with it" and table["ci_high"][0] < 0.3
    assert table["estimate"][1] < 0.3  # the classifier


def test_labels_that_mean_nothing_tell_nothing():
    """As right as chance over many sets, and as often outside an interval as intervals allow; the
    rule that is best on the very rows that it is scored on is far above chance."""
    found, inside, classifier, greedy = [], [], [], []
    for seed in range(25):
        rows = planted(60, rate=0.5, seed=seed)
        table = shortcuts.audit(rows, classifier=seed < 8)
        found.append(table["estimate"][0])
        inside.append(table["ci_low"][0] <= 0.5 <= table["ci_high"][0])
        if seed < 8:
            greedy += [row["correct"] for row in shortcuts.best(rows, rows)]
            classifier.append(table["ci_low"][1] <= 0.5 <= table["ci_high"][1])
    assert abs(np.mean(found) - 0.5) < 4 * 0.5 / np.sqrt(60 * 25)
    assert sum(inside) >= 21 and sum(classifier) >= 7
    assert np.mean(greedy) > 0.6


def test_no_two_parts_choose_for_each_other_and_a_conversation_is_in_one():
    rows = [comparison(*pair, f"Question {i % 30}?")
            for i, pair in enumerate([("a b", "c"), ("d", "e f")] * 45)]
    folds = shortcuts._Audit(rows, None, 0).folds
    chosen_on = [set(fit) for fit, _ in folds]
    parts = [set(score) for _, score in folds]
    assert sorted(i for part in parts for i in part) == list(range(90))
    for k, part in enumerate(parts):
        assert not part & chosen_on[k]
        assert all((i + 30) % 90 in part for i in part)
        for j, other in enumerate(parts):
            assert not (other & chosen_on[k] and part & chosen_on[j])
    assert (shortcuts.audit(rows, classifier=False)["n"] == 30).all()


def test_position_and_length_of_the_options_of_questions():
    rng = random.Random(0)
    rows = [question(text(rng), text(rng), 0, i) for i in range(40)]
    found = shortcuts.audit(rows)
    assert found["direction"][0] == "position: the first" and found["estimate"][0] == 1
    assert found["ci_low"][0] > 0.8  # Wilson's: no resample differs
    rows = [question(text(rng, 3 + 5 * (i % 2)), text(rng, 8 - 5 * (i % 2)), i % 2, i)
            for i in range(40)]
    rules = shortcuts.audit(rows, classifier=False).set_index("rule")
    assert rules["estimate"]["words"] == 1 and rules["direction"]["words"] == "less"
    assert "position" not in rules.index or rules["estimate"]["position"] < 0.8


def test_texts_are_sorted_where_all_questions_have_the_same_options():
    rng = random.Random(0)
    rows = []
    for i in range(80):
        label = rng.choice(("harmful", "harmless"))
        steps = 3 if label == "harmful" else 1
        rows.append(single(" ".join(text(rng, 4) for _ in range(steps)), label, rng, i))
    table = shortcuts.audit(rows).set_index("rule")
    assert table["direction"]["sentences"] == "below 3: harmless, from 3: harmful"
    assert table["estimate"]["sentences"] == table["estimate"][shortcuts.BEST] == 1
    assert table["estimate"][shortcuts.CLASSIFIER] > 0.8
    assert 0.3 < table["estimate"]["position"] < 0.7


def test_no_rule_of_position_where_it_is_not_known():
    rng = random.Random(0)
    rows = [comparison(*rng.sample(("yes", "no"), 2), f"{text(rng)} {i}?") for i in range(60)]
    table = shortcuts.audit(rows, classifier=False)
    assert "position" not in {*table["rule"]} and table["estimate"][0] < 0.75
    for row in rows:  # nothing differs
        row["prompt"][0]["content"] = "Why?"
    (best, rule) = shortcuts.audit(rows[:20], rows[20:], classifier=False).itertuples()
    assert best.estimate == rule.estimate < 1 and rule.direction.startswith("always ")


@pytest.mark.parametrize("rows, says", [
    ([comparison("a", "b"), {"prompt": [], "chosen": "a"}], "row 1: 'rejected' is None; give"),
    ([comparison("a", "b"), {**comparison("a", "b"), "chosen": []}], "row 1: 'chosen' is []; give"),
    ([["a", "b"]], "row 0: ['a', 'b'] is not a row with fields; give"),
    ([{"corrects": [" (A)"], "incorrects": [" (B)"]}], "row 0: missing field 'prompt'; give"),
    ([{**question("a", "b"), "incorrects": [" (C)"]}],
     "row 0: 'prompt' has lines for the options (A), (B), 'corrects' and 'incorrects' have others"),
], ids=range(5))
def test_rows_without_texts_are_named(rows, says):
    with pytest.raises(ValueError) as error:
        shortcuts.audit(rows)
    assert str(error.value).startswith("rows, row ") and says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [
    [], [comparison("a", "b")], planted(3), [comparison("same", "same", f"{i}?") for i in range(9)],
    [comparison("", "…", f"{i}?") for i in range(9)],
    [comparison("", "", f"{i}?") for i in range(9)],
    [comparison("Да, конечно. 好的!", "Нет ❤️", f"Почему {i}?") for i in range(9)],
    [{"prompt": "Why?", "chosen": "yes", "rejected": "no"}] * 4,
    [question("yes", "no", i % 2, i) for i in range(2)],
], ids=["none", "one", "three", "same", "empty", "nothing", "not ascii", "texts", "two questions"])
def test_small_and_odd_sets(rows, capsys):
    table = shortcuts.audit(rows)
    assert list(table) == shortcuts.COLUMNS
    assert table.empty == (len({str(r["prompt"]) for r in rows}) < 3)
    assert table["estimate"].between(0, 1).all()
    assert len(shortcuts.best(rows)) == (0 if table.empty else len(rows))
    shortcuts.show(shortcuts.top(table))
    assert ("no rule is scored" in capsys.readouterr().out) == table.empty
    assert len(shortcuts.audit(rows, planted(9))) > 0 or not rows


def test_answers_of_equal_cues_share_the_credit_and_undecided_labels_are_left_out():
    rows = [comparison("same", "same", f"{i}?") for i in range(6)]
    assert set(shortcuts.audit(rows, classifier=False)["estimate"]) == {0.5}
    rows[0]["p_chosen"] = 0.5
    rows[1]["p_chosen"] = 0.2  # the other one is preferred
    assert len(shortcuts.best(rows)) == 5
    item = cues.read(rows, "rows")[0]
    assert item.right == [False, True]
    first = cues.read([comparison("a", "b", p_first=0.3)], "rows")[0]
    assert first.places == [1, 0]  # the preferred response stood second


def test_a_question_without_options_in_its_prompt_is_read_from_its_texts():
    row = {"prompt": "Which? The answer is:", "corrects": [" (B)"], "incorrects": [" (A)"],
           "text_correct": "\n\nHuman: Hi\n\nAssistant: One.",
           "text_incorrect": "\n\nHuman: Hi\n\nAssistant: Two."}
    item = cues.read([row], "rows")[0]
    assert item.answers == ["One.", "Two."] and item.places == [1, 0]
    assert item.conversation == "Human: Hi"
    assert cues.measures("Use it. Take this one!\nNo?", "one")["sentences"] == 3


def test_answered_questions_of_a_corpus_are_read_from_their_texts():
    asked = question("Use it.", "No.", 1)
    plain = f"{asked['prompt']} (B)"
    chain = asked["prompt"].replace("The answer is:", "Step by step:") + (
        " (A) Use it: bad. (B) No.\n\nThe answer is: (B)")
    found = cues.answered([plain + chain, "\n\nHuman: Hi\n\nAssistant: (B)", asked["prompt"], chain,
                           f"{asked['prompt']} (D)"])
    assert [row["id"] for row in found] == [0, 1, 2]
    for row in found:
        assert {**asked, "id": row["id"]} == row
