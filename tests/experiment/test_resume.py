"""Checkpoints and model folders: what is damaged, half written, of another call."""

import errno
import json
import shutil

import pytest

from cai_utils.experiment import resume
from cai_utils.experiment.files import read_json
from cai_utils.experiment.writing import explained

KEY = {"lr": "a", "rows": "b"}
DAMAGE = {
    "missing": lambda file, content: file.unlink(),
    "empty": lambda file, content: file.write_bytes(b""),
    "half": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "flipped": lambda file, content: file.write_bytes(
        content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]),
}


def save(folder):
    (folder / "inner").mkdir()
    (folder / "weights.bin").write_bytes(b"weights" * 10)
    (folder / "inner" / "part.bin").write_bytes(b"inner")
    (folder / "inner" / ".metadata").write_bytes(b"where which part is")


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 9 and 10, the last two of three."""
    (tmp_path / "pm").write_text("a preference model")
    here = resume.Checkpoints(tmp_path / "run", KEY, "stage")
    for n in (8, 9, 10):
        here.write(n, save, [tmp_path / "pm"] if n == 10 else (), seconds=n)
    assert sorted(f.name for f in here.folder.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    return here


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["weights.bin", "inner/part.bin", "inner/.metadata",
                                  "state.json"])
def test_whatever_is_damaged_is_named_and_set_aside(saved, capsys, name, damage):
    file = saved.folder / "checkpoint-10" / name
    DAMAGE[damage](file, file.read_bytes())
    folder, state = saved.find()
    assert (folder.name, state["seconds"]) == ("checkpoint-9", 9)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith(f"stage: {file}")
    assert told[0].endswith(f"set aside as {saved.folder / 'damaged-checkpoint-10'}")
    # It is in nobody's way, and the next one that is damaged is set aside beside it.
    saved.write(10, save)
    (saved.folder / "checkpoint-10" / "weights.bin").unlink()
    assert saved.find()[0].name == "checkpoint-9"
    aside = sorted(f.name for f in saved.folder.glob("damaged-*"))
    assert aside == ["damaged-checkpoint-10", "damaged-checkpoint-10-2"]
    shutil.rmtree(saved.folder / "checkpoint-9" / "inner")
    assert saved.find() == (None, None)
    assert "no whole checkpoint is left" in capsys.readouterr().out
    saved.clear()
    assert len(list(saved.folder.iterdir())) == 3  # what is damaged stays


def test_a_file_more_or_another_model_is_not_taken_either(saved, tmp_path, capsys):
    (saved.folder / "checkpoint-10" / "model.safetensors").write_text("read in its place")
    assert saved.find()[0].name == "checkpoint-9"
    saved.write(10, save, [tmp_path / "pm"])
    assert saved.find()[0].name == "checkpoint-10"
    (tmp_path / "pm").write_text("another preference model")
    assert saved.find()[0].name == "checkpoint-9"
    told = capsys.readouterr().out
    assert "checkpoint-10/model.safetensors: it was not written with" in told
    assert f"stage: {tmp_path / 'pm'}: it is not as it was when" in told


def test_another_call_begins_anew_or_is_refused(saved, capsys):
    other = {"lr": "c", "rows": "b"}
    anew = resume.Checkpoints(saved.folder, other, "stage")
    with pytest.raises(ValueError, match="checkpoint-10 belongs to another run: it differs in lr"):
        resume.Checkpoints(saved.folder, other, "stage", keep_others=True).find()
    assert anew.find() == (None, None)
    assert "is of another call, which differs in lr: begins anew" in capsys.readouterr().out
    assert saved.find()[0].name == "checkpoint-10"  # as long as the other has written none
    (saved.folder / ".checkpoint-3").mkdir()  # a kill while it was written
    (saved.folder / "checkpoint-best").mkdir()  # of somebody else
    assert anew.find() == (None, None)
    anew.write(3, save)
    assert sorted(f.name for f in saved.folder.iterdir()) == ["checkpoint-3", "checkpoint-best"]


def test_a_full_disk_leaves_what_was_there(saved):
    def full(folder):
        save(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full .* free.; make room") as error:
        saved.write(11, full)
    assert error.value.errno == errno.ENOSPC and ".checkpoint-11" in str(error.value)
    assert [f.name for f in saved.folder.iterdir()] == ["checkpoint-10"]
    saved.write(11, save)
    assert saved.find()[0].name == "checkpoint-11"

    model = saved.folder / "model"
    for content in ("old", "new"):
        with resume.whole_folder(model) as folder:
            for name in ("config.json", "model.safetensors"):
                (folder / name).write_text(content)
    with pytest.raises(OSError, match="the disk is full"), resume.whole_folder(model) as folder:
        (folder / "config.json").write_text("half")
        # As safetensors says it.
        raise RuntimeError("Error while serializing: I/O error: No space left on device")
    assert {f.name: f.read_text() for f in model.iterdir()} == {
        "config.json": "new", "model.safetensors": "new"}
    with pytest.raises(RuntimeError, match="^other$"), explained(model):
        raise RuntimeError("other")


def test_a_sealed_record_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path = tmp_path / "r.json"
    record = {"a": 0.1 + 0.2, "b": [float("nan"), 1e-300], "c": {"ä": None}}
    resume.write_sealed(path, record)
    assert resume.read_sealed(path) == {**record, "b": [None, 1e-300]}
    path.write_text(json.dumps({**read_json(path), "a": 0.3}))
    assert resume.read_sealed(path) is None and resume.read_sealed(tmp_path / "none") is None
