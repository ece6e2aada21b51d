"""Rows that are too long for the model's context: left out and counted, the others unchanged."""

import numpy as np
import pytest
import tiny

from cai_utils import critique, feedback, multiple_choice
from cai_utils.constitution import Constitution
from cai_utils.lm.responses import sample
from cai_utils.lm.sampling import PromptTooLong, Sampler

RULES = Constitution("own", critiques=[{"id": str(i), "critique_request": "Bad?",
                                        "revision_request": "Mend."} for i in range(3)],
                     comparisons=[{"id": "a", "principle": "Which?"}])


@pytest.fixture(scope="module")
def sampler():
    return Sampler(tiny.llama(context=400), tiny.tokenizer())


def rows(*texts):
    return [{"id": f"r{i}", "kind": "benign", "prompt": [{"role": "user", "content": text}]}
            for i, text in enumerate(texts)]


SHORT, LONG = rows("Hi", "x" * 20, "You?", "y" * 30), "z" * 390
LONG_AT_1 = [SHORT[0], {**SHORT[1], "id": "long", "prompt": [{"role": "user", "content": LONG}]},
             *SHORT[2:]]


class Server:
    """A sampler whose context is known to the server alone: it refuses one input at a time."""

    def __init__(self, inner):
        self.inner, self.tokenizer, self.calls = inner, inner.tokenizer, 0

    def _refuse(self, name, texts, new):
        self.calls += 1
        for i, fit in enumerate(self.inner.fits(texts, new)):
            if not fit:
                raise PromptTooLong(f"{name} {i}: HTTP 400, too long")

    def generate(self, inputs, **options):
        self._refuse("input", inputs, options["max_new_tokens"])
        return self.inner.generate(inputs, **options)

    def choice_logprobs(self, texts, choices, progress=None):
        self._refuse("text", texts, 4)
        return self.inner.choice_logprobs(texts, choices, progress)


def stages(pairs, questions):
    options = {"max_new_tokens": 8}
    return {
        "samples of m": lambda s, r: sample(s, r, model="m", size="s", n=2, **options),
        "chains": lambda s, r: critique.revise(s, r, RULES, n_revisions=2, **options),
        "AI labels": lambda s, r: feedback.label(s, pairs(r), RULES),
        "AI labels, CoT": lambda s, r: feedback.label(s, pairs(r), RULES, cot=True, **options),
        "questions": lambda s, r: multiple_choice.ask(
            s, questions(r), {"plain": {"random_order": True}, "CoT": {"cot": True}}, **options),
    }


STAGES = stages(
    lambda rows: [{**row, "responses": ["One.", "Two."]} for row in rows],
    lambda rows: [{"id": row["id"], "corrects": [" (A)"], "incorrects": [" (B)"], "prompt":
                   f"\n\nHuman: {row['prompt'][0]['content']}\n (A) 1\n (B) 2\n\nAssistant: "
                   "The answer is:"} for row in rows])


@pytest.mark.parametrize("as_server", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_row_that_is_too_long_leaves_the_others_as_they_are(sampler, capsys, stage, as_server):
    used = Server(sampler) if as_server else sampler
    whole = STAGES[stage](sampler, SHORT)
    assert "left out" not in capsys.readouterr().out
    found = STAGES[stage](used, LONG_AT_1)
    assert found == [row for row in whole if row["id"] != "r1"]
    said = capsys.readouterr().out
    assert f"{stage.partition(',')[0]}: 1 of 4 rows are left out" in said and "'long'" in said
    with pytest.raises(PromptTooLong, match="1 of 1 rows are left out.*Shorten the prompts"):
        STAGES[stage](used, LONG_AT_1[1:2])


def test_a_chain_that_grows_too_long_is_left_out_in_the_middle(sampler, capsys):
    given = ["a", "b" * 100, "c", "d"]
    grown = [{**row} for row in SHORT]
    grown[1]["prompt"] = [{"role": "user", "content": "x" * 150}]
    options = dict(n_revisions=2, max_new_tokens=40, initial=given)
    found = critique.revise(sampler, grown, RULES, **options)
    assert [row["id"] for row in found] == ["r0", "r2", "r3"]
    options["initial"] = ["a", "b", "c", "d"]
    assert found == [row for row in critique.revise(sampler, SHORT, RULES, **options)
                     if row["id"] != "r1"]
    assert "chains: 1 of 4 rows" in capsys.readouterr().out


def test_the_rule_is_the_prompt_and_the_tokens_asked_for(sampler):
    n = len(sampler._text_ids(["Hi"])[0])
    assert sampler.fits(["Hi", "Hi!"], 400 - n) == [True, False]
    with pytest.raises(PromptTooLong, match="input 0: 400 tokens fill"):
        sampler.generate(["x" * 400])
    with pytest.raises(PromptTooLong, match="text 0: 400 tokens"):
        sampler.choice_logprobs(["x" * 400], [" (A)", " (B)"])
    assert np.isfinite(sampler.choice_logprobs(["x" * 390], [" (A)", " (B)"])).all()
