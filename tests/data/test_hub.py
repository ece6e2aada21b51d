"""Data sets that `datasets` reads: folders as they are, the hub through a loader of our own."""

import datasets
import pytest

from cai_utils.data import hub, load
from cai_utils.experiment import files

HUB = "HuggingFaceH4/ultrafeedback_binarized"


def ultra(n, question="Is {} even?"):
    """Rows in the published form of UltraFeedback: the prompt beside conversations that hold it."""
    def row(i):
        ask = {"role": "user", "content": question.format(i)}
        sides = [[ask, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
        return {"prompt": ask["content"], "prompt_id": f"p{i}", "chosen": sides[0],
                "rejected": sides[1], "messages": sides[0], "score_chosen": 8.0,
                "score_rejected": 3.5}

    return datasets.Dataset.from_list([row(i) for i in range(n)])


@pytest.fixture
def online(monkeypatch):
    """A hub with one data set; what it was asked for."""
    asked, there = [], {"train_prefs": ultra(3), "test_prefs": ultra(2), "train_sft": ultra(1)}

    def load_dataset(name, config=None, split=None, revision=None):
        asked.append((name, config, split, revision))
        if name != HUB:
            raise ConnectionError("Couldn't reach\nthe Hub")
        if split and split not in there:
            raise ValueError(f'Unknown split "{split}". Should be one of {[*there]}.')
        return there[split] if split else datasets.DatasetDict(there)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_of_the_hub(online):
    rows = load.load_comparisons(f"{HUB}#train_prefs", "train", axis="helpful")
    assert len(rows) == 3 and rows[1]["prompt"] == [{"role": "user", "content": "Is 1 even?"}]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "Yes."}]
    assert (rows[1]["split"], rows[1]["axis"], rows[1]["score_rejected"]) == (
        "train", "helpful", 3.5)
    both = {"train": f"{HUB}@v1#train_prefs[:2]", "eval": f"{HUB}#default/test_prefs"}
    assert len(load.load_comparisons(both, "train", axis="x")) == 2
    assert [p["split"] for p in load.load_prompts(both, "eval")] == ["eval", "eval"]
    assert online == [(HUB, None, "train_prefs", None), (HUB, None, "train_prefs", "v1"),
                      (HUB, "default", "test_prefs", None)]


def test_what_the_hub_has_not_is_named(online):
    with pytest.raises(ValueError, match="which split. Write .*#SPLIT.*train_prefs, test_prefs"):
        load.load_comparisons(HUB, "train", axis="x")
    with pytest.raises(ValueError, match=f"{HUB}#dev: .*Should be one of .*train_sft"):
        load.load_comparisons(f"{HUB}#dev", "train", axis="x")
    with pytest.raises(FileNotFoundError, match="org/nothing: no file or folder here, and not "
                       "loaded from the hub .ConnectionError: Couldn't reach the Hub.*go online"):
        load.load_prompts("org/nothing")
    with pytest.raises(FileNotFoundError, match="no such file: org/rows.jsonl"):
        load.load_prompts("org/rows.jsonl")
    with pytest.raises(ValueError, match="missing column 'corrects'; there are: prompt, prom"):
        load.load_questions(f"{HUB}#train_sft")
    assert len(online) == 4


@pytest.mark.parametrize("names, split, found", [
    (["train", "test"], "eval", "test"), (["train", "validation"], "eval", "validation"),
    (["train", "test"], "train", "train"), (["filtered"], None, "filtered"),
])
def test_the_split_that_is_meant(names, split, found):
    assert hub._default("org/name", names, split) == found


def test_folders_of_data_files_and_saved_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "own"
    folder.mkdir()
    ultra(3).to_parquet(folder / "train.parquet")
    ultra(2).to_parquet(folder / "test.parquet")
    train, test = (load.load_comparisons(str(folder), s, axis="kind") for s in ("train", "eval"))
    assert (len(train), len(test)) == (3, 2)
    assert load.load_comparisons(f"{folder}#test[1:]", "train", axis="kind") == [
        {**test[1], "split": "train"}]
    datasets.DatasetDict({"train": ultra(4)}).save_to_disk(tmp_path / "saved")
    assert len(load.load_prompts(f"{tmp_path / 'saved'}", "train")) == 4
    with pytest.raises(ValueError, match="no split 'dev'; there are: train"):
        load.load_prompts(f"{tmp_path / 'saved'}#dev")
    (folder / "test.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(ValueError, match="test.parquet: a Git LFS pointer"):
        load.load_prompts(str(folder), "train")


@pytest.mark.parametrize("name", ["u.parquet", "u.csv", "u.json", "u.jsonl.gz"])
def test_ultrafeedback_in_files(tmp_path, name):
    rows = ultra(2)
    if name.endswith(".csv"):
        rows.to_csv(tmp_path / name)  # through pandas: arrays as numpy writes them
    elif name.endswith(".parquet"):
        rows.to_parquet(tmp_path / name)
    elif name.endswith(".gz"):
        files.write_rows(tmp_path / name, rows.to_list())
    else:
        rows.to_json(tmp_path / name, lines=False)
    got = load.load_comparisons(tmp_path / name, axis="helpful")
    assert [row["prompt"][0]["content"] for row in got] == ["Is 0 even?", "Is 1 even?"]
    assert got[0]["rejected"] == [{"role": "assistant", "content": "No."}]
