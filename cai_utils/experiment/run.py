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
import csv
import os
import re
import time
from pathlib import Path

from cai_utils.experiment import fingerprint, locks, provenance, secrets, stamp
from cai_utils.experiment.files import finite, read_json, repo_root, write_json
from cai_utils.experiment.kinds import check_name
from cai_utils.experiment.params import check_profile, check_sizes, from_namespace
from cai_utils.experiment.writing import (
    atomic,
    explained,
    repaired,
    save_figure,
    set_aside,
    whole,
    write_text,
)


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
        with explained(self.dir):
            for name in ("data", "models", "results", "figures", "wandb", "executed"):
                (self.dir / name).mkdir(parents=True, exist_ok=True)
        self.provenance = provenance.describe(self.root, notebook, self.params)
        self._started = time.time()
        self._wandb = _start_wandb(self)

    # -- places

    def data(self, name: str) -> Path:
        """runs/<profile>/data/<name>, with `.jsonl` added where `name` has no suffix."""
        check_name(name, "the name of rows")
        known = (".jsonl", ".json", ".gz", ".csv", ".parquet", ".txt", ".npz")
        return self.dir / "data" / (name if name.endswith(known) else f"{name}.jsonl")

    def model(self, name: str, size: str) -> Path:
        """runs/<profile>/models/<name>/<size>, the folder of a Hugging Face model."""
        parts = check_name(name, "the name of a model"), check_name(str(size), "size")
        return self.dir.joinpath("models", *parts)

    def need(self, path, made_by: str) -> Path:
        """`path` (relative ones: under runs/<profile>), which notebook `made_by` makes.

        made_by may name the parameters, too: "09_rl method=rl_cai size=s". Raises
        FileNotFoundError that says how to make it when it is missing or an empty folder;
        ValueError when it is not what its record says: damaged, or edited.
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
            digests = fingerprint.file_digests(path)
            self._refuse_changed(path, digests, made_by)
            self.read[name] = fingerprint.total(path, digests)
        return path

    def _refuse_changed(self, path, digests, made_by):
        """ValueError where the record beside what another notebook made says otherwise."""
        beside = self._record(path)
        record = read_json(beside) if path.suffix == ".csv" else provenance.read(beside)
        wrong = provenance.changed(path, digests, record or {})
        if wrong or record is None or (not record and beside.is_file()):
            what = f"{', '.join(wrong)} changed since" if wrong else f"{beside.name} is damaged"
            raise ValueError(
                f"{path} is not as {made_by.split()[0]} made it: {what}. To make it again: `python "
                f"-m cai_utils run {made_by} --profile {self.profile}`; to go on with what is "
                f"there, remove its record, {beside}")

    def _record(self, path: Path) -> Path:
        """Where the checksums of rows, of a table or of a model that `trained` made stand."""
        if path.is_dir():
            return self.data(f"training_{path.parent.name}_{path.name}.jsonl.key.json")
        return (path.with_suffix(".provenance.json") if path.suffix == ".csv"
                else path.with_name(f"{path.name}.key.json"))

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
        after a kill or an error, as long as key and code are the same. Rows, or a record of them,
        that are not as they were written are set aside as <name>.damaged, and made again.
        """
        return self._kept(name, make, key)

    def _kept(self, name, make, key, folder=None):
        """As `rows`; with a model's folder that `make` makes as well and that the record covers."""
        from cai_utils.experiment import journal
        from cai_utils.experiment.files import read_rows, rows_beside

        path = self.data(name)
        sidecar = path.with_name(f"{path.name}.key.json")
        canonical = fingerprint.canonical(key, f"rows({name!r}): key") | provenance.trust()
        new = {"key": canonical, "code": fingerprint.code_digest(make)}
        old = provenance.read(sidecar)
        if old is None:
            self._aside(sidecar, path)
        elif {k: old.get(k) for k in new} == new:
            rows = self._as_recorded(path, folder, old)
            if rows is not None:
                print(f"{path.name}: {len(rows)} rows, kept from an earlier run")
                return rows
            if folder:  # what a training that is killed from here on leaves there is not damaged
                sidecar.unlink()
        before = time.time()
        with journal.recording(path.with_name(f"{path.name}.partial"), new) as samples:
            if samples.found or samples.damaged:
                print(f"{path.name}: {len(samples.found)} samples of an earlier run are reused"
                      + (f", {samples.damaged} damaged ones are not" if samples.damaged else ""))
            with explained(folder) if folder else contextlib.nullcontext():
                rows = list(make())
        with rows_beside(path, rows) as (temporary, marks):
            record = {**new, "rows": len(rows), "sha256": fingerprint.file_digest(temporary)}
            if path.is_file():
                record["replaces"] = fingerprint.file_digest(path)
            self.made[self._name(path)] = record["sha256"]
            if folder:
                digests = fingerprint.file_digests(folder)
                self.made[self._name(folder)] = fingerprint.total(folder, digests)
                # What an interrupted training left beside the model may go.
                record["folder"] = {name: sha for name, sha in digests.items()
                                    if not re.match(r"\.|checkpoint-|damaged-", name)}
            # The record first: of a kill between the two, its checksum tells.
            write_json(sidecar, provenance.seal({**record, "provenance": self._now()}))
        samples.remove()
        marks += samples.marks
        print(f"{path.name}: {len(rows)} rows, made in {time.time() - before:.1f} s"
              + (_changes(old, new) if old else "")
              + (f"; U+FFFD replaces {marks} lone surrogates" if marks else ""))
        # Read back, so that a fresh run and a resumed one work on exactly the same values.
        return read_rows(path)

    def _as_recorded(self, path, folder, record):
        """The rows at `path` where they, and the folder, are what their record says; else None, and
        what is not is set aside."""
        from cai_utils.experiment.files import read_rows

        whole = path.is_file() and (folder is None or (folder / "config.json").is_file())
        for place in (path, folder):
            if place is not None and place.exists():
                digests = fingerprint.file_digests(place)
                wrong = provenance.changed(place, digests, record)
                if wrong and record.get("replaces") == fingerprint.total(place, digests):
                    whole = False  # a kill between record and rows
                elif wrong:
                    whole = False
                    self._aside(place, why=", ".join(wrong))
                else:
                    self.made[self._name(place)] = fingerprint.total(place, digests)
        if not whole:
            return None
        try:
            rows = read_rows(path)
        except ValueError as error:  # records of earlier versions have no checksum
            return self._aside(path, why=str(error))
        return rows if len(rows) == record.get("rows", len(rows)) else self._aside(path)

    def _aside(self, *places, why="") -> None:
        for place in places:
            if place.exists():
                aside = set_aside(place)
                print(f"{self._name(place)} is not as it was made{why and f' ({why})'}: set aside "
                      f"as {aside.name}, made again")

    def table(self, df, name: str) -> Path:
        """Write `df` (DataFrame or list of rows) to results/<name>.csv, its provenance beside."""
        import pandas

        path = self.dir / "results" / f"{name}.csv"
        df = df if isinstance(df, pandas.DataFrame) else pandas.DataFrame(repaired(df))
        how = {"index": False, "lineterminator": "\n", "errors": "surrogatepass"}
        with atomic(path) as temporary:
            df.to_csv(temporary, **how)
            text = temporary.read_bytes().decode(errors="surrogatepass")
            if "\r" in text:  # which ends a line for readers, unless it is in quotes
                df.to_csv(temporary, **how, quoting=csv.QUOTE_NONNUMERIC)
                text = temporary.read_bytes().decode(errors="surrogatepass")
            if whole(text) != text:
                temporary.write_bytes(whole(text).encode())
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
        """results/<name>.csv as a DataFrame, equal to what was written; errors as of `need`."""
        import pandas

        path = self.need(Path("results") / f"{name}.csv", made_by or self.notebook)
        # Texts such as "None" and "NA" stay texts: a missing value is written as nothing.
        return pandas.read_csv(path, keep_default_na=False, na_values=["", "nan", "NaN"])

    def figure(self, figure, name: str) -> Path:
        """Write runs/<profile>/figures/<name>.png (200 dpi) and .pdf; the path of the PNG."""
        return save_figure(figure, self.dir / "figures", name)

    def trained(self, name: str, size: str, make, **key) -> Path:
        """The folder models/<name>/<size>, made by `make(folder) -> metrics` unless it is there
        and was made from the same `key` and code, with files that are as they were (as in `rows`).

        Its metrics go to data/training_<name>_<size>.jsonl and its loss curve to W&B.
        """
        folder, rows = self.model(name, size), f"training_{name}_{size}"
        key = {"code": make, **key}
        (metrics,) = self._kept(rows, lambda: [finite(make(folder))], key, folder)
        for logged in metrics.get("log", ()):
            self.log({f"{name}/{size}/{k}": v for k, v in logged.items()})
        loss = metrics["train_loss"]
        print(f"{name} {size}: loss {'not finite' if loss is None else format(loss, '.3f')}, "
              f"{metrics['steps']} steps, {metrics['seconds']:.0f} s")
        return folder

    def page(self, text: str, name: str) -> Path:
        """Write a Markdown page beside the figures: runs/<profile>/figures/<name>.md."""
        path = self.dir / "figures" / f"{name}.md"
        write_text(path, text)
        return path

    def log(self, values: dict) -> None:
        """Send numbers to W&B; nothing happens where W&B is off."""
        if self._wandb is not None:
            try:
                self._wandb.log(repaired(values))
            except Exception as error:
                self._wandb = None
                print(f"W&B is off from here on: {secrets.hidden(error)}")

    def finish(self) -> None:
        """Write executed/<name>.provenance.json, with `read` and `made`, and close W&B."""
        name = os.environ.get("CAI_RUN_NAME", self.notebook)
        record = {**self._now(), "read": self.read, "made": self.made}
        write_json(self.dir / "executed" / f"{name}.provenance.json", record)
        stamp.remove_overwritten(self.dir, name, self.made)
        if self._wandb is not None:
            with contextlib.suppress(Exception):
                self._wandb.finish()
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
    locks.join()
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
            config={**repaired(run.params), "git": run.provenance["git"]},
            dir=str(run.dir),  # W&B adds the folder wandb/
            mode=mode,
            reinit="finish_previous",
            settings=quiet,
        )
    except Exception as error:
        print(f"W&B is off: {type(error).__name__}: {secrets.hidden(error)}")
        return None


def _changes(old: dict, new: dict) -> str:
    before, after = old.get("key", {}), new["key"]
    names = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    names += ["code"] if old.get("code") != new["code"] else []
    return f" (changed: {', '.join(names)})" if names else ""
