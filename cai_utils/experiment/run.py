"""A run of a notebook: its folders, stages that resume, tables, figures, provenance and W&B.

In a notebook, after its parameters cell::

    run = experiment.start("04_revision_iterations", globals())
    chains = run.rows("chains_s", lambda: critique.revise(...), size="s", seed=seed)
    table = run.table(scores, "fig05_revisions")
    run.figure(draw("fig05_revisions", run.dir / "results"), "fig05_revisions")
    run.finish()

In the batch: `python -m cai_utils run 04_revision_iterations --profile miniature seed=1`.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from cai_utils.experiment import fingerprint, provenance, stamp
from cai_utils.experiment.files import (
    atomic,
    finite,
    read_json,
    repo_root,
    save_figure,
    write_json,
)
from cai_utils.experiment.params import check_profile, check_sizes, from_namespace


class Run:
    """One notebook on one profile: its folders, its results and their provenance.

    `profile`, `notebook`, `params`, `seed`; `root` (the repository), `dir`
    (runs/<profile>), `provenance` (dict, see provenance.describe). `read` and `made` hold
    the sha256 of what it took from other runs and of what it made, by path below `dir`.
    """

    def __init__(self, notebook: str, params: dict):
        self.root = repo_root()
        self.read, self.made = {}, {}
        self.notebook, self.params = notebook, dict(params)
        self.profile, self.seed = params["profile"], params.get("seed", 0)
        self.dir = self.root / "runs" / self.profile
        for name in ("data", "models", "results", "figures", "wandb", "executed"):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        self.provenance = provenance.describe(self.root, notebook, self.params)
        self._started = time.time()
        self._wandb = _start_wandb(self)

    # -- places

    def data(self, name: str) -> Path:
        """runs/<profile>/data/<name>, with `.jsonl` added where `name` has no suffix."""
        known = (".jsonl", ".json", ".gz", ".csv", ".parquet", ".txt", ".npz")
        return self.dir / "data" / (name if name.endswith(known) else f"{name}.jsonl")

    def model(self, name: str, size: str) -> Path:
        """runs/<profile>/models/<name>/<size>, the folder of a Hugging Face model."""
        return self.dir / "models" / name / str(size)

    def need(self, path, made_by: str) -> Path:
        """`path` (relative ones: under runs/<profile>), which notebook `made_by` makes.

        made_by may name the parameters, too: "09_rl method=rl_cai size=s". Raises
        FileNotFoundError that says how to make it when it is missing or an empty folder.
        """
        path = self.dir / path
        if not (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            raise FileNotFoundError(
                f"{path} is missing. {made_by.split()[0]} makes it: run `python -m cai_utils run "
                f"{made_by} --profile {self.profile}`, or everything in order with `make figures "
                f"PROFILE={self.profile}`"
            )
        name = self._name(path)
        if name not in self.read and name not in self.made:
            self.read[name] = fingerprint.file_digest(path)
        return path

    def _name(self, path: Path) -> str:
        inside = path.is_relative_to(self.dir)
        return path.relative_to(self.dir).as_posix() if inside else str(path)

    # -- results

    def rows(self, name: str, make, **key) -> list[dict]:
        """Rows of data/<name>.jsonl if they were made with the same key, else `make()`'s, saved.

        `key` holds everything that `make` depends on apart from the code of cai_utils and its
        own, which count by themselves: parameters, names, and a Path for each file or model folder
        that it reads (its content counts). ValueError for a value without a fingerprint.

        What `make` samples is kept in <name>.jsonl.partial as it comes, and taken up from there
        after a kill or an error, as long as key and code are the same.
        """
        from cai_utils.experiment import journal
        from cai_utils.experiment.files import read_rows, write_rows

        path = self.data(name)
        sidecar = path.with_name(f"{path.name}.key.json")
        canonical = fingerprint.canonical(key, f"rows({name!r}): key")
        new = {"key": canonical, "code": fingerprint.code_digest(make)}
        old = read_json(sidecar)
        if path.is_file() and {k: old.get(k) for k in new} == new:
            rows = read_rows(path)
            self.made[self._name(path)] = fingerprint.file_digest(path)
            print(f"{path.name}: {len(rows)} rows, kept from an earlier run")
            return rows
        before = time.time()
        with journal.recording(path.with_name(f"{path.name}.partial"), new) as journal:
            if journal.found:
                print(f"{path.name}: {len(journal.found)} samples of an earlier run are reused")
            rows = list(make())
        # Without its sidecar a file counts as not made, so a kill between the two costs no more
        # than making it again.
        sidecar.unlink(missing_ok=True)
        write_rows(path, rows)
        write_json(sidecar, {**new, "rows": len(rows), "provenance": self._now()})
        journal.remove()
        self.made[self._name(path)] = fingerprint.file_digest(path)
        why = _changes(old, new) if old else ""
        print(f"{path.name}: {len(rows)} rows, made in {time.time() - before:.1f} s{why}")
        # Read back, so that a fresh run and a resumed one work on exactly the same values.
        return read_rows(path)

    def table(self, df, name: str) -> Path:
        """Write `df` (DataFrame or list of rows) to results/<name>.csv, its provenance beside."""
        import pandas

        path = self.dir / "results" / f"{name}.csv"
        df = df if isinstance(df, pandas.DataFrame) else pandas.DataFrame(df)
        with atomic(path) as temporary:
            df.to_csv(temporary, index=False, lineterminator="\n")
            record = {
                "table": path.name,
                "rows": len(df),
                "sha256": fingerprint.file_digest(temporary),
                **self._now(),
            }
            # First the record: its checksum then tells whether the table beside it is its own.
            write_json(path.with_suffix(".provenance.json"), record)
        self.made[self._name(path)] = record["sha256"]
        return path

    def read_table(self, name: str, made_by: str | None = None):
        """results/<name>.csv as a DataFrame; FileNotFoundError names the notebook that makes it."""
        import pandas

        path = self.need(Path("results") / f"{name}.csv", made_by or self.notebook)
        return pandas.read_csv(path)

    def figure(self, figure, name: str) -> Path:
        """Write runs/<profile>/figures/<name>.png (200 dpi) and .pdf; the path of the PNG."""
        return save_figure(figure, self.dir / "figures", name)

    def trained(self, name: str, size: str, make, **key) -> Path:
        """The folder models/<name>/<size>, made by `make(folder) -> metrics` unless it is there
        and was made from the same `key` and code (as in `rows`).

        Its metrics go to data/training_<name>_<size>.jsonl and its loss curve to W&B.
        """
        folder, rows = self.model(name, size), f"training_{name}_{size}"
        if not (folder / "config.json").is_file():
            self.data(rows).unlink(missing_ok=True)
        (metrics,) = self.rows(rows, lambda: [finite(make(folder))], code=make, **key)
        for logged in metrics.get("log", ()):
            self.log({f"{name}/{size}/{k}": v for k, v in logged.items()})
        self.made[self._name(folder)] = fingerprint.file_digest(folder)
        loss = metrics["train_loss"]
        print(f"{name} {size}: loss {'not finite' if loss is None else format(loss, '.3f')}, "
              f"{metrics['steps']} steps, {metrics['seconds']:.0f} s")
        return folder

    def page(self, text: str, name: str) -> Path:
        """Write a Markdown page beside the figures: runs/<profile>/figures/<name>.md."""
        path = self.dir / "figures" / f"{name}.md"
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path

    def log(self, values: dict) -> None:
        """Send numbers to W&B; nothing happens where W&B is off."""
        if self._wandb is not None:
            try:
                self._wandb.log(values)
            except Exception as error:
                self._wandb = None
                print(f"W&B is off from here on: {error}")

    def finish(self) -> None:
        """Write executed/<name>.provenance.json, with `read` and `made`, and close W&B."""
        name = os.environ.get("CAI_RUN_NAME", self.notebook)
        record = {**self._now(), "read": self.read, "made": self.made}
        write_json(self.dir / "executed" / f"{name}.provenance.json", record)
        stamp.remove_overwritten(self.dir, name, self.made)
        if self._wandb is not None:
            with contextlib.suppress(Exception):
                self._wandb.finish(quiet=True)
            self._wandb = None

    def _now(self) -> dict:
        # Asked again, as torch, which knows threads and GPU, may have been imported since.
        return {
            **self.provenance,
            "machine": provenance.machine(),
            "seconds": round(time.time() - self._started, 1),
        }


def start(notebook: str, namespace) -> Run:
    """Begin `notebook` with the values of its parameters cell in `namespace`, its
    `globals()`: folders, provenance, W&B (offline by default).

    namespace may be a dict of parameters, as in tests (`params.from_namespace`). Raises
    ValueError for an unknown parameter, profile or size, naming the nearest or the known ones, and
    for a text where a number belongs; text that spells one (papermill's 5e-4) becomes it in
    `namespace`.
    """
    if not namespace.get("profile"):
        raise ValueError(f"{notebook}: its parameters must hold 'profile', a folder of params/")
    root = repo_root()
    check_profile(root, namespace["profile"])
    params = from_namespace(root, notebook, namespace)
    check_sizes(root, params, f"{notebook}: ")
    if "__name__" in namespace:  # numbers that papermill has left as text
        namespace.update(params)
        _show_text_as_it_is()
    return Run(notebook, params)


def _show_text_as_it_is() -> None:
    """DataFrames in cells show no formula between two dollars, and styled ones no markup."""
    import pandas

    for option in ("display.html.use_mathjax", "styler.html.mathjax"):
        pandas.set_option(option, False)
    pandas.set_option("styler.format.escape", "html")


def _start_wandb(run: Run):
    """A W&B run, or None where W&B is off or broken: W&B must never stop a run."""
    # Offline unless the user says otherwise; trl's own reports then follow the same choice.
    mode = os.environ.setdefault("WANDB_MODE", "offline")
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cai-lab"),
            group=run.profile,
            name=os.environ.get("CAI_RUN_NAME", run.notebook),
            config={**run.params, "git": run.provenance["git"]},
            dir=str(run.dir),  # W&B adds the folder wandb/
            mode=mode,
            reinit="finish_previous",
            settings=quiet,
        )
    except Exception as error:
        print(f"W&B is off: {type(error).__name__}: {error}")
        return None


def _changes(old: dict, new: dict) -> str:
    before, after = old.get("key", {}), new["key"]
    names = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    names += ["code"] if old.get("code") != new["code"] else []
    return f" (changed: {', '.join(names)})" if names else ""
