"""The forms of comparisons and prompts, each against the rows that it has to become."""

import json

import pytest

from cai_utils.data import comparisons, conversations, formats, load
from cai_utils.experiment import files


def say(role, content):
    return {"role": role, "content": content}


ASK, YES, NO = say("user", "Is it so?"), say("assistant", "Yes."), say("assistant", "No.")
SYSTEM, FIRST, REPLY = say("system", "Be brief."), say("user", "Hi"), say("assistant", "Hello")
TALK = [FIRST, REPLY, ASK]
TEXT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it so?"
ONE = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize("row, wanted", [
    (ONE, ONE),
    ({"prompt": "Is it so?", "chosen": "Yes.", "rejected": " No. "}, ONE),
    ({"prompt": "Is it so?", "chosen": YES, "rejected": [NO]}, ONE),
    ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, ONE),
    ({"prompt": None, "chosen": [ASK, YES], "rejected": [ASK, NO]}, ONE),
    # UltraFeedback: the prompt's text beside conversations that hold it
    ({"prompt": "Is it so?\n", "chosen": [ASK, YES], "rejected": [ASK, NO]}, ONE),
    ({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, ONE),
    ({"prompt": "Hi", "chosen": [*TALK, YES], "rejected": [*TALK, NO]}, {**ONE, "prompt": TALK}),
    ({"prompt": "Is it so?", "chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]},
     {**ONE, "prompt": [SYSTEM, ASK]}),
    ({"chosen": [say("system", " "), ASK, YES], "rejected": [say("system", ""), ASK, NO]}, ONE),
    ({"prompt": [SYSTEM, ASK], "chosen": "Yes.", "rejected": "No."},
     {**ONE, "prompt": [SYSTEM, ASK]}),
    ({"chosen": f"{TEXT}\n\nAssistant: Yes.", "rejected": f"{TEXT}\n\nAssistant: No."},
     {**ONE, "prompt": TALK}),
    ({"prompt": f"{TEXT}\n\nAssistant:", "chosen": f"{TEXT}\n\nAssistant: Yes.".strip(),
      "rejected": f"{TEXT}\n\nAssistant: No."}, {**ONE, "prompt": TALK}),
    ({"prompt": TEXT.replace("\n", "\r\n"), "chosen": "Yes.", "rejected": "No."},
     {**ONE, "prompt": TALK}),
    # a text that looks like a transcript is an answer where the other side is not one
    ({"prompt": "Is it so?", "chosen": "Human: a\n\nAssistant: b", "rejected": "No."},
     {**ONE, "chosen": [say("assistant", "Human: a\n\nAssistant: b")]}),
    # lists in CSV cells, as json.dumps and as pandas writes them; parts of text
    ({"chosen": json.dumps([ASK, YES]), "rejected": str([ASK, NO])}, ONE),
    ({"prompt": [say("user", [{"type": "text", "text": "Is it so?"}])], "chosen": "Yes.",
      "rejected": "No."}, ONE),
    ({"prompt": "[1, 2] is a list?", "chosen": "Yes.", "rejected": "No."},
     {**ONE, "prompt": [say("user", "[1, 2] is a list?")]}),
    ({"prompt": f"{json.dumps([ASK])} What is it?", "chosen": "Yes.", "rejected": "No."},
     {**ONE, "prompt": [say("user", f"{json.dumps([ASK])} What is it?")]}),
    # both answers look like transcripts, with single line ends and beside a prompt
    ({"prompt": "Q", "chosen": "Human: a\nAssistant: b", "rejected": "Human: c\nAssistant: d"},
     {"prompt": [say("user", "Q")], "chosen": [say("assistant", "Human: a\nAssistant: b")],
      "rejected": [say("assistant", "Human: c\nAssistant: d")]}),
    ({"prompt": "Is it so?", "chosen": "\r\n\r\nHuman: Is it so?\r\n\r\nAssistant: Yes.",
      "rejected": "\r\n\r\nHuman: Is it so?\r\n\r\nAssistant: No."}, ONE),
    # a system turn of the prompt alone, or a column of its own
    ({"prompt": [SYSTEM, ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
     {**ONE, "prompt": [SYSTEM, ASK]}),
    ({"prompt": [SYSTEM, ASK], "chosen": [*TALK, YES], "rejected": [*TALK, NO]},
     {**ONE, "prompt": [SYSTEM, *TALK]}),
    ({"system": "Be brief.", "prompt": "Is it so?", "chosen": "Yes.", "rejected": "No."},
     {**ONE, "prompt": [SYSTEM, ASK]}),
    ({"system": "Be brief.", "chosen": [ASK, YES], "rejected": [ASK, NO]},
     {**ONE, "prompt": [SYSTEM, ASK]}),
    ({"system": "Be brief.", **ONE, "prompt": [SYSTEM, ASK]}, {**ONE, "prompt": [SYSTEM, ASK]}),
    ({"system": " ", "prompt": "Is it so?", "chosen": "Yes.", "rejected": "No."}, ONE),
    ({"system": None, "prompt": "Is it so?", "chosen": "Yes.", "rejected": "No."}, ONE),
], ids=str)
def test_every_form_becomes_the_same_row(row, wanted):
    given = json.dumps(row)
    got = formats.validate(formats.Comparison, {"score_chosen": 8.0, **row}, "f, row 1", axis="x")
    assert {side: got[side] for side in wanted} == wanted and json.dumps(row) == given
    assert got["score_chosen"] == 8.0 and got["p_chosen"] == 1.0
    (trained,) = comparisons.check([got])
    assert {side: trained[side] for side in wanted} == wanted


@pytest.mark.parametrize("row, fault", [
    ({"prompt": "q", "rejected": "No."}, "missing field 'chosen'"),
    ({"prompt": "q", "chosen": "Yes."}, "missing field 'rejected'"),
    ({"chosen": "Yes.", "rejected": "No."}, "missing field 'prompt'"),
    ({**ONE, "prompt": " \n\t"}, "'prompt' is empty"),
    ({**ONE, "prompt": [say("user", "  ")]}, "'prompt' is empty"),
    ({**ONE, "prompt": f"{TEXT}\n\nAssistant: So.\n\nHuman: "}, "'prompt' is empty"),
    ({**ONE, "chosen": None}, "'chosen' has to be one assistant message or its text, not None"),
    ({**ONE, "chosen": 3}, "'chosen' has to be .*, not 3"),
    ({**ONE, "rejected": []}, "'rejected' has to be"),
    ({**ONE, "rejected": [None]}, "rejected: message 0 is None"),
    ({**ONE, "rejected": [say("assistant", None)]}, "rejected: the content of message 0 is None"),
    ({**ONE, "rejected": [say("assistant", 5)]}, "rejected: the content of message 0 is 5,"),
    ({**ONE, "chosen": [ASK, say("assistant", None)], "rejected": [ASK, NO]},
     "chosen: the content of message 1 is None"),
    ({**ONE, "prompt": [say("user", None)]}, "prompt: the content of message 0 is None"),
    ({**ONE, "prompt": [say("human", "a")]}, "prompt: message 0 is .* of system, user, assistant"),
    ({**ONE, "prompt": ["Is it so?"]}, "prompt: message 0 is 'Is it so"),
    ({**ONE, "prompt": {"text": "a"}}, "'prompt' has to be a text or a list of messages"),
    ({**ONE, "prompt": [ASK, SYSTEM, ASK]}, "prompt: message 1 .*may stand before the first turn"),
    ({**ONE, "prompt": "[{'role': 'user', 'content': array(['a'])}]"}, ".*neither JSON nor Python"),
    ({**ONE, "chosen": [ASK, YES]}, "'chosen' has to be one assistant .*; or both sides are whole"),
    ({"prompt": "Other?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
     "'prompt' is not what 'chosen' and 'rejected' begin with"),
    ({"prompt": [say("system", "Be long."), ASK], "chosen": [SYSTEM, ASK, YES],
      "rejected": [SYSTEM, ASK, NO]}, "two system texts, 'Be brief.' and 'Be long.'"),
    ({"system": "Be long.", **ONE, "prompt": [SYSTEM, ASK]}, "two system texts"),
    ({**ONE, "axis": " "}, "'axis' is ' '"), ({**ONE, "axis": 3}, "'axis' is 3"),
], ids=str)
def test_what_is_missing_or_no_text_is_named(tmp_path, row, fault):
    path = tmp_path / "c.jsonl"
    files.write_rows(path, [ONE, ONE, row])
    with pytest.raises(ValueError, match=f"c.jsonl, row 3: {fault}"):
        load.load_comparisons(path, axis="x")


def test_rows_that_say_nothing_are_skipped_counted_and_named(tmp_path):
    path = tmp_path / "c.jsonl"
    files.write_rows(path, [
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, say("assistant", " ")]},
        {"chosen": [ASK, YES], "rejected": [FIRST, NO]},
        {"chosen": [FIRST, ASK, YES], "rejected": [FIRST, ASK, NO]},
        {"chosen": [say("user", ""), YES], "rejected": [say("user", ""), NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, YES]},  # kept here, left out by `check`
    ])
    with pytest.warns(UserWarning, match=(
        "skipped 4 of 6 rows: 1 with an empty last answer, 1 with an empty prompt, 1 with no "
        "common prompt, 1 with two turns of one role in a row"
    )):
        rows = load.load_comparisons(path, axis="honest")
    assert [row["prompt"] for row in rows] == [[ASK], [ASK]]
    assert {row["axis"] for row in rows} == {"honest"}
    assert len(comparisons.check(rows, on_bad="skip")) == 1
    with pytest.raises(ValueError, match="c.jsonl, row 2: an empty last answer"):
        load.load_comparisons(path, axis="honest", strict=True)
    with pytest.warns(UserWarning, match="skipped 4 of 6"):
        assert [row["prompt"] for row in load.load_prompts(path)] == [[ASK], [ASK]]
    files.write_rows(path, [{"chosen": [ASK, YES], "rejected": [FIRST, NO]}])
    with pytest.raises(ValueError, match="none of its 1 rows can be used: 1 with no common prompt"):
        load.load_comparisons(path, axis="honest")


def test_a_side_that_is_no_list():
    with pytest.raises(conversations.Malformed, match="an empty last answer"):
        conversations.whole([], [ASK, NO])


def test_a_system_column_is_the_first_turn_of_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    files.write_rows(path, [{"system": "Be brief.", "prompt": "Is it so?"},
                            {"system": "", "prompt": "Is it so?"}])
    rows = load.load_prompts(path)
    assert [row["prompt"] for row in rows] == [[SYSTEM, ASK], [ASK]]
    files.write_rows(path, rows)  # what was loaded once is loaded again
    assert [row["prompt"] for row in load.load_prompts(path)] == [[SYSTEM, ASK], [ASK]]


def test_a_prompt_that_looks_like_a_very_deep_list_is_named():
    with pytest.raises(ValueError, match="looks like a list of messages"):
        conversations.prompt_of('[{"role": ' + "[" * 100_000 + "]")
