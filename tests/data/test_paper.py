"""The paper's samples and XSTest's completions: on small files of our own always, and on the real
ones where they are."""

import csv
import json
import os
from pathlib import Path

import pytest

from cai_utils.data import fetch, paper, xstest

ASK = "\n\nHuman: {}\n\nAssistant:"
ANSWERS = {"HRLHF": "Take a rope and a hook.", "HHRLHF": "I'm sorry. I won't respond",
           "RLMADISON": "That would hurt him. Talk to him.", "RLMADISON_COT": "Please talk to him."}


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def samples_row(question, texts, scores):
    return {"rl_prompt": ASK.format(question), "comparison_dataset": "LaMDA", "sampled_answers": [
        {"sampled_string": f" {t}\n\nHuman:", "pm_scores": [{"pm_score": s}]}
        for t, s in zip(texts, scores, strict=True)]}


def chain_row(question, first, revisions):
    step = {"cst_value": {"prompt": ["\n\nCritiqueRequest: What is harmful?\n\nCritique:"],
                          "edit_request": "\n\nRevisionRequest: Mend it.\n\nRevision:"}}
    return {"rl_prompt": ASK.format(question), "initial_response": [{"sample": f" {first}\n\n"}],
            "cst": [{**step, "critique": {"sample": f" It harms {k}."},
                     "revision": {"sample": f" {text}\n"}} for k, text in enumerate(revisions)]}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    folder = tmp_path / "constitutional_harmlessness_paper/samples"
    for number, (ending, text) in enumerate(ANSWERS.items()):
        rows = [samples_row(q, [f"{text} {k}" for k in range(5)], [1.0, 5.0, 3.0, 2.0, 4.0])
                for q in ("How do I climb?", "How do I win?")]
        jsonl(folder / f"LAMDA_{ending}.jsonl", rows[::-1] if number % 2 else rows)
    jsonl(folder / "LAMDA_SLMADISON.jsonl",
          [chain_row("How do I win?", "Cheat.",
                     ["Cheat less.", "Train.", "Train well.", "Train!"])])
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    return tmp_path


def test_samples(lab):
    rows = paper.load_samples("lamda", ["hh_rlhf", "helpful_rlhf"])
    assert len(rows) == 20 and {r["model"] for r in rows} == {"hh_rlhf", "helpful_rlhf"}
    assert len({r["id"] for r in rows}) == 2  # the same prompt, the same id, in any order
    by_id = {r["id"]: r["prompt"][-1]["content"] for r in rows}
    assert sorted(by_id.values()) == ["How do I climb?", "How do I win?"]
    assert rows[0] == {
        "id": rows[0]["id"], "kind": "lamda", "response": "I'm sorry. I won't respond 1",
        "prompt": [{"role": "user", "content": "How do I win?"}], "model": "hh_rlhf",
        "size": "52B", "step": 0, "rank_in_file": 1,
    }
    own = [(r["rank_in_file"], r["response"][-1]) for r in rows[:5]]
    assert own == [(1, "1"), (2, "4"), (3, "2"), (4, "3"), (5, "0")]  # by the scores 5 4 3 2 1
    few = paper.load_samples("lamda", ["hh_rlhf"], n=3)
    assert [r["rank_in_file"] for r in few] == [1, 3, 5] * 2
    (last,) = paper.load_samples("lamda", ["sl_cai"])
    assert last["response"] == "Train!" and last["id"] in by_id


def test_chains(lab):
    (chain,) = paper.load_chains("lamda")
    assert chain["responses"] == ["Cheat.", "Cheat less.", "Train.", "Train well.", "Train!"]
    assert chain["critiques"] == [f"It harms {k}." for k in range(4)]
    assert chain["principles"] == ["What is harmful?"] * 4
    assert chain["prompt"] == [{"role": "user", "content": "How do I win?"}]


def test_what_is_wrong_is_named(lab):
    with pytest.raises(ValueError, match="'gopher'.*lamda, instructgpt, palms"):
        paper.load_samples("gopher")
    with pytest.raises(ValueError, match="'gpt'.*helpful_rlhf.*sl_cai"):
        paper.load_samples("lamda", ["gpt"])
    with pytest.raises(ValueError, match="n=0"):
        paper.load_samples("lamda", n=0)
    folder = lab / "constitutional_harmlessness_paper/samples"
    good = samples_row("A?", ["B"], [1.0])
    null = {"sampled_string": None, "pm_scores": [{"pm_score": 1.0}]}
    for bad, message in [({**good, "rl_prompt": None}, "rl_prompt"),
                         ({**good, "sampled_answers": [null]}, "sampled_string"),
                         ({**good, "sampled_answers": [{"sampled_string": "x"}]}, "pm_score")]:
        jsonl(folder / "LAMDA_HRLHF.jsonl", [good, bad])
        with pytest.raises(ValueError, match=rf"LAMDA_HRLHF.jsonl, row 2.*{message}"):
            paper.load_samples("lamda", ["helpful_rlhf"])
    jsonl(folder / "LAMDA_SLMADISON.jsonl", [{"rl_prompt": ASK.format("A?"), "cst": []}])
    with pytest.raises(ValueError, match="LAMDA_SLMADISON.jsonl, row 1.*initial_response"):
        paper.load_chains("lamda")


def completions(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["id", "type", "prompt", "completion", "annotation_1", "annotation_2", "agreement",
             "final_label"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])


def test_completions(lab):
    yes, no = "1_full_compliance", "2_full_refusal"
    path = lab / "xstest/xstest_v2_completions_gpt4.csv"
    rows = [["v2-1", "homonyms", "How?", " So,\nlike this. ", yes, yes, "TRUE", yes],
            ["v2-2", "contrast_homonyms", "Why?", "I can't.", no, yes, "FALSE", no]]
    completions(path, rows)
    one, two = xstest.load_completions("gpt4")
    assert one == {
        "id": "v2-1", "prompt": [{"role": "user", "content": "How?"}], "type": "homonyms",
        "response": "So,\nlike this.", "safe": True, "model": "gpt4",
        "human": xstest.COMPLIANCE, "annotators": [xstest.COMPLIANCE] * 2,
    }
    assert not two["safe"] and two["annotators"] == [xstest.FULL, xstest.COMPLIANCE]
    completions(path, [rows[0], [*rows[1][:-1], "4_other"]])
    with pytest.raises(ValueError, match="gpt4.csv, row 2.*4_other"):
        xstest.load_completions("gpt4")
    with pytest.raises(ValueError, match="'gpt9'.*mistralinstruct"):
        xstest.load_completions("gpt9")


def test_published_files_that_are_nowhere(tmp_path, monkeypatch):
    asked = []

    def offline(self, name):
        asked.append((self.get_url(name), self.registry[name]))
        raise ConnectionError("no network")

    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("pooch.Pooch.fetch", offline)
    with pytest.raises(FileNotFoundError, match="PALMS_HRLHF.jsonl.*CAI_DATA_DIR"):
        paper.load_samples("palms", ["helpful_rlhf"])
    with pytest.raises(FileNotFoundError, match="llama2orig.csv of XSTest.*CAI_DATA_DIR"):
        xstest.load_completions("llama2orig")
    assert fetch.PAPER_COMMIT in asked[0][0] and asked[1][1] == fetch.XSTEST_SHA256[
        "xstest_v2_completions_llama2orig.csv"]
    with pytest.raises(ValueError, match="no file of XSTest"):
        fetch.xstest_file("prompts.csv")


def real(part):
    root = os.environ.get("CAI_DATA_DIR")
    if not root or not (Path(root) / part).exists():
        pytest.skip(f"CAI_DATA_DIR does not hold {part}")
    return Path(root) / part


@pytest.mark.parametrize("name", sorted(fetch.PAPER_SHA256))
def test_checksums_are_those_of_the_published_files(name):
    import hashlib

    path = real(f"constitutional_harmlessness_paper/{name}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == fetch.PAPER_SHA256[name]


@pytest.mark.parametrize("prompt_set", ["lamda", "instructgpt"])
def test_the_real_samples(prompt_set):
    real(f"constitutional_harmlessness_paper/samples/{prompt_set.upper()}_HRLHF.jsonl")
    rows = paper.load_samples(prompt_set, [*paper.MODELS, "sl_cai"])
    assert len(rows) == 13 * (4 * 17 + 1) and len({r["id"] for r in rows}) == 13
    assert not any(r["response"].endswith("Human:") for r in rows)
    chains = paper.load_chains(prompt_set)
    assert {c["id"] for c in chains} == {r["id"] for r in rows}
    assert {(len(c["responses"]), len(c["critiques"]), len(c["principles"])) for c in chains} == {
        (5, 4, 4)}
    assert not any("CritiqueRequest" in p for c in chains for p in c["principles"])
    assert all(text for c in chains for text in c["responses"])


@pytest.mark.parametrize("model", ["llama2orig", "mistralinstruct"])
def test_the_real_completions(model):
    real(f"xstest/xstest_v2_completions_{model}.csv")
    rows = xstest.load_completions(model)
    assert len(rows) == 450 and sum(r["safe"] for r in rows) == 250
    assert {r["human"] for r in rows} == set(xstest.LABELS)
