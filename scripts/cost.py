"""What a replication at the paper's scale costs: tokens and GPU-hours per stage and model size.

Nothing here is measured. Tokens follow from counts of prompts (Bai et al. 2022, sections 3.2, 4.1
and 4.3) and assumed lengths; hours follow from tokens a second, which are either measured ones that
the file gives, or estimated from the floating-point operations of a token (2 N to read or sample
one, 6 N to train on one; N: parameters in matrix products, attention not counted; Kaplan et al.
2020, arXiv 2001.08361, section 2.1), the peak of a GPU and assumed shares of it.

    python -m scripts.cost params/paper/cost.yaml [--csv FILE]

The file is `params/paper/cost.yaml` or one like it: `counts`, `tokens`, `rl`, `labels`,
`gpu`, `models` {size: parameters} and `throughput` {size: {read, sampled, trained}}.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from cai_utils.experiment import registry
from cai_utils.experiment.params import read_params

FIELDS = {
    "counts": ("redteam_human", "redteam_generated", "helpful", "helpful_samples", "revisions",
               "helpful_comparisons", "harmless_comparisons", "rl_redteam", "rl_helpful"),
    "tokens": ("prompt", "response", "critique", "request", "question", "chain", "few_shot"),
    "labels": ("orders", "chains"),
    "rl": ("passes", "epochs"),
    "gpu": ("peak_flops", "read", "sampled", "trained"),
}
KINDS = ("read", "sampled", "trained")  # what is done with tokens
COLUMNS = ["stage", "section", *KINDS]


def load(path) -> dict:
    """The checked content of a cost file. FileNotFoundError; ValueError, naming file and field, for
    one that is missing, unknown or not a number of at least 0."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; params/paper/cost.yaml is one")
    given = read_params(path)
    for section, names in FIELDS.items():
        own = given.get(section)
        if not isinstance(own, dict):
            raise ValueError(f"{path}: missing section '{section}' ({', '.join(names)})")
        _numbers(own, names, f"{path}: {section}")
    if not isinstance(given.get("models"), dict) or not given["models"]:
        raise ValueError(f"{path}: missing section 'models' (size: parameters)")
    given["models"] = {str(size): n for size, n in given["models"].items()}
    _numbers(given["models"], tuple(given["models"]), f"{path}: models")
    given["throughput"] = {str(s): v for s, v in (given.get("throughput") or {}).items()}
    for size, own in given["throughput"].items():
        if size not in given["models"]:
            raise ValueError(f"{path}: throughput: {size!r} is not one of models "
                             f"({', '.join(given['models'])})")
        _numbers(own, KINDS, f"{path}: throughput.{size}")
    unknown = sorted(set(given) - {*FIELDS, "models", "throughput"})
    if unknown:
        raise ValueError(f"{path}: unknown section {unknown[0]!r}; known: {', '.join(FIELDS)}, "
                         "models, throughput")
    return given


def _numbers(own, names, where):
    for name in names:
        value = own.get(name) if isinstance(own, dict) else None
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not 0 <= value < float("inf"):
            raise ValueError(f"{where}: '{name}' is {value!r}; give a number of at least 0")
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(names)}")


def tokens(given) -> pd.DataFrame:
    """Tokens of each stage, for one model: columns `stage`, `section` (of the paper), `read`
    (prompts, and text that is only scored), `sampled`, `trained` (each epoch counts).

    given: what `load` returns. Every request is counted in full, as by an engine that does not
    reuse shared prefixes; reuse makes it cheaper. The RL runs are those of the registry's policies
    that PPO trains.
    """
    n, t, labels, rl = (given[name] for name in ("counts", "tokens", "labels", "rl"))
    prompt, response, critique, request = (
        t[name] for name in ("prompt", "response", "critique", "request")
    )
    redteam = n["redteam_human"] + n["redteam_generated"]
    helpful = n["helpful"] * n["helpful_samples"]
    conversation = prompt + response
    # critique: the conversation and its request are read; revision: the critique on top of that
    critiqued = t["few_shot"] + conversation + request
    revised = critiqued + critique + request
    asked = t["few_shot"] + prompt + 2 * response + t["question"]
    episodes = redteam + n["helpful"] + n["rl_redteam"] + n["rl_helpful"]
    chains = redteam * labels["orders"] * labels["chains"]
    pairs = {
        "helpful": n["helpful_comparisons"],
        "HH": n["helpful_comparisons"] + n["harmless_comparisons"],
        "RL-CAI": n["helpful_comparisons"] + redteam,
        "RL-CAI with CoT": n["helpful_comparisons"] + redteam,
    }
    run = (episodes * (prompt + rl["passes"] * conversation), episodes * response,
           episodes * rl["epochs"] * 2 * conversation)  # 2: policy and value model
    rows = [
        ("red-team responses", "3.2", redteam * prompt, redteam * response, 0),
        ("critiques and revisions", "3.1", redteam * n["revisions"] * (critiqued + revised),
         redteam * n["revisions"] * (critique + response), 0),
        ("helpful responses", "3.2", helpful * prompt, helpful * response, 0),
        ("SL-CAI", "3.2", 0, 0, (redteam * n["revisions"] + helpful) * conversation),
        ("pairs of responses", "4.1", 2 * redteam * prompt, 2 * redteam * response, 0),
        ("AI labels", "4.1", redteam * labels["orders"] * asked, 0, 0),
        ("AI labels with CoT", "4.1", chains * asked, chains * t["chain"], 0),
        *((f"PM, {name}", "4.1", 0, 0, 2 * conversation * count) for name, count in pairs.items()),
        *((f"RL, {policy.label}", "4.3", *run) for policy in registry.POLICIES.values()
          if policy.trainer == "ppo"),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def throughput(given, size) -> dict:
    """Tokens a second on one GPU, {"read", "sampled", "trained", "how"}: the measured ones of the
    file (how: "measured"), else an estimate (how: "estimated")."""
    if size in given["throughput"]:
        return {**given["throughput"][size], "how": "measured"}
    gpu, parameters = given["gpu"], given["models"][size]
    flops = {"read": 2 * parameters, "sampled": 2 * parameters, "trained": 6 * parameters}
    return {k: gpu["peak_flops"] * gpu[k] / flops[k] for k in KINDS} | {"how": "estimated"}


def table(given) -> pd.DataFrame:
    """One row per size and stage: `size`, `stage`, `section`, `read`, `sampled`,
    `trained` (tokens), `gpu_hours`, `how` (see `throughput`). ValueError where tokens are
    to be handled at a speed of 0."""
    stages, parts = tokens(given), []
    for size in given["models"]:
        speed = throughput(given, size)
        for kind in KINDS:
            if not speed[kind] and stages[kind].any():
                raise ValueError(f"{size}: 0 tokens {kind} a second: correct 'gpu' or 'throughput'")
        seconds = sum(stages[kind] / speed[kind] for kind in KINDS if speed[kind])
        parts.append(stages.assign(size=size, gpu_hours=seconds / 3600, how=speed["how"]))
    return pd.concat(parts, ignore_index=True)[["size", *COLUMNS, "gpu_hours", "how"]]


def markdown(given) -> str:
    """The table to read: tokens in millions, GPU-hours of each size, and their sums."""
    rows, sizes = table(given), list(given["models"])
    how = {size: throughput(given, size)["how"] for size in sizes}
    hours = rows.pivot(index="stage", columns="size", values="gpu_hours")
    head = ["stage", "section", *(f"M tokens {kind}" for kind in KINDS),
            *(f"{size}, GPU-hours ({how[size]})" for size in sizes)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    stages = tokens(given)
    for row in stages.to_dict("records"):
        cells = [row["stage"], row["section"], *(_short(row[kind] / 1e6) for kind in KINDS)]
        cells += [_short(hours.loc[row["stage"], size]) for size in sizes]
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["all", "", *(_short(stages[kind].sum() / 1e6) for kind in KINDS)]
    cells += [_short(hours[size].sum()) for size in sizes]
    return "\n".join([*lines, "| " + " | ".join(cells) + " |"])


def _short(x) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def main(arguments=None) -> None:
    """The command line; `--help` lists its arguments."""
    parser = argparse.ArgumentParser(prog="python -m scripts.cost", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="params/paper/cost.yaml")
    parser.add_argument("--csv", help="write the table, one row a size and stage, to this file")
    options = parser.parse_args(arguments)
    try:
        given = load(options.file)
        if options.csv:
            table(given).to_csv(options.csv, index=False, lineterminator="\n")
        print(markdown(given))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
