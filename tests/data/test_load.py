"""Loaders, on small files of our own always, and on the published ones where they are."""

import gzip
import json
import os
import warnings
from pathlib import Path

import pandas as pd
import pytest

from cai_utils import multiple_choice
from cai_utils.data import load
from cai_utils.experiment import files

USER = [{"role": "user", "content": "Hi"}]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def hh(prompt, chosen, rejected):
    lead = f"{prompt}\n\nAssistant:"
    return {"chosen": lead + chosen, "rejected": lead + rejected}


HH = [
    hh("\n\nHuman: Hi", " Hello! ", " Go."),
    hh("\n\nHuman: Hi", "", " Go."),  # an empty answer
    hh("\n\nHuman: Hi\n\nHuman: You?", " Hello!", " Go."),  # two turns of the human
    {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
    hh("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nin two parts", " D", " E"),
    {"chosen": "Human", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
    hh("\n\nHuman: Hi", " Hello!", "  "),  # an empty answer
]


@pytest.fixture
def hh_dir(tmp_path, monkeypatch):
    jsonl(tmp_path / "hh-rlhf/harmless-base/test.jsonl.gz", HH)
    jsonl(tmp_path / "hh-rlhf/helpful-base/train.jsonl", HH[:1])
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_round_trip(tmp_path, name):
    rows = [{"id": "1", "text": "a\n\u2028é"}, {"id": "2", "list": [1, None]}]
    files.write_rows(tmp_path / "new" / name, rows)
    assert files.read_rows(tmp_path / "new" / name) == rows
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.write_rows(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        files.write_rows(path, rows())
    assert files.read_rows(path) == [{"a": 1}]
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        files.read_rows(tmp_path / "nowhere.jsonl")
    path = tmp_path / "torn.jsonl"
    path.write_text('{"a": 1}\n\n{"a": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"torn.jsonl, line 3"):
        files.read_rows(path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1.*JSON object"):
        files.read_rows(path)
    other = tmp_path / "rows.txt"
    other.write_text("x")
    with pytest.raises(ValueError, match="rows.txt"):
        files.read_rows(other)
    with pytest.raises(ValueError, match="rows.txt"):
        files.write_rows(other, [])
    empty = jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="no rows"):
        load.load_prompts(empty)


def test_prompts_from_files(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [
        {"id": "x", "prompt": USER, "kind": "benign", "split": "eval"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:"},
        {"prompt": "Just text"},
    ])
    rows = load.load_prompts(path)
    assert rows[0] == {"id": "x", "prompt": USER, "kind": "benign", "split": "eval"}
    assert [m["content"] for m in rows[1]["prompt"]] == ["Hi", "Ho", "And?"]
    assert rows[2] == {"id": "2", "prompt": [{"role": "user", "content": "Just text"}]}
    assert [r["id"] for r in load.load_prompts(path, split="eval")] == ["x"]
    with pytest.raises(ValueError, match="split='train'"):
        load.load_prompts(path, split="train")
    with pytest.raises(ValueError, match="split='test'"):
        load.load_prompts(path, split="test")


def test_csv_and_parquet(tmp_path):
    frame = pd.DataFrame({"id": [7, 8], "prompt": ["Hi, you\nthere", json.dumps(USER)]})
    frame.to_csv(tmp_path / "p.csv", index=False)
    rows = load.load_prompts(tmp_path / "p.csv")
    assert [r["id"] for r in rows] == ["7", "8"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Hi, you\nthere"}]
    assert rows[1]["prompt"] == USER
    pd.DataFrame({"prompt": [USER, USER]}).to_parquet(tmp_path / "p.parquet")
    assert [r["prompt"] for r in load.load_prompts(tmp_path / "p.parquet")] == [USER, USER]


@pytest.mark.parametrize("prompt", [
    None, "", [], [{"role": "assistant", "content": "Hi"}], [{"role": "bot", "content": "Hi"}],
    3, "\n\nHuman: a\n\nAssistant: b",
])
def test_a_bad_prompt_is_named(tmp_path, prompt):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": USER}, {"prompt": prompt}])
    with pytest.raises(ValueError, match=r"p.jsonl, row 2.*prompt"):
        load.load_prompts(path)


def test_limit_draws_reproducibly(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"text {i}"} for i in range(100)])
    ids = [r["id"] for r in load.load_prompts(path, limit=10, seed=1)]
    assert ids == [r["id"] for r in load.load_prompts(path, limit=10, seed=1)]
    assert ids != [r["id"] for r in load.load_prompts(path, limit=10, seed=2)]
    assert len(set(ids)) == 10 and [int(i) for i in ids] == sorted(map(int, ids))
    assert len(load.load_prompts(path, limit=1000)) == 100
    with pytest.raises(ValueError, match="limit=0"):
        load.load_prompts(path, limit=0)


def test_hh_rlhf(hh_dir):
    with pytest.warns(UserWarning, match=(
        "skipped 5 of 7 rows: 1 with a text that is not a transcript, 2 with an empty last answer, "
        "1 with no common prompt, 1 with two turns of one role in a row"
    )):
        rows = load.load_comparisons("hh-rlhf/harmless-base/test")
    assert rows[0] == {
        "id": "0", "prompt": USER, "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "Go."}], "p_chosen": 1.0, "source": "human",
        "axis": "harmless", "principle": None, "split": "eval",
    }
    assert [m["content"] for m in rows[1]["prompt"]] == ["A", "B", "C\n\nin two parts"]
    with pytest.warns(UserWarning, match="skipped 5 of 7"):
        prompts = load.load_prompts("hh-rlhf/harmless-base/test", split="eval")
    assert [p["prompt"] for p in prompts] == [r["prompt"] for r in rows]
    assert [p["id"] for p in prompts] == ["0", "4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        helpful = load.load_comparisons("hh-rlhf/helpful-base/train")
    assert (helpful[0]["axis"], helpful[0]["split"]) == ("helpful", "train")


def test_hh_rlhf_strict_and_bad_specs(hh_dir):
    with pytest.raises(ValueError, match=r"test.jsonl.gz, line 2: an empty last answer"):
        load.load_comparisons("hh-rlhf/harmless-base/test", strict=True)
    with pytest.raises(ValueError, match="hh-rlhf/<subset>/<train or test>"):
        load.load_comparisons("hh-rlhf/harmless-base")
    with pytest.raises(ValueError, match="its subsets are harmless-base, helpful-base, "):
        load.load_comparisons("hh-rlhf/harmless")
    path = jsonl(hh_dir / "mine.jsonl", HH[:1])
    with pytest.raises(ValueError, match="axis='helpful'"):
        load.load_comparisons(path)
    assert load.load_comparisons(path, axis="helpful")[0]["axis"] == "helpful"


ATTEMPTS = [
    {"transcript": "\n\nHuman: A?\n\nAssistant: B\n\nHuman: C?\n\nAssistant: D ", "rating": 4.0,
     "task_description": "to upset it", "tags": None},
    {"transcript": "\n\nAssistant: B", "rating": 0.0, "task_description": "", "tags": ["x"]},
    {"transcript": "\n\nHuman: A?\n\nHuman: B?\n\nAssistant: C", "rating": 1.0},
    {"transcript": None},
    {"transcript": "\n\nHuman: Last?", "rating": 2.0},
]


@pytest.mark.parametrize("name", ["red_team_attempts.jsonl.gz", "red_team_attempts.jsonl"])
@pytest.mark.parametrize("array", [False, True])
def test_red_team_attempts(tmp_path, monkeypatch, name, array):
    path = jsonl(tmp_path / "hh-rlhf/red-team-attempts" / name, ATTEMPTS)
    if array:  # one JSON array, over several lines
        text = json.dumps(ATTEMPTS, indent=1).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match=(
        "skipped 3 of 5 rows: 1 with a text that is not a transcript, 1 with no human turn, "
        "1 with two turns of one role in a row"
    )):
        rows = load.load_prompts("hh-rlhf/red-team-attempts")
    assert rows[0] == {
        "id": "0", "rating": 4.0, "task_description": "to upset it", "tags": None,
        "prompt": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"},
                   {"role": "user", "content": "C?"}],
    }
    assert rows[1] == {"id": "4", "rating": 2.0,
                       "prompt": [{"role": "user", "content": "Last?"}]}
    with pytest.raises(ValueError, match=r"row 2: no human turn"):
        load.load_prompts("hh-rlhf/red-team-attempts", strict=True)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_file_by_its_path_gives_the_rows_of_its_name(hh_dir):
    """Whatever the folders above it are called."""
    far = hh_dir / "train-helpful"
    for name in ("harmless-base/test", "helpful-base/train"):
        (path,) = hh_dir.glob(f"hh-rlhf/{name}.jsonl*")
        copy = far / name.split("/")[0] / path.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
        for read in (load.load_comparisons, load.load_prompts):
            assert read(copy) == read(path) == read(f"hh-rlhf/{name}")
    array = hh_dir / "hh-rlhf/red-team-attempts/red_team_attempts.jsonl.gz"
    array.parent.mkdir()
    array.write_bytes(gzip.compress(json.dumps(ATTEMPTS, indent=1).encode()))
    assert load.load_prompts(array) == load.load_prompts("hh-rlhf/red-team-attempts")


def test_null_in_a_transcript_past_the_first_row(hh_dir):
    path = jsonl(hh_dir / "harmless-base/test.jsonl", [
        HH[0], {**HH[0], "chosen": None}, {"rejected": HH[0]["rejected"]}, {**HH[0], "chosen": 5},
        {"chosen": "Assistant:", "rejected": "Assistant:"}])
    with pytest.warns(UserWarning, match="skipped 4 of 5 rows: 3 with a text that is not a "
                                         "transcript, 1 with an empty last answer"):
        assert len(load.load_comparisons(path)) == 1
    with pytest.raises(ValueError, match="line 2: a text that is not a transcript"):
        load.load_comparisons(path, strict=True)


def test_windows_line_ends_part_the_turns_of_transcripts(tmp_path):
    rows = [{k: v.replace("\n", "\r\n") for k, v in HH[i].items()} for i in (0, 4)]
    path = jsonl(tmp_path / "harmless-base/test.jsonl", rows)
    got = load.load_comparisons(path)
    assert [len(row["prompt"]) for row in got] == [1, 3]
    text = "\r\n\r\nHuman: Hi\r\n\r\nAssistant: Ho\r\n\r\nHuman: And?\r\n\r\nAssistant:"
    (row,) = load.load_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": text}]))
    assert [m["content"] for m in row["prompt"]] == ["Hi", "Ho", "And?"]


def test_transcripts_that_end_in_an_empty_human_turn(tmp_path):
    texts = ["\n\nHuman: A?\n\nAssistant: B\n\nHuman:", "\n\nHuman: A?\n\nHuman: \n\nAssistant: B"]
    path = jsonl(tmp_path / "r.jsonl", [{"transcript": text} for text in texts])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row["prompt"] for row in load.load_prompts(path)] == [
            [{"role": "user", "content": "A?"}]] * 2
        rows = [{side: text + "\n\nHuman:" for side, text in HH[4].items()}, HH[4]]
        one, two = load.load_comparisons(jsonl(tmp_path / "harmless-base/test.jsonl", rows))
    assert one == {**two, "id": "0"}


@pytest.mark.parametrize("read, row, fault", [
    (load.load_prompts, {"question": "a", "n": 1},
     "missing column 'prompt'; there are: question, n"),
    (load.load_comparisons, {"prompt": "a", "response": "b"},
     "missing column 'chosen'; there are: prompt, response"),
    (load.load_questions, {"prompt": "a", "corrects": ["b"]}, "missing column 'incorrects'"),
])
def test_a_missing_column_is_named_as_missing(tmp_path, read, row, fault):
    with pytest.raises(ValueError, match=f"m.jsonl: {fault}"):
        read(jsonl(tmp_path / "m.jsonl", [row, row]))


@pytest.mark.parametrize("row, fault", [
    ({"corrects": None}, "'corrects'"), ({"prompt": None}, "'prompt'"),
    ({"prompt": " "}, "'prompt'"),
    ({"incorrects": [None]}, r"incorrects\[0\]"), ({"incorrects": [2]}, r"incorrects\[0\]"),
])
def test_null_in_a_question_past_the_first_row(tmp_path, row, fault):
    fine = {"prompt": "Q The answer is:", "corrects": [" (A)"], "incorrects": [" (B)"]}
    with pytest.raises(ValueError, match=f"q.jsonl, row 2: .*{fault}"):
        load.load_questions(jsonl(tmp_path / "q.jsonl", [fine, {**fine, **row}]))


def test_an_empty_id_is_the_number_of_the_row(tmp_path):
    rows = [{"prompt": "a", "id": None}, {"prompt": "b", "id": ""}, {"prompt": "c", "id": 7}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    assert [row["id"] for row in load.load_prompts(path)] == ["0", "1", "7"]
    question = {"id": None, "prompt": "Q", "corrects": [" (A)"], "incorrects": [" (B)"]}
    path = jsonl(tmp_path / "q.jsonl", [question, question])
    assert [row["id"] for row in load.load_questions(path)] == ["0", "1"]


def test_slices_and_a_spec_for_each_split(hh_dir, tmp_path):
    spec = {"train": "hh-rlhf/harmless-base/test[:1]", "eval": "hh-rlhf/harmless-base/test[1:]"}
    with pytest.warns(UserWarning, match="skipped 5 of 7"):
        whole = load.load_comparisons("hh-rlhf/harmless-base/test")
        parts = [row for split in spec for row in load.load_comparisons(spec, split)]
        prompts = [row for split in spec for row in load.load_prompts(spec, split)]
    assert len(whole) == 2  # usable rows are counted, and keep their ids
    assert parts == [{**row, "split": s} for row, s in zip(whole, spec, strict=True)]
    assert [(p["id"], p["split"]) for p in prompts] == [("0", "train"), ("4", "eval")]
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": str(i), "split": "eval"} for i in range(10)])
    rows = load.load_prompts(f"{path}[2:5]", "train")
    assert [(r["id"], r["split"]) for r in rows] == [(i, "train") for i in "234"]
    assert [r["split"] for r in load.load_prompts(f"{path}[8:]")] == ["eval", "eval"]
    assert len(load.load_prompts(f"{path}[:8]", limit=3)) == 3
    with pytest.raises(ValueError, match=r"p.jsonl: \[10:\] of its 10 rows holds none"):
        load.load_prompts(f"{path}[10:]")
    with pytest.raises(ValueError, match="no spec for split 'train'"):
        load.load_prompts({"eval": path}, "train")
    with pytest.raises(ValueError, match="one spec is wanted here, not one for each"):
        load.load_questions(spec)


@pytest.mark.parametrize("train, evaluation, common", [
    ("[:5]", "[5:]", False), ("[:6]", "[5:]", True), ("[5:]", "[:5]", False), ("[2:4]", "", True),
    ("", "", False), ("[3:4]", "[:4]", True), ("[:]", "[9:]", True),
])
def test_the_two_splits_of_one_file_have_no_rows_in_common(tmp_path, train, evaluation, common):
    path = jsonl(tmp_path / "p.jsonl",
                 [{"prompt": str(i), "split": ("train", "eval")[i % 2]} for i in range(10)])
    spec = {"train": f"{path}{train}", "eval": f"{path}{evaluation}"}
    for split in spec:
        if common:
            with pytest.raises(ValueError, match="train and eval may have rows in common"):
                load.load_prompts(spec, split)
        else:
            assert load.load_prompts(spec, split)
    other = jsonl(tmp_path / "q.jsonl", [{"prompt": "x"}])
    assert load.load_prompts({"train": f"{path}[:5]", "eval": f"{other}[:5]"}, "train")


@pytest.mark.parametrize("part", ["[-3:]", "[::2]", "[4]", "[a:b]"])
def test_a_slice_that_cannot_be_read(tmp_path, part):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="a slice is .start:stop., whole numbers"):
        load.load_prompts(f"{path}{part}")


def test_xstest_prompts(tmp_path, monkeypatch):
    (tmp_path / "xstest").mkdir()
    (tmp_path / "xstest/xstest_prompts.csv").write_text(
        "id,prompt,type,label,focus,note\n1,How?,homonyms,safe,kill,violence\n", encoding="utf-8")
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    row = {"id": "1", "prompt": [{"role": "user", "content": "How?"}], "type": "homonyms",
           "label": "safe", "focus": "kill", "note": "violence", "kind": "sensitive"}
    assert load.load_prompts("xstest/prompts") == load.load_prompts("xstest/safe") == [row]
    assert load.load_prompts(tmp_path / "xstest/xstest_prompts.csv") == [row]
    with pytest.raises(ValueError, match="no row is labelled unsafe"):
        load.load_prompts("xstest/unsafe")
    with pytest.raises(ValueError, match="xstest.load_completions"):
        load.load_prompts("xstest/gpt4")


def test_published_data_that_is_nowhere(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("pooch.Pooch.fetch", offline)
    with pytest.raises(FileNotFoundError, match=r"hh-rlhf/harmless-base/test.*CAI_DATA_DIR"):
        load.load_comparisons("hh-rlhf/harmless-base/test")
    with pytest.raises(FileNotFoundError, match=r"red-team-attempts.*CAI_DATA_DIR"):
        load.load_prompts("hh-rlhf/red-team-attempts")
    with pytest.raises(FileNotFoundError, match="its subsets are harmless-base, .*red-team-att"):
        load.load_comparisons("hh-rlhf/harmfull-base/test")
    with pytest.raises(FileNotFoundError, match="paper/438HHHEvaluations, paper/HarmfulVsEthical, "
                                                "paper/HarmfulnessClassification"):
        load.load_questions("paper/HarmfulVsEthicals")
    jsonl(tmp_path / "constitutional_harmlessness_paper/evals/Mine.jsonl", [{}])
    with pytest.raises(FileNotFoundError, match="paper/HarmfulnessClassification, paper/Mine"):
        load.load_questions("paper/Min")
    with pytest.raises(FileNotFoundError, match="CAI_DATA_DIR") as error:
        load.load_questions("paper/HarmfulVsEthical")
    assert "438HHH" not in str(error.value)  # the name is right, the file is not here
    with pytest.raises(FileNotFoundError, match=r"831f781[0-9a-f]{33}/evals/X.jsonl.*CAI_DATA_DIR"):
        load.load_questions("paper/X")


def test_comparisons_from_files(tmp_path):
    row = {"prompt": USER, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b",
           "p_chosen": 0.7, "source": "ai", "axis": "harmless", "principle": "kind", "extra": 1}
    got = load.load_comparisons(jsonl(tmp_path / "c.jsonl", [row]))[0]
    assert got == {**row, "rejected": [{"role": "assistant", "content": "b"}], "split": None}
    for change, message in [
        ({"p_chosen": 0.4}, "p_chosen=0.4"), ({"p_chosen": "x"}, "p_chosen='x'"),
        ({"axis": ["nice"]}, "'axis' is ['nice']"), ({"chosen": ""}, "'chosen'"),
        ({"rejected": USER}, "'rejected'"), ({"prompt": None}, "'prompt'"),
    ]:
        path = jsonl(tmp_path / "c.jsonl", [row, {**row, **change}])
        with pytest.raises(ValueError, match="c.jsonl, row 2") as error:
            load.load_comparisons(path)
        assert message in str(error.value)


def test_questions(tmp_path):
    row = {"prompt": "Q\n (A) x\n (B) y\nThe answer is:", "corrects": [" (A)"],
           "incorrects": [" (B)"], "text_correct": "t"}
    assert load.load_questions(jsonl(tmp_path / "q.jsonl", [row])) == [{"id": "0", **row}]
    for change, message in [
        ({"prompt": ""}, "'prompt'"), ({"corrects": []}, "'corrects'"),
        ({"incorrects": " (B)"}, "'incorrects'"), ({"incorrects": [" (A)"]}, "both corrects"),
    ]:
        path = jsonl(tmp_path / "q.jsonl", [row, {**row, **change}])
        with pytest.raises(ValueError, match="q.jsonl, row 2") as error:
            load.load_questions(path)
        assert message in str(error.value)


def published(part):
    root = os.environ.get("CAI_DATA_DIR")
    if not root or not (Path(root) / part).exists():
        pytest.skip(f"CAI_DATA_DIR does not hold {part}")
    return Path(root) / part


def test_the_real_hh_rlhf():
    published("hh-rlhf/harmless-base/test.jsonl.gz")
    with pytest.warns(UserWarning, match="skipped .* of .* rows"):
        rows = load.load_comparisons("hh-rlhf/harmless-base/test")
    assert len(rows) >= 1400
    for row in rows:
        roles = [m["role"] for m in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert row["chosen"][0]["content"] and row["rejected"][0]["content"]


def test_the_real_questions():
    published("constitutional_harmlessness_paper/evals/438HHHEvaluations.jsonl")
    questions = load.load_questions("paper/438HHHEvaluations")
    assert len(questions) == 438
    assert {len(q["corrects"] + q["incorrects"]) for q in questions} == {2}
    about = multiple_choice.conversations(questions)
    assert len(set(about.values())) == 188
    for q in questions:  # what the texts say is what the question shows
        asked = q["prompt"].partition("\n\nHuman:")[2].partition("\n\nPlease choose")[0]
        assert about[q["id"]].removeprefix("Human:").split() == asked.split()


def test_the_real_xstest():
    path = published("xstest/xstest_prompts.csv")
    rows = load.load_prompts(path)
    found = load.load_prompts("xstest/prompts")
    assert rows == found
    assert len(rows) == 450 and {r["label"] for r in rows} == {"safe", "unsafe"}
    safe, unsafe = (load.load_prompts(f"xstest/{label}") for label in ("safe", "unsafe"))
    assert (len(safe), len(unsafe)) == (250, 200) and safe[0]["kind"] == "sensitive"
    assert {r["kind"] for r in unsafe} == {"redteam"}


@pytest.mark.parametrize("field", ["p_chosen", "extra"])
def test_nan_is_nothing_but_where_a_label_belongs(tmp_path, field):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "axis": "helpful", "split": "train",
           field: float("nan")}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    if field == "extra":
        [found] = load.load_comparisons(tmp_path / "r.jsonl", "train")
        assert found["p_chosen"] == 1 and found.get("extra") is None
    else:
        with pytest.raises(ValueError, match="p_chosen=nan has to be from 0.5 to 1"):
            load.load_comparisons(tmp_path / "r.jsonl", "train")


@pytest.mark.parametrize("row, message", [
    ({"prompt": [{"role": "user", "content": None}]}, "content of message 0 is None, not a text"),
    ({"prompt": [{"role": "user", "content": [1]}]}, r"content of message 0 is \[1\]"),
    ({"prompt": [{"content": "x"}]}, "message 0 is .*'role'"),
    ({"prompt": 5}, "'prompt' has to be a text or a list"),
    ({"prompt": " \n"}, "'prompt' is empty"),
    ({"id": ["a"], "prompt": "Hi"}, r"'id' is \['a'\]: give a text"),
    ({"id": True, "prompt": "Hi"}, "'id' is True"),
    ({"kind": ["redteam"], "prompt": "Hi"}, r"'kind' is \['redteam'\]"),
])
def test_wrong_types_of_prompts_are_named_by_file_and_row(tmp_path, row, message):
    path = jsonl(tmp_path / "own.jsonl", [{"prompt": "Hi"}, row])
    with pytest.raises(ValueError, match=f"own.jsonl, row 2: .*{message}"):
        load.load_prompts(str(path))


@pytest.mark.parametrize("row, message", [
    ({"chosen": "y", "rejected": 5}, "'rejected' has to be one assistant message"),
    ({"chosen": "y", "rejected": "x", "p_chosen": True}, "p_chosen=True has to be from 0.5 to 1"),
    ({"chosen": "y", "rejected": "x", "id": {"a": 1}}, "'id' is {'a': 1}"),
])
def test_wrong_types_of_comparisons_are_named_by_file_and_row(tmp_path, row, message):
    good = {"prompt": "Hi", "chosen": "y", "rejected": "x", "axis": "helpful"}
    path = jsonl(tmp_path / "own.jsonl", [good, {"prompt": "Hi", "axis": "helpful", **row}])
    with pytest.raises(ValueError, match=f"own.jsonl, row 2: .*{message}"):
        load.load_comparisons(str(path))


def test_wrong_types_of_questions_and_doubled_ids_are_named(tmp_path):
    good = {"prompt": "Q", "corrects": [" (A)"], "incorrects": [" (B)"]}
    path = jsonl(tmp_path / "own.jsonl", [good, {**good, "text_correct": 5}])
    with pytest.raises(ValueError, match="own.jsonl, row 2: .*'text_correct' has to be a text"):
        load.load_questions(str(path))
    for rows, read in (([{**good, "id": "a"}] * 2, load.load_questions),
                       ([{"id": "a", "prompt": "Hi"}] * 2, load.load_prompts)):
        with pytest.raises(ValueError, match="own.jsonl: .*rows 1 and 2 have the same id 'a'"):
            read(str(jsonl(path, rows)))


@pytest.mark.parametrize("spec", ["paper/../../../x", "paper//etc/passwd", "paper/..\\x",
                                  "hh-rlhf/..\\..\\x/test", "hh-rlhf/../test"])
def test_specs_do_not_lead_out_of_the_data_folder(tmp_path, monkeypatch, spec):
    (tmp_path / "data/constitutional_harmlessness_paper/evals").mkdir(parents=True)
    jsonl(tmp_path / "x.jsonl", [{"prompt": "Q", "corrects": [" (A)"], "incorrects": [" (B)"]}])
    monkeypatch.setenv("CAI_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="data spec .*cannot be the name of a file or folder"):
        load.load_questions(spec)
