"""Run a notebook in the batch, with papermill."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from cai_utils.experiment import kinds
from cai_utils.experiment.files import PACKAGE, finite, write_json

FOLDERS = ("data", "models", "results", "figures", "wandb", "executed")  # of a run


class _Prefixed(io.TextIOBase):
    """Standard output with the run's name before each line, as several notebooks run at once."""

    def __init__(self, name: str):
        self.name, self.rest = name, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            print(f"{self.name} | {line}", flush=True)
        return len(text)


def check_name(name: str) -> str:
    """The name of a run; ValueError where its notebook cannot be called so."""
    if str(name).endswith((".running", ".failed")):
        raise ValueError(f"the name {name!r} of a run ends as those of unfinished ones; give "
                         "another")
    return kinds.check_name(name, "the name of a run")


def check_folder(folder) -> Path:
    """The folder of a run; ValueError where a run could not write in it."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    for path in (there, *(folder / name for name in FOLDERS)):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file where a run needs a folder: move it away")
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"{path} is read-only, and a run writes there: make it writable")
    return folder


def one_line(error) -> str:
    """What an error says, without the number that an OSError begins with."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _strict(path: Path) -> None:
    """Make a notebook JSON that any reader takes: null for the NaN and infinities of parameters and
    outputs, which nbformat writes as they are."""
    if not path.is_file():
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if finite(notebook) != notebook:
        write_json(path, finite(notebook))


def _unformatted(path) -> str:
    """A path for papermill, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def execute(root, notebook: str, params: dict, name: str) -> Path:
    """Run a notebook with papermill; the path of the executed notebook.

    It appears as runs/<profile>/executed/<name>.ipynb only when it ran to its end. One that failed
    stays as <name>.failed.ipynb, and RuntimeError says in which cell and why.
    """
    # jsonschema builds this parser of addresses on import, in 1.3 s; nothing here uses it.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    check_name(name)
    folder = Path(root) / "runs" / kinds.check_name(params["profile"], "profile") / "executed"
    folder.mkdir(parents=True, exist_ok=True)
    running, failed = folder / f"{name}.running.ipynb", folder / f"{name}.failed.ipynb"
    # The kernel has to find this package even where it is not installed.
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    os.environ["CAI_ROOT"], os.environ["CAI_RUN_NAME"] = str(root), name
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    where = f"{failed} shows how far it got"
    try:
        papermill.execute_notebook(
            _unformatted(Path(root) / "notebooks" / f"{notebook}.ipynb"),
            _unformatted(running),
            parameters=params,
            cwd=str(root),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,  # seconds; a busy machine takes longer than the default 60
            stdout_file=_Prefixed(name),
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        _strict(running)
        os.replace(running, folder / f"{name}.ipynb")
        failed.unlink(missing_ok=True)
    except papermill.PapermillExecutionError as error:
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        last = (error.evalue.strip().splitlines() or [""])[-1]
        raise RuntimeError(
            f"{name} failed in cell In [{error.exec_count}] ({first.strip()[:60]}): "
            f"{error.ename}: {last}\n  {where}"
        ) from None
    except NoSuchKernel:
        raise RuntimeError(f"{name}: this Python has no Jupyter kernel: run `make env`") from None
    except DeadKernelError:
        raise RuntimeError(
            f"{name}: its kernel died, often for lack of memory\n  {where}"
        ) from None
    finally:
        with contextlib.suppress(OSError, ValueError):  # the error above is the one to read
            if running.exists():
                os.replace(running, failed)
            _strict(failed)
    return folder / f"{name}.ipynb"
