"""Run folders, resumable stages, provenance, parameters and the command line that runs notebooks.

Everything happens in a small laboratory in a temporary folder, with notebooks made here.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest

from cai_utils import __main__, critique, experiment
from cai_utils.experiment import (
    files,
    fingerprint,
    locks,
    params,
    provenance,
    registry,
    stamp,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def write_notebook(root, name, cells, parameters='profile = "mini"\nseed = 0\n'):
    book = nbformat.v4.new_notebook()
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    if parameters is not None:
        first = nbformat.v4.new_code_cell(parameters)
        first.metadata.tags = ["parameters"]
        book.cells.insert(0, first)
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(book, root / "notebooks" / f"{name}.ipynb")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A laboratory with one profile and one notebook; CAI_ROOT points to it."""
    write(tmp_path / "params" / "mini" / "_common.yaml", "seed: 3\nsizes: [xs, s]\nunused: 1\n")
    (tmp_path / "params" / "other").mkdir()
    write_notebook(
        tmp_path,
        "04_revisions",
        ["print(profile)"],
        'profile = "mini"\nseed = 0\nsizes = [\n    "xs",\n]\nsize: str | None = None\n'
        "n_prompts = 4\nlr = 1e-3\n",
    )
    monkeypatch.setenv("CAI_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("CAI_RUN_NAME", raising=False)
    return tmp_path


@pytest.fixture
def run(lab):
    return experiment.start("04_revisions", {"profile": "mini", "seed": 3, "size": "s"})


# ---------------------------------------------------------------- parameters


def merge(lab, notebook="04_revisions", profile="mini", overrides=None, **more):
    return params.merge_params(lab, notebook, profile, {**(overrides or {}), **more})


def test_own_values_go_before_common_ones_and_overrides_before_both(lab):
    assert merge(lab) == {"profile": "mini", "seed": 3, "sizes": ["xs", "s"]}
    write(
        lab / "params" / "mini" / "04_revisions.yaml", "seed: 5\nn_prompts: 8\ngrid: {sizes: [s]}\n"
    )
    assert merge(lab, n_prompts=2) == {
        "profile": "mini",
        "seed": 5,
        "sizes": ["xs", "s"],
        "n_prompts": 2,
    }


def test_undeclared_parameters_are_refused_with_their_place_and_nearest_names(lab):
    with pytest.raises(ValueError, match="command line.*'n_prompt'.*nearest: n_prompts") as caught:
        merge(lab, n_prompt=3)
    assert "\n" not in str(caught.value)
    write(lab / "params" / "mini" / "04_revisions.yaml", "sede: 1\n")
    with pytest.raises(ValueError, match=r"params/mini/04_revisions\.yaml.*'sede'.*nearest: seed"):
        merge(lab)


def test_unknown_profile_and_notebook_list_the_known_ones(lab):
    with pytest.raises(ValueError, match="unknown profile 'minni'.*known: mini, other"):
        merge(lab, profile="minni")
    with pytest.raises(ValueError, match="unknown notebook '05_x'.*known: 04_revisions"):
        merge(lab, notebook="05_x")
    with pytest.raises(ValueError, match="unknown profile 'nil'.*known: mini, other"):
        experiment.start("04_revisions", {"profile": "nil"})
    with pytest.raises(ValueError, match="use --profile"):
        merge(lab, profile="mini", overrides={"profile": "other"})


@pytest.mark.parametrize("values", [{"size": "xl"}, {"sizes": ["s", "xl"]}])
def test_unknown_sizes_are_refused_early_and_in_the_notebook(lab, values):
    with pytest.raises(ValueError, match="unknown size 'xl'.*known: xs, s.*_common.yaml"):
        merge(lab, **values)
    with pytest.raises(ValueError, match="04_revisions: unknown size 'xl'"):
        experiment.start("04_revisions", {"profile": "mini", **values})
    # A series that is longer than the sizes of the figures.
    write(lab / "params" / "mini" / "_common.yaml", "sizes: [xs, s]\nseries: [xs, s, xl]\n")
    assert merge(lab, **values)
    # A profile that names no sizes takes any.
    assert experiment.start("04_revisions", {"profile": "other", **values}).profile == "other"


def test_a_number_that_yaml_1_1_takes_for_text_is_read(lab):
    write(lab / "params" / "mini" / "04_revisions.yaml", "lr: 1e-4\n")
    assert merge(lab)["lr"] == 0.0001
    write(lab / "params" / "mini" / "04_revisions.yaml", "lr: 1.0e-4\n")
    assert merge(lab)["lr"] == 0.0001
    assert params.parse_override("lr=2e5") == ("lr", 200000.0)
    assert merge(lab, lr={"xs": "5e-4"}, n_prompts=1e3) == {
        "profile": "mini", "seed": 3, "sizes": ["xs", "s"], "lr": {"xs": 0.0005}, "n_prompts": 1000}
    with pytest.raises(ValueError, match="04_revisions: lr='fast' is a text; give a number"):
        merge(lab, lr="fast")


def test_papermills_own_numbers_are_read_in_the_notebook(lab):
    """`papermill -f` and `-y` read YAML 1.1, and `-p n 1e3` gives a float."""
    from papermill import cli, iorw

    write(lab / "own.yaml", "lr: {xs: 5e-4}\nsizes: [s]\nsize: xs\n")
    given = iorw.read_yaml_file(str(lab / "own.yaml"))
    assert given["lr"] == {"xs": "5e-4"}
    namespace = {"__name__": "__main__", "profile": "mini", "seed": 0, **given,
                 "n_prompts": cli._resolve_type("1e3"), "other": 1}
    run = experiment.start("04_revisions", namespace)
    assert namespace["lr"] == run.params["lr"] == {"xs": 0.0005}
    assert repr(namespace["n_prompts"]) == "1000" and namespace["other"] == 1
    with pytest.raises(ValueError, match="04_revisions: lr='fast' is a text; give a number"):
        experiment.start("04_revisions", {**namespace, "lr": cli._resolve_type("fast")})


def test_a_parameter_written_twice_is_named(lab):
    write(lab / "params" / "mini" / "04_revisions.yaml", "lr: {xs: 1, xs: 2}\n")
    with pytest.raises(ValueError, match=r"04_revisions\.yaml is not .* field 'xs' is there twice"):
        merge(lab)
    with pytest.raises(ValueError, match="'lr={xs: 1, xs: 2}' .*the field 'xs' is there twice"):
        params.parse_override("lr={xs: 1, xs: 2}")


def test_broken_yaml_names_its_file(lab):
    write(lab / "params" / "mini" / "04_revisions.yaml", "a: [1\n")
    with pytest.raises(ValueError, match=r"04_revisions\.yaml is not valid YAML"):
        merge(lab)
    write(lab / "params" / "mini" / "04_revisions.yaml", "- 1\n")
    with pytest.raises(ValueError, match="must hold 'name: value' lines"):
        merge(lab)


def test_overrides_are_yaml():
    assert params.parse_override("sizes=[xs, s]") == ("sizes", ["xs", "s"])
    assert params.parse_override("cot=true") == ("cot", True)
    assert params.parse_override("clamp=null") == ("clamp", None)
    assert params.parse_override("text=a=b") == ("text", "a=b")
    with pytest.raises(ValueError, match="write name=value"):
        params.parse_override("size")


def test_an_override_sets_one_entry_of_a_dict(lab):
    write_notebook(lab, "07_sft", ["x = 1"],
                   "profile = 'mini'\nn_train = {'xs': 1, 's': 2}\nlr = 1.0\nsettings = None\n")
    assert merge(lab, "07_sft", overrides={"n_train.s": 3})["n_train"] == {"xs": 1, "s": 3}
    own = lab / "params" / "mini" / "07_sft.yaml"
    write(own, "settings: {ppo: {lr: 0.1, clip: 0.2}, 1: x}\n")
    found = merge(lab, "07_sft", overrides=dict([params.parse_override("settings.ppo.lr=1e-4")]))
    assert found["settings"] == {"ppo": {"lr": 0.0001, "clip": 0.2}, 1: "x"}
    both = {"settings": {"a": 1}, "settings.ppo.lr": 2, "settings.ppo.clip": 3}
    assert merge(lab, "07_sft", overrides=both)["settings"] == {"a": 1, "ppo": {"lr": 2, "clip": 3}}
    assert merge(lab, "07_sft", overrides={"settings.1": "y"})["settings"][1] == "y"
    own.unlink()
    assert merge(lab, "07_sft", overrides={"settings.a.b": 1})["settings"] == {"a": {"b": 1}}
    with pytest.raises(ValueError, match="command line.*'setting'.*nearest: settings"):
        merge(lab, "07_sft", overrides={"setting.ppo.lr": 1})
    with pytest.raises(ValueError, match=r"lr\.xs cannot be set: lr is 1\.0, not a dict"):
        merge(lab, "07_sft", overrides={"lr.xs": 1})
    write(own, "settings.ppo: 1\n")
    with pytest.raises(ValueError, match="unknown parameter 'settings.ppo'"):
        merge(lab, "07_sft")
    for wrong in ("a.=1", ".a=1", "a b=1", "=1"):
        with pytest.raises(ValueError, match="write name=value"):
            params.parse_override(wrong)


def test_all_parameters_are_the_notebooks_own_where_nothing_else_is_said(lab):
    found = params.all_params(lab, "04_revisions", "mini", {"lr": 2.0})
    assert found == {"profile": "mini", "seed": 3, "sizes": ["xs", "s"], "size": None,
                     "n_prompts": 4, "lr": 2.0}  # fmt: skip


def test_a_run_takes_its_parameters_from_the_notebooks_namespace(lab):
    values = {"profile": "mini", "seed": 1, "sizes": ["s"], "size": None, "n_prompts": 2, "lr": 0.1}
    run = experiment.start("04_revisions", {**values, "__name__": "__main__", "pandas": 1, "x": 2})
    assert run.params == values
    with pytest.raises(ValueError, match="04_revisions: unknown parameter 'sede'; nearest: seed"):
        experiment.start("04_revisions", {"profile": "mini", "sede": 1})
    assert experiment.start("99_none", {"profile": "mini", "sede": 1}).params["sede"] == 1
    with pytest.raises(ValueError, match="must hold 'profile'"):
        experiment.start("04_revisions", {"seed": 1})


@pytest.mark.parametrize("given, fails", [("sede = 1", True), ("seed = 1", False),
                                          ("unused = 1\ngrid = {}", False)])
def test_what_papermill_passes_has_to_be_a_parameter(lab, monkeypatch, given, fails):
    """As after `papermill -p sede 1`, which only warns; `-f _common.yaml` passes others' values."""
    import IPython

    cells = ["", "profile = 'mini'\nseed = 0", f"# Parameters\n{given}\n", "sede = 5"]
    shell = type("Shell", (), {"user_ns": {"In": cells}})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    namespace = {"__name__": "__main__", "profile": "mini", "seed": 0}
    if fails:
        with pytest.raises(ValueError, match="unknown parameter 'sede'; nearest: seed"):
            experiment.start("04_revisions", namespace)
    else:
        assert experiment.start("04_revisions", namespace).params["seed"] == 0


def test_notebooks_without_a_parameters_cell_or_profile_are_refused(lab):
    write_notebook(lab, "05_none", ["x = 1"], parameters=None)
    with pytest.raises(ValueError, match="05_none.ipynb has no cell with the tag 'parameters'"):
        merge(lab, notebook="05_none")
    write_notebook(lab, "06_no_profile", ["x = 1"], parameters="seed = 1\n")
    with pytest.raises(ValueError, match="06_no_profile must declare 'profile'"):
        merge(lab, notebook="06_no_profile")


# ---------------------------------------------------------------- a run


def test_root_is_found_from_any_folder_of_the_clone(monkeypatch):
    monkeypatch.delenv("CAI_ROOT", raising=False)
    monkeypatch.chdir(REPOSITORY / "cai_utils" / "constitutions")
    assert files.repo_root() == REPOSITORY
    monkeypatch.setenv("CAI_ROOT", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="CAI_ROOT=/no/such/folder"):
        files.repo_root()


def test_folders_and_missing_results(lab, run):
    folders = {"data", "models", "results", "figures", "wandb", "executed"}
    assert {p.name for p in run.dir.iterdir()} == folders
    assert run.data("chains_s") == lab / "runs" / "mini" / "data" / "chains_s.jsonl"
    assert run.model("sl_cai", "s") == lab / "runs" / "mini" / "models" / "sl_cai" / "s"
    folder = run.model("sl_cai", "s")
    with pytest.raises(
        FileNotFoundError, match="07_sl_cai makes it: run `python -m cai_utils run"
    ):
        run.need(folder, "07_sl_cai")
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="--profile mini"):
        run.need("models/sl_cai/s", "07_sl_cai")  # an empty folder is no model
    write(folder / "config.json", "{}")
    assert run.need("models/sl_cai/s", "07_sl_cai") == folder
    command = "run 09_rl method=rl_cai size=s --profile mini"
    with pytest.raises(FileNotFoundError, match=f"09_rl makes it: .*{command}`"):
        registry.folder(run, "rl_cai", "s")
    with pytest.raises(FileNotFoundError, match="fig05.*03_chains makes it"):
        run.read_table("fig05", made_by="03_chains")


def test_rows_are_made_once_for_a_key(run, capsys):
    calls = []

    def make():
        calls.append(1)
        return [{"id": "a", "pair": ("x", "y")}]

    first = run.rows("chains", make, size="s", lr=np.float32(0.5))
    assert first == [{"id": "a", "pair": ["x", "y"]}]  # as it will be read back later
    assert run.rows("chains", make, lr=0.5, size="s") == first
    assert len(calls) == 1
    assert "kept from an earlier run" in capsys.readouterr().out
    run.rows("chains", make, size="xs", lr=0.5)
    assert len(calls) == 2
    assert "changed: size" in capsys.readouterr().out
    record = json.loads((run.dir / "data" / "chains.jsonl.key.json").read_text())
    assert record["key"] == {"size": "xs", "lr": 0.5}
    assert record["rows"] == 1
    assert record["provenance"]["notebook"] == "04_revisions"


def test_a_training_whose_loss_is_no_number_is_told(run, capsys):
    def make(folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return {"train_loss": float("nan"), "steps": 3, "seconds": 1.0, "log": [{"loss": np.inf}]}

    for _ in range(2):  # made, and kept
        run.trained("pm", "s", make, seed=0)
        assert "pm s: loss not finite, 3 steps, 1 s" in capsys.readouterr().out
    (row,) = files.read_rows(run.data("training_pm_s"))
    assert row["train_loss"] is None and row["log"] == [{"loss": None}]


def test_rows_without_their_record_or_file_are_made_again(run):
    calls = []

    def make():
        return calls.append(1) or [{"n": len(calls)}]

    run.rows("x", make, k=1)
    (run.dir / "data" / "x.jsonl.key.json").unlink()
    assert run.rows("x", make, k=1) == [{"n": 2}]
    run.data("x").unlink()
    assert run.rows("x", make, k=1) == [{"n": 3}]
    (run.dir / "data" / "x.jsonl.key.json").write_text("{half a rec")
    assert run.rows("x", make, k=1) == [{"n": 4}]


def test_a_stage_that_fails_leaves_the_old_rows(run):
    run.rows("x", lambda: [{"n": 1}], k=1)

    def broken():
        yield {"n": 2}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run.rows("x", broken, k=2)
    assert run.data("x").read_text() == '{"n": 1}\n'
    assert sorted(p.name for p in (run.dir / "data").iterdir()) == ["x.jsonl", "x.jsonl.key.json"]


def test_a_path_in_the_key_stands_for_its_content(run):
    folder = run.model("helpful", "s")
    write(folder / "model.bin", "one")
    made = [run.rows("x", lambda: [{"n": os.urandom(8).hex()}], model=folder) for _ in range(2)]
    assert made[0] == made[1]
    write(folder / "model.bin", "two")
    assert run.rows("x", lambda: [{"n": os.urandom(8).hex()}], model=folder) != made[0]
    with pytest.raises(FileNotFoundError, match="absent is part of a key"):
        run.rows("x", lambda: [], model=run.dir / "absent")
    with pytest.raises(ValueError, match=r"rows\('x'\): key.sampler is a object"):
        run.rows("x", lambda: [], sampler=object())


def test_code_is_part_of_the_fingerprint():
    def plain():
        return [1]

    def stage():
        return critique.revise(None, [], None)

    def helper():
        return 2

    def through():
        return [helper() for _ in range(3)]

    before = {f: fingerprint.code_digest(f) for f in (plain, stage, through)}
    assert len(set(before.values())) == 3
    assert before == {f: fingerprint.code_digest(f) for f in before}
    assert fingerprint.code_digest(partial(stage)) == before[stage]
    # A notebook's own function, reached through another one, counts.
    code = helper.__code__
    helper.__code__ = code.replace(co_consts=tuple(3 if c == 2 else c for c in code.co_consts))
    assert fingerprint.code_digest(through) != before[through]
    assert fingerprint.code_digest(plain) == before[plain]


def test_modules_count_by_what_they_do(tmp_path, monkeypatch):
    """A comment changes nothing; a change in a module that the stage imports changes all."""
    package = tmp_path / "cai_utils"
    write(package / "stage.py", "from cai_utils.floor import f\n")
    write(package / "floor.py", "def f():\n    return 1\n")
    write(package / "apart.py", "x = 1\n")
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    used = fingerprint.modules_of(
        "%matplotlib inline\nfrom cai_utils import stage, runs\n", "not ( python"
    )
    assert [p.name for p in used] == ["floor.py", "stage.py"]
    stage = type(sys)("cai_utils.stage")
    before = fingerprint.code_digest(stage)
    write(package / "floor.py", "# why\ndef f():\n\n    return 1\n")
    write(package / "apart.py", "x = 2\n")
    assert fingerprint.code_digest(stage) == before
    write(package / "floor.py", "def f():\n    return 2\n")
    assert fingerprint.code_digest(stage) != before


@pytest.mark.parametrize(
    "source, text",
    [
        ("import cai_utils.sub.low", ""),
        ("from cai_utils.sub import low", ""),
        ("judge = 'cai_utils.sub.low:score'", ""),
        ("", "judge: cai_utils.sub.low:score"),
        ("from cai_utils import top", ""),
        ("def f():\n    from cai_utils.top import anything", ""),
    ],
)
def test_imports_are_followed_in_every_form(tmp_path, monkeypatch, source, text):
    package = tmp_path / "cai_utils"
    write(package / "top.py", '"""Not like cai_utils.apart."""\nfrom .sub import low\n')
    write(package / "sub" / "__init__.py", "")
    write(package / "sub" / "low.py", "from . import twin\nfrom .. import other\n")
    write(package / "sub" / "twin.py", "# see cai_utils.apart\n")
    write(package / "other.py", "")
    write(package / "apart.py", "")
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    names = {p.relative_to(package).as_posix() for p in fingerprint.modules_of(source, text=text)}
    assert {"sub/low.py", "sub/twin.py", "other.py"} <= names
    assert ("top.py" in names) == ("top" in source)
    assert "apart.py" not in names


def test_keys_of_equal_values_are_equal_and_others_differ():
    values = [
        None,
        True,
        1,
        1.5,
        "1",
        [1],
        [1, 2],
        {"a": 1},
        {"a": [1]},
        list(range(50)),
        np.arange(51),
    ]
    digests = [fingerprint.digest(v) for v in values]
    assert len(set(digests)) == len(values)
    assert fingerprint.digest({"a": 1, "b": 2}) == fingerprint.digest({"b": 2, "a": 1})
    assert fingerprint.digest(np.arange(50)) == fingerprint.digest(list(range(50)))
    assert fingerprint.digest({"s", "t", "u"}) == fingerprint.digest(["s", "t", "u"])
    assert "sha256" in fingerprint.canonical(list(range(50)))  # long ones are shortened


def test_table_and_its_provenance(run):
    path = run.table([{"size": "s", "estimate": 0.1 + 0.2, "n": 3}], "fig05_revisions")
    assert path == run.dir / "results" / "fig05_revisions.csv"
    back = run.read_table("fig05_revisions")
    pd.testing.assert_frame_equal(
        back, pd.DataFrame([{"size": "s", "estimate": 0.1 + 0.2, "n": 3}])
    )
    record = json.loads((run.dir / "results" / "fig05_revisions.provenance.json").read_text())
    assert record["sha256"] == fingerprint.file_digest(path)
    assert record["params"] == {"profile": "mini", "seed": 3, "size": "s"}
    assert record["seed"] == 3 and record["rows"] == 1
    assert record["versions"]["torch"] and record["versions"]["numpy"] == np.__version__
    assert record["machine"]["cpu"] and record["machine"]["threads"] >= 1
    assert set(record["git"]) == {"commit", "dirty"}


def test_a_table_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    path = run.table(pd.DataFrame({"a": [1]}), "t")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    def to_csv(self, target, **_):
        Path(target).write_text("a\nhal")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", to_csv)
    with pytest.raises(OSError):
        run.table(pd.DataFrame({"a": [2]}), "t")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_git_state_tells_commit_and_dirt(tmp_path):
    assert provenance.git_state(tmp_path / "nowhere") == {"commit": None, "dirty": None}

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True
        )

    git("init", "-q")
    write(tmp_path / "code.py", "1")
    write(tmp_path / "figures" / "fig.png", "1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    state = provenance.git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    write(tmp_path / "runs" / "new.txt", "2")  # nobody has added it
    write(tmp_path / "figures" / "fig.png", "2")  # published, not yet committed
    assert provenance.git_state(tmp_path)["dirty"] is False
    write(tmp_path / "code.py", "2")
    assert provenance.git_state(tmp_path)["dirty"] is True


def test_figures_are_the_same_bytes_for_the_same_table(lab, run, monkeypatch):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def draw():
        figure, axis = plt.subplots(figsize=(2, 1.5))
        axis.plot([1, 2], [3, 4], label="a")
        path = run.figure(figure, "fig")
        plt.close(figure)
        return {s: path.with_suffix(s).read_bytes() for s in (".png", ".pdf")}

    first = draw()
    # A clock that has gone on must not be seen in the files.
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert draw() == first
    assert {p.name for p in (run.dir / "figures").iterdir()} == {"fig.png", "fig.pdf"}
    assert not (lab / "figures").exists()  # a run never touches the committed figures
    width = int.from_bytes(first[".png"][16:20], "big")
    assert 300 < width < 500  # 2 inches at 200 dots, trimmed


def test_wandb_is_offline_by_default_and_never_in_the_way(lab, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    run = experiment.start("04_revisions", {"profile": "mini", "seed": 1})
    run.log({"score": 1.0})
    assert sys.modules["wandb"].run is not None
    run.finish()
    assert sys.modules["wandb"].run is None
    folders = [p.name for p in (lab / "runs" / "mini" / "wandb").iterdir()]
    assert any(name.startswith("offline-run-") for name in folders)
    record = json.loads(
        (lab / "runs" / "mini" / "executed" / "04_revisions.provenance.json").read_text()
    )
    assert record["seconds"] >= 0


def test_a_broken_wandb_costs_one_line(lab, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    run = experiment.start("04_revisions", {"profile": "mini"})
    run.log({"score": 1.0})
    run.finish()
    assert capsys.readouterr().out.count("W&B is off") == 1


# ---------------------------------------------------------------- the command line


def command(lab, *arguments):
    environment = {**os.environ, "CAI_ROOT": str(lab), "WANDB_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-m", "cai_utils", "run", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )


def test_a_notebook_runs_with_its_parameters_and_streams(lab):
    write_notebook(
        lab,
        "04_revisions",
        [
            "from cai_utils import experiment",
            "run = experiment.start('04_revisions', globals())",
            "import os\nprint(seed, lr, os.getcwd() == str(run.root))",
            "run.table([dict(seed=seed)], 'out')\nrun.finish()",
            "from IPython.display import publish_display_data as show\n"
            "show({'application/json': {'x': float('nan')}})",
        ],
        'profile = "other"\nseed = 0\nlr = 1.0\nclip = 1.0\n',
    )
    done = command(lab, "04_revisions", "--profile", "mini", "lr=1e-4", "clip=.inf", "--name",
                   "04-a")
    assert done.returncode == 0, done.stderr
    assert "04-a | 3 0.0001 True" in done.stdout.splitlines()
    assert "Passed unknown parameter" not in done.stderr
    executed = lab / "runs" / "mini" / "executed"
    assert sorted(p.name for p in executed.iterdir()) == [
        "04-a.ipynb",
        "04-a.provenance.json",
        "04-a.stamp.json",
    ]
    assert (lab / "runs" / "mini" / "results" / "out.csv").read_text() == "seed\n3\n"
    assert json.loads((executed / "04-a.provenance.json").read_text())["params"]["lr"] == 0.0001
    for path in executed.iterdir():
        text = path.read_text()  # JSON that any reader takes
        assert '"clip": null' in text or '"clip": {\n   "float": "inf"' in text
        json.loads(text, parse_constant=pytest.fail)


def test_a_failing_notebook_is_kept_and_reported_in_one_message(lab):
    executed = lab / "runs" / "mini" / "executed"
    write(executed / "04_revisions.ipynb", "the last good one")
    write_notebook(
        lab,
        "04_revisions",
        ["print('before')", "\nraise KeyError('no such row\\nprompt 17')", "print('after')"],
    )
    done = command(lab, "04_revisions", "--profile", "mini")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "before" in done.stdout and "after" not in done.stdout
    assert "error: 04_revisions failed in cell In [4] (raise KeyError" in done.stderr
    assert "KeyError: " in done.stderr and "prompt 17" in done.stderr
    assert {p.name for p in executed.iterdir()} == {
        "04_revisions.ipynb",
        "04_revisions.failed.ipynb",
    }
    assert (executed / "04_revisions.ipynb").read_text() == "the last good one"
    assert "before" in (executed / "04_revisions.failed.ipynb").read_text()


def test_a_dead_kernel_is_reported(lab):
    write_notebook(lab, "04_revisions", ["import os\nos._exit(9)"])
    done = command(lab, "04_revisions", "--profile", "mini")
    assert done.returncode == 1
    assert "its kernel died" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["04_revisions", "--profile", "minni"], "error: unknown profile 'minni'; nearest: mini"),
        (["04_revision", "--profile", "mini"], "unknown notebook '04_revision'"),
        (["04_revisions", "--profile", "mini", "n_promts=3"], "unknown parameter 'n_promts'"),
        (["04_revisions", "--profile", "mini", "size=xl"], "unknown size 'xl'"),
        (["04_revisions", "n_prompts=3", "--profile", "mini", "a.b=1"], "unknown parameter 'a'"),
        *((["04_revisions", "--profile", "mini", f"--name={name}"], "cannot be the name of a file")
          for name in ("../../harm", "/harm", "..", "a\nb", "x" * 240)),
        (["04_revisions", "--profile", "mini", "--name=x.failed"], "ends as those of unfinished"),
        (["04_revisions", "--profile", "../mini"], "unknown profile '../mini'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(lab, monkeypatch, arguments, words):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["run", *arguments])
    assert words in str(caught.value.code)
    assert "\n" not in str(caught.value.code)
    assert not (lab / "runs").exists()


def refusal(*arguments):
    with pytest.raises(SystemExit) as caught:
        __main__.main([*arguments])
    return caught.value.code


def test_folders_that_cannot_be_written_are_found_before_work_starts(lab, monkeypatch):
    monkeypatch.setattr(__main__, "execute", lambda *_: pytest.fail("it has started"))
    call = ("run", "04_revisions", "--profile", "mini")
    (lab / "runs").write_text("")
    assert refusal(*call) == (f"error: {lab}/runs is a file where a run needs a folder: move it "
                              "away")
    (lab / "runs").unlink()
    (lab / "runs" / "mini" / "results").mkdir(parents=True)
    (lab / "runs" / "mini" / "data").symlink_to(lab / "params" / "mini" / "_common.yaml")
    assert "runs/mini/data is a file" in refusal(*call)
    (lab / "runs" / "mini" / "data").unlink()
    # As of a read-only disk; root may write anywhere else.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "results")
    assert refusal(*call) == (f"error: {lab}/runs/mini/results is read-only, and a run writes "
                              "there: make it writable")
    monkeypatch.undo()


def test_one_run_at_a_time_whatever_it_is_called(lab, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.1)
    write(lab / "params" / "mini" / "04_revisions.yaml", "grid: {sizes: [xs, s]}\n")
    call = ("run", "04_revisions", "--profile", "mini", "--name=other")
    with locks.held(lab / "runs" / "mini", ["04_revisions-s"], ""):  # as the batch does
        assert refusal(*call, "size=s") == (
            f"error: 04_revisions-s runs already in {lab}/runs/mini, as process {os.getpid()}: "
            "wait for it, or stop it")
        monkeypatch.setattr(__main__, "execute", lambda *_: sys.exit("it starts"))
        assert refusal(*call, "size=xs") == "it starts"


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device", "x.csv"), "error: x.csv: No space left on device"),
    (OSError("a line of its own"), "error: a line of its own"),
    (KeyboardInterrupt(), 130),
])
def test_a_command_ends_in_one_line(lab, monkeypatch, capsys, error, said):
    def execute(*_):
        raise error

    monkeypatch.setattr(__main__, "execute", execute)
    assert refusal("run", "04_revisions", "--profile", "mini") == said
    assert capsys.readouterr().err in ("", "interrupted: the same command goes on from here\n")


def test_partials_defaults_and_containers_count():
    def stage(n=1, *, m=2):
        return n + m

    def other(n=5, *, m=2):
        return n + m

    def holds(inside):
        return lambda: [f for group in inside for f in group]

    digest = fingerprint.code_digest
    assert digest(stage) != digest(other)
    assert digest(partial(stage, 3)) != digest(partial(stage, 4)) != digest(stage)
    plain = digest(holds([(partial(stage, 3),)]))
    assert plain != digest(holds([(partial(critique.revise, None),)]))


def test_leave_to_run_code_is_recorded_and_makes_rows_anew(run, monkeypatch, capsys):
    for value, made in (("0", "made"), ("0", "kept"), ("1", "made"), ("1", "kept"), ("0", "made")):
        monkeypatch.setenv("CAI_TRUST_REMOTE_CODE", value)
        run.rows("trust", lambda: [{"id": "1"}], key=1)
        assert made in capsys.readouterr().out
        record = provenance.describe(run.root, "t", run.params)
        assert record.get("trust_remote_code", False) == (value == "1")


def test_leave_to_run_code_makes_a_run_anew(lab, monkeypatch):
    write_notebook(lab, "04_revisions", ["1"])
    without, again = (stamp.ingredients(lab, "04_revisions", "mini") for _ in range(2))
    monkeypatch.setenv("CAI_TRUST_REMOTE_CODE", "1")
    allowed = stamp.ingredients(lab, "04_revisions", "mini")
    assert without == again != allowed
