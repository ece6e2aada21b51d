"""Row formats: what validation keeps, fills in and refuses; the loaders' tests have the rest."""

import json

import pytest

from cai_utils.data import formats

ASK = [{"content": "Hi", "role": "user"}]  # keys in the order that some data sets have


def test_a_row_keeps_its_fields_and_their_order():
    row = {"extra": {"a": [1]}, "split": "", "prompt": ASK, "axis": "helpful", "p_chosen": "0.75",
           "rejected": "no ", "chosen": [{"role": "assistant", "content": " yes"}]}
    given = json.dumps(row)
    got = formats.validate(formats.Comparison, row, "x")
    assert json.dumps(row) == given  # the argument is left as it is
    assert list(got) == [*row, "source", "principle"]
    assert json.dumps(got["prompt"]) == json.dumps(ASK) and got["extra"] == {"a": [1]}
    assert (got["p_chosen"], got["source"], got["principle"], got["split"]) == (
        0.75, "human", None, None)
    assert got["rejected"] == [{"role": "assistant", "content": "no"}]
    assert got["chosen"] == row["chosen"]
    short = {"prompt": "Hi", "rejected": "no", "chosen": "yes"}
    got = formats.validate(formats.Comparison, short, "x", axis="harmless")
    assert list(got) == [*short, "p_chosen", "source", "axis", "principle", "split"]
    assert got["axis"] == "harmless"


@pytest.mark.parametrize("kind, row, fault", [
    (formats.Prompt, {"id": 1}, "f, row 2: missing field 'prompt'"),
    (formats.Question, {"prompt": " ", "corrects": ["a"], "incorrects": ["b"]},
     "f, row 2: missing field 'prompt' (a text)"),
    (formats.Question, {"prompt": "q", "corrects": [], "incorrects": ["b"]},
     "f, row 2: missing field 'corrects' (a list like [\" (A)\"])"),
    (formats.Question, {"prompt": "q", "corrects": ["a", 3], "incorrects": ["b"]},
     "f, row 2: corrects[1] has to be a text, not 3"),
    (formats.RevisionChain, {"id": "a", "prompt": ASK, "responses": ["a", None], "critiques": [],
                             "principles": []},
     "f, row 2: responses[1] has to be a text, not None"),
    (formats.Score, {"messages": ASK, "score": 1.0},
     "f, row 2: 'messages' must be a prompt and an assistant turn"),
    (formats.Score, {"messages": [*ASK, None], "score": 1.0},
     "f, row 2: messages: message 1 is None: it needs 'content' and a 'role' of system, user, "
     "assistant"),
    (formats.Score, {"messages": [*ASK, {"role": "assistant", "content": None}], "score": 1.0},
     "f, row 2: messages: the content of message 1 is None, not a text"),
    (formats.Score, {"messages": [*ASK, {"role": "assistant", "content": "x"}], "score": True},
     "f, row 2: 'score' must be a finite number, got True"),
])
def test_a_fault_is_one_line(kind, row, fault):
    with pytest.raises(ValueError) as error:
        formats.validate(kind, row, "f, row 2")
    assert str(error.value) == fault
