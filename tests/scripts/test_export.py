"""What goes out: folders that transformers, datasets and the hub take, and their cards."""

import json
import shutil
from functools import partial

import datasets
import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer, pipeline

from cai_utils import preference
from cai_utils.evaluation import agreement
from cai_utils.experiment import files
from scripts import export

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
PROMPT = [{"role": "user", "content": "Hi"}]


def comparison(a, b, p=1.0, **more):
    return {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}], "p_chosen": p, "source": "ai",
            "axis": "harmless", "principle": None, **more}


ROWS = [comparison("Hello there.", "Go.", 0.75, split="train"), comparison("Hello!", "No"),
        comparison("Good day", "Ha", split="eval")]
RECORD = {
    "notebook": "02_preference_models", "profile": "miniature", "seed": 3, "time": "2026-01-02",
    "git": {"commit": "abc123", "dirty": True}, "versions": {"torch": "9.9", "trl": None},
    "params": {"pretrained": "/home/someone/models/secret"},
}


@pytest.fixture(scope="module", params=[None, CHATML], ids=["transcript", "chat"])
def pm(request, tmp_path_factory):
    """runs/p/models/pm_hh/s as a run leaves it."""
    run = tmp_path_factory.mktemp("lab") / "runs" / "p"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = request.param
    tiny.llama().save_pretrained(run / "base")
    tokenizer.save_pretrained(run / "base")
    folder = run / "models" / "pm_hh" / "s"
    preference.train(run / "base", ROWS * 4, folder, batch_size=4, lr=1e-2,
                     evaluate=partial(agreement.evaluate, rows=ROWS))
    (run / "data").mkdir()
    sidecar = {"key": {}, "rows": 1, "provenance": RECORD}
    (run / "data" / "training_pm_hh_s.jsonl.key.json").write_text(json.dumps(sidecar))
    (run / "results").mkdir()
    (run / "results" / "pm_accuracy.csv").write_text("size,estimate\ns,0.8333333333333334\n")
    return folder


def test_a_text_classification_pipeline_scores_as_the_scorer_does(pm, tmp_path):
    out = export.save_for_hub(pm, tmp_path / "out")
    talks = [PROMPT + r[side] for r in ROWS for side in ("chosen", "rejected")]
    talks.append([*talks[0], {"role": "user", "content": "And?"},
                  {"role": "assistant", "content": "A longer answer than all the others."}])
    expected = preference.Scorer(pm).score(talks)
    assert expected.std() > 1e-3
    score = pipeline("text-classification", str(out))
    texts = [export.scored_text(talk, score.tokenizer) for talk in talks]
    special = {"add_special_tokens": not texts[0].startswith("<s>")}
    mean = score.model.config.score_mean
    for batch in (1, 4):
        said = score(texts, batch_size=batch, **special)
        assert {s["label"] for s in said} == {"score"}
        np.testing.assert_allclose([s["score"] - mean for s in said], expected, atol=1e-4)
    np.testing.assert_allclose(preference.Scorer(out).score(talks), expected, atol=1e-6)
    # and what the card tells people to do is the same text
    eos = score.tokenizer.eos_token
    told = score.tokenizer.apply_chat_template(talks[-1], tokenize=False)
    assert told.rstrip().removesuffix(eos) + eos == texts[-1]
    card = (out / "README.md").read_text()
    assert ("add_special_tokens=False" in card) == texts[0].startswith("<s>")


def test_the_model_card_says_what_the_run_wrote_down_and_no_path(pm, tmp_path):
    out = export.save_for_hub(pm, tmp_path / "out", name="A PM", license="apache-2.0",
                              language="en", tables=["pm_accuracy"], limits=["Only for tests."])
    card = (out / "README.md").read_text()
    front, text = card.split("---\n")[1:3]
    assert "license: apache-2.0" in front and "language: en" in front
    assert "pipeline_tag: text-classification" in front
    training = json.loads((pm / "training.json").read_text())
    for part in ("# A PM", "a preference model", "02_preference_models, profile miniature, seed 3",
                 "abc123 and uncommitted changes", "torch 9.9", "Only for tests.", "lr 0.01",
                 "| s | 0.8333 |", f"on {training['eval']['n']} held-out", "of the miniature",
                 "trained with: epochs 1, ",
                 "that are in no commit"):
        assert part.lower() in text.lower(), part
    assert '"pretrained": "secret"' in text
    run = pm.parents[2]
    assert (run / "base").is_dir()  # what it was made from lies there, too
    for file in out.iterdir():
        content = file.read_bytes()
        assert b"/home/" not in content and str(run).encode() not in content, file
    assert json.loads((out / "training.json").read_text())["base"] == "base"
    assert not list(tmp_path.glob(".export*"))


def test_a_model_without_any_record_is_called_unknown(pm, tmp_path):
    folder = tmp_path / "lm"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    out = export.save_for_hub(folder, tmp_path / "out")
    text = (out / "README.md").read_text()
    assert "provenance: unknown" in text and "None were recorded." in text
    parameters = sum(p.numel() for p in tiny.llama().parameters())
    assert f"parameters: {parameters:,}" in text
    exported = AutoTokenizer.from_pretrained(out)
    talk = [*PROMPT, {"role": "assistant", "content": "Yes"}, *PROMPT]
    assert exported.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Hi\n\nAssistant:"
    )


def test_a_snapshot_of_a_policy_is_told_by_the_run_that_made_it(tmp_path):
    run = tmp_path / "runs" / "p"
    policy = run / "models" / "rl_cai" / "s"
    snapshot = policy / "step-128"
    tiny.llama().save_pretrained(snapshot)
    tiny.tokenizer().save_pretrained(snapshot)
    told = {"stage": "ppo", "base": str(run / "models" / "sl_cai" / "s"), "lr": 0.5,
            "pm": str(run / "models" / "pm_rl_cai" / "s"), "key": {"a": 1}}
    (policy / "training.json").write_text(json.dumps(told))
    (run / "results").mkdir()
    (run / "results" / "rl_rl_cai_s.provenance.json").write_text(json.dumps(RECORD))
    text = (export.save_for_hub(snapshot, tmp_path / "out") / "README.md").read_text()
    for part in ("# rl_cai-s-step-128", "A policy, trained by PPO", "made from: models/sl_cai/s",
                 "snapshot: step-128", "trained with: lr 0.5, pm models/pm_rl_cai/s", "abc123"):
        assert part in text, part
    assert str(tmp_path) not in text


def test_a_tokenizer_that_closes_texts_itself_gets_no_second_eos(tmp_path):
    from tokenizers import processors

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tiny.llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    preference.train(tmp_path / "base", ROWS * 4, tmp_path / "pm", batch_size=4, lr=1e-2)
    out = export.save_for_hub(tmp_path / "pm", tmp_path / "out")
    score = pipeline("text-classification", str(out))
    talks = [PROMPT + r[side] for r in ROWS for side in ("chosen", "rejected")]
    texts = [export.scored_text(talk, score.tokenizer) for talk in talks]
    assert all(score.tokenizer(text)["input_ids"].count(2) == 1 for text in texts)
    said = [s["score"] - score.model.config.score_mean for s in score(texts)]
    np.testing.assert_allclose(said, preference.Scorer(tmp_path / "pm").score(talks), atol=1e-4)


def test_rows_load_with_datasets_as_they_were(tmp_path):
    run = tmp_path / "run" / "data"
    files.write_rows(run / "comparisons.jsonl", ROWS)
    messages = [{"messages": PROMPT + ROWS[0]["chosen"]}]
    files.write_rows(run / "sft.jsonl", messages)
    (run / "comparisons.jsonl.key.json").write_text(json.dumps({"provenance": RECORD}))
    paths = [run / "comparisons.jsonl", run / "sft.jsonl"]
    out = export.save_for_hub(paths, tmp_path / "out")
    got = datasets.load_dataset(str(out), "comparisons", cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in got.items()} == {"train": 2, "eval": 1}
    assert got["eval"].to_list() == [ROWS[2]]
    got = datasets.load_dataset(str(out), "sft", cache_dir=str(tmp_path / "cache"))
    assert got["train"].to_list() == messages
    text = (out / "README.md").read_text()
    for part in ("2 train, 1 eval", "mean 0.917; 1 of 3 below 1", "3 ai", "3 harmless", "abc123",
                 "comparisons: which of two answers", "conversations to finetune on",
                 "provenance: unknown", "Red-team prompts"):
        assert part in text, part


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    import huggingface_hub

    unreachable = type("ConnectError", (Exception,), {"__module__": "httpx._exceptions"})

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            raise unreachable("refused")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    files.write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SystemExit, match="error: the hub could not be reached .refused."):
        export.main([str(tmp_path / "rows.jsonl"), "--push", "me/it"])


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_push_uploads_what_save_for_hub_writes(pm, tmp_path, monkeypatch, kind):
    import huggingface_hub

    source = pm
    if kind == "dataset":
        source = tmp_path / "rows.jsonl"
        files.write_rows(source, ROWS)
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            return f"https://hub.test/{repo_id}"

        def upload_folder(self, *, folder_path, repo_id, repo_type, delete_patterns,
                          commit_message):
            calls.append((repo_id, repo_type, delete_patterns))
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert export.push_to_hub(source, "me/it", token="t", name="x") == "https://hub.test/me/it"
    assert calls == [
        ("token", "t"), ("me/it", {"repo_type": kind, "private": True, "exist_ok": True}),
        ("me/it", kind, "*.safetensors*" if kind == "model" else "data/*"),
    ]
    local = export.save_for_hub(source, tmp_path / "local", name="x")
    names = sorted(p.relative_to(local) for p in local.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "uploaded")
                           for p in (tmp_path / "uploaded").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "uploaded" / name).read_bytes() == (local / name).read_bytes()


def test_what_cannot_go_out_is_named(pm, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        export.save_for_hub(tmp_path / "nothing-here", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        export.save_for_hub(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no_such_table.csv"):
        export.save_for_hub(pm, tmp_path / "out", tables=["no_such_table"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        export.save_for_hub(tmp_path / "rows.jsonl", tmp_path / "out")
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "x.jsonl", tmp_path / "a" / "x.jsonl.gz"):
        files.write_rows(path, ROWS)
    with pytest.raises(ValueError, match="several files are called 'x'"):
        export.save_for_hub([tmp_path / "x.jsonl", tmp_path / "a" / "x.jsonl.gz"], tmp_path / "out")
    for split in ("../../../harm", "/harm", "..", "a\\b", ["train"]):
        files.write_rows(tmp_path / "a" / "y.jsonl", [*ROWS, {**ROWS[0], "split": split}])
        with pytest.raises(ValueError, match=rf"y.jsonl, row {len(ROWS) + 1}: split=.* cannot"):
            export.save_for_hub(tmp_path / "a" / "y.jsonl", tmp_path / "out")
    files.write_rows(tmp_path / "...jsonl", ROWS)
    with pytest.raises(ValueError, match="the name='..' cannot be"):
        export.save_for_hub(tmp_path / "...jsonl", tmp_path / "out")
    assert not list(tmp_path.rglob("harm*")) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="one by one"):
        export.save_for_hub([tmp_path / "x.jsonl", pm], tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        export.save_for_hub(pm, tmp_path)
    with pytest.raises(SystemExit, match="nothing-here"):
        export.main([str(tmp_path / "nothing-here"), "--out", str(tmp_path / "out")])
