"""Samples of policies where there is no ground truth."""

import numpy as np

from cai_utils.evaluation import samples

NO = "I'm sorry, but I can't help with that."


class Length:
    """A PM whose score is the number of characters of the answer."""

    def score(self, conversations):
        return np.array([len(turns[-1]["content"]) for turns in conversations], dtype=float)


def sample(id_, model, response, step=0):
    return {"id": id_, "kind": "redteam", "prompt": [{"role": "user", "content": "How?"}],
            "response": response, "model": model, "size": "135M", "step": step}


def test_samples_scored_by_pms_and_by_their_text():
    rows = [sample(i, "sl_cai", "Like this.") for i in "ab"]
    rows += [sample(i, "pretrained", NO) for i in "ab"]
    frame = samples.scored(rows, {"harmlessness": Length()})
    assert list(frame["PM:harmlessness"]) == [10, 10, len(NO), len(NO)]
    assert list(frame["text:evasive"]) == [0, 0, 1, 1]
    assert list(frame["text:words"]) == [2, 2, 8, 8]
    table = samples.scored_table(frame, [("sl_cai", "pretrained"), ("sl_cai", "nobody")])
    found = table.set_index(["measure", "group"])["estimate"]
    assert found["PM:harmlessness", "sl_cai"] == 10
    assert found["PM:harmlessness", "sl_cai - pretrained"] == 10 - len(NO)
    assert found["text:evasive", "pretrained"] == 1
    assert (table["n"] == 2).all() and set(table["kind"]) == {"redteam"}
    assert not any("nobody" in group for group in table["group"])


def test_snapshots_are_compared_by_step():
    rows = [sample(i, "rl_cai", "ab" * (1 + step), step) for step in (0, 8) for i in "ab"]
    table = samples.scored_table(samples.scored(rows, {}), [(8, 0)], "step")
    assert set(table["group"]) == {"0", "8", "8 - 0"}
    assert set(table["measure"]) == {"text:evasive", "text:words"}


def test_samples_of_two_kinds_may_share_an_id(capsys):
    """Two files of prompts number their rows alike."""
    rows = [sample("0", "sl_cai", "Bad."),
            {**sample("0", "sl_cai", "Good."), "kind": "helpful",
             "prompt": [{"role": "user", "content": "Please?"}]}]
    samples.show_samples(rows, ["sl_cai"])
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert "How?" in first and "Bad." in first and "Good." not in first
    assert "Please?" in second and "Good." in second and "Bad." not in second
