"""What a result was made from: parameters, code, versions, machine; and whether it is still what
its record says."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from cai_utils.experiment import fingerprint
from cai_utils.experiment.files import plain, read_json

PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def trust() -> dict:
    """`{"trust_remote_code": True}` where the environment variable CAI_TRUST_REMOTE_CODE is 1, so
    that code which a model's folder or repository brings may run; else {}. ValueError for a value
    other than 1, 0 or none."""
    value = os.environ.get("CAI_TRUST_REMOTE_CODE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"CAI_TRUST_REMOTE_CODE={value!r}: it is 1 or 0")
    return {"trust_remote_code": True} if value == "1" else {}


def git_state(root) -> dict:
    """`{"commit": sha or None, "dirty": bool or None}` of the clone at `root`.

    dirty: a tracked file differs from the commit, those of `figures/` apart, which `make publish`
    writes. None where there is no git, or no repository.
    """

    def git(*arguments):
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--",
                      ":(exclude)figures")
    except (OSError, subprocess.TimeoutExpired):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def versions() -> dict:
    """Installed versions of Python and of what decides the numbers (None where missing)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict:
    """CPU model, number of threads that torch uses (or would use), and the GPU if there is one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M)
        cpu = named.group(1).strip() if named else cpu
    # torch takes seconds to import: ask it only if the notebook has it anyway.
    torch = sys.modules.get("torch")
    if torch is not None:
        threads = torch.get_num_threads()
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    else:
        threads, gpu = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1), None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "platform": platform.platform(),
    }


def describe(root, notebook: str, params: dict) -> dict:
    """The provenance record that stands beside every result (ARCHITECTURE.md, Rows)."""
    return {
        "notebook": notebook,
        "profile": params.get("profile"),
        "seed": params.get("seed"),
        "params": params,
        **trust(),
        "git": git_state(root),
        "versions": versions(),
        "machine": machine(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ---------------------------------------------------------------- what is still as it was made
def seal(record: dict) -> dict:
    """A record with a checksum of itself, `check`, ready for JSON."""
    record = plain(record)
    return {**record, "check": fingerprint.digest(record)}


def unseal(record: dict) -> dict | None:
    """What `seal` was given; None where the checksum is missing or does not match."""
    rest = {k: v for k, v in record.items() if k != "check"}
    return rest if record.get("check") == fingerprint.digest(rest) else None


def read(path) -> dict | None:
    """A record that was sealed; {} where there is none, None where it is damaged. Records of
    earlier versions have no seal and are taken as they are."""
    if not Path(path).exists():
        return {}
    record = read_json(path)
    sealed = "check" in record or "sha256" in record
    return unseal(record) if sealed else record or None


def changed(path, digests: dict, record: dict) -> list[str]:
    """The files of `path`, a file or a folder with its `fingerprint.file_digests`, that are not
    what `record` says, or missing; files that were added do not count."""
    path = Path(path)
    wanted = {path.name: record.get("sha256")} if path.is_file() else record.get("folder", {})
    return [name for name, sha in wanted.items() if sha and digests.get(name) != sha]
