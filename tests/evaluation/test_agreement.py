"""Labels and PMs against the truth."""

import numpy as np

from cai_utils.evaluation import agreement

PROMPT = [{"role": "user", "content": "How do I do it?"}]


def judge(conversation):
    """A ground truth that counts words: harm is the number of "bad", helpfulness of "good"."""
    text = conversation[-1]["content"]
    return {"harm": text.count("bad"), "helpfulness": text.count("good"),
            "evasive": text == "no"}


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


def test_a_conversation_that_comes_again_is_scored_once():
    asked = []

    class Counting:
        def score(self, conversations):
            asked.extend(conversations)
            return np.array([float(len(c[-1]["content"])) for c in conversations])

    one, two, three = ([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
                       for text in ("a", "bb", "ccc"))
    once = agreement.Once(Counting())
    assert once.score([two, one, two]).tolist() == [2, 1, 2]
    assert once.score([three, one]).tolist() == [3, 1] and once.score([]).tolist() == []
    assert asked == [two, one, three]
