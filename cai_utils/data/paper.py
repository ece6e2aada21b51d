"""The paper's published samples, as this project's rows.

The paper's repository holds samples of its 52B models (sections 3.3 and 4.3, appendix D) on the
prompts of InstructGPT, LaMDA and PALMS: `samples/<PROMPTS>_<MODEL>.jsonl`. Models of RL have
`sampled_answers` with `pm_scores`; SL-CAI has an initial response and four revisions.

The files' `pm_scores` come from the PM that each model was trained against. They rank the samples
of one file and **must not be compared between files**; `rank_in_file` keeps only that.
"""

from __future__ import annotations

import hashlib
import re

from cai_utils import dialogue
from cai_utils.data import formats
from cai_utils.data.fetch import paper_file
from cai_utils.experiment import files

PROMPT_SETS = {"lamda": "LAMDA", "instructgpt": "INSTRUCTGPT", "palms": "PALMS"}
MODELS = {  # ours -> the ending of the paper's files; "Madison" is its name for CAI
    "helpful_rlhf": "HRLHF", "hh_rlhf": "HHRLHF", "rl_cai": "RLMADISON",
    "rl_cai_cot": "RLMADISON_COT",
}
SL_CAI = "sl_cai"
SIZE, PARAMETERS = "52B", 52_000_000_000
_END = re.compile(r"\n*\s*(?:Human|Assistant):\s*$")


def load_samples(prompt_set: str, models=tuple(MODELS), n=None) -> list[dict]:
    """Samples of the paper's RL models on one prompt set, as rows of samples.

    {"id": "<prompt set>-<hash of the prompt>", "kind": the prompt set, "prompt": messages,
    "response", "model", "size": "52B", "step": 0, "rank_in_file": 1 for the answer that the model's
    own PM scored highest on this prompt}. The same prompt has the same id whichever the model. `n`
    keeps n answers of each prompt, at evenly spaced ranks, as a sample of all.

    `sl_cai` is the last revision of `load_chains`, one answer a prompt. A trailing "Human:", where
    sampling stopped, is cut off.
    ValueError for an unknown prompt set or model, a malformed row (file and row are named), or
    n < 1.
    """
    ids, rows = {}, []
    for model in models:
        if model == SL_CAI:
            rows += [_sample(prompt_set, c["prompt"], c["responses"][-1], model, 1, ids)
                     for c in load_chains(prompt_set)]
            continue
        if model not in MODELS:
            raise ValueError(f"models: no samples of {model!r}; known: "
                             f"{', '.join([*MODELS, SL_CAI])}")
        for at, row, prompt in _rows(prompt_set, MODELS[model]):
            try:
                answers = [(_cut(a["sampled_string"]), float(a["pm_scores"][0]["pm_score"]))
                           for a in row["sampled_answers"]]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{at}: sampled_answers need 'sampled_string' and 'pm_scores' "
                                 f"with 'pm_score' ({type(error).__name__}: {error})") from None
            answers.sort(key=lambda a: -a[1])
            for k in _spread(len(answers), n):
                rows.append(_sample(prompt_set, prompt, answers[k][0], model, k + 1, ids))
    return rows


def load_chains(prompt_set: str) -> list[dict]:
    """The paper's SL-CAI chains on one prompt set: revision chains (ARCHITECTURE.md, Rows).

    {"id", "prompt", "responses": 5 texts (the initial response and 4 revisions), "critiques": 4,
    "principles": 4 critique requests}. ValueError as in `load_samples`.
    """
    ids, chains = {}, []
    for at, row, prompt in _rows(prompt_set, "SLMADISON"):
        try:
            first = row["initial_response"]
            first = first[0] if isinstance(first, list) else first
            first = first["sample"] if isinstance(first, dict) else first
            steps = row["cst"]
            chain = {
                "responses": [_cut(first), *(_cut(s["revision"]["sample"]) for s in steps)],
                "critiques": [s["critique"]["sample"].strip() for s in steps],
                "principles": [_request(s["cst_value"]["prompt"][0]) for s in steps],
            }
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{at}: a chain needs 'initial_response' and 'cst' with critique and "
                             f"revision ({type(error).__name__}: {error})") from None
        chain = {"id": _id(prompt_set, prompt, ids), "prompt": prompt, **chain}
        chains.append(formats.validate(formats.RevisionChain, chain, at))
    return chains


def _rows(prompt_set, ending):
    """(place, raw row, prompt) of a file of samples."""
    if prompt_set not in PROMPT_SETS:
        raise ValueError(f"no prompt set {prompt_set!r}; known: {', '.join(PROMPT_SETS)}")
    path = paper_file(f"samples/{PROMPT_SETS[prompt_set]}_{ending}.jsonl")
    for i, row in enumerate(files.read_rows(path)):
        at = f"{path}, row {i + 1}"
        try:
            prompt = dialogue.parse_transcript(row["rl_prompt"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{at}: 'rl_prompt' is no transcript ({error})") from None
        yield at, row, prompt


def _sample(prompt_set, prompt, text, model, rank, ids):
    return {"id": _id(prompt_set, prompt, ids), "kind": prompt_set, "prompt": prompt,
            "response": text, "model": model, "size": SIZE, "step": 0, "rank_in_file": rank}


def _id(prompt_set, prompt, ids):
    """The id of a prompt by its text, since the files list prompts in different orders."""
    text = dialogue.transcript(prompt)
    return ids.setdefault(text, f"{prompt_set}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def _spread(count, n):
    """Indices of n of `count` answers, evenly spaced; all where n is None or larger."""
    if n is not None and n < 1:
        raise ValueError(f"n={n}: at least 1 answer a prompt")
    if n is None or n >= count:
        return range(count)
    return [int((k + 0.5) * count / n) for k in range(n)]


def _cut(text):
    """The text without a next turn that sampling had begun."""
    return _END.sub("", text).strip()


def _request(text):
    """The paper's critique request without its "CritiqueRequest:" and "Critique:"."""
    text = re.sub(r"^\s*CritiqueRequest:", "", text)
    return re.sub(r"\s*Critique:\s*$", "", text).strip()
