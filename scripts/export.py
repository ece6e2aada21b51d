"""Export of models and rows as folders for the Hugging Face hub and its tools.

`save_for_hub` works offline; `push_to_hub` uploads the same files. The card beside the weights
or rows is a template (`model_card.md`, `data_card.md`) filled in from the run's records:
`training.json` in a model's folder, `<name>.jsonl.key.json` beside rows,
`<name>.provenance.json` beside a table. What has no record is called unknown.

    python -m scripts.export runs/miniature/models/pm_hh/s --out OUT --table pm_accuracy
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from cai_utils.dialogue import TEMPLATE, broken, render
from cai_utils.experiment.files import read_json, read_rows, write_json, write_rows
from cai_utils.experiment.kinds import check_name
from cai_utils.lm import models, tokens
from scripts import cards

TEMPLATES = Path(__file__).parent
PAPER = "Bai et al. 2022, Constitutional AI (arXiv 2212.08073)"
STAGES = {
    "sft": "a language model, finetuned on conversations",
    "preference": "a preference model: one score per conversation",
    "absolute": "a harmfulness model: one absolute score per conversation (section 4.5)",
    "ppo": "a policy, trained by PPO against a preference model",
    "dpo": "a policy, trained by DPO on AI preference labels",
}


def save_for_hub(source, out_dir, *, name=None, license=None, language=None,
                 tables=(), limits=()) -> Path:
    """A model folder, a rows file (.jsonl, .jsonl.gz, .csv, .parquet) or several -> `out_dir`.

    A model: its files, a chat template where it has none (the paper's transcript), its
    `training.json` without absolute paths, README.md (the model card). A score model is set so
    that `pipeline("text-classification")` gives its raw score (see `scored_text`). Rows:
    `data/<name>/<split>.jsonl` and README.md (the data card), as `datasets.load_dataset` reads
    them.

    name: title of the card (default: names of the folder). license: an identifier of the hub, as
    "apache-2.0"; language: likewise, as "en". tables: results to show, names in the run's
    `results/` or paths of CSVs. limits: sentences for the card's section of that name. Returns
    `out_dir`.
    FileNotFoundError: no such source or table; ValueError: a folder that is no model, files without
    rows or of one name, splits that cannot be names of files, an `out_dir` that is not empty.
    """
    sources = [Path(s) for s in ([source] if isinstance(source, str | Path) else source)]
    out_dir = Path(out_dir)
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} is not empty: give a new folder, or its files go out too")
    missing = [str(path) for path in sources if not path.exists()]
    if missing or not sources:
        raise FileNotFoundError(f"{', '.join(missing) or 'nothing'}: no such model folder or file")
    known = dict(name=name, license=license, language=language, tables=tables, limits=limits)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".export-") as building:
        made = Path(building) / "out"
        made.mkdir()
        if any(path.is_dir() for path in sources):
            if len(sources) > 1:
                raise ValueError("a folder of the hub holds one model: export them one by one")
            _model(sources[0], made, **known)
        else:
            _rows(sources, made, **known)
        if out_dir.is_dir():
            out_dir.rmdir()
        shutil.move(made, out_dir)
    return out_dir


def push_to_hub(source, repo_id, *, private=True, token=None, **card) -> str:
    """Upload what `save_for_hub(source, ..., **card)` writes to `repo_id`; returns its URL.

    The repository is made where it is not there: a model's or a data set's, by what `source` is.
    Weights or rows of an earlier upload that are not in this one are removed, since tools would
    load them too. token: None takes that of `hf auth login`. Errors are those of `save_for_hub`
    and of huggingface_hub (no token, no right to write); ConnectionError where there is no network.
    """
    from huggingface_hub import HfApi

    first = source if isinstance(source, str | Path) else source[0]
    kind = "model" if Path(first).is_dir() else "dataset"
    with tempfile.TemporaryDirectory() as folder:
        made = save_for_hub(source, Path(folder) / "out", **card)
        try:
            api = HfApi(token=token)
            url = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
            stale = "*.safetensors*" if kind == "model" else "data/*"
            api.upload_folder(folder_path=made, repo_id=repo_id, repo_type=kind,
                              delete_patterns=stale,
                              commit_message=f"Upload {kind} made with cai-lab")
        except Exception as error:
            if not type(error).__module__.startswith("httpx"):
                raise
            raise ConnectionError(f"the hub could not be reached ({error}): the upload may be "
                                  "incomplete; write a folder instead, and push it later"
                                  ) from error
    return str(url)


def scored_text(conversation, tokenizer) -> str:
    """The text whose score a text-classification pipeline gives as `preference.Scorer` does, up
    to `config.score_mean`: the rendered conversation, ended by one eos, where scores are read
    (left to tokenizers that write it themselves). Where a chat template wrote the text, the
    pipeline needs `add_special_tokens=False`. A special token that a content spells has a backslash
    in it (`dialogue.broken`). ValueError as in `dialogue.render`."""
    text = broken(render(conversation, tokenizer, add_generation_prompt=False))
    closes = tokens.adds_special_tokens(text, tokenizer) and tokens.closes_texts(tokenizer)
    return text.rstrip().removesuffix(tokenizer.eos_token) + ("" if closes else tokenizer.eos_token)


def _model(folder, out, *, name, license, language, tables, limits):
    from huggingface_hub import ModelCard, ModelCardData

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder}: no config.json, so no model; give the folder that holds it")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    snapshot = re.fullmatch(r"step-\d+", folder.name)  # of PPO: its record is in the parent
    training = read_json((folder.parent if snapshot else folder) / "training.json")
    run_dir, record = _provenance_of(folder)
    record = cards.without_paths(record, run_dir)
    scores = any("SequenceClassification" in a for a in config.get("architectures") or ())
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in (
                "training.json", "finished.json", "training_args.bin", "README.md"):
            shutil.copy2(file, out / file.name)
    tokenizer = models.load_tokenizer(folder)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    if scores:
        # Raw scores, not their sigmoid; and on the right, since padding on the left would shift
        # the learned positions of a GPT-2.
        config |= {"problem_type": "regression", "id2label": {"0": "score"},
                   "label2id": {"score": 0}}
        # As it was: transformers reads an infinity in it (Mamba's time_step_limit), not null.
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        tokenizer.padding_side = "right"
    tokenizer.save_pretrained(out)
    if training:
        training = cards.without_paths(training, run_dir)
        write_json(out / "training.json", training)
    base = training.get("base")
    data = ModelCardData(
        language=language, license=license, base_model=cards.hub_id(base),
        library_name="transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["constitutional-ai", "reward-model" if scores else "conversational"],
    )
    what = STAGES.get(training.get("stage"), "a score model" if scores else "a language model")
    path = folder.resolve().relative_to(run_dir / "models") if run_dir else folder.resolve()
    title = name or "-".join(path.parts if run_dir else path.parts[-1:])
    origin = {
        "architecture": ", ".join(config.get("architectures") or ["unknown"]),
        "parameters": f"{_parameters(out):,}" if _parameters(out) else "unknown",
        "made from": base or "unknown",
        **({"snapshot": f"{folder.name}, taken along the training"} if snapshot else {}),
        **cards.settings(training),
        **cards.origin(record),
    }
    use = cards.use_scores(config, tokenizer, training.get("stage")) if scores else cards.USE_TEXT
    ModelCard.from_template(
        data, TEMPLATES / "model_card.md", title=cards.cell(title), paper=PAPER, use=use,
        what=f"{what[0].upper()}{what[1:]}", origin=cards.bullets(origin),
        results=cards.results(training, tables, run_dir),
        limits=cards.limits_of([record], limits, scores=scores),
    ).save(out / "README.md")


def _parameters(folder) -> int:
    """Numbers in the safetensors files of a folder, read from their headers."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (a safetensors file is no dict)
                size = 1
                for n in weights.get_slice(key).get_shape():
                    size *= n
                total += size
    return total


def _provenance_of(folder):
    """(run folder or None, provenance record or {}) of a model's folder or one of its snapshots."""
    folder = folder.resolve()
    for model in (folder, folder.parent):
        if model.parent.parent.name == "models":
            run_dir, name = model.parents[2], f"{model.parent.name}_{model.name}"
            sidecar = read_json(run_dir / "data" / f"training_{name}.jsonl.key.json")
            return run_dir, sidecar.get("provenance") or read_json(
                run_dir / "results" / f"rl_{name}.provenance.json")
    return None, {}


def _rows(files, out, *, name, license, language, tables, limits):
    from huggingface_hub import DatasetCard, DatasetCardData

    configs, sections, records, run_dir = [], [], [], None
    stems = [re.sub(r"(\.jsonl|\.csv|\.parquet)?(\.gz)?$", "", file.name) for file in files]
    twice = sorted(stem for stem, n in Counter(stems).items() if n > 1)
    if twice:
        raise ValueError(f"several files are called {twice[0]!r}: rename them, or one would take "
                         "the other's place")
    for file, stem in zip(files, stems, strict=True):
        check_name(stem, f"{file}: the name")
        rows = read_rows(file)
        if not rows:
            raise ValueError(f"{file}: the file has no rows")
        record = read_json(file.with_name(f"{file.name}.key.json")).get("provenance") or {}
        run_dir = run_dir or _run_of(file)
        record = cards.without_paths(record, run_dir)
        records.append(record)
        splits = Counter(check_name(row.get("split") or "train", f"{file}, row {number}: split")
                         for number, row in enumerate(rows, 1))
        for split in splits:
            write_rows(out / "data" / stem / f"{split}.jsonl",
                       [row for row in rows if (row.get("split") or "train") == split])
        configs.append({"config_name": stem, "data_files": [
            {"split": split, "path": f"data/{stem}/{split}.jsonl"} for split in splits]})
        sections.append(cards.describe(stem, rows, splits, record))
    data = DatasetCardData(language=language, license=license, tags=["constitutional-ai"],
                           configs=configs)
    DatasetCard.from_template(
        data, TEMPLATES / "data_card.md", title=cards.cell(name or ", ".join(stems)), paper=PAPER,
        sections="\n\n".join(sections), results=cards.results({}, tables, run_dir),
        limits=cards.limits_of(records, limits, rows=True),
    ).save(out / "README.md")


def _run_of(file):
    return file.resolve().parents[1] if file.resolve().parent.name == "data" else None


def main(arguments=None) -> None:
    """The command line; `--help` lists its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description="Write a model or rows with their card to a folder, or push them to the hub.",
    )
    parser.add_argument("source", nargs="+", help="a model folder, or files of rows")
    parser.add_argument("--out", help="the folder to write")
    parser.add_argument("--push", metavar="REPO_ID", help="the repository on the hub to write")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    parser.add_argument("--name", help="title of the card")
    parser.add_argument("--license", help="as the hub names it: apache-2.0")
    parser.add_argument("--language", help="of the texts, as the hub names it: en")
    parser.add_argument("--table", action="append", default=[], help="a result to show; repeatable")
    parser.add_argument("--limit", action="append", default=[],
                        help="a sentence for the limits; repeatable")
    options = parser.parse_args(arguments)
    if not (options.out or options.push):
        parser.error("give --out FOLDER, or --push REPO_ID")
    source = options.source[0] if len(options.source) == 1 else options.source
    card = dict(name=options.name, license=options.license, language=options.language,
                tables=options.table, limits=options.limit)
    try:
        if options.out:
            print(save_for_hub(source, options.out, **card))
        if options.push:
            print(push_to_hub(source, options.push, private=not options.public, **card))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
