"""Critique -> revision chains: exact texts and turns, and a chain whose every step is checked."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from tiny import Chat

from cai_utils import constitution, critique
from cai_utils.lm.sampling import Sampler

PROMPT = [{"role": "user", "content": "Hi"}]
TALK = [*PROMPT, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Help"}]
PRINCIPLES = constitution.Constitution(
    "test",
    critiques=[
        {"id": f"p{i}", "critique_request": f"Find {i}.", "revision_request": f"Mend {i}."}
        for i in range(3)
    ],
    few_shot={"critique": [{
        "prompt": [{"role": "user", "content": "Ex"}], "response": "bad", "critique_request": "CQ",
        "critique": "CC", "revision_request": "RQ", "revision": "good",
    }]},
)


class Scripted:
    """A sampler that answers each input by a rule and keeps what it was given."""

    def __init__(self, rule, tokenizer=None):
        self.rule, self.tokenizer, self.calls = rule, tokenizer, []

    def generate(self, inputs, *, n=1, **settings):
        self.calls.append((list(inputs), settings))
        return [
            [SimpleNamespace(text=self.rule(x, k), finish_reason="eos") for k in range(n)]
            for x in inputs
        ]


def test_exact_texts():
    assert critique.critique_text(TALK, "No. ", "Find 0.") == (
        "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help\n\nAssistant: No."
        "\n\nCritiqueRequest: Find 0.\n\nCritique:"
    )
    assert critique.revision_text(PROMPT, "No.", "Find 0.", "Rude.", "Mend 0.") == (
        "\n\nHuman: Hi\n\nAssistant: No.\n\nCritiqueRequest: Find 0.\n\nCritique: Rude."
        "\n\nRevisionRequest: Mend 0.\n\nRevision:"
    )
    assert critique.direct_revision_text(PROMPT, "No.", "Mend 0.") == (
        "\n\nHuman: Hi\n\nAssistant: No.\n\nRevisionRequest: Mend 0.\n\nRevision:"
    )


@pytest.fixture
def published():
    root = os.environ.get("CAI_DATA_DIR")
    folder = Path(root or ".") / "constitutional_harmlessness_paper/prompts"
    if not root or not folder.exists():
        pytest.skip("CAI_DATA_DIR does not hold constitutional_harmlessness_paper/prompts")
    return folder


def test_a_base_model_reads_the_paper_s_requests_to_the_character(published):
    """All 16 critiques and 16 revisions, with and without the published examples."""
    raw = json.loads((published / "CritiqueRevisionInstructions.json").read_text("utf-8"))
    shots = json.loads((published / "CritiqueRevisionFewShotPrompts.json").read_text("utf-8"))
    # The opening of a next human turn marks the end of most examples.
    shots = "".join(text.removesuffix("\n\nHuman:") for text in shots)
    paper = constitution.load(published)
    rows = [{"prompt": TALK}] * 200  # every principle is drawn
    for few_shot, before in ((False, ""), (True, shots)):
        sampler = Scripted(lambda text, _: " Why not.\n")
        chains = critique.revise(sampler, rows, paper, n_revisions=1, initial=["No."] * len(rows),
                                 few_shot=few_shot)
        (asked, _), (mended, _) = sampler.calls
        assert {c["principles"][0] for c in chains} == set(raw)
        for chain, first, second in zip(chains, asked, mended, strict=True):
            principle = raw[chain["principles"][0]]
            said = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help\n\nAssistant: No."
            assert first == before + said + principle["prompt"][0]
            assert second == first + " Why not." + principle["edit_request"]


def growing(text, _):
    """Critiques quote the response that they read; revisions lengthen it by one."""
    if isinstance(text, list):
        return " r"
    said = re.findall(r"Assistant: (\w+)", text)[-1]
    return f" saw {said}" if text.endswith("Critique:") else f" {said}r"


def test_a_chain_step_by_step():
    sampler = Scripted(growing)
    rows = [{"id": f"x{i}", "prompt": PROMPT, "kind": "benign"} for i in range(40)]
    chains = critique.revise(sampler, rows, PRINCIPLES, n_revisions=3, seed=5, stop=("END",))
    assert chains[0]["responses"] == ["r", "rr", "rrr", "rrrr"]
    assert chains[0]["critiques"] == ["saw r", "saw rr", "saw rrr"]
    assert (chains[0]["id"], chains[0]["kind"], chains[0]["empty"]) == ("x0", "benign", 0)
    assert len(sampler.calls) == 7  # initial, then critique and revision of all rows, three times
    assert len({settings["seed"] for _, settings in sampler.calls}) == 7
    assert all("END" in s["stop"] and "\n\nHuman:" in s["stop"] for _, s in sampler.calls)
    for step in range(3):
        for i, chain in enumerate(chains):
            p = constitution.draw(PRINCIPLES.critiques, 5, i, step)
            assert chain["principles"][step] == p["id"]
            old, said = chain["responses"][step], chain["critiques"][step]
            assert sampler.calls[1 + 2 * step][0][i] == critique.critique_text(
                PROMPT, old, p["critique_request"]
            )
            assert sampler.calls[2 + 2 * step][0][i] == critique.revision_text(
                PROMPT, old, p["critique_request"], said, p["revision_request"]
            )
    assert len({tuple(c["principles"]) for c in chains}) > 10
    again = critique.revise(Scripted(growing), rows, PRINCIPLES, n_revisions=3, seed=5)
    assert again == chains
    only = critique.revise(Scripted(growing), rows, PRINCIPLES, n_revisions=2, n_principles=1)
    assert {p for c in only for p in c["principles"]} == {"p0"}


def test_direct_revisions_and_given_responses():
    sampler = Scripted(growing)
    chains = critique.revise(
        sampler, [{"prompt": PROMPT}, {"prompt": TALK}], PRINCIPLES, n_revisions=2,
        critiqued=False, initial=["a", " b "],
    )
    assert [c["responses"] for c in chains] == [["a", "ar", "arr"], ["b", "br", "brr"]]
    assert [c["critiques"] for c in chains] == [[None, None]] * 2
    assert [c["id"] for c in chains] == ["0", "1"]
    assert len(sampler.calls) == 2
    assert "Critique" not in "".join(sampler.calls[0][0])


def test_an_empty_revision_keeps_the_response():
    def rule(text, _):
        if "Mend 0" in text or "Mend 1" in text or "Mend 2" in text:
            return " \n" if "Human: Hi\n\nAssistant: Yes?" in text else " new"
        return " c"

    rows = [{"prompt": PROMPT}, {"prompt": TALK}]
    chains = critique.revise(Scripted(rule), rows, PRINCIPLES, n_revisions=2, initial=["a", "b"])
    assert chains[0]["responses"] == ["a", "new", "new"] and chains[0]["empty"] == 0
    assert chains[1]["responses"] == ["b", "b", "b"] and chains[1]["empty"] == 2


def test_few_shot_prefix():
    sampler = Scripted(growing)
    critique.revise(
        sampler, [{"prompt": PROMPT}], PRINCIPLES, n_revisions=1, few_shot=True, initial=["a"]
    )
    prefix = (
        "\n\nHuman: Ex\n\nAssistant: bad\n\nCritiqueRequest: CQ\n\nCritique: CC"
        "\n\nRevisionRequest: RQ\n\nRevision: good"
    )
    (asked,), _ = sampler.calls[0]
    assert asked.startswith(prefix + "\n\nHuman: Hi\n\nAssistant: a\n\nCritiqueRequest: Find ")
    sampler = Scripted(growing)
    critique.revise(
        sampler, [{"prompt": PROMPT}], PRINCIPLES, n_revisions=1, few_shot=True, initial=["a"],
        critiqued=False,
    )
    (asked,), _ = sampler.calls[0]
    assert asked.startswith(
        "\n\nHuman: Ex\n\nAssistant: bad\n\nRevisionRequest: RQ\n\nRevision: good\n\nHuman: Hi"
    )


def test_a_chat_model_gets_turns():
    sampler = Scripted(lambda turns, _: f" {len(turns)}", Chat)
    one = constitution.Constitution("one", critiques=PRINCIPLES.critiques[:1])
    (chain,) = critique.revise(sampler, [{"prompt": PROMPT}], one, n_revisions=1, stop=("END",))
    inputs = [[(m["role"], m["content"]) for m in call[0][0]] for call in sampler.calls]
    assert inputs[1] == [("user", "Hi"), ("assistant", "1"), ("user", "Find 0.")]
    assert inputs[2] == [*inputs[1], ("assistant", "3"), ("user", "Mend 0.")]
    assert chain["responses"] == ["1", "5"] and chain["critiques"] == ["3"]
    assert {s["stop"] for _, s in sampler.calls} == {("END",)}
    sampler = Scripted(lambda turns, _: " x", Chat)
    critique.revise(
        sampler, [{"prompt": PROMPT}], PRINCIPLES, n_revisions=1, few_shot=True, initial=["a"],
        n_principles=1, critiqued=False,
    )
    assert [(m["role"], m["content"]) for m in sampler.calls[0][0][0]] == [
        ("user", "Ex"), ("assistant", "bad"), ("user", "RQ"), ("assistant", "good"),
        ("user", "Hi"), ("assistant", "a"), ("user", "Mend 0."),
    ]


@pytest.mark.parametrize("forms", [(None, Chat), (Chat, None)])
def test_a_critic_of_its_own_writes_in_its_own_form(forms):
    def scripted(name, form):
        return Scripted(lambda x, _: f" {name}{len(x)}", form)

    rows, (own, other) = [{"prompt": PROMPT}, {"prompt": TALK}], forms
    assistant, critic = scripted("a", own), scripted("c", other)
    how = dict(n_revisions=2, few_shot=True, seed=3, stop=("END",))
    chains = critique.revise(assistant, rows, PRINCIPLES, critic=critic, **how)
    ((inputs, settings),) = assistant.calls
    assert inputs == [PROMPT, TALK]
    assert settings["stop"] == ("END",) if own else ("END", *critique.STOPS)
    assert [c["responses"][0] for c in chains] == ["a1", "a3"]
    # From there on all is as if the critic were alone.
    alone = scripted("c", other)
    assert chains == critique.revise(alone, rows, PRINCIPLES, initial=["a1", "a3"], **how)
    assert critic.calls == alone.calls and len(critic.calls) == 4
    assert all(isinstance(x, list if other else str) for x in critic.calls[0][0])


def test_bad_input():
    sampler = Scripted(growing)
    with pytest.raises(ValueError, match="row 1.*end with a user message"):
        critique.revise(sampler, [{"prompt": PROMPT}, {"prompt": TALK[:2]}], PRINCIPLES)
    with pytest.raises(ValueError, match="2 responses for 1 rows"):
        critique.revise(sampler, [{"prompt": PROMPT}], PRINCIPLES, initial=["a", "b"])
    empty = constitution.Constitution("empty")
    with pytest.raises(ValueError, match="no principles"):
        critique.revise(sampler, [{"prompt": PROMPT}], empty, initial=["a"])
    with pytest.raises(ValueError, match="'empty' has no few_shot critiques"):
        critique.revise(sampler, [{"prompt": PROMPT}], empty, few_shot=True)
    assert critique.revise(sampler, [], PRINCIPLES) == []


def test_a_real_model_writes_the_same_chains_whatever_the_batch():
    """Every text of a chain is the model's own answer to the text form of its step."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    rows = [{"prompt": PROMPT}, {"prompt": TALK}, {"prompt": PROMPT}]
    settings = {"n_revisions": 2, "max_new_tokens": 12, "temperature": 0.7, "few_shot": True}
    chains = critique.revise(Sampler(model, tokenizer), rows, PRINCIPLES, **settings)
    small = Sampler(model, tokenizer, batch_tokens=1)
    assert critique.revise(small, rows, PRINCIPLES, **settings) == chains
    assert critique.revise(small, rows, PRINCIPLES, seed=1, **settings) != chains
    assert chains[0]["responses"] != chains[2]["responses"]  # each row draws its own randomness
    greedy = {**settings, "temperature": 0, "few_shot": False}
    (chain,) = critique.revise(small, rows[1:2], PRINCIPLES, **greedy)
    p = {c["id"]: c for c in PRINCIPLES.critiques}
    for step, name in enumerate(chain["principles"]):
        old, said = chain["responses"][step], chain["critiques"][step]
        asked = [
            critique.critique_text(TALK, old, p[name]["critique_request"]),
            critique.revision_text(
                TALK, old, p[name]["critique_request"], said, p[name]["revision_request"]
            ),
        ]
        answers = small.generate(asked, temperature=0, max_new_tokens=12, stop=critique.STOPS)
        assert answers[0][0].text.strip() == said
        assert (answers[1][0].text.strip() or old) == chain["responses"][step + 1]


def test_system_messages_of_examples_and_rows():
    """An example's own stays with the example; a row's stands first, as templates want it."""
    system = {"role": "system", "content": "Be brief."}
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}
    shot = {"prompt": [{**system, "content": "Be kind."}, user], "response": "no",
            "critique_request": "C?", "critique": "rude", "revision_request": "R?",
            "revision": "yes"}
    own = constitution.Constitution("own", few_shot={"critique": [shot, shot]}, critiques=[
        {"id": "k", "critique_request": "C?", "revision_request": "R?"}])
    seen = []

    class Chat:
        tokenizer = tiny.Chat()

        def generate(self, inputs, **_):
            seen.extend(inputs)
            return [[SimpleNamespace(text="no")] for _ in inputs]

    critique.revise(Chat(), [{"prompt": [system, user]}], own, n_revisions=1, few_shot=True)
    assert seen[0] == [system, user]
    for asked in seen[1:]:
        assert asked[0] == system and [m["role"] for m in asked].count("system") == 1
        assert asked[1] == {"role": "user", "content": "Be kind.\n\nHi"}
        assert asked[13:15] == [user, said]
