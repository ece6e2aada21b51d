"""Long work: journals that survive kills, torn lines and other work; bars and lines of progress."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from cai_utils import constitution, critique, feedback
from cai_utils.experiment import journal
from cai_utils.experiment.journal import Journal, recording
from cai_utils.lm.sampling import Sampler

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["\n\nHuman: " + x for x in ("a", "bcd", "Tell me.", "Why is it so?", "q", "zz")]
LAW = constitution.Constitution(
    "test",
    critiques=[{"id": "p", "critique_request": "Find.", "revision_request": "Mend."}],
    comparisons=[{"id": "c", "principle": "Which?"}],
)


def counted(seen, stop_after=None):
    """A tiny sampler of a fixed model that counts the rows of its batches, and may die."""
    sampler = Sampler(tiny.llama(), tiny.tokenizer(), batch_tokens=150)
    sampler.source = "tiny"

    def counting(plain):
        def run(prompts, *args):
            if stop_after is not None and len(seen) >= stop_after:
                raise KeyboardInterrupt
            done = plain(prompts, *args)
            seen.extend(map(tuple, prompts))
            return done

        return run

    sampler.engine.decode = counting(sampler.engine.decode)
    sampler.engine.score = counting(sampler.engine.score)
    return sampler


def test_a_journal_keeps_its_lines(tmp_path):
    path = tmp_path / "deep" / "x.partial"
    header = {"key": 1}
    journal = Journal(path, header)
    journal.add([("a", [1.5, None]), ("b", "\u00e9\n")])
    journal.add([("c", 3)])
    journal.close()
    whole = path.read_bytes()
    assert Journal(path, header).found == {"a": [1.5, None], "b": "\u00e9\n", "c": 3}
    # Killed anywhere in the last line: it alone is lost, and what follows is whole again.
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(path, header)
        assert set(journal.found) == {"a", "b"}, end
        journal.add([("d", 4)])
        journal.close()
        again = Journal(path, header)
        assert again.found == {"a": [1.5, None], "b": "\u00e9\n", "d": 4}
        again.close()
    # A malformed line in the middle counts as not there; one without its header is other work.
    path.write_bytes(whole.replace(b'["b"', b'\xff"b"'))
    journal = Journal(path, header)
    assert set(journal.found) == {"a", "c"}
    journal.close()
    journal = Journal(path, {"key": 2})
    assert journal.found == {} and json.loads(path.read_bytes())[0] == {"key": 2}
    journal.close()
    path.write_bytes(b'{"ke')  # torn in its header
    assert Journal(path, header).found == {}


def test_two_runs_at_once_do_not_tear_each_others_lines(tmp_path):
    pytest.importorskip("fcntl")
    first, second = (Journal(tmp_path / "x", {}) for _ in range(2))
    first.add([("a", 1)])
    second.add([("b", 2)])
    second.remove()
    first.close()
    assert Journal(tmp_path / "x", {}).found == {"a": 1}


@pytest.mark.parametrize("stop_after", [0, 1, 5, 9])
def test_what_was_sampled_is_not_sampled_again(tmp_path, stop_after):
    how = {"n": 2, "max_new_tokens": 10, "seed": 3}
    want = counted([]).generate(PROMPTS, **how)
    scores = counted([]).choice_logprobs(PROMPTS, ["x", "yz"])

    def work(sampler):
        return sampler.generate(PROMPTS, **how), sampler.choice_logprobs(PROMPTS, ["x", "yz"])

    seen, path = [], tmp_path / "x.partial"
    with pytest.raises(KeyboardInterrupt), recording(path, 1):
        work(counted(seen, stop_after))
    assert path.exists() == bool(seen)
    before = len(seen)
    if seen:
        with open(path, "ab") as file:
            file.write(b'["torn", [0.1, ')
    with recording(path, 1):
        texts, again = work(counted(seen))
    assert texts == want and (again == scores).all()
    assert len(seen) == 2 * len(PROMPTS) + len(PROMPTS)  # samples, and questions
    assert before < len(seen)
    with recording(path, 1):
        assert work(counted(seen, 0))[0] == want  # nothing at all is left to do
    more = []
    with recording(path, 1):  # other settings are other work
        counted(more).generate(PROMPTS, **{**how, "seed": 4})
        assert len(more) == 2 * len(PROMPTS)


def test_a_live_model_is_never_taken_from_a_journal(tmp_path):
    seen = []
    sampler = counted(seen)
    sampler.source = None
    with recording(tmp_path / "x", 1) as journal:
        for _ in range(2):
            sampler.generate(PROMPTS, max_new_tokens=3)
        assert journal.found == {} and len(seen) == 2 * len(PROMPTS)
    assert not (tmp_path / "x").exists()


def test_chains_and_labels_are_taken_up_in_the_middle(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": x}]} for x in ("Hi", "Help me", "So?")]
    pairs = [{**row, "responses": ["one", "another"]} for row in rows]

    def chains(sampler):
        return critique.revise(sampler, rows, LAW, n_revisions=2, max_new_tokens=6)

    def labels(sampler):
        return feedback.label(sampler, pairs, LAW, cot=True, n_samples=2, max_new_tokens=6)

    for name, work in (("chains", chains), ("labels", labels)):
        whole, seen = [], []
        want = work(counted(whole))
        path = tmp_path / name
        for stop_after in (1, len(whole) // 2, len(whole) - 1):
            with contextlib.suppress(KeyboardInterrupt), recording(path, 1):
                work(counted(seen, stop_after))
            assert len(seen) >= stop_after
        with recording(path, 1):
            got = work(counted(seen))
        # Other batches round the probabilities otherwise.
        for one, other in zip(got, want, strict=True):
            for key in ("p_first", "p_chosen", "position_bias"):
                assert one.pop(key, 0) == pytest.approx(other.pop(key, 0), abs=1e-5)
        assert got == want
        assert sorted(seen) == sorted(whole), name  # each row once, over all four runs


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}, {tests!r} + '/experiment']
import test_journal
from cai_utils import experiment
seen = []
sampler = test_journal.counted(seen)
plain = sampler.engine.decode
def slow(*args):
    if seen:
        print("second batch", flush=True)
        time.sleep({pause})
    return plain(*args)
sampler.engine.decode = slow
run = experiment.start("04_x", {{"profile": "mini"}})
def make():
    said = sampler.generate(test_journal.PROMPTS, n=4, max_new_tokens=10)
    return [{{"texts": [c.text for c in row]}} for row in said]
run.rows("said", make, k=1)
print("sampled", len(seen), flush=True)
"""


def test_rows_survive_a_kill(tmp_path):
    """A run that is killed for real, and the same run again."""
    (tmp_path / "params" / "mini").mkdir(parents=True)
    env = {**os.environ, "CAI_ROOT": str(tmp_path), "WANDB_MODE": "disabled"}

    def start(pause):
        code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), pause=pause)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                                env=env)  # fmt: skip

    first = start(600)
    partial = tmp_path / "runs" / "mini" / "data" / "said.jsonl.partial"
    assert first.stdout.readline() == "second batch\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = len(partial.read_text().splitlines()) - 1
    assert 0 < kept < 4 * len(PROMPTS)
    second = start(0)
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0
    assert f"sampled {4 * len(PROMPTS) - kept}\n" in said
    rows = partial.with_name("said.jsonl").read_text().splitlines()
    texts = [json.loads(row)["texts"] for row in rows]
    assert texts == [[c.text for c in row] for row in
                     counted([]).generate(PROMPTS, n=4, max_new_tokens=10)]  # fmt: skip
    assert not partial.exists()


def test_progress_of_a_batch_is_told_in_lines(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 31.0, 40.0, 65.0])
    monkeypatch.setattr(journal, "_interactive", lambda: False)
    monkeypatch.setattr(journal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with journal.progress(100, "completion") as bar:
        for _ in range(4):
            bar.update(20)
    assert capsys.readouterr().out.splitlines() == [
        "40 of 100 completions, 1.29 a second, 46 s left",
        "80 of 100 completions, 1.23 a second, 16 s left",
    ]
    with journal.progress(3, "question", False) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")
    with journal.progress(3, "question", True) as bar:
        bar.update(2)
    assert "2/3" in capsys.readouterr().err
