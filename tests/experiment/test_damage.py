"""Files that changed since they were made: named, set aside, made again, and never trusted."""

import json
import os
import zlib

import pandas as pd
import pytest

from cai_utils import experiment
from cai_utils.experiment import files, fingerprint, journal, provenance
from cai_utils.experiment.run import Run


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "params" / "mini").mkdir(parents=True)
    monkeypatch.setenv("CAI_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return experiment.start("04_x", {"profile": "mini"})


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def made(run, seen, name="x", n=5):
    return run.rows(name, lambda: seen.append(1) or [{"id": i, "text": f"row {i}"}
                                                     for i in range(n)], k=1)


# ---------------------------------------------------------------- rows and their record
DAMAGE = {
    "a line lost": lambda lines: lines[:-1],
    "a line doubled": lambda lines: [*lines, lines[-1]],
    "lines exchanged": lambda lines: lines[::-1],
    "a letter changed": lambda lines: [lines[0].replace(b"row", b"raw"), *lines[1:]],
    "torn": lambda lines: [*lines[:-1], lines[-1][:7]],
    "no JSON": lambda lines: [b"\0" * 40],
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_rows_are_set_aside_and_made_again(run, capsys, damage):
    seen, path = [], run.data("x")
    want, whole = made(run, seen), path.read_bytes()
    for number, aside in enumerate(("x.jsonl.damaged", "x.jsonl.damaged.2"), 2):
        path.write_bytes(b"".join(damage(whole.splitlines(keepends=True))))
        bad = path.read_bytes()
        assert made(run, seen) == want and len(seen) == number
        assert path.read_bytes() == whole and path.with_name(aside).read_bytes() == bad
        said = capsys.readouterr().out
        assert "data/x.jsonl is not as it was made" in said and f"set aside as {aside}" in said
        assert made(run, seen) == want and len(seen) == number  # kept from now on
    assert run.made["data/x.jsonl"] == fingerprint.file_digest(path)


def test_a_kill_between_record_and_rows_is_no_damage(run, capsys, monkeypatch):
    made(run, [], n=5)
    old = run.data("x").read_bytes()
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("x.jsonl"):
            raise KeyboardInterrupt
        replace(source, target)

    again = {"name": "x", "make": lambda: [{"id": 7}], "k": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        run.rows(**again)
    assert run.data("x").read_bytes() == old
    assert run.rows(**again) == [{"id": 7}] == files.read_rows(run.data("x"))
    assert "not as it was made" not in capsys.readouterr().out
    assert not list(run.dir.rglob("*.damaged*"))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text("{half a rec"),
    lambda path: path.write_text("null"),
    lambda path: path.write_text("[]"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text(path.read_text().replace('"mini"', '"maxi"')),
    lambda path: path.write_text(path.read_text().replace('"k": 1', '"k": 2')),
], ids=["torn", "null", "list", "empty", "provenance", "key"])
def test_a_damaged_record_is_set_aside_with_its_rows(run, capsys, damage):
    seen, path = [], run.data("x")
    sidecar = path.with_name("x.jsonl.key.json")
    want, whole = made(run, seen), path.read_bytes()
    damage(sidecar)
    assert made(run, seen) == want and len(seen) == 2
    assert path.with_name("x.jsonl.damaged").read_bytes() == whole
    assert path.with_name("x.jsonl.key.json.damaged").exists()
    assert "data/x.jsonl.key.json is not as it was made" in capsys.readouterr().out
    assert provenance.read(sidecar)["rows"] == 5
    assert made(run, seen) == want and len(seen) == 2


def test_records_of_earlier_versions_are_taken_unless_they_are_wrong(run):
    seen, path = [], run.data("x")
    sidecar = path.with_name("x.jsonl.key.json")
    want = made(run, seen)
    old = {k: v for k, v in json.loads(sidecar.read_text()).items() if k not in ("sha256", "check")}
    for damage, calls in ((lambda text: text, 1), (lambda text: text + text, 2),
                          (lambda text: text[:-9], 3)):
        files.write_json(sidecar, old)
        path.write_text(damage(path.read_text()))
        assert made(run, seen) == want and len(seen) == calls


def test_rows_that_cannot_be_written_leave_rows_and_record(run):
    seen, path = [], run.data("x")
    want = made(run, seen)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(ValueError, match="not a finite number"):
        run.rows("x", lambda: [{"id": 1}, {"id": 2, "p": float("nan")}], k=2)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    assert made(run, seen) == want and len(seen) == 1


# ---------------------------------------------------------------- models
def trained(run, seen):
    def make(folder):
        seen.append(1)
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "damaged-checkpoint-1").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors", "sub/tokenizer.json",
                     "damaged-checkpoint-1/state.json"):
            (folder / name).write_text(f"{name} " * 50)
        return {"train_loss": 1.0, "steps": 3, "seconds": 0.1}

    return run.trained("pm", "s", make, seed=0)


@pytest.mark.parametrize("damage, named", [
    (lambda folder: flip(folder / "model.safetensors"), "model.safetensors"),
    (lambda folder: (folder / "sub/tokenizer.json").unlink(), "sub/tokenizer.json"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: os.truncate(folder / "model.safetensors", 20), "model.safetensors"),
])
def test_a_damaged_model_is_set_aside_and_trained_again(run, capsys, damage, named):
    seen = []
    folder = trained(run, seen)
    whole = fingerprint.file_digests(folder)
    damage(folder)
    bad = fingerprint.file_digests(folder)
    assert trained(run, seen) == folder and len(seen) == 2
    assert fingerprint.file_digests(folder) == whole
    assert fingerprint.file_digests(folder.with_name("s.damaged")) == bad
    said = capsys.readouterr().out
    assert f"models/pm/s is not as it was made ({named}): set aside as s.damaged" in said
    trained(run, seen)
    assert len(seen) == 2


def test_a_model_is_read_once_and_may_be_removed_or_added_to(run, monkeypatch):
    seen, read = [], []
    folder, digests = trained(run, seen), fingerprint.file_digests
    monkeypatch.setattr(fingerprint, "file_digests", lambda p: read.append(p) or digests(p))
    (folder / "README.md").write_text("a card")
    (folder / "damaged-checkpoint-1/state.json").unlink()
    trained(run, seen)
    assert len(seen) == 1 and read.count(folder) == 1
    assert run.made["models/pm/s"] == fingerprint.file_digest(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    trained(run, seen)
    assert len(seen) == 2 and not folder.with_name("s.damaged").exists()


def test_a_training_that_is_killed_after_damage_goes_on_in_its_folder(run):
    seen, found = [], []

    def make(folder):
        found.append(sorted(p.name for p in folder.glob("*")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint-1").write_text("half")
        seen.append(1)
        if len(seen) in (2, 3):
            raise KeyboardInterrupt
        (folder / "config.json").write_text("{}")
        return {"train_loss": 1.0, "steps": 3, "seconds": 0.1}

    folder = run.trained("pm", "s", make)
    flip(folder / "config.json")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.trained("pm", "s", make)
    run.trained("pm", "s", make)
    assert found == [[], [], ["checkpoint-1"], ["checkpoint-1"]]
    assert [p.name for p in sorted(folder.parent.iterdir())] == ["s", "s.damaged"]


# ---------------------------------------------------------------- what another notebook made
def test_what_changed_since_another_notebook_made_it_is_refused_by_name(run):
    made(run, [])
    trained(run, [])
    run.table([{"size": "s", "estimate": 0.25}], "t")
    places = {"data/x.jsonl": "data/x.jsonl.key.json", "results/t.csv": "results/t.provenance.json",
              "models/pm/s": "data/training_pm_s.jsonl.key.json"}
    for name, record in places.items():
        path = run.dir / name
        assert Run("05_y", run.params).need(name, "04_x size=s") == path
        flip(path / "model.safetensors" if path.is_dir() else path)
        with pytest.raises(ValueError) as caught:
            Run("05_y", run.params).need(name, "04_x size=s")
        said = str(caught.value)
        assert "\n" not in said and f"{path} is not as 04_x made it" in said
        assert "cai_utils run 04_x size=s --profile mini" in said
        assert said.endswith(f"remove its record, {run.dir / record}")
        (run.dir / record).unlink()
        assert Run("05_y", run.params).need(name, "04_x size=s") == path
        (run.dir / record).write_text("{half")
        with pytest.raises(ValueError, match=r"json is damaged\. To make it again"):
            Run("05_y", run.params).need(name, "04_x size=s")
    with pytest.raises(ValueError, match="t.csv is not as 04_x made it"):
        Run("05_y", run.params).read_table("t", "04_x")


# ---------------------------------------------------------------- journals
def sealed(value):
    text = json.dumps(value).encode()
    return text[:-1] + b', "%08x"]\n' % zlib.crc32(text)


ROTTEN = {
    "null": (lambda lines: [lines[0], b"null\n", *lines[2:]], {1, 2}, 1),
    "short": (lambda lines: [lines[0], b'["k"]\n', b"[]\n", *lines[3:]], {2}, 2),
    "text": (lambda lines: [*lines[:2], lines[2].replace(b"no. 1", b"no. 7"), lines[3]],
             {0, 2}, 1),
    "exchanged": (lambda lines: [lines[0], lines[1][:35] + lines[2][35:], *lines[2:]], {1, 2}, 1),
    "doubled": (lambda lines: [*lines, lines[1]], {0, 1, 2}, 0),
    "no form": (lambda lines: [*lines, sealed([json.loads(lines[1])[0], None])], {1, 2}, 0),
    "short form": (lambda lines: [*lines, sealed([json.loads(lines[1])[0], ["x"]])], {1, 2}, 0),
    "header": (lambda lines: [lines[0].replace(b"7", b"6"), *lines[1:]], set(), 0),
    "version": (lambda lines: [b'{"key": 7}\n', b'["a", ["b", "c"]]\n'], set(), 0),
    "other work": (lambda lines: [sealed([{"key": 8}]), *lines[1:]], set(), 0),
}


@pytest.mark.parametrize("damage, kept, damaged", ROTTEN.values(), ids=ROTTEN)
def test_damaged_lines_of_a_journal_are_made_again_and_the_rest_reused(
        tmp_path, capsys, damage, kept, damaged):
    path, jobs = tmp_path / "x.partial", [0, 1, 2]

    def work(fresh):
        out = {}

        def put(job, value):
            out[job] = "{} {}".format(*value)

        left, keep = journal.pick_up("model", jobs, str, put)
        for job in left:
            keep([job], [["said", f"no. {job}"]])
            fresh.append(job)
        return out

    with journal.recording(path, {"key": 7}):
        want = work([])
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    bad = path.read_bytes()
    fresh, again = [], []
    with journal.recording(path, {"key": 7}) as found:
        assert work(fresh) == want
    assert set(fresh) == set(jobs) - kept and found.damaged == damaged
    with journal.recording(path, {"key": 7}):
        assert work(again) == want and again == []
    said, aside = capsys.readouterr().out, path.with_name("x.partial.damaged")
    assert aside.exists() == (damage is ROTTEN["header"][0])
    assert not aside.exists() or (aside.read_bytes() == bad and aside.name in said)
    assert ("without checksums" in said) == (damage is ROTTEN["version"][0])


def test_rows_say_what_of_a_journal_they_reuse(run, capsys):
    def make():
        left, keep = journal.pick_up("model", [0, 1, 2], str, lambda job, value: None)
        keep(left, [[f"no. {job}"] for job in left])
        if os.environ.get("STOP"):
            raise KeyboardInterrupt
        return [{"id": 0}]

    os.environ["STOP"] = "1"
    try:
        with pytest.raises(KeyboardInterrupt):
            run.rows("x", make, k=1)
    finally:
        del os.environ["STOP"]
    flip(run.data("x").with_name("x.jsonl.partial"), -20)
    run.rows("x", make, k=1)
    assert "x.jsonl: 2 samples of an earlier run are reused, 1 damaged ones are not" in (
        capsys.readouterr().out)


# ---------------------------------------------------------------- text that UTF-8 cannot hold
LONE = "half \ud83d, \udc00\ud800, whole \ud83d\ude00"
WHOLE = "half \ufffd, \ufffd\ufffd, whole \U0001f600"


def test_a_lone_surrogate_does_not_end_a_stage(run, capsys):
    calls = []

    def make():
        left, keep = journal.pick_up("model", [0], str, lambda job, value: calls.append(value))
        keep(left, [[LONE, 1]] * len(left))
        if len(calls) == 1:
            raise RuntimeError("killed")
        return [{"id": 0, "text": calls[-1][0]}, {"id": 1, LONE: [LONE]}]

    with pytest.raises(RuntimeError):
        run.rows("x", make, note=LONE)
    want = [{"id": 0, "text": WHOLE}, {"id": 1, WHOLE: [WHOLE]}]
    assert run.rows("x", make, note=LONE) == want
    assert calls == [[WHOLE, 1]] * 2  # sampled once
    assert "; U+FFFD replaces 9 lone surrogates" in capsys.readouterr().out
    assert run.rows("x", make, note=LONE) == want and len(calls) == 2
    assert "kept" in capsys.readouterr().out
    run.params["note"] = LONE
    run.provenance["note"] = LONE
    path = run.page(LONE, "page")
    assert path.read_bytes() == WHOLE.encode()
    run.table([{"text": LONE, "estimate": 1}], "t")
    assert run.read_table("t")["text"].tolist() == [WHOLE]
    run.table(pd.DataFrame({"text": [LONE, 1, None]}, dtype=object), "u")
    assert run.read_table("u")["text"].tolist()[:2] == [WHOLE, "1"]
    run.finish()
    found = json.loads((run.dir / "executed/04_x.provenance.json").read_text())
    assert found["note"] == WHOLE
    file = run.dir / "own.jsonl"
    file.write_text(json.dumps({"text": LONE}) + "\n")
    assert files.read_rows(file) == [{"text": WHOLE}]


def test_a_table_reads_back_as_it_was_written(run):
    texts = ["a\rb", "a\r\nb", "\n", "a\0b", "\0", "\x1a", "\x0b\x0c\x1c\x85\u2028", "None", "NA",
             "null", 'a "b", c', " pad ", "\ufeff", "-inf"]
    table = pd.DataFrame({"text": texts, "n": range(len(texts)), "estimate": 0.1})
    table.loc[1, "estimate"] = float("nan")
    run.table(table, "t")
    pd.testing.assert_frame_equal(run.read_table("t"), table)
    assert [row["text"] for row in files.read_rows(run.dir / "results/t.csv")] == texts
    plain = run.table(table.iloc[4:8], "plain").read_text()
    assert plain == "text,n,estimate\n" + table.iloc[4:8].to_csv(
        index=False, header=False, lineterminator="\n")
