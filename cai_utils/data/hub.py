"""Data sets that `datasets` reads: those of the Hugging Face hub, and folders of data files.

A spec is `ORG/NAME` or `FOLDER`, with `@REVISION` behind a hub id, and `#SPLIT` or `#CONFIG/SPLIT`
where the split has another name than ours: `HuggingFaceH4/ultrafeedback_binarized#train_prefs`.
"""

from __future__ import annotations

import re
from pathlib import Path

from cai_utils.experiment.files import refuse_pointer, without_nan

_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_FILES = re.compile(r".*\.(jsonl|json|csv|parquet|txt|tsv)(\.gz)?", re.IGNORECASE)
OURS = {"train": "train", "test": "eval", "val": "eval", "dev": "eval", "eval": "eval"}


def recognise(spec) -> bool:
    """Whether a spec names a folder, or may be a hub id; files are neither."""
    base = spec.partition("#")[0]
    if Path(spec).is_file():
        return False
    return Path(base).is_dir() or bool(_ID.fullmatch(base) and not _FILES.fullmatch(base))


def read(spec, split=None) -> list[dict]:
    """The rows of a data set. A row without `split` gets ours ("train", "eval"), by the beginning
    of its split's name.

    split: ours; where the spec names none, it decides between `train` and `test` (or
    `validation`). ValueError for a split or a configuration that is not there, with those that
    are; FileNotFoundError where the hub cannot be reached or has no such data set.
    """
    base, _, part = spec.partition("#")
    config, _, name = part.rpartition("/")
    folder = Path(base)
    if folder.is_dir():
        refuse_pointer(folder)
        base, revision = str(folder.resolve()), None
    else:
        base, revision = _ID.fullmatch(base).group("name", "revision")
    if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        data = fetch(spec, "load_from_disk", base)
    else:
        data = fetch(spec, "load_dataset", base, config or None, split=name or None,
                     revision=revision)
    if isinstance(data, dict):
        name = name or _default(spec, [*data], split)
        if name not in data:
            raise ValueError(f"{spec}: no split {name!r}; there are: {', '.join(data)}")
        data = data[name]
    ours = next((o for beginning, o in OURS.items() if name.startswith(beginning)), None)
    return [{**row, "split": row.get("split") or ours} for row in without_nan(data.to_list())]


def _default(spec, names, split):
    """The split that a spec without one stands for."""
    if len(names) == 1:
        return names[0]
    wanted = {"train": ["train"], "eval": ["test", "validation", "eval"]}.get(split, [])
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{spec}: which split? Write {spec}#SPLIT, with one of: {', '.join(names)}")


def fetch(spec, loader, *arguments, mend="go online, or give a file", **options):
    """`loader` of `datasets` called, its errors in one line that names the spec. It runs no code
    that a data set brings along: versions from 4.0 on cannot."""
    import datasets

    try:
        return getattr(datasets, loader)(*arguments, **options)
    except Exception as error:  # offline, unknown, gated, damaged: many kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ValueError):  # a configuration or split that is not there
            raise ValueError(f"{spec}: {why}") from error
        raise FileNotFoundError(f"{spec}: no file or folder here, and not loaded from the hub "
                                f"({why}). Correct the name, {mend}") from error
