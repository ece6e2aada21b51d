"""The order of the experiments: which jobs there are, what waits for what, what is run again.

On a copy of the Snakefile and the package, with notebooks made here.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from cai_utils.experiment import params

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = {
    "00_miniature": "from cai_utils.miniature import world",
    "01_harm_identification": "from cai_utils import feedback",
    "02_preference_models": "from cai_utils.evaluation import stats",
    "03_critique_revision": "from cai_utils import critique",
    "04_revision_iterations": "from cai_utils.evaluation import stats",
    "06_critique_ablation": "from cai_utils import critique",
    "07_sl_cai": "from cai_utils import sft",
    "08_ai_feedback": "from cai_utils import feedback",
    "09_rl": "from cai_utils.rl import ppo",
    "10_elo": "from cai_utils.evaluation import elo",
}
GRID = "grid:\n  methods: [helpful_rlhf, rl_cai]\n  sizes: [xs, s]\n"
RL = [f"09_rl-{method}-{size}" for method in ("helpful_rlhf", "rl_cai") for size in ("xs", "s")]
ALL = sorted([*(name for name in NOTEBOOKS if name != "09_rl"), *RL])

HARM = "$(touch harm) `touch harm` '; touch harm; ' \"; touch harm; \" & touch harm #"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("a lab")  # a path with a space
    shutil.copy(REPOSITORY / "Snakefile", root)
    shutil.copytree(
        REPOSITORY / "cai_utils",
        root / "cai_utils",
        ignore=shutil.ignore_patterns("__pycache__", "weights"),
    )
    (root / "pyproject.toml").write_text('[project]\nname = "cai-lab"\n')
    (root / "cai_utils" / "miniature" / "weights" / "xs").mkdir(parents=True)
    (root / "cai_utils" / "miniature" / "weights" / "xs" / "config.json").write_text("{}")
    (root / "notebooks").mkdir()
    (root / "params" / "miniature").mkdir(parents=True)
    (root / "params" / "miniature" / "_common.yaml").write_text("sizes: [xs, s]\n")
    for name, source in NOTEBOOKS.items():
        own = GRID if name == "09_rl" else ""
        (root / "params" / "miniature" / f"{name}.yaml").write_text(own)
        book = nbformat.v4.new_notebook()
        cell = nbformat.v4.new_code_cell(
            'profile = "miniature"\nmethod = ""\nsize = ""\n'
            + "pms = {}\n" * (name in ("07_sl_cai", "09_rl"))
            + 'n = ""\n' * (name == "06_critique_ablation")
            + "rl_seed = 0\n" * (name == "09_rl") + "n_seeds = 1\n" * (name == "10_elo")
        )
        cell.metadata.tags = ["parameters"]
        # In a function, as this is about who uses what; torch would only take time.
        body = (
            f"def uses():\n    {source}\n    return {source.split()[-1]}\n"
            "import os\nprint('threads', os.environ['OMP_NUM_THREADS'])"
        )
        book.cells = [cell, nbformat.v4.new_code_cell(body)]
        nbformat.write(book, root / "notebooks" / f"{name}.ipynb")
    # Two notebooks on real data, as in a profile without a miniature.
    (root / "params" / "real").mkdir()
    for name in ("01_harm_identification", "03_critique_revision"):
        (root / "params" / "real" / f"{name}.yaml").write_text("")
    # One whose grid would do harm in a shell that reads it.
    (root / "params" / "shell").mkdir()
    (root / "params" / "shell" / "06_critique_ablation.yaml").write_text(
        f"grid: {{ns: [{json.dumps(HARM)}, \"1e5\"]}}\n"
    )
    return root


def snakemake(lab, *arguments, profile="miniature", dry=True, seeds=1):
    environment = {**os.environ, "WANDB_MODE": "disabled", "CAI_ROOT": str(lab)}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--rerun-triggers", "mtime"]
    command += ["--scheduler", "greedy", "--quiet", "host", *arguments]
    command += ["--config", f"profile={profile}", f"seeds={seeds}"] + (["-n"] if dry else [])
    done = subprocess.run(command, cwd=lab, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def jobs(output):
    """Names of the jobs of snakemake's closing table, without the target `all`."""
    table = output[output.rindex("Job stats:") :] if "Job stats:" in output else ""
    found = re.findall(r"^(\d\d_\S+) +(\d+)$", table, re.M)
    assert all(count == "1" for _, count in found)
    return sorted(name for name, _ in found)


def before(output):
    """{job: the jobs whose output it reads} of a dry run."""
    waits = {}
    for block in re.findall(r"input: ([^\n]*)\n\s+output: \S*/executed/(\S+)\.ipynb", output):
        waits[block[1]] = set(re.findall(r"/executed/(\S+?)\.ipynb", block[0]))
    return waits


def dry_run_details(lab, profile="miniature", seeds=1):
    """Like snakemake(), with the inputs of each job, which its message would take the place of."""
    text = (lab / "Snakefile").read_text()
    plain = lab / "Snakefile.plain"
    plain.write_text(re.sub(r"\n        message:\n.*", "", text))
    code, output = snakemake(lab, "--snakefile", str(plain), profile=profile, seeds=seeds)
    plain.unlink()
    assert code == 0, output
    return output


def finished(lab, stamp):
    """As after a run of everything that ended at time `stamp`."""
    for name in ALL:
        for ending in ("ipynb", "stamp.json"):
            path = lab / "runs" / "miniature" / "executed" / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            os.utime(path, (stamp, stamp))


def change(path, text, stamp):
    path.write_text(text)
    os.utime(path, (stamp, stamp))


def test_every_notebook_has_its_jobs_and_waits_for_what_it_builds_on(lab):
    output = dry_run_details(lab)
    assert jobs(output) == ALL
    waits = before(output)
    assert waits["00_miniature"] == set()
    assert waits["02_preference_models"] == waits["03_critique_revision"] == {"00_miniature"}
    assert waits["01_harm_identification"] == {"00_miniature", "02_preference_models"}
    both = {"02_preference_models", "03_critique_revision"}
    assert waits["04_revision_iterations"] == waits["06_critique_ablation"] == both
    assert waits["07_sl_cai"] == {"03_critique_revision"}
    assert waits["08_ai_feedback"] == {"07_sl_cai"}
    for size in ("xs", "s"):
        assert waits[f"09_rl-helpful_rlhf-{size}"] == both
        assert waits[f"09_rl-rl_cai-{size}"] == {"07_sl_cai", "08_ai_feedback"}
    assert waits["10_elo"] == {*RL, "07_sl_cai"}
    inputs = re.findall(r"input: ([^\n]*)\n\s+output: \S*/executed/(\S+)\.ipynb", output)
    inputs = {name: set(files.split(", ")) for files, name in inputs}
    assert "cai_utils/miniature/weights/xs/config.json" in inputs["00_miniature"]
    assert "cai_utils/rl/ppo.py" in inputs["09_rl-rl_cai-s"]
    assert "cai_utils/rl/ppo.py" not in inputs["03_critique_revision"]
    every = set().union(*inputs.values())
    assert not any(f.startswith("cai_utils/figures/") for f in every)
    # What reads rows, picks values and says what a method learns from; not where results go.
    counted = {f"cai_utils/experiment/{name}.py" for name in ("files", "params", "registry")}
    assert {f for f in every if f.startswith("cai_utils/experiment/")} <= counted


def test_more_seeds_are_more_runs_of_rl_that_elo_waits_for(lab):
    output = dry_run_details(lab, seeds=2)
    further = [f"{name}-seed1" for name in RL]
    assert jobs(output) == sorted(ALL + further)
    waits = before(output)
    assert waits["09_rl-rl_cai-s-seed1"] == waits["09_rl-rl_cai-s"]
    assert waits["10_elo"] == {*RL, *further, "07_sl_cai"}


def test_elo_is_made_again_for_another_number_of_seeds(lab):
    for path in lab.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    finished(lab, time.time() - 10)
    executed = lab / "runs" / "miniature" / "executed"
    for name in RL:
        for ending in ("ipynb", "stamp.json"):
            shutil.copy2(executed / f"{name}.{ending}", executed / f"{name}-seed1.{ending}")
    stamp = executed / "10_elo.stamp.json"
    for before, seeds, again in ((2, 1, ["10_elo"]), (2, 2, [])):
        change(stamp, json.dumps({"params": {"n_seeds": before}}), time.time() - 10)
        assert jobs(snakemake(lab, seeds=seeds)[1]) == again
    shutil.rmtree(lab / "runs")


@pytest.mark.parametrize("file", ["07_sl_cai", "_common"])
def test_pms_that_score_samples_have_to_be_there_first(lab, file):
    own = lab / "params" / "miniature" / f"{file}.yaml"
    kept = own.read_text()
    own.write_text(kept + "pms: {harmlessness: pm_harmless}\n")
    waits = before(dry_run_details(lab))
    own.write_text(kept)
    assert waits["07_sl_cai"] == {"02_preference_models", "03_critique_revision"}
    assert waits["03_critique_revision"] == {"00_miniature"}  # it has no such parameter


def test_only_what_is_out_of_date_is_run_again(lab):
    now = time.time()
    finished(lab, now + 10)
    code, output = snakemake(lab)
    assert code == 0 and "Nothing to be done" in output, output
    change(lab / "params" / "miniature" / "06_critique_ablation.yaml", "n: 1\n", now + 20)
    change(lab / "cai_utils" / "rl" / "ppo.py", "x = 1\n", now + 20)
    # ppo.py is the business of RL and of what reads its results, of nobody else.
    assert jobs(snakemake(lab)[1]) == sorted(["06_critique_ablation", *RL, "10_elo"])
    finished(lab, now + 30)
    change(lab / "cai_utils" / "miniature" / "weights" / "xs" / "config.json", "{}", now + 40)
    assert jobs(snakemake(lab)[1]) == ALL
    shutil.rmtree(lab / "runs")


def test_a_profile_without_some_notebooks_runs_and_is_then_up_to_date(lab):
    """For real: two jobs side by side, one thread each, and nothing the second time."""
    code, output = snakemake(lab, "--quiet", "rules", "reason", profile="real", dry=False)
    assert code == 0, output
    executed = lab / "runs" / "real" / "executed"
    assert sorted(p.name for p in executed.glob("*.ipynb")) == [
        "01_harm_identification.ipynb",
        "03_critique_revision.ipynb",
    ]
    assert "03_critique_revision | threads 1" in output
    assert "01_harm_identification | done in" in output
    assert "Figures of profile real" in output
    code, output = snakemake(lab, profile="real", dry=False)
    assert code == 0 and "Nothing to be done" in output, output


def really(lab):
    """Runs profile `real`; ({job: whether it was up to date}, the output)."""
    code, output = snakemake(lab, "--quiet", "rules", "reason", profile="real", dry=False)
    assert code == 0, output
    ran = dict.fromkeys(re.findall(r"^(\d\d_\S+) \| starts", output, re.M), False)
    return ran | dict.fromkeys(re.findall(r"^(\d\d_\S+) \| up to date", output, re.M), True), output


def test_what_snakemake_finds_newer_runs_only_if_its_contents_have_changed(lab):
    """After test_a_profile_without_some_notebooks, which has run both notebooks."""
    package = lab / "cai_utils"
    for path in package.rglob("*.py"):
        os.utime(path)
    assert False not in really(lab)[0].values()  # Snakemake itself skips small files by content
    # How figures look is nobody's business, and a docstring changes no number.
    plots = package / "figures" / "plots.py"
    plots.write_text(plots.read_text() + "\nLABEL = 'another'\n")
    assert really(lab)[0] == {}
    feedback = package / "feedback.py"
    text = feedback.read_text()
    feedback.write_text('"""Another docstring."""\n' + text.partition('"""\n')[2])
    assert really(lab)[0] == {"01_harm_identification": True}
    feedback.write_text(text.replace("def label(", "PART = 1\n\n\ndef label("))
    found, output = really(lab)
    assert found == {"01_harm_identification": False}
    assert "(changed: code cai_utils.feedback.*" in output
    # Parameters by their values: what the notebook has anyway changes nothing.
    own = lab / "params" / "real" / "03_critique_revision.yaml"
    own.write_text("method: ''\n")
    assert really(lab)[0] == {"03_critique_revision": True}
    own.write_text("size: s\n")
    assert really(lab)[0] == {"03_critique_revision": False}
    own.write_text("")
    # Without its record, or without its notebook, a run is made again.
    executed = lab / "runs" / "real" / "executed"
    (executed / "01_harm_identification.stamp.json").unlink()
    (executed / "03_critique_revision.ipynb").unlink()
    both = ("01_harm_identification", "03_critique_revision")
    assert really(lab)[0] == dict.fromkeys(both, False)


def test_values_are_no_shell_code(lab):
    code, output = snakemake(lab, profile="shell", dry=False)
    assert code == 0, output
    assert not list(lab.rglob("harm"))
    stamps = (lab / "runs" / "shell" / "executed").glob("*.stamp.json")
    values = {json.loads(path.read_text())["params"]["n"] for path in stamps}
    assert values == {HARM, "1e5"}


def test_mistakes_are_one_clear_error(lab):
    code, output = snakemake(lab, profile="minature")
    assert code != 0
    assert "unknown profile 'minature'; nearest: miniature; known: miniature, real" in output
    assert "Traceback" not in output
    stray = lab / "params" / "real" / "55_unheard_of.yaml"
    stray.write_text("")
    code, output = snakemake(lab, profile="real")
    stray.unlink()
    assert code != 0
    assert "55_unheard_of" in output and "NEEDS of the Snakefile" in output
    grid = lab / "params" / "real" / "03_critique_revision.yaml"
    for points, words in {
        "{sizes: xs}": "give a list of values", "{sizes: [a/../b]}": "give a list of values",
        "{sizes: ['{input}']}": "give a list of values", "{sizes: []}": "give a list of values",
        "3": "grid is 3", "{sizes: [xs, xs]}": "03_critique_revision-xs is there twice",
    }.items():
        grid.write_text(f"grid: {points}\n")
        code, output = snakemake(lab, profile="real")
        assert code != 0 and words in output and "Traceback" not in output, output
    grid.write_text("")
    (lab / "runs").mkdir(exist_ok=True)
    (lab / "runs").rename(lab / "away")
    (lab / "runs").touch()
    code, output = snakemake(lab, profile="real")
    (lab / "runs").unlink()
    (lab / "away").rename(lab / "runs")
    assert code != 0 and f"{lab}/runs is a file where a run needs a folder" in output, output
    assert "Traceback" not in output


def test_the_repository_itself_has_a_plan_for_each_of_its_profiles():
    profiles = params.profiles(REPOSITORY)
    if not profiles:
        pytest.skip("no params/ yet")
    for profile in profiles:
        command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "--cores", "2"]
        command += ["--nolock", "--config", f"profile={profile}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        planned = set(jobs(done.stdout + done.stderr))
        own = {p.stem for p in (REPOSITORY / "params" / profile).glob("[0-9]*.yaml")}
        assert {name.split("-")[0] for name in planned} == own


SLOW = """import os, time
from pathlib import Path
from cai_utils import experiment
from cai_utils.experiment.writing import temporary_name
run = experiment.start("03_critique_revision", globals())
temporary_name(run.dir / "results" / "half.csv").touch()
while not Path("go").exists():
    Path("beats").open("a").write(f"{os.getpid()}\\n")
    time.sleep(0.05)
run.finish()"""


def writers(lab, more_than=0):
    """Numbers of the kernels that have written, in order, once there are more than so many."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = (lab / "beats").read_text().split() if (lab / "beats").exists() else []
        found = [pid for pid, _ in itertools.groupby(lines)]
        if len(found) > more_than:
            return found
        time.sleep(0.05)
    pytest.fail("no kernel writes")


def test_a_kill_of_any_process_leaves_nothing_behind_and_nothing_in_the_way(lab, tmp_path):
    """make and snakemake, killed alone one after the other with the same command again at
    once; two at the same time are one too many."""
    import psutil

    root = tmp_path / "a 'lab' of $HOME"
    shutil.copytree(lab, root, ignore=shutil.ignore_patterns("runs", ".snakemake"))
    shutil.copy(REPOSITORY / "Makefile", root)
    shutil.rmtree(root / "params")
    (root / "params" / "slow").mkdir(parents=True)
    (root / "params" / "slow" / "03_critique_revision.yaml").touch()
    path = root / "notebooks" / "03_critique_revision.ipynb"
    book = nbformat.read(path, 4)
    book.cells[1].source = SLOW
    nbformat.write(book, path)
    (root / "requirements.lock").touch()
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (root / ".venv" / "bin" / "python").chmod(0o755)
    (root / ".venv" / ".installed").touch()
    environment = {**os.environ, "WANDB_MODE": "disabled", "CAI_ROOT": str(root)}

    def start():
        return subprocess.Popen(["make", "figures", "PROFILE=slow"], cwd=root, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    for victim in range(2):
        make = start()
        kernel = psutil.Process(int(writers(root, victim)[-1]))
        tree = [*(parent.pid for parent in reversed(kernel.parents()[:3])), kernel.pid]
        assert tree[0] == make.pid
        if victim == 0:
            second = start()
            said = second.communicate()[0]
            assert second.returncode and "Traceback" not in said
            assert (f"another `make figures` works already in {root}/runs/slow, as process "
                    f"{tree[1]}: wait for it, or stop it") in said
        os.kill(tree[victim], signal.SIGKILL)
        if victim > 0:  # it has to say so; without make nobody does
            assert make.wait(30) != 0
    (root / "go").touch()
    last = start()
    said = last.communicate()[0]
    executed = {p.name for p in (root / "runs" / "slow" / "executed").iterdir()}
    assert "03_critique_revision.ipynb" in executed and "Exception ignored" not in said, said
    assert not {name for name in executed if "running" in name}
    assert not list((root / "runs" / "slow" / "results").glob(".*"))
    assert len(set(writers(root))) == len(writers(root)) == 2  # none after one that came later
