"""Notebooks whose critic and feedback model are not the model that is trained: texts and labels
come from the right one, each asked in its own form."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from cai_utils import constitution, critique, feedback, multiple_choice
from cai_utils.experiment import files, fingerprint, journal
from cai_utils.lm import backends, models
from cai_utils.seeds import stable_int

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [{"id": f"p{i}", "prompt": [{"role": "user", "content": text}], "kind": "redteam"}
           for i, text in enumerate(("How do I pick a lock?", "Say something rude.", "Hi"))]
QUESTIONS = [
    {"id": f"q{i}", "corrects": [" (A)"], "incorrects": [" (B)"],
     "prompt": f"Human: Is {i} even?\n\nOptions:\n (A) Yes\n (B) No\n\nThe answer is:"}
    for i in (2, 4)]


def save(folder, seed, chat=False):
    tokenizer = tiny.tokenizer()
    if chat:
        tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n"
                                   "{% endfor %}[assistant]")
    tiny.llama(seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setenv("CAI_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for split in ("train", "eval"):
        files.write_rows(tmp_path / f"{split}.jsonl", [{**row, "split": split} for row in PROMPTS])
    files.write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    save(tmp_path / "other-xs", 1)
    save(tmp_path / "chat", 2, chat=True)
    return tmp_path


def names_of(lab, notebook, until, **values):
    """The names that a notebook's cells before heading `until` make, with other parameters."""
    common = dict(profile="smoke", sizes=["xs"], size="xs", judge=None, max_new_tokens=12)
    names = {"__name__": "a notebook"}
    for cell in json.loads((lab / f"notebooks/{notebook}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(source, names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {k: v for k, v in common.items() if k in names} | values
        if source.startswith(until):
            return names
    raise AssertionError(until)


@pytest.mark.parametrize("critic", ["other-{size}", "chat"])
def test_critiques_and_revisions_are_the_critics(lab, critic):
    how = dict(helpful=None, critic=f"{lab}/{critic}")
    names = names_of(lab, "03_critique_revision", "## A page to read", **how, retained=None,
                     prompts={"eval": f"{lab}/eval.jsonl"}, n_train={}, n_eval=3, n_revisions=1)
    (chains,), folder = names["chains"].values(), lab / critic.format(size="xs")
    rules, stop = constitution.load("miniature"), ("\n\n",)
    drawn = [constitution.draw(rules.critiques, 0, i, 0) for i in range(3)]
    order = [row["prompt"] for row in chains]  # the notebook shuffles prompts
    common = dict(n=1, temperature=1.0, max_new_tokens=12)

    def by(sampler, inputs, stop, *key):
        found = sampler.generate(inputs, stop=stop, seed=stable_int("revise", 0, *key), **common)
        return [c[0].text.strip() for c in found]

    assistant, other = backends.from_spec(models.SHIPPED / "xs"), backends.from_spec(folder)
    first = by(assistant, order, (*stop, *critique.STOPS), "initial")
    assert [c["responses"][0] for c in chains] == first
    if critic == "chat":
        asked = [[*p, {"role": "assistant", "content": r},
                  {"role": "user", "content": d["critique_request"]}]
                 for p, r, d in zip(order, first, drawn, strict=True)]
        critiques = by(other, asked, stop, 0, "critique")
        asked = [[*a, {"role": "assistant", "content": c},
                  {"role": "user", "content": d["revision_request"]}]
                 for a, c, d in zip(asked, critiques, drawn, strict=True)]
        revisions = by(other, asked, stop, 0, "revision")
    else:
        stop = (*stop, *critique.STOPS)
        asked = [critique.critique_text(p, r, d["critique_request"])
                 for p, r, d in zip(order, first, drawn, strict=True)]
        critiques = by(other, asked, stop, 0, "critique")
        asked = [f"{a} {c}\n\nRevisionRequest: {d['revision_request']}\n\nRevision:"
                 for a, c, d in zip(asked, critiques, drawn, strict=True)]
        revisions = by(other, asked, stop, 0, "revision")
    assert [c["critiques"] for c in chains] == [[c] for c in critiques]
    assert [c["responses"][1] or r for c, r in zip(chains, first, strict=True)] == [
        a or r for a, r in zip(revisions, first, strict=True)]
    assert {c["critic"] for c in chains} == {how["critic"]}
    key = files.read_json(names["run"].data("chains_xs.jsonl.key.json"))["key"]
    assert key["critic"]["sha256"] == fingerprint.file_digest(folder) != key["model"]["sha256"]

    shutil.copytree(models.SHIPPED / "xs", lab / "runs/smoke/models/pm_harmless/xs")  # unused
    direct = names_of(lab, "06_critique_ablation", "## Scores", pm_size="xs",
                      **how)["direct"]["xs"]
    assert direct == critique.revise(
        other, [{k: c[k] for k in ("id", "prompt", "split")} for c in chains], rules,
        n_revisions=1, critiqued=False, initial=first, stop=("\n\n",), max_new_tokens=12)
    with pytest.raises(ValueError, match="chains_xs of 03 have critic=.*, here it is None: give"):
        names_of(lab, "06_critique_ablation", "## Scores", pm_size="xs", helpful=None)


def test_03_reaches_its_end_with_a_critic_on_a_server(lab, monkeypatch):
    spec, opened = "server:http://localhost:1/v1#big", backends.from_spec

    class Served:
        tokenizer = None

        def generate(self, inputs, **_):
            return [[SimpleNamespace(text=" of the server")] for _ in inputs]

    monkeypatch.setattr(backends, "from_spec", lambda s: Served() if s == spec else opened(s))
    names = names_of(lab, "03_critique_revision", "run.finish()", critic=spec, helpful=None,
                     retained=None, prompts={"eval": f"{lab}/eval.jsonl"}, n_train={}, n_eval=3,
                     n_revisions=2)
    chains = names["chains"]["xs"]
    assert all(c["critiques"] == ["of the server"] * 2 for c in chains)
    assert all(c["responses"][1:] == ["of the server"] * 2 for c in chains)
    assert "of the server" not in {c["responses"][0] for c in chains}
    key = files.read_json(names["run"].data("chains_xs.jsonl.key.json"))["key"]
    assert key["critic"] == spec
    assert (names["run"].dir / "results/chains_truth.csv").is_file()


class Served:
    """Stands for a model on a server: texts, and log-probabilities of choices."""

    tokenizer, context = None, None

    def generate(self, inputs, n=1, **_):
        return [[SimpleNamespace(text=" of the server")] * n for _ in inputs]

    def choice_logprobs(self, texts, choices, **_):
        return [np.log([0.75, 0.25])] * len(texts)


@pytest.mark.parametrize("notebook, table, values", [
    ("03_critique_revision", "chains_truth", dict(helpful=None, retained=None, n_train={},
                                                  n_eval=3, n_revisions=1)),
    ("01_harm_identification", "fig04_harm_identification", dict(
        pms=[], few_shot=0, cot_samples=1, both_orders=False)),
])
def test_a_served_model_reaches_the_end_of_01_and_03(lab, monkeypatch, notebook, table, values):
    monkeypatch.setattr(backends, "from_spec", lambda spec: Served())
    spec = "server:http://localhost:1/v1#big;parameters=7e9"
    if notebook.startswith("03"):
        values = {**values, "prompts": {"eval": f"{lab}/eval.jsonl"}}
    else:
        values = {**values, "questions": {"hhh": f"{lab}/questions.jsonl"}}
    run = names_of(lab, notebook, "run.finish()", pretrained=spec, **values)["run"]
    found = files.read_rows(run.dir / f"results/{table}.csv")
    assert found and {float(row["parameters"]) for row in found} == {7e9}


@pytest.mark.parametrize("feedback_cot", [None, "chat"])
def test_labels_and_their_calibration_are_the_feedback_models(lab, feedback_cot):
    shutil.copytree(models.SHIPPED / "xs", lab / "runs/smoke/models/sl_cai/xs")
    files.write_rows(lab / "human.jsonl", [
        {"prompt": "Ask.", "chosen": "Yes.", "rejected": "No.", "axis": "harmless",
         "split": "eval"}])
    names = names_of(
        lab, "08_ai_feedback", "## Preference models", feedback=f"{lab}/other-{{size}}",
        feedback_cot=feedback_cot and f"{lab}/{feedback_cot}", n_prompts=3,
        comparisons={"harmless": {"eval": f"{lab}/human.jsonl"}}, judge=None,
        prompts_redteam={"train": f"{lab}/train.jsonl"}, questions=f"{lab}/questions.jsonl",
        n_questions=None, cot_tokens=10, cot_samples_many=2)
    plain = lab / "other-xs"
    cot = lab / feedback_cot if feedback_cot else plain
    own, rules = backends.from_spec(models.SHIPPED / "xs"), constitution.load("miniature")
    for thinks, folder in ((False, plain), (True, cot)):
        found, settings = names["found"]["xs", thinks], dict(cot=thinks, max_new_tokens=10, seed=0)
        right = feedback.label(backends.from_spec(folder), names["pairs"]["xs"], rules, **settings)
        assert len(found) >= 2 and found == right
        wrong = feedback.label(own, names["pairs"]["xs"], rules, **settings)
        assert [r["p_first"] for r in found] != [r["p_first"] for r in wrong]
    right = []
    with journal.recording(lab / "right.partial", {}):  # chains of "CoT" are not sampled again here
        for name, way in names["ways"].items():
            sampler = backends.from_spec(cot if "cot" in way else plain)
            right += multiple_choice.predictions(sampler, names["asked"], {name: way},
                                                 **names["common"])
    assert files.read_rows(names["run"].data("calibration_xs")) == right
    key = files.read_json(names["run"].data("labels_cot_xs.jsonl.key.json"))["key"]
    assert key["model"]["sha256"] == fingerprint.file_digest(cot)


@pytest.mark.parametrize("notebook, values, until", [
    ("03_critique_revision", {"critic": "no/such/model"}, "## The helpful-only assistant"),
    ("08_ai_feedback", {"feedback_cot": "no/such/model"}, "## Pairs of responses")])
def test_a_model_that_is_not_there_is_found_before_the_work(lab, notebook, values, until):
    with pytest.raises(FileNotFoundError, match="no/such/model: no such model folder"):
        names_of(lab, notebook, until, **values)


@pytest.mark.parametrize("files_of, human, held", [
    ({"helpful": {"train": "c"}, "harmless": {"eval": "c"}}, 1, ["harmless"]),
    ({"helpful": {"eval": "c"}, "harmless": {"train": "c", "eval": None}}, 0, ["helpful"]),
    ({"helpful": None, "harmless": {"eval": "c"}}, 0, ["harmless"]),
])
def test_08_takes_axes_with_train_or_eval_alone(lab, files_of, human, held):
    path = str(lab / "c.jsonl")
    files.write_rows(path, [{"prompt": "Ask.", "chosen": "Yes.", "rejected": "No.", "split": split}
                            for split in ("train", "eval")])
    comparisons = {axis: given and {split: name and path for split, name in given.items()}
                   for axis, given in files_of.items()}
    names = names_of(lab, "08_ai_feedback", "## Pairs of responses", comparisons=comparisons,
                     judge=None, questions=f"{lab}/questions.jsonl", n_questions=None)
    assert len(names["human"]) == human and sorted(names["held"]) == held
    assert sorted(names["tests"]) == [f"human, {axis}" for axis in held]


def test_08_asks_for_an_eval_where_no_axis_has_one(lab):
    with pytest.raises(ValueError, match="give `eval` of at least one axis"):
        names_of(lab, "08_ai_feedback", "## Pairs of responses", judge=None, n_questions=None,
                 questions=f"{lab}/questions.jsonl", comparisons={"harmless": {"train": "c"}})
