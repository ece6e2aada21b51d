"""The policies of the lab, and who makes what: the one place that says so.

Snakefile, notebooks 07, 09 and 10, figures, gallery and the cost table read it. A new RL method is
one row in `POLICIES` and one training function.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

RL = "09_rl"  # the notebook that runs every method with a trainer


@dataclass(frozen=True)
class Policy:
    """One policy: how it is made, and how figures show it.

    start: the policy that training begins from (None: nothing trains it here). reward: what it
    learns from, the folder name of a PM below models/, or `data/NAME` for rows of comparisons
    (None: no RL). trainer: the module of `cai_utils.rl` whose `train` makes it. notebook: the
    one that makes it. color (hex) and marker (matplotlib's) are the same in every figure.
    """

    name: str
    label: str
    color: str
    marker: str
    notebook: str | None = None
    start: str | None = None
    reward: str | None = None
    trainer: str | None = None


# In the paper's order. Colors: Okabe and Ito, told apart with any common color blindness.
POLICIES = {
    policy.name: policy
    for policy in (
        Policy("pretrained", "pretrained", "#000000", "X"),
        Policy("helpful_sft", "helpful SFT", "#56b4e9", "v", "03_critique_revision"),
        Policy("helpful_rlhf", "helpful RLHF", "#0072b2", "o", RL,
               start="helpful_sft", reward="pm_helpful", trainer="ppo"),
        Policy("hh_rlhf", "HH RLHF", "#e69f00", "s", RL,
               start="helpful_sft", reward="pm_hh", trainer="ppo"),
        Policy("sl_cai", "SL-CAI", "#009e73", "D", "07_sl_cai"),
        Policy("rl_cai", "RL-CAI", "#d55e00", "^", RL,
               start="sl_cai", reward="pm_rl_cai", trainer="ppo"),
        Policy("rl_cai_cot", "RL-CAI with CoT", "#cc79a7", "P", RL,
               start="sl_cai", reward="pm_rl_cai_cot", trainer="ppo"),
        Policy("dpo_cai", "DPO-CAI", "#6b2d0c", "p", RL,
               start="sl_cai", reward="data/labels", trainer="dpo"),
    )
}  # fmt: skip

# What else later notebooks read: the folder of a model, or the name of a file of rows in data/.
MADE_BY = {
    "pm_helpful": "02_preference_models", "pm_harmless": "02_preference_models",
    "pm_hh": "02_preference_models",
    "pm_rl_cai": "08_ai_feedback", "pm_rl_cai_cot": "08_ai_feedback",
    "labels": "08_ai_feedback", "labels_cot": "08_ai_feedback",
    "samples_pretrained": "07_sl_cai", "samples_helpful_sft": "07_sl_cai",
    "samples_sl_cai": "07_sl_cai",
}  # fmt: skip

MEASURES = ("harm", "helpfulness", "evasive", "refusal")  # of a judge's verdict
PANELS = {  # what figures of the truth show: kind of prompt and measure
    "Harm, red-team (0 to 4)": ("redteam", "harm"),
    "Evasive, red-team (share)": ("redteam", "evasive"),
    "Helpful, benign (0 to 4)": ("benign", "helpfulness"),
    "Helpful, sensitive (0 to 4)": ("sensitive", "helpfulness"),
}


def baselines() -> list[str]:
    """Names of the policies that are made without RL, in the paper's order."""
    return [policy.name for policy in POLICIES.values() if not policy.trainer]


def methods() -> list[str]:
    """Names of the policies that RL makes, in the paper's order."""
    return [policy.name for policy in POLICIES.values() if policy.trainer]


def method(name: str) -> Policy:
    """The row of an RL method; ValueError, with the nearest names, for an unknown one."""
    if name not in methods():
        near = difflib.get_close_matches(name, methods(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown method {name!r}{hint}; known: {', '.join(methods())}")
    return POLICIES[name]


def label(name: str) -> str:
    """The name of a policy in figures and tables: "rl_cai_cot" -> "RL-CAI with CoT"."""
    if name.startswith("sl_cai_"):
        return f"SL-CAI-{name.removeprefix('sl_cai_')}"
    return POLICIES[name].label if name in POLICIES else name


def made_by(name: str) -> str:
    """The notebook that makes a policy, a PM, or rows; notebook 09 for names not listed here."""
    if name in POLICIES:
        return POLICIES[name].notebook or "00_miniature"
    return MADE_BY.get(name.removeprefix("data/"), RL)


def command(name: str, size: str, run: int = 0) -> str:
    """What to run for a policy, a PM, or rows at a size: "09_rl method=rl_cai size=s"."""
    policy = name.removeprefix("samples_")
    more = f" method={policy} size={size}" if policy in methods() else ""
    more += f" rl_seed={run}" if run else ""
    return made_by(name) + more


def needs(name: str) -> list[str]:
    """The notebooks that have to run before an RL method: those that make its start and reward,
    and for training on human labels alone no others."""
    row = method(name)
    return sorted({made_by(row.start), made_by(row.reward)})


def further(size: str, run: int) -> str:
    """`size` in the names of what the run-th training of a policy makes: "s", then "s_seed1".
    ValueError for a size that would be taken for a further run."""
    if is_further(str(size)):
        raise ValueError(f"size {size!r} ends as the names of further runs of RL do; rename it")
    return f"{size}_seed{run}" if run else str(size)


def is_further(name: str) -> bool:
    """Whether a name is of a further run of RL: "rl_cai_s_seed1"."""
    return bool(re.search(r"_seed\d+$", name))


def folder(run, name: str, size: str) -> Path:
    """The folder of a trained model, or FileNotFoundError naming the notebook that trains it."""
    return run.need(run.model(name, size), command(name, size))


def reward(run, name: str, size: str) -> Path:
    """What an RL method learns from at a size: the folder of its PM, or its file of comparisons.

    FileNotFoundError, naming the notebook that makes it, where it is missing.
    """
    source = method(name).reward
    if source.startswith("data/"):
        return run.need(run.data(f"{source.removeprefix('data/')}_{size}"), made_by(source))
    return folder(run, source, size)
