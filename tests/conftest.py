"""The order of the test files: the longest first, so that no worker is left with one at the end."""

# `make test` starts files in this order (xdist's --no-loadscope-reorder), the others as they come.
LONGEST = ("test_chain.py", "test_bench.py", "test_miniature.py", "test_ppo_runs.py",
           "test_snakefile.py", "test_kills.py", "test_families.py", "test_refusal_probe.py",
           "test_reference.py")


def pytest_collection_modifyitems(items):
    def place(item):
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)
