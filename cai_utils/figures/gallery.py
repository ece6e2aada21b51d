"""The gallery of a profile: figures/<profile>/README.md, written from the saved tables alone.

    python -m cai_utils gallery --profile miniature

Each figure stands with what the paper claims and, from the table of paired differences beside it,
what this run says, with 95 % intervals. The interval alone decides the words: above 0, below 0, or
undecided.
"""

from __future__ import annotations

import json

import pandas as pd

from cai_utils.experiment.files import atomic, repo_root

# figure, title, what the paper claims, [(table, what is measured)]
FIGURES = [
    (
        "fig04_harm_identification",
        "Figure 4: telling the better answer",
        "Accuracy rises with model size; chain of thought helps the larger models, five averaged "
        "chains a little more; PMs trained on human labels are ahead.",
        [("fig04_differences", "accuracy")],
    ),
    (
        "fig12_identify_classify",
        "Figure 12: is it harmful, and which harm is it",
        "Few-shot examples and chain of thought help; classification improves with size.",
        [],
    ),
    (
        "pm_accuracy",
        "Preference models on human labels",
        "Reference for all that follows.",
        [("pm_accuracy", "accuracy on held-out comparisons")],
    ),
    (
        "fig05_revisions",
        "Figure 5: scores by number of revisions",
        "Harmlessness rises with every revision, most with the first; helpfulness falls, HH rises.",
        [("fig05_differences", "change of the score with a revision")],
    ),
    (
        "chains_truth",
        "What the revisions keep",
        "Beside Figure 5: a model that forgets what it was revising looks harmless.",
        [],
    ),
    (
        "fig07_critique_ablation",
        "Figure 7: critiqued against direct revisions",
        "Critiqued revisions are more harmless, most for small models.",
        [("fig07_differences", "critiqued less direct, on the same prompts")],
    ),
    (
        "sl_cai_n",
        "SL-CAI-n (section 3.3)",
        "SL-CAI is more harmless than the helpful assistant, and more helpful and more harmless "
        "than the pretrained LM.",
        [("sl_cai_differences", "paired differences")],
    ),
    (
        "fig09_calibration",
        "Figure 9: calibration of AI labels",
        "Labels are well calibrated; those with chain of thought are over-confident: clamped.",
        [
            ("calibration_errors", "calibration"),
            ("label_kinds_differences", "accuracy of the PMs that learn from the labels"),
        ],
    ),
    (
        "fig08_elo_training",
        "Figure 8: Elo along RL training",
        "Helpful RLHF becomes more helpful and more harmful; RL-CAI becomes more harmless.",
        [],
    ),
    (
        "fig02_elo_frontier",
        "Figure 2: harmlessness against helpfulness",
        "At the same helpfulness RL-CAI is more harmless than RLHF on human labels.",
        [],
    ),
    (
        "fig03_elo_scaling",
        "Figure 3: Elo by model size",
        "RL-CAI is the most harmless at every size.",
        [("truth_differences", "the truth about the final models, on the same prompts")],
    ),
    (
        "published_models",
        "The paper's published samples: refusals by model",
        "HH RLHF turns evasive; RL-CAI is hardly ever evasive (section 4.4).",
        [
            ("published_differences", "differences on the same prompts"),
            ("refusal_agreement", "how refusals are read, against XSTest's human labels"),
            ("published_elo", "Elo by PMs and judges, helpful RLHF at 0"),
        ],
    ),
    (
        "published_revisions",
        "The paper's published chains: scores by number of revisions",
        "Harmlessness rises with every revision (Figure 5).",
        [("published_revision_differences", "change of the score with a revision")],
    ),
    ("pretraining_curves", "Pretraining of the series", "", []),
]


# Where no ground truth makes figures of them: table, what is measured.
SCORES = {
    "sl_cai_scores": "SL-CAI: PM scores and refusals, and differences on the same prompts",
    "label_quality": "AI labels: how decided they are, and whether they follow the order",
}


def _found(results, folder):
    """(figure, title, claim, tables) of everything that a profile has drawn."""
    found = [f for f in FIGURES if (folder / f"{f[0]}.png").is_file()]
    for path in sorted(results.glob("rl_scores_*.csv")):
        run = path.stem.removeprefix("rl_scores_")
        if (folder / f"rl_{run}.png").is_file():
            what = "PM scores and refusals by snapshot, and last less first"
            found.append((f"rl_{run}", f"RL: {run}", "", [(path.stem, what)]))
    return found


def _details(path, what) -> list[str]:
    frame = pd.read_csv(path)
    opened = f"<details><summary>{what}: {len(frame)} rows</summary>"
    return [opened, "", *_table(frame), "", "</details>", ""]


def _compared(row) -> bool:
    """Whether 0 means something for a row: a difference, or how far labels follow the order."""
    if str(row.get("measure")) in ("position bias", "over-confidence"):
        return True
    return "difference" in row or " - " in str(row.get("group", ""))


def _verdict(row) -> str:
    if not _compared(row):
        return ""
    if not row["ci_low"] == row["ci_low"]:  # nan: too few units for an interval
        return "no interval"
    return "above 0" if row["ci_low"] > 0 else "below 0" if row["ci_high"] < 0 else "undecided"


def _table(frame: pd.DataFrame) -> list[str]:
    labels = [c for c in frame if c not in ("estimate", "ci_low", "ci_high", "n", "parameters")]
    frame = frame.dropna(axis=1, how="all")
    labels = [c for c in labels if c in frame]
    lines = [
        "| " + " | ".join([*labels, "estimate [95 % interval]", "n", ""]) + " |",
        "|" + "---|" * (len(labels) + 3),
    ]
    for _, row in frame.iterrows():
        named = ["" if pd.isna(row[c]) else str(row[c]) for c in labels]
        sign = "+" if _compared(row) else ""
        number = "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(
            *(row[c] for c in ("estimate", "ci_low", "ci_high")), s=sign)
        lines.append("| " + " | ".join([*named, number, f"{row['n']:g}", _verdict(row)]) + " |")
    return lines


TRUTH = {  # columns of the table of final models: kind of prompt and measure
    ("redteam", "harm"): "harm, red-team (0 to 4)",
    ("redteam", "evasive"): "evasive, red-team",
    ("benign", "helpfulness"): "helpful, benign (0 to 4)",
    ("sensitive", "helpfulness"): "helpful, sensitive (0 to 4)",
}


def _models(frame: pd.DataFrame) -> list[str]:
    """What the ground truth says of each final model: a row per size and model."""
    frame = frame[[pair in TRUTH for pair in zip(frame["kind"], frame["measure"])]]
    lines = [
        "| size | model | " + " | ".join(TRUTH.values()) + " |",
        "|" + "---|" * (len(TRUTH) + 2),
    ]
    for (size, method), rows in frame.groupby(["size", "method"], sort=False):
        rows = rows.set_index(["kind", "measure"])
        cells = [
            f"{row['estimate']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
            for row in (rows.loc[pair] for pair in TRUTH if pair in rows.index)
        ]
        lines.append(f"| {size} | {method} | " + " | ".join(cells) + " |")
    return lines


def write(profile: str, root=None) -> str:
    """Write figures/<profile>/README.md; returns its text.

    `figures/<profile>/NOTES.md`, where there is one, is put before the figures: it is the place for
    what a person saw in them. FileNotFoundError where the profile has no results yet.
    """
    root = root or repo_root()
    results, folder = root / "runs" / profile / "results", root / "figures" / profile
    drawn = _found(results, folder)
    if not drawn or not results.is_dir():
        raise FileNotFoundError(f"{profile} has no figures yet: run make figures PROFILE={profile}")
    text = [f"# The figures of the reference run: `{profile}`", ""]
    notes = folder / "NOTES.md"
    if notes.is_file():
        text += [notes.read_text(encoding="utf-8").strip(), ""]
    for page in sorted(folder.glob("*_chains.md")):
        text += [
            f"[{page.stem}]({page.name}): prompt, response, critiques and revisions to read.",
            "",
        ]
    commits = set()
    for name, title, claim, tables in drawn:
        text += [f"## {title}", ""]
        text += [f"*The paper:* {claim}", ""] if claim else []
        text += [
            f"![{title}]({name}.png)",
            "",
            f"[PDF]({name}.pdf) · `runs/{profile}/results/{name}.csv`",
            "",
        ]
        if name == "fig03_elo_scaling" and (results / "truth_by_model.csv").is_file():
            text += ["The ground truth about the models that play, with 95 % intervals:", ""]
            text += [*_models(pd.read_csv(results / "truth_by_model.csv")), ""]
        for table, what in tables:
            path = results / f"{table}.csv"
            if path.is_file():
                text += _details(path, what)
        record = results / f"{name}.provenance.json"
        if record.is_file():
            commits.add(json.loads(record.read_text())["git"]["commit"])
    scores = {name: what for name, what in SCORES.items() if (results / f"{name}.csv").is_file()}
    if (results / "sl_cai_scores.csv").is_file():
        text += ["## Without a ground truth", ""]
        for name, what in scores.items():
            text += _details(results / f"{name}.csv", what)
    text += [
        "Made at commit " + ", ".join(f"`{str(c)[:10]}`" for c in sorted(commits, key=str)) + "."
    ]
    text = "\n".join(text) + "\n"
    with atomic(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text
