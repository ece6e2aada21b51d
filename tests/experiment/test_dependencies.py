"""Fingerprints follow definitions: what makes rows and models counts, and nothing else does."""

import re
import shutil
import time
from functools import cache, partial
from pathlib import Path

import pytest

from cai_utils import critique, preference, sft
from cai_utils.experiment import dependencies, files, fingerprint, params
from cai_utils.experiment.dependencies import ALL, RUN, Graph
from cai_utils.lm.sampling import Sampler

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = {
    "finetune": lambda: sft.finetune("base", [], "folder"),
    "train": lambda: preference.train("base", [], "folder"),
    "revise": lambda: critique.revise(Sampler.from_spec("base"), [], None),
    "read": lambda: files.read_rows("rows.jsonl"),
    "pick": lambda: params.for_size({"s": 1}, "s"),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the real package, which fingerprints are then taken from."""
    ignored = shutil.ignore_patterns("__pycache__", "weights", "*.yaml")
    copy = shutil.copytree(REPOSITORY / "cai_utils", tmp_path / "cai_utils", ignore=ignored)
    monkeypatch.setattr(fingerprint, "PACKAGE", copy)
    return copy


def digests():
    return {name: fingerprint.code_digest(stage) for name, stage in STAGES.items()}


def edit(path, pattern, replacement):
    text, n = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.S | re.M)
    assert n == 1, f"{pattern} is not in {path}"
    path.write_text(text)


DEF = r"^(def \w+\(.*?\).*?:\n(?:    \"\"\".*?\"\"\"\n)?)"


@pytest.mark.parametrize(
    "file, pattern, replacement",
    [
        ("evaluation/tables.py", DEF, r"\1    print('another format')\n"),
        ("evaluation/stats.py", DEF, r"\1    print('another interval')\n"),
        ("figures/plots.py", DEF, r"\1    print('another label')\n"),
        ("figures/panels.py", DEF, r"\1    print('another label')\n"),
        ("experiment/writing.py", r'dpi": 200', 'dpi": 100'),
        ("experiment/registry.py", r'"SL-CAI"', '"another name"'),
        ("sft.py", r'    """(\w)', r'    """Said otherwise. \1'),
        ("sft.py", r"^def finetune", "# A comment.\n\n\ndef finetune"),
        ("sft.py", r"\Z", "\n\ndef unused():\n    return 1\n"),
        ("critique.py", r"\Z", "\n\nimport json\n"),
        ("lm/engine.py", r"^def \w+\(", "UNUSED = 1\n\n\n\\g<0>"),
    ],
)
def test_what_computes_nothing_changes_no_digest(package, file, pattern, replacement):
    before = digests()
    edit(package / file, pattern, replacement)
    assert digests() == before


@pytest.mark.parametrize(
    "file, pattern, replacement, changed",
    [
        ("lm/engine.py", r"^(class \w+.*?:\n)", r"\1    width = 2\n", {"revise"}),
        ("lm/training.py", r"^(def training_arguments\(.*?\):\n)", r"\1    print()\n",
         {"finetune", "train"}),
        ("lm/training.py", r"^class LengthBuckets.*?:\n", "\\g<0>    width = 2\n",
         {"finetune", "train"}),
        ("lm/models.py", r"^transformers_logging", "import os\nos.sync()\n\\g<0>",
         {"finetune", "train", "revise"}),
        ("seeds.py", r"^(def stable_int\(.*?:\n)", r"\1    print()\n", {"revise"}),
        ("critique.py", r"^STOPS = ", "STOPS = 1 and ", {"revise"}),
        ("preference.py", r"^(def soft_preference_loss\(.*?:\n)", r"\1    print()\n", {"train"}),
        ("sft.py", r"^class _Trainer\((\w)", r"class _Trainer(object, \1", {"finetune"}),
        ("experiment/files.py", r'"utf-8-sig"', '"latin-1"', {"read"}),
        ("experiment/params.py", r"    return value\[size\]", "    return value", {"pick"}),
    ],
)  # fmt: skip
def test_what_samples_or_trains_changes_the_digests_that_reach_it(
    package, file, pattern, replacement, changed
):
    before = digests()
    edit(package / file, pattern, replacement)
    after = digests()
    assert {name for name in STAGES if after[name] != before[name]} == changed


def test_a_digest_does_not_depend_on_the_order_of_definitions(package):
    before = digests()
    for file in (package / "sft.py", package / "critique.py", package / "lm" / "training.py"):
        blocks = re.split(r"^(?=def |class )", file.read_text(), flags=re.M)
        main = [b for b in blocks if "__main__" in b]
        assert len(blocks) > 3
        moved = [blocks[0], *reversed([b for b in blocks[1:] if b not in main]), *main]
        file.write_text("\n\n".join(block.strip() for block in moved) + "\n")
    assert digests() == before


def test_fingerprints_are_fast(package):
    dependencies.parsed.cache_clear()
    began = time.process_time()
    digests()
    first = time.process_time() - began
    began = time.process_time()
    digests()
    again = time.process_time() - began
    # Three digests; measured 0.3 s and 0.01 s.
    assert first < 2 and again < 0.3


# ---------------------------------------------------------------- a small package


@pytest.fixture
def small(tmp_path):
    def make(**files):
        folder = tmp_path / "cai_utils"
        for name, text in {"__init__": "", **files}.items():
            path = folder / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            if path.parent != folder:
                (path.parent / "__init__.py").touch()
        return Graph(folder)

    return make


def names(graph, *start):
    found = graph.reached([("cai_utils." + start[0], *start[1:])])
    return {f"{m}.{n}".removeprefix("cai_utils.") for m, n in found if n != RUN}


def test_names_are_followed_in_every_form(small):
    graph = small(
        a=(
            "from cai_utils import b, e\nfrom cai_utils.b import two as second\n"
            "import cai_utils.d\nimport cai_utils.d as short\n"
            "X = 1\nY = X + 1\n"
            "def f(n=Y):\n    return helper(n)\n"
            "def helper(n):\n    return b.one(n)\n"
            "def g():\n    return second()\n"
            "def h():\n    from cai_utils.c import deep\n    return deep\n"
            "def i():\n    return cai_utils.d.last, short.K.z\n"
            "class C(Base):\n    def run(self):\n        return self.b\n"
            "class Base:\n    pass\n"
            "def by_name():\n    return 'cai_utils.c:deep'\n"
            "def whole():\n    return vars(e)\n"
            "def annotated(x: C) -> C:\n    return x\n"
        ),
        b="def one(n):\n    return n\n\ndef two():\n    return 2\n",
        c="def deep():\n    return 3\n\ndef other():\n    pass\n",
        d="last = 1\nclass K:\n    z = 2\nrest = 3\n",
        e="from cai_utils.c import other\ndef hidden():\n    return 1\n",
    )
    assert names(graph, "a", "f") == {"a.f", "a.Y", "a.X", "a.helper", "b.one"}
    assert names(graph, "a", "g") == {"a.g", "b.two"}
    assert names(graph, "a", "h") == {"a.h", "c.deep"}
    assert names(graph, "a", "i") == {"a.i", "d.last", "d.K"}
    assert names(graph, "a", "C") == {"a.C", "a.Base"}
    assert names(graph, "a", "by_name") == {"a.by_name", "c.deep"}
    assert names(graph, "a", "whole") == {"a.whole", f"e.{ALL}", "c.other"}
    assert names(graph, "a", "annotated") == {"a.annotated"}


def test_what_runs_on_import_counts_for_whoever_uses_the_module(small):
    graph = small(
        a="from cai_utils import patched\ndef f():\n    return 1\n",
        patched=(
            "import sys\nNAMES = {}\ny = sys.x = 1\nNAMES.update({k: 2 for k in 'ab'})\nz = 3\n"
            "try:\n    from cai_utils.table import register\nexcept ImportError:\n"
            "    register = None\ndef g():\n    return register\n"
        ),
        registered=(
            "from cai_utils.table import register\n"
            "@register\ndef g():\n    return 1\n\ndef h():\n    return 2\n"
        ),
        table="def register(f):\n    return f\n",
    )
    found = graph.reached([("cai_utils.a", "f")])
    assert "x" in found["cai_utils.patched", RUN] and "update" in found["cai_utils.patched", RUN]
    assert "'z'" not in found["cai_utils.patched", RUN]
    assert ("cai_utils.patched", "NAMES") in found  # it is named there
    assert ("cai_utils.table", "register") in graph.reached([("cai_utils.patched", "g")])
    found = graph.reached([("cai_utils.registered", "h")])
    assert "'g'" in found["cai_utils.registered", RUN] and ("cai_utils.table", "register") in found


def test_where_an_outside_name_comes_from_counts(small):
    text = "from math import floor as cut\ndef f(x):\n    return cut(x)\n"
    (before,) = [t for n, t in small(a=text).reached([("cai_utils.a", "f")]).items() if n[1] == "f"]
    text = text.replace("floor", "ceil")
    (after,) = [t for n, t in small(a=text).reached([("cai_utils.a", "f")]).items() if n[1] == "f"]
    assert before != after


def test_a_star_import_and_a_package_that_hands_on_names(small):
    graph = small(
        a="from cai_utils.b import *\ndef f():\n    return one()\n",
        b="def one():\n    return 1\n",
        p__in__inner="def g():\n    return 1\n\ndef unused():\n    pass\n",
        user="from cai_utils import p\nfrom cai_utils.p import g\ndef f():\n    return g, p.g\n",
    )
    assert names(graph, "a", "f") == {"a.f", f"b.{ALL}"}
    (graph.folder / "p" / "__init__.py").write_text("from cai_utils.p.inner import g\n")
    assert names(Graph(graph.folder), "user", "f") == {"user.f", "p.inner.g"}


# ---------------------------------------------------------------- functions of a notebook


def test_a_function_reaches_what_it_calls_through_wrappers_and_containers():
    def starts(function):
        return fingerprint._reached(function, set())[0]

    sampler = cache(lambda: Sampler.from_spec("x"))
    assert ("cai_utils.lm.sampling", "Sampler") in starts(lambda: sampler())
    assert ("cai_utils.sft", "finetune", ALL) in starts(lambda: sft.finetune(1))
    assert ("cai_utils.sft", "finetune") in starts(partial(sft.finetune, 1))
    assert ("cai_utils.sft", ALL) in starts(lambda: print(sft))
    scorers = {"hh": object.__new__(preference.Scorer)}
    assert ("cai_utils.preference", "Scorer") in starts(lambda: list(scorers))

    def inside():
        from cai_utils import feedback, harmfulness
        from cai_utils.lm.models import load

        return feedback, harmfulness, load

    assert {("cai_utils", "feedback"), ("cai_utils", "harmfulness"),
            ("cai_utils.lm.models", "load")} <= starts(inside)  # fmt: skip


def test_a_notebook_counts_by_its_code_and_what_that_reaches(package):
    path = package.parent / "notebook.ipynb"
    shutil.copy(REPOSITORY / "notebooks" / "04_revision_iterations.ipynb", path)
    before = fingerprint.notebook_code(path, {"profile": "miniature"})
    assert "cai_utils.evaluation.chains.chains_long" in before
    assert "cai_utils.preference.Scorer" in before and "cai_utils.preference.train" not in before
    assert not any(".figures." in name or ".experiment.run." in name for name in before)
    path.write_text(path.read_text().replace("The paper claims", "The paper says"))
    assert fingerprint.notebook_code(path, {"profile": "miniature"}) == before
    named = fingerprint.notebook_code(path, {"judge": "cai_utils.miniature.judge:retained"})
    assert "cai_utils.miniature.judge.retained" in named
    path.write_text(path.read_text().replace("chains_of(size) for", "chains_of(size)[:5] for"))
    after = fingerprint.notebook_code(path, {"profile": "miniature"})
    assert {name for name in after if after[name] != before[name]} == {"cells"}
