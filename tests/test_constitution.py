"""Constitutions: the shipped one, one's own YAML, the paper's JSON files; draws of principles."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from cai_utils import constitution

MINE = {
    "name": "tone",
    "critiques": [
        {"id": "polite", "critique_request": "Where is it rude?", "revision_request": "Be polite."},
        {"id": "short", "critique_request": "Where is it long?", "revision_request": "Be brief."},
    ],
    "comparisons": [{"id": "polite", "principle": "Which is more polite?"}],
}


def written(tmp_path, data):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_default_is_complete():
    default = constitution.load("default")
    assert len(default.critiques) == len(default.comparisons) == 16
    assert len({c["id"] for c in default.critiques}) == 16
    assert len({c["principle"] for c in default.comparisons}) == 16
    assert len(default.few_shot["critique"]) >= 2
    assert len(default.few_shot["comparison"]) == 4
    assert len(default.few_shot["comparison_cot"]) >= 2
    for kind in ("comparison", "comparison_cot"):  # neither letter is always the answer
        assert {shot["answer"] for shot in default.few_shot[kind]} == {"A", "B"}
        assert all(shot["prompt"][-1]["role"] == "user" for shot in default.few_shot[kind])


def test_one_s_own_yaml(tmp_path):
    mine = constitution.load(written(tmp_path, MINE))
    assert (mine.name, len(mine.critiques), len(mine.comparisons)) == ("tone", 2, 1)
    assert mine.few_shot == {"critique": [], "comparison": [], "comparison_cot": []}


@pytest.mark.parametrize("section, i, field, shown", [
    ("critiques", 1, "revision_request", "id 'short'"),
    ("critiques", 0, "critique_request", "id 'polite'"),
    ("critiques", 1, "id", "critiques[1]"),
    ("comparisons", 0, "principle", "id 'polite'"),
])
@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_field_is_named(tmp_path, section, i, field, shown, empty):
    data = json.loads(json.dumps(MINE))
    if empty:
        data[section][i][field] = "  "
    else:
        del data[section][i][field]
    path = written(tmp_path, data)
    with pytest.raises(ValueError) as error:
        constitution.load(path)
    for part in (str(path), shown, f"{section}[{i}]", f"missing field '{field}'"):
        assert part in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("name"), "missing field 'name'"),
    (lambda d: (d.pop("critiques"), d.pop("comparisons")), "no principles"),
    (lambda d: d.update(critics=[]), "unknown field 'critics'"),
    (lambda d: d["critiques"][0].update(revision="x"), "unknown field 'revision'"),
    (lambda d: d["critiques"][1].update(id="polite"), "the id 'polite' is there twice"),
    (lambda d: d.update(critiques="x"), "'critiques' has to be a list"),
    (lambda d: d.update(critiques=["x"]), "critiques[0] has to be a mapping"),
    (lambda d: d.update(few_shot={"chat": []}), "few_shot is a mapping of critique"),
    (lambda d: d.update(few_shot={"comparison": [{"prompt": "p", "a": "x", "b": "y"}]}),
     "few_shot.comparison[0]: missing field 'answer'"),
    (lambda d: d.update(few_shot={"comparison": [
        {"prompt": "p", "a": "x", "b": "y", "answer": "C"}]}), "'answer' has to be A or B"),
    (lambda d: d.update(few_shot={"comparison": [
        {"prompt": [{"role": "system", "content": "s"}], "a": "x", "b": "y", "answer": "A"}]}),
     "few_shot.comparison[0]: prompt"),
])
def test_other_faults_are_named(tmp_path, change, message):
    data = json.loads(json.dumps(MINE))
    change(data)
    path = written(tmp_path, data)
    with pytest.raises(ValueError) as error:
        constitution.load(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("critiques:\n  - id: a\n    critique_request: [x, y]\n    revision_request: z",
     "critiques[0] (id 'a'): 'critique_request' has to be a text, not ['x', 'y']"),
    ("comparisons:\n  - id: a\n    principle: No",
     "comparisons[0] (id 'a'): YAML reads 'principle' as False; put it in quotes"),
    ("comparisons:\n  - id: a\n    principle: x\n    principle: y",
     "the field 'principle' is there twice"),
    ("comparisons:\n  - {id: a, principle: x}\ncomparisons:\n  - {id: b, principle: y}",
     "the field 'comparisons' is there twice"),
    ("comparisons:\n  - id: a\n    principle:", "missing field 'principle'"),
    ("comparisons:\n  - id: 0\n    principle:", "comparisons[0] (id 0): missing field"),
    ("comparisons:\n  - {id: a, principle: x}\n"
     "few_shot:\n  comparison:\n    - {prompt: {a: b}, a: x, b: y, answer: A}",
     "'prompt' has to be a text or a list of messages, not {'a': 'b'}"),
    ("comparisons:\n  - {id: a, principle: x}\n"
     "few_shot:\n  comparison:\n    - {prompt: Yes, a: x, b: y, answer: A}",
     "YAML reads 'prompt' as True"),
    ("- comparisons", "a constitution is a mapping"),
])
def test_what_yaml_makes_of_one_s_own_text_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text if text.startswith("-") else f"name: mine\n{text}\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        constitution.load(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_an_anchor_may_be_merged_and_overridden(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('''\
name: mine
critiques:
  - &first {id: a, critique_request: Find what is rude., revision_request: Be polite.}
  - {<<: *first, id: b, critique_request: Find what is loud.}
''', encoding="utf-8")
    one, two = constitution.load(path).critiques
    assert two == {"id": "b", "critique_request": "Find what is loud.",
                   "revision_request": one["revision_request"]}


def test_an_id_may_be_a_number_and_a_theme_any(tmp_path):
    text = """\
name: pirate
critiques:
  - {id: 0, critique_request: Find what is not pirate., revision_request: Talk like a pirate.}
comparisons:
  - id: 0
    principle: |
      Choose the answer that a pirate would give:
      with a ship in it.
few_shot:
  critique:
    - prompt: Hello
      response: Good day.
      critique_request: Where is it no pirate?
      critique: It says good day.
      revision_request: Talk like a pirate.
      revision: Ahoy!
"""
    path = tmp_path / "pirate.yaml"
    path.write_text(text, encoding="utf-8")
    mine = constitution.load(path)
    assert mine.critiques[0]["id"] == mine.comparisons[0]["id"] == "0"
    assert mine.comparisons[0]["principle"] == (
        "Choose the answer that a pirate would give:\nwith a ship in it.")
    assert mine.few_shot["critique"][0]["prompt"] == [{"role": "user", "content": "Hello"}]
    assert constitution.draw(mine.critiques, 0, 0, 0)["revision_request"] == "Talk like a pirate."


def test_default_reads_well():
    """Principles are whole sentences, each once; examples show a change and a real choice."""
    default = constitution.load("default")
    for field in ("critique_request", "revision_request"):
        texts = [c[field] for c in default.critiques]
        assert len(set(texts)) == 16, field
        assert all(t[0].isupper() and t[-1] in ".?" and len(t.split()) >= 6 for t in texts)
    for c in default.comparisons:
        assert c["principle"][0].isupper() and len(c["principle"].split()) >= 6
    for shot in default.few_shot["critique"]:
        assert shot["revision"] != shot["response"] and shot["critique"] != shot["revision"]
    for kind in ("comparison", "comparison_cot"):
        assert all(shot["a"] != shot["b"] for shot in default.few_shot[kind])
    # a chain of thought speaks of both answers, or the model would learn to look at one
    for shot in default.few_shot["comparison_cot"]:
        assert "(A)" in shot["reasoning"] and "(B)" in shot["reasoning"]


def test_no_such_constitution_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="default"):
        constitution.load("no-such")
    with pytest.raises(FileNotFoundError, match="CritiqueRevisionInstructions.json"):
        constitution.load(tmp_path)
    path = tmp_path / "broken.yaml"
    path.write_text("name: [", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid YAML"):
        constitution.load(path)


def test_draws_are_reproducible_uniform_and_independent():
    principles = [{"id": str(i)} for i in range(4)]
    drawn = [
        [constitution.draw(principles, 7, row, step)["id"] for step in range(2)]
        for row in range(2000)
    ]
    assert drawn == [
        [constitution.draw(principles, 7, row, step)["id"] for step in range(2)]
        for row in range(2000)
    ]
    # 2000 pairs over 16 cells: 125 each, standard deviation 10.8; a chi-square at p = 1e-4 is 42.6.
    cells = Counter(map(tuple, drawn))
    assert len(cells) == 16
    assert sum((n - 125) ** 2 / 125 for n in cells.values()) < 42.6
    other = [constitution.draw(principles, 8, row, 0)["id"] for row in range(2000)]
    agree = sum(a[0] == b for a, b in zip(drawn, other, strict=True))
    assert 400 < agree < 600  # a quarter: another seed is another stream


def test_draws_from_the_first_n():
    principles = [{"id": str(i)} for i in range(4)]
    ids = {constitution.draw(principles, 0, row, 0, n_principles=2)["id"] for row in range(64)}
    assert ids == {"0", "1"}
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n_principles={n}"):
            constitution.draw(principles, 0, 0, 0, n_principles=n)
    with pytest.raises(ValueError, match="no principles"):
        constitution.draw([], 0, 0, 0)


# Small files of our own in the published forms.
PUBLISHED = {
    "CritiqueRevisionInstructions.json": {
        "kind0": {
            "prompt": ["\n\nCritiqueRequest: Find what is unkind.\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Make it kind.\n\nRevision:",
        }
    },
    "CritiqueRevisionFewShotPrompts.json": [
        "\n\nHuman: Hi\n\nAssistant: What?\n\nHuman: Sorry\n\nAssistant: Go.\n\nCritiqueRequest: "
        "Find what is unkind.\n\nCritique: It is curt.\n\nIt sends them off.\n\nRevisionRequest: "
        "Make it kind.\n\nRevision: Hello! What can I do?\n\nHuman:"
    ],
    "RLMadisonInstructions.json": ["\nWhich is kinder? Options:"],
    "RLMadisonFewShotPrompts.json": [
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "corrects": ["Hello!"], "incorrects": ["Go."]},
        {"prompt": "\n\nHuman: Bye\n\nAssistant:", "corrects": ["Bye!"], "incorrects": ["Ha."]},
    ],
    "RLMadisonPrecogFewShotPrompts.json": [{"prompt": [
        "\n\nHuman: Consider this:\n\nH: Hi\n\nA: What?\n\nH: Sorry\n\n{}\n (A) [[[Go.]]]\n (B) "
        "[[[Hello!\n\nHow are you?]]]\n\nAssistant: Let's think step by step: B is kind.\n\nHuman:"
        "\nSo the answer is: (B)"
    ]}],
}


def test_the_paper_s_files_are_read(tmp_path):
    for name, data in PUBLISHED.items():
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
    paper = constitution.load(tmp_path)
    talk = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "Sorry"},
    ]
    assert paper.critiques == [{
        "id": "kind0", "critique_request": "Find what is unkind.",
        "revision_request": "Make it kind.",
    }]
    assert paper.comparisons == [  # to the character: its line break belongs to the question
        {"id": "comparison0", "principle": "\nWhich is kinder? Options:"}]
    assert paper.few_shot["critique"] == [{
        "prompt": talk, "response": "Go.", "critique_request": "Find what is unkind.",
        "critique": "It is curt.\n\nIt sends them off.", "revision_request": "Make it kind.",
        "revision": "Hello! What can I do?",
    }]
    assert [(s["a"], s["b"], s["answer"]) for s in paper.few_shot["comparison"]] == [
        ("Hello!", "Go.", "A"), ("Ha.", "Bye!", "B")
    ]
    assert paper.few_shot["comparison_cot"] == [{
        "prompt": talk, "a": "Go.", "b": "Hello!\n\nHow are you?", "reasoning": "B is kind.",
        "answer": "B", "published": PUBLISHED["RLMadisonPrecogFewShotPrompts.json"][0]["prompt"][0],
    }]
    alone = constitution.load(tmp_path / "RLMadisonInstructions.json")
    assert alone.comparisons == paper.comparisons and not alone.critiques


@pytest.mark.parametrize("field", ["prompt", "edit_request"])
def test_a_published_principle_without_its_request(tmp_path, field):
    path = tmp_path / "CritiqueRevisionInstructions.json"
    data = json.loads(json.dumps(PUBLISHED[path.name]))
    del data["kind0"][field]
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=f"'kind0': missing field '{field}'"):
        constitution.load(path)


@pytest.mark.parametrize("broken", ["RLMadisonInstructions", "RLMadisonPrecogFewShotPrompts"])
def test_a_broken_published_file_is_named(tmp_path, broken):
    for name, data in PUBLISHED.items():
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / f"{broken}.json").write_text("[", encoding="utf-8")
    for path in (tmp_path, tmp_path / "RLMadisonInstructions.json"):
        with pytest.raises(ValueError, match=f"{broken}.json: not valid JSON"):
            constitution.load(path)


def test_the_published_files_themselves():
    root = os.environ.get("CAI_DATA_DIR")
    folder = Path(root or ".") / "constitutional_harmlessness_paper" / "prompts"
    if not root or not folder.exists():
        pytest.skip("CAI_DATA_DIR does not hold constitutional_harmlessness_paper/prompts")
    paper = constitution.load(folder)
    assert len(paper.critiques) == len(paper.comparisons) == 16
    assert {k: len(v) for k, v in paper.few_shot.items()} == {
        "critique": 5, "comparison": 5, "comparison_cot": 6
    }
    ours = constitution.load("default")
    theirs = {c["critique_request"] for c in paper.critiques}
    theirs |= {c["principle"].removesuffix("Options:").strip() for c in paper.comparisons}
    assert not theirs & {c["critique_request"] for c in ours.critiques}
    assert not theirs & {c["principle"] for c in ours.comparisons}
