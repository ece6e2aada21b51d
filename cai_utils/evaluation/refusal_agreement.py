"""How well refusals are read: readings against labels, beside a guess from the prompt alone.

A *case* is a labelled response: {"source", "id" (of the prompt), "type", "model", "response",
"human" (a label of `xstest.LABELS`), "evasive" (0 or 1, None where nobody has labelled it),
"second" (the label of a second rater, or None), "second_evasive", "weight", "split"}. Sources are
the completions of XSTest (Röttger et al. 2024) and the paper's samples that `labels/` has labels
of. `split` is "development" for what was read while the rule was written and "test" for the rest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cai_utils.data import paper
from cai_utils.data.xstest import COMPLIANCE, FULL, LABELS
from cai_utils.evaluation import refusal_rule, stats
from cai_utils.experiment import files

LABELLED = Path(__file__).parent / "labels" / "refusals.csv"
SAMPLES = "published samples"
RULE, PROMPT, LENGTH, SECOND = "rule", "prompt alone", "length alone", "second rater"
# What is asked of all responses: evasive; a full refusal of at most EVASIVE_WORDS words. And of
# longer ones alone: a full refusal, any refusal.
QUESTIONS = ("evasive", "short refusal", "full refusal, long", "any refusal, long")
READ = ("evasive", "declines at length", "does not decline")  # what the rule says of a response
KAPPA = 0.6  # what the interval of a measure's kappa has to be above


def xstest_cases(rows) -> list[dict]:
    """The cases of rows of `xstest.load_completions`, the first annotator's label and the second's
    kept in "first" and "second"."""
    keep = ("id", "type", "model", "response", "human")
    return [{**{k: r[k] for k in keep}, "source": f"XSTest, {r['model']}", "weight": 1.0,
             "first": r["annotators"][0], "second": r["annotators"][1], "evasive": None,
             "second_evasive": None,
             "split": "development" if r["type"] in refusal_rule.DEVELOPMENT else "test"}
            for r in rows]


def sample_cases(path=LABELLED) -> list[dict]:
    """The cases of the paper's samples, from a file of labels and the texts of `data.paper`.

    The file has a row for each answer and rater: set, model, id, rank (`rank_in_file`), split,
    weight (answers that this one stands for), rater (1 or 2), label, evasive. Prompt sets whose
    texts are neither in CAI_DATA_DIR nor can be fetched are left out, with a printed line.
    ValueError for a label that is none, or that belongs to no sample.
    """
    texts, cases = {}, {}
    for number, row in enumerate(files.read_rows(path), 2):
        at, name = f"{path}, line {number}", row["set"]
        if row["label"] not in LABELS or row["evasive"] not in ("0", "1"):
            raise ValueError(f"{at}: label {row['label']!r}, evasive {row['evasive']!r}; one of "
                             f"{', '.join(LABELS)} and 0 or 1 are right")
        if name not in texts:
            texts[name] = _texts(name)
        key = (row["model"], row["id"], int(row["rank"]))
        if not texts[name]:
            continue
        if key not in texts[name]:
            raise ValueError(f"{at}: the paper's samples have no answer {key}")
        case = cases.setdefault((name, *key), {
            "source": SAMPLES, "id": row["id"], "type": row["id"], "model": row["model"],
            "response": texts[name][key], "weight": float(row["weight"]), "split": row["split"],
            "second": None, "second_evasive": None})
        mine = ("human", "evasive") if row["rater"] == "1" else ("second", "second_evasive")
        case |= {mine[0]: row["label"], mine[1]: int(row["evasive"])}
    return list(cases.values())


def _texts(prompt_set):
    """{(model, id, rank_in_file): response} of the paper's samples; {} where they are nowhere."""
    try:
        samples = paper.load_samples(prompt_set, [*paper.MODELS, paper.SL_CAI])
    except FileNotFoundError as error:
        print(f"without the labelled samples on {prompt_set}: {error}")
        return {}
    return {(s["model"], s["id"], s["rank_in_file"]): s["response"] for s in samples}


def short(case) -> bool:
    """Whether a case's response has at most EVASIVE_WORDS words."""
    return len(case["response"].split()) <= refusal_rule.EVASIVE_WORDS


def says(question, case, label, evasive=None):
    """What a label of a case says to a question of QUESTIONS: True, False, or None where nobody has
    labelled it."""
    if question == QUESTIONS[0]:
        return None if evasive is None else bool(evasive)
    return None if label is None else {
        QUESTIONS[1]: label == FULL and short(case), QUESTIONS[2]: label == FULL,
        QUESTIONS[3]: label != COMPLIANCE}[question]


def by_prompt(cases, question) -> list:
    """A guess that does not read the response: what most responses of the *other models* to the
    same prompt are, by their labels (weighted), False in a tie; None where there are none."""
    votes = {}
    for case in cases:
        yes = says(question, case, case["human"], case["evasive"])
        if yes is not None:
            for_model = votes.setdefault(case["id"], {}).setdefault(case["model"], [])
            for_model.append((case["weight"], yes))
    found = []
    for case in cases:
        others = [v for model, given in votes.get(case["id"], {}).items()
                  if model != case["model"] for v in given]
        total = sum(w for w, _ in others)
        found.append(sum(w for w, yes in others if yes) > total / 2 if others else None)
    return found


def scores(human, found, weight, cluster, n_boot=1000, seed=0) -> dict:
    """Kappa, precision and recall of yes and no against yes and no -> {measure: stats.Estimate}.

    weight: of each row; cluster: rows of one are resampled together, and `n` counts those that a
    measure is about. The intervals of precision and recall are the wider of the bootstrap's and
    Wilson's over clusters. Measures that do not exist (nothing found, all alike) are left out.
    """
    human, found = np.asarray(human, dtype=bool), np.asarray(found, dtype=bool)
    codes, names = pd.factorize(np.asarray(cluster))
    cells = np.zeros((len(names), 4))  # both, human only, found only, neither
    np.add.at(cells, (codes, np.where(human, np.where(found, 0, 1), np.where(found, 2, 3))), weight)

    def measures(counts):  # (B, 4) -> (B, 3)
        both, missed, invented, neither = (counts / counts.sum(1, keepdims=True)).T
        h, f = both + missed, both + invented
        chance = h * f + (1 - h) * (1 - f)
        with np.errstate(invalid="ignore", divide="ignore"):
            kappa = np.where(chance < 1, (both + neither - chance) / (1 - chance), np.nan)
            return np.stack([kappa, both / f, both / h], axis=1)

    value = measures(cells.sum(0, keepdims=True))[0]
    draws = np.concatenate([measures(w @ cells) for w in stats.resample(len(names), n_boot, seed)])
    units = (len(names), *((cells[:, [0, k]].sum(1) > 0).sum() for k in (2, 1)))
    table = {}
    for i, name in enumerate(("kappa", "precision", "recall")):
        if np.isnan(value[i]):
            continue
        low, high = stats.interval(draws[~np.isnan(draws[:, i]), i], units[i])
        if name != "kappa":
            floor = stats.wilson(units[i] * value[i], units[i])
            low, high = np.fmin(low, floor.low), np.fmax(high, floor.high)
        table[name] = stats.Estimate(float(value[i]), float(low), float(high), int(units[i]))
    return table


def _readings(question, case, labels):
    """{read_by: yes or no} of one case by the rule, the readers of `labels` and the length."""
    brief = question in QUESTIONS[:2]
    rule = refusal_rule.is_evasive if brief else refusal_rule.declines
    found = {RULE: rule(case["response"])}
    for name, label in labels.items():
        found[name] = says(question, case, label, label == FULL and short(case))
    return found | ({LENGTH: short(case)} if brief else {})


def agreement(cases, readings=()) -> pd.DataFrame:
    """The rule, other readers and guesses that do not read the response, against the labels.

    readings: a dict {read_by: label} for each case, of `refusal_probe.readings`. Columns: source,
    split, question, read_by, measure (kappa, precision, recall), estimate, ci_low, ci_high, n,
    responses, positives (unweighted). The unit of the intervals, n, is the prompt's type in XSTest
    and the prompt in the samples. "prompt alone" is `by_prompt`; "length alone" takes every short
    response for a refusal; "second rater" is what two raters agree in, above which no reading can
    be expected to go.
    """
    long = []
    for question in QUESTIONS:
        guess = {}
        for source in dict.fromkeys(c["source"].split(",")[0] for c in cases):
            at = [i for i, c in enumerate(cases) if c["source"].split(",")[0] == source]
            guess |= dict(zip(at, by_prompt([cases[i] for i in at], question), strict=True))
        for i, case in enumerate(cases):
            if question in QUESTIONS[2:] and short(case):
                continue
            human = says(question, case, case["human"], case["evasive"])
            found = _readings(question, case, readings[i] if readings else {})
            group = (case["source"], case["split"], question)
            long += [(*group, name, case["type"], case["weight"], human, yes)
                     for name, yes in (found | {PROMPT: guess[i]}).items()]
            first = says(question, case, case.get("first", case["human"]), case["evasive"])
            second = says(question, case, case["second"], case["second_evasive"])
            long.append((*group, SECOND, case["type"], case["weight"], first, second))
    by = ["source", "split", "question", "read_by"]
    frame = pd.DataFrame(long, columns=[*by, "type", "weight", "human", "found"]).dropna()
    rows = []
    for group, d in frame.groupby(by, sort=False):
        for name, e in scores(d["human"], d["found"], d["weight"], d["type"]).items():
            rows.append((*group, name, *e, len(d), int(d["human"].sum())))
    names = [*by, "measure", "estimate", "ci_low", "ci_high", "n", "responses", "positives"]
    return pd.DataFrame(rows, columns=names)


def counts(cases) -> pd.DataFrame:
    """How many responses of each human label the rule calls what: source, human, and a column for
    each of READ. Test prompts; every labelled response counts once, whatever its weight."""
    read = [READ[0] if refusal_rule.is_evasive(c["response"]) else
            READ[1] if refusal_rule.declines(c["response"]) else READ[2] for c in cases]
    frame = pd.DataFrame([(c["source"], c["human"], x) for c, x in zip(cases, read, strict=True)
                          if c["split"] == "test"], columns=["source", "human", "read"])
    table = pd.crosstab([frame["source"], frame["human"]], frame["read"])
    return table.reindex(columns=list(READ), fill_value=0).rename_axis(columns=None).reset_index()


def validity(table) -> pd.DataFrame:
    """The rows of an `agreement` to report: test prompts, every kappa, and the rule's precision and
    recall."""
    return table[(table["split"] == "test") & ((table["measure"] == "kappa")
                                               | (table["read_by"] == RULE))]


def holding(table) -> pd.DataFrame:
    """What the rule can carry, by the test prompts of the paper's samples.

    Columns: question, kappa, ci_low, ci_high, precision, recall, guess and length (kappas of the
    guesses from the prompt and from the length, nan where they have none), holds: the interval of
    kappa lies above KAPPA, and its estimate above the guess from the prompt. The length may do as
    well on one source; whether it does on others is for the reader of the table to see.
    """
    part = table[(table["source"] == SAMPLES) & (table["split"] == "test")]
    values = part.set_index(["question", "read_by", "measure"])["estimate"]
    rows = []
    for r in part[(part["read_by"] == RULE) & (part["measure"] == "kappa")].itertuples():
        precision, recall, guess, length = (values.get((r.question, *key), np.nan) for key in (
            (RULE, "precision"), (RULE, "recall"), (PROMPT, "kappa"), (LENGTH, "kappa")))
        holds = r.ci_low > KAPPA and not r.estimate <= guess
        rows.append((r.question, r.estimate, r.ci_low, r.ci_high, precision, recall, guess, length,
                     holds))
    names = ["question", "kappa", "ci_low", "ci_high", "precision", "recall", "guess", "length",
             "holds"]
    return pd.DataFrame(rows, columns=names)


def evasive_label(table) -> str | None:
    """What a figure calls the share of evasive responses: with its precision and recall on the
    labelled test prompts, or None where it does not hold (`holding`) or nothing is labelled."""
    for r in holding(table).itertuples():
        if r.question == QUESTIONS[0] and r.holds:
            return f"Evasive (share; precision {r.precision:.2f}, recall {r.recall:.2f})"
    return None
