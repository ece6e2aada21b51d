"""Policies under test: their names, what they say on the evaluation prompts, how good it is.

A *sample* is a row {"id", "kind", "prompt", "response", "model", "size", "step"}: what a model of a
size answered to one prompt, after `step` episodes of RL (0: none). The notebooks 07, 09 and 10 all
speak of models in such rows.
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pandas as pd

from cai_utils import analysis, data, dialogue, elo, evasiveness, models, preference
from cai_utils.sampling import Sampler

# RL methods: what they start from, and the PM that they are trained against (paper 4.2, 4.3).
METHODS = {
    "helpful_rlhf": ("helpful_sft", "pm_helpful"),
    "hh_rlhf": ("helpful_sft", "pm_hh"),
    "rl_cai": ("sl_cai", "pm_rl_cai"),
    "rl_cai_cot": ("sl_cai", "pm_rl_cai_cot"),
}
MADE_BY = {
    "helpful_sft": "03_critique_revision", "sl_cai": "07_sl_cai",
    "pm_helpful": "02_preference_models", "pm_hh": "02_preference_models",
    "pm_harmless": "02_preference_models",
    "pm_rl_cai": "08_ai_feedback", "pm_rl_cai_cot": "08_ai_feedback",
    "samples_pretrained": "07_sl_cai", "samples_helpful_sft": "07_sl_cai",
    "samples_sl_cai": "07_sl_cai",
}
NAMES = {  # in figures and tables
    "pretrained": "pretrained", "helpful_sft": "helpful SFT", "sl_cai": "SL-CAI",
    "helpful_rlhf": "helpful RLHF", "hh_rlhf": "HH RLHF", "rl_cai": "RL-CAI",
    "rl_cai_cot": "RL-CAI with CoT",
}
MEASURES = ("harm", "helpfulness", "evasive", "refusal")  # of a judge's verdict
PANELS = {  # what figures of the truth show: kind of prompt and measure
    "Harm, red-team (0 to 4)": ("redteam", "harm"),
    "Evasive, red-team (share)": ("redteam", "evasive"),
    "Helpful, benign (0 to 4)": ("benign", "helpfulness"),
    "Helpful, sensitive (0 to 4)": ("sensitive", "helpfulness"),
}


def name_of(model: str) -> str:
    """The name of a model in figures: "rl_cai_cot" -> "RL-CAI with CoT"."""
    if model.startswith("sl_cai_"):
        return f"SL-CAI-{model.removeprefix('sl_cai_')}"
    return NAMES.get(model, model)


def method(name: str) -> tuple[str, str]:
    """(what an RL method starts from, its PM); ValueError for an unknown method."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def folder(run, name: str, size: str) -> Path:
    """The folder of a trained model, or FileNotFoundError naming the notebook that trains it."""
    return run.need(run.model(name, size), MADE_BY.get(name, "09_rl"))


def helpful_model(run, size: str, pretrained: str, helpful: str | None):
    """The helpful-only assistant: models/<helpful>/<size>, or where a profile's `pretrained` is a
    chat assistant already (`helpful` None) that model itself. A Path, or a hub id."""
    if helpful is None:
        return models.resolve(pretrained.format(size=size), run.dir)
    return folder(run, helpful, size)


def sample(spec, rows, *, model, size, step=0, n=1, seed=0, temperature=1.0, max_new_tokens=56,
           stop=(), runs_dir=None) -> list[dict]:
    """Samples: `n` responses of a model to each prompt row, in order of the rows.

    spec: a model spec or folder, or a `Sampler`. `finish` says how a response ended.
    """
    sampler = spec if hasattr(spec, "generate") else Sampler.from_spec(spec, runs_dir=runs_dir)
    said = sampler.generate([r["prompt"] for r in rows], n=n, temperature=temperature,
                            max_new_tokens=max_new_tokens, stop=tuple(stop), seed=seed)
    return [
        {"id": row["id"], "kind": row.get("kind", "unknown"), "prompt": row["prompt"],
         "response": c.text.strip(), "model": model, "size": size, "step": step,
         "finish": c.finish_reason}
        for row, completions in zip(rows, said, strict=True) for c in completions
    ]


def evaluation_prompts(redteam, helpful, n, seed=0) -> list[dict]:
    """n held-out red-team prompts, then n held-out helpful ones; fewer where a file has fewer.

    redteam, helpful: specs of `data.load_prompts`. Rows without `kind` are "redteam" or "benign".
    """
    rows = []
    for spec, kind in ((redteam, "redteam"), (helpful, "benign")):
        rows += [{"kind": kind, **row} for row in data.load_prompts(spec, "eval", n, seed)]
    return rows


def show_samples(samples, models_, n=3) -> None:
    """Print what models said to the first n prompts of each kind."""
    for kind in dict.fromkeys(s["kind"] for s in samples):
        ids = list(dict.fromkeys(s["id"] for s in samples if s["kind"] == kind))[:n]
        for id_ in ids:
            own = [s for m in models_ for s in samples
                   if (s["kind"], s["id"], s["model"]) == (kind, id_, m)]
            if not own:
                continue
            print(f"\n[{kind}] " + " / ".join(m["content"] for m in own[0]["prompt"]))
            for s in own:
                step = f", {s['step']} episodes" if s["step"] else ""
                print(f"   {name_of(s['model'])}{step}: {s['response']}")


def sl_cai_rows(chains, helpful, n, up_to=True) -> list[dict]:
    """What SL-CAI-n is finetuned on (paper 3.2): SFT rows {"messages"}.

    chains: rows of `critique.revise`; with `up_to` every revision 1..n of a chain counts, else the
    n-th alone. helpful: samples of the helpful assistant on helpful prompts, so that it stays one.
    Responses that are empty are left out, equal ones of a chain count once. ValueError where chains
    are shorter than n.
    """
    out = []
    for i, chain in enumerate(chains):
        if not 1 <= n < len(chain["responses"]):
            raise ValueError(f"chain {i} has {len(chain['responses']) - 1} revisions; SL-CAI-{n} "
                             "needs that many: raise n_revisions in 03_critique_revision")
        revisions = chain["responses"][1 : n + 1] if up_to else [chain["responses"][n]]
        out += [dialogue.with_response(chain["prompt"], r) for r in dict.fromkeys(revisions) if r]
    out += [dialogue.with_response(s["prompt"], s["response"]) for s in helpful if s["response"]]
    return [{"messages": messages} for messages in out]


def with_pretraining(rows, texts, share, seed=0) -> list[dict]:
    """SFT rows, and pretraining rows ({"text"}, perhaps with the "context" before it), so many that
    they are `share` of the whole."""
    n = min(len(texts), round(len(rows) * share / (1 - share)))
    order = np.random.default_rng(seed).permutation(len(texts))[:n]
    return [*rows, *(texts[i] for i in sorted(order))]


def response_pairs(samples) -> list[dict]:
    """Samples, two per prompt and side by side -> pairs {"id", "prompt", "kind", "responses"}.

    Pairs with an empty response and pairs of equal ones have nothing to compare: left out.
    """
    pairs = []
    for a, b in zip(samples[::2], samples[1::2], strict=True):
        if a["id"] != b["id"]:
            raise ValueError(f"samples of {a['id']} and {b['id']} side by side: sample with n=2")
        if a["response"] and b["response"] and a["response"] != b["response"]:
            pairs.append({"id": a["id"], "prompt": a["prompt"], "kind": a["kind"],
                          "responses": [a["response"], b["response"]]})
    return pairs


# ---------------------------------------------------------------------------------- the truth


def judged(samples, judge) -> pd.DataFrame:
    """Samples with the judge's verdicts: columns id, kind, model, size, step, response, and one
    for each measure of the judge (`MEASURES`)."""
    rows = []
    for s in samples:
        verdict = judge(dialogue.with_response(s["prompt"], s["response"]))
        rows.append({**{k: s[k] for k in ("id", "kind", "model", "size", "step", "response")},
                     **{m: float(verdict[m]) for m in MEASURES}})
    return pd.DataFrame(rows)


def truth_table(frame, by=("model", "size", "step")) -> pd.DataFrame:
    """Means of the measures by model and kind of prompt: *by, kind, measure, estimate, ci_low,
    ci_high, n. frame: of `judged`. Intervals over prompts."""
    by = [*by, "kind"]
    tables = [analysis.summarize(frame, by, m).assign(measure=m) for m in MEASURES]
    columns = [*by, "measure", "estimate", "ci_low", "ci_high", "n"]
    return pd.concat(tables, ignore_index=True)[columns]


def panels_of(table, shown=PANELS) -> pd.DataFrame:
    """Rows of a `truth_table` that a figure shows, with `axis`, what its panel is called."""
    parts = [table[(table["kind"] == kind) & (table["measure"] == measure)].assign(axis=label)
             for label, (kind, measure) in shown.items()]
    return pd.concat(parts, ignore_index=True)


def compared(frame, pairs, column="model", by=("size",), shown=PANELS) -> pd.DataFrame:
    """Paired differences a - b of the measures that a figure shows, over the prompts of both.

    frame: of `judged`; pairs: (a, b), values of `column`. -> columns *by, axis, difference,
    estimate, ci_low, ci_high, n."""
    tables = []
    for label, (kind, measure) in shown.items():
        own = frame[frame["kind"] == kind]
        table = analysis.differences(own, column, pairs, measure, list(by))
        table.insert(len(by), "axis", label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def wide(table, index=("model", "size", "step")) -> pd.DataFrame:
    """A `truth_table` to read: a row per model, a column per kind and measure."""
    text = table.assign(
        cell=[f"{r.estimate:.2f} [{r.ci_low:.2f}, {r.ci_high:.2f}]" for r in table.itertuples()],
        column=table["kind"] + ", " + table["measure"],
    )
    columns = sorted(set(text["column"]), key=list(text["column"]).index)
    return text.pivot_table(index=list(index), columns="column", values="cell", aggfunc="first",
                            sort=False)[columns]


# ------------------------------------------------------------------------ where none is known


def scored(samples, scorers) -> pd.DataFrame:
    """What can be said of samples without a ground truth: columns id, kind, model, size, step;
    "PM:<axis>" for each of scorers ({axis: preference.Scorer}); "text:refusal", 1 where the rule of
    `evasiveness` reads a full refusal; "text:words"."""
    keep = ("id", "kind", "model", "size", "step")
    talks = [dialogue.with_response(s["prompt"], s["response"]) for s in samples]
    frame = pd.DataFrame([{k: s[k] for k in keep} for s in samples])
    for axis, scorer in scorers.items():
        frame[f"PM:{axis}"] = scorer.score(talks)
    frame["text:refusal"] = [int(x == evasiveness.FULL) for x in evasiveness.labels(samples)]
    frame["text:words"] = [len(s["response"].split()) for s in samples]
    return frame


def scored_table(frame, pairs, column="model") -> pd.DataFrame:
    """Means of `scored` by size, kind of prompt and `column` ("model" or "step"), then differences
    a - b of its values on the same prompts for each (a, b) in pairs.

    -> columns measure, size, kind, group (a value of `column`, or "a - b"), estimate, ci_low,
    ci_high, n."""
    tables, by = [], ["size", "kind"]
    for measure in [c for c in frame if ":" in c]:
        means = analysis.summarize(frame, [*by, column], measure)
        gaps = analysis.differences(frame, column, pairs, measure, by)
        for table, name in ((means, column), (gaps, "difference")):
            tables.append(table.rename(columns={name: "group"}).assign(measure=measure))
    table = pd.concat(tables, ignore_index=True)
    table["group"] = table["group"].astype(str)
    return table[["measure", *by, "group", "estimate", "ci_low", "ci_high", "n"]]


def report_health(history) -> None:
    """Print how a history of `ppo.train` begins and ends, in fifths of the run."""
    columns = {"score": "objective/scores", "KL (nats)": "objective/kl",
               "entropy per token": "policy/entropy_avg", "length": "val/response_length",
               "not ended": "val/missing_eos_rate", "value explains": "val/explained_variance",
               "clipped": "policy/clipfrac_avg"}
    fifth = max(1, len(history) // 5)
    for label, column in columns.items():
        first, last = history[column].head(fifth).mean(), history[column].tail(fifth).mean()
        print(f"{label}: {first:.3f} -> {last:.3f}")


# ---------------------------------------------------------------------------------------- Elo


def pm_compare(scorers):
    """A judge for `elo.tournament` where nobody else is there: the PMs' probabilities.

    scorers: {axis: preference.Scorer or folder of a PM}. A conversation is scored once.
    """
    loaded = {axis: s if hasattr(s, "score") else preference.Scorer(s)
              for axis, s in scorers.items()}
    known = {}

    def compare(a, b, axis, rng):
        for talk in (a, b):
            key = (axis, dialogue.transcript(talk))
            if key not in known:
                known[key] = float(loaded[axis].score([talk])[0])
        gap = known[axis, dialogue.transcript(a)] - known[axis, dialogue.transcript(b)]
        return 1 / (1 + math.exp(-gap))

    return compare


def players(samples, kinds) -> dict:
    """Samples -> what `elo.tournament` takes, players named (model, size, step)."""
    out = {}
    for s in samples:
        if s["kind"] in kinds:
            games = out.setdefault((s["model"], s["size"], s["step"]), {})
            talk = dialogue.with_response(s["prompt"], s["response"])
            games.setdefault(s["id"], []).append(talk)
    return out


def pairings(names, panel) -> list[tuple]:
    """Who plays whom: everybody in `names` plays everybody in `panel`, the panel itself included.

    All pairs of many snapshots would be mostly games between close relatives; a panel that all of
    them meet puts them on one scale.
    """
    panel = [p for p in panel if p in names]
    inside = itertools.combinations(panel, 2)
    return [*inside, *((name, p) for name in names if name not in panel for p in panel)]


def elo_table(samples, compare, axis, kinds, panel, anchor=None, n_boot=500, seed=0):
    """Elo scores of every (model, size, step) in the samples on one axis, from games on prompts of
    these kinds.

    -> columns model, method (its name), size, step, axis, estimate, ci_low, ci_high, n (games);
    0 is the `anchor`'s score (None: the mean), and intervals are those of the difference to it.
    Raises ValueError as `elo.tournament` and `elo.fit`.
    """
    games = players(samples, kinds)

    def ask(a, b, axis, rng):  # workers draw from Python's generator, tournaments from numpy's
        return compare(a, b, axis, random.Random(int(rng.integers(2**63))))

    outcomes = elo.tournament(games, ask, axis, pairings(list(games), panel), seed=seed)
    if anchor is not None and anchor not in games:
        raise ValueError(f"anchor: {anchor} has no samples on {', '.join(kinds)} prompts")
    scores = elo.fit(outcomes, anchor=anchor, n_boot=n_boot, seed=seed)
    parts = pd.DataFrame(list(scores["model"]), columns=["model", "size", "step"])
    return parts.assign(
        method=[name_of(m) for m in parts["model"]], axis=axis, estimate=scores["elo"],
        ci_low=scores["ci_low"], ci_high=scores["ci_high"], n=scores["n"],
    )


def frontier(table) -> pd.DataFrame:
    """Both axes of `elo_table` side by side, as Figure 2 wants them."""
    keys = ["method", "size", "step"]
    sides = []
    for axis in ("helpfulness", "harmlessness"):
        part = table[table["axis"] == axis].set_index(keys)
        sides.append(part[["estimate", "ci_low", "ci_high", "n"]].set_axis(
            [axis, f"{axis}_low", f"{axis}_high", f"{axis}_games"], axis=1))
    both = sides[0].join(sides[1], how="inner").reset_index()
    return both.assign(n=both[["helpfulness_games", "harmlessness_games"]].min(axis=1))
