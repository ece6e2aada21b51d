"""AI feedback: exact texts; labels of a model with a known preference and a known position bias."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from tiny import Chat

from cai_utils import constitution, feedback, multiple_choice
from cai_utils.data import load
from cai_utils.lm.sampling import Sampler

PROMPT = [{"role": "user", "content": "Hi"}]
TALK = [*PROMPT, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Help"}]
SHOTS = {
    "comparison": [
        {"prompt": TALK, "a": "x", "b": "y", "answer": "B"},
        {"prompt": PROMPT, "a": "v", "b": "w", "answer": "A", "principle": "Own?"},
    ],
    "comparison_cot": [{"prompt": PROMPT, "a": "x", "b": "y", "answer": "B", "reasoning": "Why."}],
}
LAW = constitution.Constitution(
    "test", comparisons=[{"id": f"p{i}", "principle": f"Rule {i}?"} for i in range(3)],
    few_shot=SHOTS,
)


class Judge:
    """Prefers, by 2 nats, the option that says "good"; likes (A) by `bias` nats; a chain that says
    "swap" turns its preference round. Keeps what it was given."""

    def __init__(self, bias=0.0, chains=(), tokenizer=None):
        self.bias, self.chains, self.tokenizer = bias, chains, tokenizer
        self.asked, self.read, self.settings = [], [], []

    def generate(self, inputs, *, n=1, **settings):
        self.asked += inputs
        self.settings.append(settings)
        return [[SimpleNamespace(text=self.chains[k % len(self.chains)]) for k in range(n)]
                for _ in inputs]

    def choice_logprobs(self, texts, choices, progress=False):
        self.read += texts
        logits = []
        for text, own in zip(texts, choices, strict=True):
            body = text[text.rfind("\n (A) "):]
            liked = [2.0 * ("good" in body.split(f"\n{c} ")[1].split("\n")[0]) for c in own]
            if "swap" in text:
                liked = liked[::-1]
            liked[0] += self.bias
            logits.append(liked)
        logits = np.array(logits)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_exact_texts():
    body = "Read this conversation.\n\nH: Hi\n\nA: Yes?\n\nH: Help\n\nRule?\n (A) one\n (B) two"
    plain = multiple_choice.question_text(TALK, "one", "two", "Rule?")
    cot = multiple_choice.question_text(TALK, "one", "two", "Rule?", cot=True)
    assert plain == f"\n\nHuman: {body}\n\nAssistant: The answer is:"
    assert cot == f"\n\nHuman: {body}\n\nAssistant: Step by step:"
    assert multiple_choice.cot_form(plain) == cot
    with pytest.raises(ValueError, match="The answer is:"):
        multiple_choice.cot_form(cot)


@pytest.mark.parametrize("bias", [0.0, 1.0, -3.0])
def test_both_orders_are_averaged_and_mapped_back(bias):
    pairs = [
        {"id": "x", "prompt": PROMPT, "responses": ["bad", "good"], "split": "eval"},
        {"id": "y", "prompt": TALK, "responses": ["good", "bad"]},
        {"id": "z", "prompt": TALK, "responses": ["same", "same"]},
    ]
    judge = Judge(bias)
    x, y, z = feedback.label(judge, pairs, LAW)
    # p(first) of a good first response: as (A) sigmoid(2 + bias), as (B) sigmoid(2 - bias)
    p = (sigmoid(2 + bias) + sigmoid(2 - bias)) / 2
    assert y["p_first"] == pytest.approx(p) and x["p_first"] == pytest.approx(1 - p)
    assert z["p_first"] == pytest.approx(0.5) and x["p_chosen"] == pytest.approx(p)
    for row in (x, y):
        assert row["chosen"] == [{"role": "assistant", "content": "good"}]
        assert row["rejected"] == [{"role": "assistant", "content": "bad"}]
        assert row["position_bias"] == pytest.approx(sigmoid(2 + bias) - sigmoid(2 - bias))
    assert z["position_bias"] == pytest.approx(2 * sigmoid(bias) - 1)
    assert (x["source"], x["axis"], x["split"], x["cot"]) == ("ai", "harmless", "eval", [])
    assert "responses" not in x and x["prompt"] == PROMPT
    rule = constitution.draw(LAW.comparisons, 0, 0, 0)
    assert x["principle"] == rule["id"]
    assert judge.read[:2] == [
        multiple_choice.question_text(PROMPT, "bad", "good", rule["principle"]),
        multiple_choice.question_text(PROMPT, "good", "bad", rule["principle"]),
    ]


def test_one_order_is_drawn_and_mapped_back():
    pairs = [{"prompt": PROMPT, "responses": ["good", "bad"]} for _ in range(200)]
    rows = feedback.label(Judge(1.0), pairs, LAW, both_orders=False, seed=3)
    seen = Counter(round(row["p_first"], 6) for row in rows)
    assert set(seen) == {round(sigmoid(3.0), 6), round(sigmoid(1.0), 6)}
    assert min(seen.values()) > 70  # 100 expected, standard deviation 7.1
    assert rows == feedback.label(Judge(1.0), pairs, LAW, both_orders=False, seed=3)
    other = feedback.label(Judge(1.0), pairs, LAW, both_orders=False, seed=4)
    assert [r["p_first"] for r in other] != [r["p_first"] for r in rows]
    # The mean over pairs estimates the bias that both orders measure exactly.
    exact = sigmoid(3.0) - sigmoid(1.0)
    assert np.mean([r["position_bias"] for r in rows]) == pytest.approx(exact, abs=0.25)
    unbiased = feedback.label(Judge(), pairs, LAW, both_orders=False)
    assert all(r["p_first"] == pytest.approx(sigmoid(2.0)) for r in unbiased)


def test_principles_are_drawn_per_question():
    pairs = [{"prompt": PROMPT, "responses": ["good", "bad"]} for _ in range(60)]
    rows = feedback.label(Judge(), pairs, LAW, seed=9)
    assert [r["principle"] for r in rows] == [
        constitution.draw(LAW.comparisons, 9, i, 0)["id"] for i in range(60)
    ]
    assert {r["principle"] for r in rows} == {"p0", "p1", "p2"}
    rows = feedback.label(Judge(), pairs, LAW, n_principles=1)
    assert {r["principle"] for r in rows} == {"p0"}


def test_chains_are_averaged_then_clamped():
    chains = [" Good first. \n\n", " swap", ""]  # the last one ended without a word
    pairs = [{"prompt": PROMPT, "responses": ["good", "bad"]}]
    judge = Judge(chains=chains)
    (row,) = feedback.label(judge, pairs, LAW, cot=True, n_samples=3, n_principles=1)
    p = sigmoid(2.0)
    assert row["p_first"] == pytest.approx((p + (1 - p) + p) / 3)
    assert row["cot"] == ["Good first.", "swap", ""] * 2
    lead = multiple_choice.question_text(PROMPT, "good", "bad", "Rule 0?", cot=True)
    assert judge.asked[0] == lead and len(judge.asked) == 2
    assert judge.read[:3] == [
        lead + " Good first.\n\nThe answer is:", lead + " swap\n\nThe answer is:",
        lead + "\n\nThe answer is:",
    ]
    assert "The answer is:" in judge.settings[0]["stop"]
    one = {"cot": True, "n_samples": 1}
    (row,) = feedback.label(Judge(chains=chains), pairs, LAW, clamp=(0.4, 0.6), **one)
    assert row["p_first"] == row["p_chosen"] == 0.6
    swapped = [{"prompt": PROMPT, "responses": ["bad", "good"]}]
    (row,) = feedback.label(Judge(chains=chains), swapped, LAW, clamp=(0.4, 0.6), **one)
    assert (row["p_first"], row["p_chosen"]) == (0.4, 0.6)
    assert row["chosen"][0]["content"] == "good"
    # (p + 2 (1 - p)) / 3 lies inside the clamp only because chains are averaged before it.
    (row,) = feedback.label(
        Judge(chains=["", "swap", "swap"]), pairs, LAW, clamp=(0.3, 0.6), cot=True, n_samples=3
    )
    assert row["p_first"] == pytest.approx((p + 2 * (1 - p)) / 3)


def test_few_shot_prefix():
    judge = Judge()
    pairs = [{"prompt": PROMPT, "responses": ["good", "bad"]}]
    feedback.label(judge, pairs, LAW, few_shot=True, n_principles=1)
    assert judge.read[0] == (
        multiple_choice.question_text(TALK, "x", "y", "Rule 0?") + " (B)"
        + multiple_choice.question_text(PROMPT, "v", "w", "Own?") + " (A)"
        + multiple_choice.question_text(PROMPT, "good", "bad", "Rule 0?")
    )
    judge = Judge(chains=["c"])
    feedback.label(judge, pairs, LAW, few_shot=True, n_principles=1, cot=True)
    assert judge.asked[0] == (
        multiple_choice.question_text(PROMPT, "x", "y", "Rule 0?", cot=True)
        + " Why.\n\nThe answer is: (B)"
        + multiple_choice.question_text(PROMPT, "good", "bad", "Rule 0?", cot=True)
    )
    assert multiple_choice.few_shot_text(LAW, cot=True).endswith("\n\nThe answer is: (B)")


def test_a_chat_model_is_asked_in_turns():
    pairs = [{"prompt": PROMPT, "responses": ["good", "bad"]}]
    judge = Judge(chains=[" c"], tokenizer=Chat)
    feedback.label(judge, pairs, LAW, n_principles=1, cot=True, few_shot=True)
    question = "Read this conversation.\n\nH: Hi\n\nRule 0?\n (A) {}\n (B) {}"
    assert judge.asked[0] == (
        f"<user>{question.format('x', 'y')}"
        "<assistant>Step by step: Why.\n\nThe answer is: (B)"
        f"<user>{question.format('good', 'bad')}<assistant>Step by step:"
    )
    assert judge.read[0] == judge.asked[0] + " c\n\nThe answer is:"
    judge = Judge(tokenizer=Chat)
    feedback.label(judge, pairs, LAW, n_principles=1)
    assert judge.read[0] == (
        f"<user>{question.format('good', 'bad')}<assistant>The answer is:"
    )


def ask(a, b, right="A", end="\n\nThe answer is:"):
    wrong = "B" if right == "A" else "A"
    return {"prompt": f"\n\nTalk:\n\nHuman: Hi\n\n\nWhich? Options:\n (A) {a}\n (B) {b}{end}",
            "corrects": [f" ({right})"], "incorrects": [f" ({wrong})"]}


NINE = {
    "prompt": "Kind?\n" + "\n".join(f" ({c}) {'good' if c == 'D' else 'x'}" for c in "ABCDEFGHI")
    + "\nThe answer is:",
    "corrects": [" (D)"], "incorrects": [f" ({c})" for c in "ABCEFGHI"],
}


def test_evaluation_questions():
    one, two, nine = multiple_choice.answer(
        Judge(), [ask("good", "bad"), ask("good", "bad", right="B"), NINE]
    )
    assert one["p_correct"] == pytest.approx(sigmoid(2)) and one["correct"]
    assert two["p_correct"] == pytest.approx(sigmoid(-2)) and not two["correct"]
    assert nine["p_correct"] == pytest.approx(np.e**2 / (np.e**2 + 8)) and nine["correct"]
    assert len(nine["probs"]) == 9 and sum(nine["probs"].values()) == pytest.approx(1)
    (tie,) = multiple_choice.answer(Judge(), [ask("same", "same")])
    assert not tie["correct"]
    assert multiple_choice.answer(Judge(), []) == []


def test_both_orders_of_a_question():
    judge = Judge(bias=3.0)
    (row,) = multiple_choice.answer(judge, [ask("bad", "good", "B")], both_orders=True)
    assert judge.read == [ask("bad", "good")["prompt"], ask("good", "bad")["prompt"]]
    assert row["p_correct"] == pytest.approx((sigmoid(-1) + sigmoid(5)) / 2)
    assert row["position_bias"] == pytest.approx(sigmoid(1) + sigmoid(5) - 1)
    assert row["correct"]
    (row,) = multiple_choice.answer(Judge(bias=3.0), [ask("bad", "good", "B")])
    assert not row["correct"]  # the bias decides where only one order is asked


def test_a_random_order_is_mapped_back():
    questions = [ask("good", "bad") for _ in range(60)]
    judge = Judge(bias=1.0)
    rows = multiple_choice.answer(judge, questions, random_order=True, seed=2)
    swapped = [text == ask("bad", "good")["prompt"] for text in judge.read]
    assert 15 < sum(swapped) < 45  # 30 expected, standard deviation 3.9
    for row, turned in zip(rows, swapped, strict=True):
        # The good option, (A) as the question stands, was read under (B) where it was swapped.
        assert row["p_correct"] == pytest.approx(sigmoid(1.0 if turned else 3.0))
        assert row["probs"][" (A)"] == row["p_correct"] and row["correct"]
        bias = 2 * (1 - row["p_correct"] if turned else row["p_correct"]) - 1
        assert row["position_bias"] == pytest.approx(bias)
    again = multiple_choice.answer(Judge(bias=1.0), questions, random_order=True, seed=2)
    assert again == rows


@pytest.mark.parametrize("a, b", [
    ("one", "two"), ("[[[two\n\nparagraphs]]]", "[[[with (A) inside\n]]]"), ("trailing ", " b "),
])
@pytest.mark.parametrize("end", [
    "\n\nThe answer is:", "\nThe answer is:", "\n\nAssistant: The answer is:",
])
def test_options_swap_exactly(a, b, end):
    swapped = multiple_choice.swap_options(ask(a, b, end=end)["prompt"])
    assert swapped == ask(b, a, end=end)["prompt"]


@pytest.mark.parametrize("question", [
    ask("one\n (B) not an option", "two"), ask("one\n (C) three", "two"), NINE,
])
def test_what_cannot_be_swapped_is_named(question):
    with pytest.raises(ValueError, match="question 1: both_orders"):
        multiple_choice.answer(Judge(), [ask("a", "b"), question], both_orders=True)


def test_questions_with_chains_and_prefix():
    judge = Judge(chains=[" c", " swap"])
    (row,) = multiple_choice.answer(
        judge, [ask("good", "bad")], cot=True, n_samples=2, few_shot="\n\nHuman: Before."
    )
    lead = "\n\nHuman: Before." + ask("good", "bad", end="\n\nStep by step:")["prompt"]
    assert judge.asked == [lead]
    assert judge.read == [
        lead + " c\n\nThe answer is:", lead + " swap\n\nThe answer is:"
    ]
    assert row["p_correct"] == pytest.approx(0.5) and row["cot"] == ["c", "swap"]


@pytest.mark.parametrize("end", ["\n\nThe answer is:", "\n\nAssistant: The answer is:"])
def test_questions_to_a_chat_model(end):
    judge = Judge(tokenizer=Chat)
    multiple_choice.answer(judge, [ask("good", "bad", end=end)], few_shot="Before.")
    assert judge.read == [
        "<user>Before.\n\nTalk:\n\nHuman: Hi\n\n\nWhich? Options:\n (A) good\n (B) bad"
        "<assistant>The answer is:"
    ]


def test_bad_input():
    good = {"prompt": PROMPT, "responses": ["a", "b"]}
    for bad, message in [
        ({"prompt": PROMPT, "responses": ["a"]}, "pair 1: 'responses'"),
        ({"prompt": PROMPT}, "pair 1: 'responses'"),
        ({"prompt": TALK[:2], "responses": ["a", "b"]}, "pair 1: 'prompt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            feedback.label(Judge(), [good, bad], LAW)
    for clamp in [(0.6, 0.4), (0.6, 0.9), (-0.1, 0.6)]:
        with pytest.raises(ValueError, match="clamp"):
            feedback.label(Judge(), [good], LAW, clamp=clamp)
    with pytest.raises(ValueError, match="n_samples=0"):
        feedback.label(Judge(), [good], LAW, cot=True, n_samples=0)
    empty = constitution.Constitution("empty")
    with pytest.raises(ValueError, match="no principles"):
        feedback.label(Judge(), [good], empty)
    with pytest.raises(ValueError, match="'empty' has no few_shot comparison_cot"):
        feedback.label(Judge(), [good], empty, cot=True, few_shot=True)
    assert feedback.label(Judge(), [], LAW) == []
    for change, message in [
        ({"corrects": []}, "missing field 'corrects'"), ({"corrects": [" (C)"]}, "its options"),
        ({"corrects": ["(A)"]}, "its options"), ({"incorrects": [" (A)"]}, "its options"),
        ({"prompt": "Which?"}, "has to end in"),
    ]:
        with pytest.raises(ValueError, match=f"question 1: .*{message}"):
            multiple_choice.answer(Judge(), [ask("a", "b"), {**ask("a", "b"), **change}])


def test_all_published_questions_swap():
    root = os.environ.get("CAI_DATA_DIR")
    name = "438HHHEvaluations"
    part = f"constitutional_harmlessness_paper/evals/{name}.jsonl"
    if not root or not (Path(root) / part).exists():
        pytest.skip(f"CAI_DATA_DIR does not hold {part}")
    for i, question in enumerate(load.load_questions(f"paper/{name}")):
        swapped = multiple_choice.swap_options(question["prompt"], i)
        assert swapped != question["prompt"]
        assert multiple_choice.swap_options(swapped) == question["prompt"]


def p_of_a(model, tokenizer, text):
    """p(" (A)") against " (B)" by one plain forward pass of each: no cache, no batch."""
    scores = []
    for choice in (" (A)", " (B)"):
        ids = torch.tensor([tokenizer(text + choice)["input_ids"]])
        n = len(tokenizer(choice)["input_ids"])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1]
        scores.append(logprobs.gather(1, ids[0, 1:, None])[-n:].sum().item())
    return sigmoid(scores[0] - scores[1])


def test_labels_of_a_real_model_are_its_probabilities():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    sampler = Sampler(model, tokenizer)
    pairs = [{"prompt": PROMPT, "responses": ["one", "two"]},
             {"prompt": TALK, "responses": ["three", "a fourth"]}]
    rows = feedback.label(sampler, pairs, LAW, n_principles=1)
    for pair, row in zip(pairs, rows, strict=True):
        texts = [multiple_choice.question_text(pair["prompt"], *r, "Rule 0?")
                 for r in (pair["responses"], pair["responses"][::-1])]
        a, b = (p_of_a(model, tokenizer, text) for text in texts)
        assert row["p_first"] == pytest.approx((a + 1 - b) / 2, abs=1e-5)
        assert row["position_bias"] == pytest.approx(a + b - 1, abs=1e-5)
    settings = {"cot": True, "n_samples": 2, "max_new_tokens": 16, "temperature": 0.7}
    rows = feedback.label(sampler, pairs, LAW, n_principles=1, **settings)
    assert len(rows[0]["cot"]) == 4 and len(set(rows[0]["cot"])) > 1
    lead = [multiple_choice.question_text(PROMPT, *r, "Rule 0?", cot=True)
            for r in (("one", "two"), ("two", "one"))]
    p = [p_of_a(model, tokenizer, f"{lead[i // 2]} {chain}".rstrip(" ") + "\n\nThe answer is:")
         for i, chain in enumerate(rows[0]["cot"])]
    expected = (p[0] + p[1] + 2 - p[2] - p[3]) / 4
    assert rows[0]["p_first"] == pytest.approx(expected, abs=1e-5)
    again = feedback.label(
        Sampler(model, tokenizer, batch_tokens=1), pairs, LAW, n_principles=1, **settings
    )
    assert [r["cot"] for r in again] == [r["cot"] for r in rows]
    (answer,) = multiple_choice.answer(sampler, [ask("one", "two", "B")])
    expected = 1 - p_of_a(model, tokenizer, ask("one", "two")["prompt"])
    assert answer["p_correct"] == pytest.approx(expected, abs=1e-5)


def test_a_chain_that_fills_the_context_is_still_read():
    """An untrained model never stops by itself; its chain ends where the context does."""
    model, tokenizer = tiny.llama(context=200), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[2] * 0 - 1e-6
    pairs = [{"prompt": PROMPT, "responses": ["one", "two"]}]
    (row,) = feedback.label(
        Sampler(model, tokenizer), pairs, LAW, cot=True, max_new_tokens=400, seed=2
    )
    assert 0 < row["p_first"] < 1 and len(row["cot"]) == 2


# The paper's form: small files of our own in the published shapes, and the published ones.
OURS = {
    "RLMadisonInstructions.json": ["\nWhich is kinder? Options:", "\nWhich is wiser? Options:"],
    "RLMadisonFewShotPrompts.json": [
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "corrects": ["Hello!"], "incorrects": ["Go."]},
        {"prompt": "\n\nHuman: Bye\n\nAssistant:", "corrects": ["Bye!"], "incorrects": ["Ha."]},
    ],
    "RLMadisonPrecogFewShotPrompts.json": [
        {"prompt": start + "Human: Look at this (H, A):\n\nH: Hi {}\n\nA:  What?\n\nH: Sorry\n\n{}"
         "\n (A) [[[Go.]]]\n (B) [[[Hello!\n\nYou?]]]\n\nAssistant: Let us see:" + reasons
         + "\n\nHuman:\nThus: (B)"} for start, reasons in (("\n\n", "\n(B) asks."), ("\n", " B."))],
}
QUESTION = ("\n\nRead:\n\nHuman: Hi\n\n\nWhich is wiser? Options:\n (A) [[[x{}]]]\n (B) [[[y]]]\n\n"
            "The answer is:")


class Published:
    """The texts of a folder of the paper's files, cut up by hand."""

    def __init__(self, folder):
        self.law = constitution.load(folder / "prompts")
        read = {n: json.loads((folder / "prompts" / n).read_text("utf-8")) for n in OURS}
        self.rules, pairs, reasoned = read.values()
        lines = (folder / "evals/438HHHEvaluations.jsonl").read_text("utf-8").splitlines()
        self.questions = [{"id": str(i), **json.loads(line)} for i, line in enumerate(lines)]
        self.lead = self.questions[0]["prompt"].partition("\n\nHuman: ")[0]
        self.end = self.questions[0]["prompt"].rpartition("]]]")[2]
        self.reasoned = [item["prompt"] for item in reasoned]
        self.cot_lead, _, rest = self.reasoned[0].partition("\n\nH: ")
        self.cot_end = re.search(r"\n\nAssistant: [^\n:]*:", rest)[0]
        self.answer = re.search(r"\n\nHuman:\n.*:", rest)[0]
        self.pairs = [(p["prompt"].removesuffix("\n\nAssistant:"), p["corrects"][0],
                       p["incorrects"][0]) for p in pairs]

    def plain(self, talk, a, b, rule):
        return f"{self.lead}{talk}\n\n{rule}\n (A) [[[{a}]]]\n (B) [[[{b}]]]{self.end}"

    def cot(self, talk, a, b, rule):
        talk = talk.replace("\n\nHuman:", "\n\nH:").replace("\n\nAssistant:", "\n\nA:")
        return f"{self.cot_lead}{talk}\n\n{rule}\n (A) [[[{a}]]]\n (B) [[[{b}]]]{self.cot_end}"

    def plain_shots(self, rule):
        texts = [self.plain(talk, *((good, bad) if i % 2 == 0 else (bad, good)), rule)
                 + (" (A)" if i % 2 == 0 else " (B)")
                 for i, (talk, good, bad) in enumerate(self.pairs)]
        return "".join(texts)

    def cot_shots(self, rule):
        return "".join(text.replace("\n\n{}\n (A)", f"\n\n{rule}\n (A)")
                       for text in self.reasoned)


@pytest.fixture(params=["ours", "theirs"])
def published(request, tmp_path, monkeypatch):
    folder = tmp_path / "paper"
    if request.param == "ours":
        monkeypatch.delenv("CAI_DATA_DIR", raising=False)
        for name, data in OURS.items():
            (folder / "prompts").mkdir(parents=True, exist_ok=True)
            (folder / "prompts" / name).write_text(json.dumps(data), "utf-8")
        (folder / "evals").mkdir()
        rows = [{"prompt": QUESTION.replace("{}", str(i)), "corrects": [" (A)"],
                 "incorrects": [" (B)"]} for i in range(3)]
        (folder / "evals/438HHHEvaluations.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return Published(folder)
    folder = Path(os.environ.get("CAI_DATA_DIR") or ".") / "constitutional_harmlessness_paper"
    if not os.environ.get("CAI_DATA_DIR") or not folder.exists():
        pytest.skip("CAI_DATA_DIR does not hold constitutional_harmlessness_paper")
    return Published(folder)


SAID = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help"  # TALK
PAIRS = [{"prompt": TALK, "responses": ["good", "bad"]}] * 40


@pytest.mark.parametrize("few_shot", [False, True])
def test_a_base_model_reads_the_paper_s_question_to_the_character(published, few_shot):
    judge = Judge()
    rows = feedback.label(judge, PAIRS, published.law, few_shot=few_shot)
    rules = [published.rules[int(r["principle"].removeprefix("comparison"))] for r in rows]
    assert len(set(rules)) > 1
    for i, rule in enumerate(rules):
        shots = published.plain_shots(rule) if few_shot else ""
        assert judge.read[2 * i] == shots + published.plain(SAID, "good", "bad", rule)
        assert judge.read[2 * i + 1] == shots + published.plain(SAID, "bad", "good", rule)


@pytest.mark.parametrize("few_shot", [False, True])
def test_a_base_model_reads_the_paper_s_chain_to_the_character(published, few_shot):
    judge = Judge(chains=["\n(A) is good.\n", " Good."])
    rows = feedback.label(judge, PAIRS, published.law, few_shot=few_shot, cot=True, n_samples=2)
    for i, row in enumerate(rows):
        rule = published.rules[int(row["principle"].removeprefix("comparison"))]
        shots = published.cot_shots(rule) if few_shot else ""
        asked = shots + published.cot(SAID, "good", "bad", rule)
        assert judge.asked[2 * i] == asked
        assert judge.read[4 * i : 4 * i + 2] == [asked + "\n(A) is good." + published.answer,
                                                asked + " Good." + published.answer]
        assert row["cot"] == ["(A) is good.", "Good."] * 2
    # A chain ends where the next human turn begins, in which its answer is read.
    assert published.answer.startswith("\n\nHuman:") and "\n\nHuman:" in judge.settings[0]["stop"]
    assert published.answer.rpartition("\n")[2] in judge.settings[0]["stop"]


def test_the_published_examples_are_questions_of_this_form(published):
    """Each published chain, asked anew from its parts, is the text in the file; so are all
    questions."""
    for text in published.reasoned:
        head, _, rest = text.partition("\n\nH: ")
        if head != published.cot_lead:
            continue  # it opens in words of its own
        talk, _, rest = ("\n\nH: " + rest).partition("\n\n{}\n (A) [[[")
        a, _, rest = rest.partition("]]]\n (B) [[[")
        b, _, rest = rest.partition("]]]")
        prompt = [{"role": "user" if who == "H" else "assistant", "content": said}
                  for who, said in re.findall(r"\n\n([HA]): (.*?)(?=\n\n[HA]: |\Z)", talk, re.S)]
        form = multiple_choice.form_of(published.law, cot=True)
        assert form.text(prompt, a, b, "{}") + rest.removeprefix(published.cot_end) == text
    for question in published.questions:
        talk, _, rest = question["prompt"].removeprefix(published.lead).partition(
            "\n\n" + published.rules[1] + "\n (A) [[[")
        a, _, rest = rest.partition("]]]\n (B) [[[")
        b = rest.removesuffix("]]]" + published.end)
        prompt = [{"role": "user" if who == "Human" else "assistant", "content": said}
                  for who, said in re.findall(
                      r"\n\n(Human|Assistant): (.*?)(?=\n\n(?:Human|Assistant): |\Z)", talk, re.S)]
        judge, rule = Judge(), [{"id": "0", "principle": published.rules[1]}]
        one = constitution.Constitution("p", comparisons=rule, forms=published.law.forms)
        feedback.label(judge, [{"prompt": prompt, "responses": [a, b]}], one)
        assert judge.read[0] == question["prompt"]


@pytest.mark.parametrize("cot", [False, True])
def test_a_chat_model_gets_the_paper_s_question_in_turns(published, cot):
    judge = Judge(chains=[" c"], tokenizer=Chat)
    rule = published.rules[0]
    feedback.label(judge, PAIRS[:1], published.law, n_principles=1, few_shot=True, cot=cot)
    build = published.cot if cot else published.plain
    lead = published.cot_end if cot else published.end
    body = build(SAID, "good", "bad", rule).removesuffix(lead).strip().removeprefix("Human: ")
    reply = lead.strip().removeprefix("Assistant: ")
    first = (judge.asked if cot else judge.read)[0]
    assert first.endswith(f"<user>{body}<assistant>{reply}")
    answer = published.answer.rpartition("\n")[2] if cot else reply
    shots = published.reasoned if cot else published.pairs
    assert first.count(f"{answer} (") == len(shots) and first.count("<user>") == len(shots) + 1
    assert "Human:\n" not in first and "\n\nAssistant:" not in first.replace(SAID, "")
    if cot:  # the answer stays in the turn of the chain
        assert judge.read[0] == f"{first} c\n\n{answer}"


def test_labels_in_the_paper_s_form_are_the_model_s_probabilities(published):
    model, tokenizer = tiny.llama(context=4096), tiny.tokenizer()
    pairs = [{"prompt": TALK, "responses": ["one", "two"]}]
    settings = {"n_principles": 1, "both_orders": True}
    (row,) = feedback.label(Sampler(model, tokenizer), pairs, published.law, **settings)
    a, b = (p_of_a(model, tokenizer, published.plain(SAID, *two, published.rules[0]))
            for two in (("one", "two"), ("two", "one")))
    assert row["p_first"] == pytest.approx((a + 1 - b) / 2, abs=1e-5)
    (row,) = feedback.label(Sampler(model, tokenizer), pairs, published.law, cot=True,
                            max_new_tokens=12, temperature=0, **settings)
    lead = published.cot(SAID, "one", "two", published.rules[0])
    (said,), = Sampler(model, tokenizer).generate(
        [lead], temperature=0, max_new_tokens=12, stop=("\n\nHuman:",))
    read = [lead + said.text.rstrip() + published.answer]
    lead = published.cot(SAID, "two", "one", published.rules[0])
    (said,), = Sampler(model, tokenizer).generate(
        [lead], temperature=0, max_new_tokens=12, stop=("\n\nHuman:",))
    read.append(lead + said.text.rstrip() + published.answer)
    a, b = (p_of_a(model, tokenizer, text) for text in read)
    assert row["p_first"] == pytest.approx((a + 1 - b) / 2, abs=1e-5)


def test_published_questions_get_the_paper_s_chains_and_examples(published):
    judge = Judge(chains=[" c"])
    asked = published.questions[:3]
    prefix, left = multiple_choice.shots(asked, "constitution", published.law)
    assert left == asked and prefix == published.plain_shots(published.rules[1])
    multiple_choice.answer(judge, asked, few_shot=prefix)
    assert judge.read == [prefix + q["prompt"] for q in asked]
    judge = Judge(chains=[" c"])
    multiple_choice.answer(judge, asked, cot=True, forms=published.law.forms)
    for text, question in zip(judge.asked, asked, strict=True):
        talk = question["prompt"].removeprefix(published.lead).partition("\n\n\n")[0]
        a = question["prompt"].partition(" (A) [[[")[2].partition("]]]\n (B) ")[0]
        b = question["prompt"].partition("]]]\n (B) [[[")[2].removesuffix("]]]" + published.end)
        assert text == published.cot(talk, a, b, published.rules[1])
    assert judge.read[0] == judge.asked[0] + " c" + published.answer
    judge = Judge(chains=[" c"])
    multiple_choice.answer(judge, [NINE], cot=True, forms=published.law.forms)
    assert judge.asked[0].endswith("\nStep by step:")  # no comparison: the project's own chain


def test_a_missing_form_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("CAI_DATA_DIR", raising=False)
    name = "RLMadisonInstructions.json"
    (tmp_path / name).write_text(json.dumps(OURS[name]))
    law, judge = constitution.load(tmp_path), Judge()
    with pytest.warns(UserWarning, match="438HHHEvaluations.jsonl beside their folder"):
        feedback.label(judge, PAIRS[:1], law, n_principles=1)
    assert judge.read[0] == multiple_choice.question_text(TALK, "good", "bad", OURS[name][0])
    with pytest.warns(UserWarning, match="RLMadisonPrecogFewShotPrompts.json"):
        assert multiple_choice.form_of(law, cot=True) == multiple_choice.OWN["comparison_cot"]
