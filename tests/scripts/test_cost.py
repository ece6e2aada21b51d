"""The profile of the paper's counts, and what it would cost."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from cai_utils.data import load
from cai_utils.experiment import files, params
from scripts import cost

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "params" / "paper"
# (layers, hidden, rows of the vocabulary) of the series' published configs
PYTHIA = {
    "410m": (24, 1024, 50304), "1.4b": (24, 2048, 50304), "2.8b": (32, 2560, 50304),
    "6.9b": (32, 4096, 50432), "12b": (36, 5120, 50688),
}
PRETRAINING_LR = {"410m": 3e-4, "1.4b": 2e-4, "2.8b": 1.6e-4, "6.9b": 1.2e-4, "12b": 1.2e-4}
SMALL = {
    "counts": {"redteam_human": 6, "redteam_generated": 4, "revisions": 2, "helpful": 5,
               "helpful_samples": 2, "helpful_comparisons": 3, "harmless_comparisons": 2,
               "rl_redteam": 20, "rl_helpful": 15},
    "tokens": {"prompt": 10, "response": 5, "critique": 4, "request": 3, "question": 7, "chain": 8,
               "few_shot": 1},
    "labels": {"orders": 2, "chains": 3},
    "rl": {"passes": 4, "epochs": 2},
    "gpu": {"peak_flops": 7200, "read": 0.5, "sampled": 0.25, "trained": 0.5},
    "models": {"a": 2, "b": 1000},
    "throughput": {"b": {"read": 100, "sampled": 10, "trained": 50}},
}


def written(tmp_path, given):
    path = tmp_path / "cost.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def test_tokens_and_hours_by_hand(tmp_path):
    given = cost.load(written(tmp_path, SMALL))
    got = cost.tokens(given).set_index("stage")[["read", "sampled", "trained"]].T.to_dict("list")
    rl = [50 * (10 + 4 * 15), 50 * 5, 50 * 2 * 2 * 15]  # 50 episodes; two networks, two epochs
    assert got == {
        "red-team responses": [100, 50, 0],
        # 10 prompts, 2 steps: 1 + 15 + 3 tokens before a critique, 4 + 3 more before a revision
        "critiques and revisions": [20 * (19 + 26), 20 * (4 + 5), 0],
        "helpful responses": [100, 50, 0],
        "SL-CAI": [0, 0, (20 + 10) * 15],
        "pairs of responses": [200, 100, 0],
        "AI labels": [20 * 28, 0, 0],
        "AI labels with CoT": [60 * 28, 60 * 8, 0],
        "PM, helpful": [0, 0, 3 * 30], "PM, HH": [0, 0, 5 * 30],
        "PM, RL-CAI": [0, 0, 13 * 30], "PM, RL-CAI with CoT": [0, 0, 13 * 30],
        "RL, helpful RLHF": rl, "RL, HH RLHF": rl, "RL, RL-CAI": rl, "RL, RL-CAI with CoT": rl,
    }
    # size a, estimated: 4 FLOP to read or sample a token, 12 to train on one, of 7200 a second
    assert cost.throughput(given, "a") == {
        "read": 900, "sampled": 450, "trained": 300, "how": "estimated"}
    table = cost.table(given).set_index(["size", "stage"])
    assert table.loc[("a", "RL, RL-CAI"), "gpu_hours"] == pytest.approx(
        (3500 / 900 + 250 / 450 + 3000 / 300) / 3600)
    assert table.loc[("b", "RL, RL-CAI"), "gpu_hours"] == pytest.approx((35 + 25 + 60) / 3600)
    assert table.loc[("b", "SL-CAI"), "gpu_hours"] == pytest.approx(9 / 3600)
    assert set(table.loc["b", "how"]) == {"measured"} and len(table) == 2 * 15
    total = cost.markdown(given).splitlines()[-1]
    assert total.startswith("| all |") and len(cost.markdown(given).splitlines()) == 2 + 15 + 1


@pytest.mark.parametrize("change, message", [
    (lambda g: g.pop("tokens"), "missing section 'tokens'"),
    (lambda g: g["counts"].pop("revisions"), "counts: 'revisions' is None"),
    (lambda g: g["counts"].update(revisions=-1), "counts: 'revisions' is -1"),
    (lambda g: g["counts"].update(revisions="four"), "counts: 'revisions' is 'four'"),
    (lambda g: g["tokens"].update(words=1), "tokens: unknown field 'words'"),
    (lambda g: g.update(hours=1), "unknown section 'hours'"),
    (lambda g: g.update(models={}), "missing section 'models'"),
    (lambda g: g["throughput"].update(c={"read": 1}), "throughput: 'c' is not one of models (a, b"),
    (lambda g: g["throughput"]["b"].pop("read"), "throughput.b: 'read' is None"),
])
def test_a_fault_in_a_cost_file_is_named(tmp_path, change, message):
    given = json.loads(json.dumps(SMALL))
    change(given)
    path = written(tmp_path, given)
    with pytest.raises(ValueError) as error:
        cost.load(path)
    assert message in str(error.value) and str(path) in str(error.value)
    with pytest.raises(SystemExit, match="error: "):
        cost.main([str(path)])


def test_a_speed_of_zero_and_no_file(tmp_path):
    given = json.loads(json.dumps(SMALL))
    given["gpu"]["trained"] = 0
    with pytest.raises(ValueError, match="a: 0 tokens trained a second"):
        cost.table(cost.load(written(tmp_path, given)))
    with pytest.raises(FileNotFoundError, match="params/paper/cost.yaml"):
        cost.load(tmp_path / "none.yaml")


def test_the_readme_shows_what_the_file_computes():
    given = cost.load(FOLDER / "cost.yaml")
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert cost.markdown(given) in text, "python -m scripts.cost prints the table to put there"
    for size, (layers, hidden, vocabulary) in PYTHIA.items():
        body = layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden
        assert given["models"][size] == body + vocabulary * hidden


def test_the_profile_holds_the_counts_of_the_paper():
    counts = cost.load(FOLDER / "cost.yaml")["counts"]
    redteam = counts["redteam_human"] + counts["redteam_generated"]
    assert redteam == 182831
    merged = {n: params.merge_params(ROOT, n, "paper") for n in params.notebooks(ROOT)
              if (FOLDER / f"{n}.yaml").is_file()}
    assert len(merged) >= 9
    for values in merged.values():
        params.check_sizes(ROOT, values)
    sizes = list(PYTHIA)
    assert params.known_sizes(params.read_params(FOLDER / "_common.yaml")) == sizes
    chains = merged["03_critique_revision"]
    assert chains["n_train"] == dict.fromkeys(sizes, redteam)
    assert chains["n_revisions"] == counts["revisions"] == 4
    assert merged["08_ai_feedback"]["n_prompts"] == redteam
    assert merged["08_ai_feedback"]["n_human"] == counts["helpful_comparisons"]
    sl = merged["07_sl_cai"]
    assert (sl["n_helpful"], sl["sft_batch_size"], sl["sft_epochs"]) == (135296, 1024, 1)
    assert sl["samples_helpful"] == counts["helpful_samples"] == 2 and sl["temperature"] == 1.0
    half = {size: pytest.approx(0.5 * rate) for size, rate in PRETRAINING_LR.items()}
    assert sl["sft_lr"] == chains["sft_lr"] == half
    for name, parts in (("03_critique_revision", "sft"), ("07_sl_cai", "sft"),
                        ("02_preference_models", "pm"), ("08_ai_feedback", "pm")):
        own = merged[name]
        assert own["max_length"] == 1024 and set(own[f"{parts}_accumulation"]) == set(sizes)
        for size in sizes:  # what training_arguments would refuse
            assert own[f"{parts}_batch_size"] % own[f"{parts}_accumulation"][size] == 0
    rl = merged["09_rl"]
    prompts = redteam + counts["helpful"] + counts["rl_redteam"] + counts["rl_helpful"]
    ppo = rl["settings"]["ppo"]
    assert ppo["iterations"] == math.ceil(prompts / ppo["episodes"])
    assert rl["n_prompts"] == redteam + counts["rl_redteam"]


def test_the_preparation_in_the_readme_makes_what_the_notebooks_read(tmp_path, monkeypatch):
    start = "\n\nHuman: Hi\n\nAssistant:"
    for subset in ("harmless-base", "helpful-base"):
        folder = tmp_path / "published" / "hh-rlhf" / subset
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            row = {"chosen": f"{start} {split}", "rejected": f"{start} no"}
            with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
                file.write(json.dumps(row) + "\n")
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path / "published"))
    monkeypatch.chdir(tmp_path)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.S).group(1), {})
    for name, kind in (("prompts_redteam", "redteam"), ("prompts_helpful", "benign")):
        path = tmp_path / "runs" / "paper" / "data" / f"{name}.jsonl"
        for split in ("train", "eval"):
            (row,) = load.load_prompts(path, split)
            assert row["prompt"] == [{"role": "user", "content": "Hi"}] and row["kind"] == kind
    (row,) = files.read_rows(tmp_path / "runs" / "paper" / "data" / "demonstrations.jsonl")
    assert row["messages"][-1] == {"role": "assistant", "content": "train"}
