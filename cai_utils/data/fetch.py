"""Published files: found in a local folder, or fetched once at a pinned commit.

A file is first looked for in the folder that the environment variable CAI_DATA_DIR names, under the
name of its source (`constitutional_harmlessness_paper/`, `xstest/`, `hh-rlhf/`), else fetched from
its publisher by a pooch registry into the user's cache, and checked by SHA-256 where the sum is
known here. The commit in each address pins the content of the others.
"""

from __future__ import annotations

import os
from pathlib import Path

from cai_utils.experiment.writing import NotWritten, explained

PAPER_COMMIT = "831f7813dbafab659a526d7452f7adeac464b796"
PAPER_URL = ("https://raw.githubusercontent.com/anthropics/ConstitutionalHarmlessnessPaper/"
             f"{PAPER_COMMIT}/")
PAPER_SHA256 = {
    "evals/438HHHEvaluations.jsonl":
        "d1ee180289d3eeeb314ad862344cbd9af07f19c6d52a77524f9a1a21e7373c10",
    "prompts/CritiqueRevisionFewShotPrompts.json":
        "cb8082c963af77b3e2713f1dc37adff01962b21ebb5f92d37877d559dfeb1085",
    "prompts/CritiqueRevisionInstructions.json":
        "a55071cbef36e2a944e8e4f3612eb6afaaa63b5d56e7e8c14732cedc864b4045",
    "prompts/RLMadisonFewShotPrompts.json":
        "f1fdce27f1b4693a172aa4249e097b3a3beadcbc5c0b58d720d716a6d4999d74",
    "prompts/RLMadisonInstructions.json":
        "aeadbe39725a89dc8d2fb0ed54f0a646a777dacd9b938175cb7b420fbd59930a",
    "prompts/RLMadisonPrecogFewShotPrompts.json":
        "9417ba076fec230ec2d7573dccacdc5e3cd2c0736cb8930bfb2aba78248dda70",
    "samples/INSTRUCTGPT_HHRLHF.jsonl":
        "0520e1d164a3fc7d36a978351d96fc0338d5b4cef346b42c05514175b2e1b8e3",
    "samples/INSTRUCTGPT_HRLHF.jsonl":
        "9ad173ffe09bf5f763a915ce339504bde4b3b5495e981744c0202bd3393020f9",
    "samples/INSTRUCTGPT_RLMADISON.jsonl":
        "db6c7d035699d072041b1bf98396a3a9e2a0ef6e2bac3925be0681ed0b656e96",
    "samples/INSTRUCTGPT_RLMADISON_COT.jsonl":
        "525bdddd145ae0f10b0024e4b2dc4bc5c2f7023b993138a76b31a7308ea6935a",
    "samples/INSTRUCTGPT_SLMADISON.jsonl":
        "0a7e256b65e87ec2df82474584e380d94a16d0ad29ebabc0acb8901f4a77fa21",
    "samples/LAMDA_HHRLHF.jsonl":
        "9e0e744409137e994cd735d5970c224cd9e1d93c9913dc4bf10629a28f384a60",
    "samples/LAMDA_HRLHF.jsonl":
        "ecf996914eaaf419b0d94d2224fd640e9a067bbbd8b9ec3a9a4eaa8c97d5d2a8",
    "samples/LAMDA_RLMADISON.jsonl":
        "ba99e035e0b4f9a3fb188384ab54e92222a2c36db0b860554632dcd4b7d5559f",
    "samples/LAMDA_RLMADISON_COT.jsonl":
        "08a87d9f86c986427907a709ccc9566bbd5c190ab830a888573e18140c472a5a",
    "samples/LAMDA_SLMADISON.jsonl":
        "200d08a1a8565aefb4cc00a9608ec077c965ec6f803ad84ac7c3a490e6f2da35",
}
PAPER_EVALS = ("438HHHEvaluations", "HarmfulVsEthical", "HarmfulnessClassification")

# The prompts come from a later commit than the completions: it added their labels.
XSTEST_URL = "https://raw.githubusercontent.com/paul-rottger/exaggerated-safety/"
XSTEST_MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
XSTEST_FILES = {"xstest_prompts.csv": "475f10bf0a3d6a9dfb174b6de1a38afbfdff98a5/xstest_prompts.csv"}
for _model in XSTEST_MODELS:
    _name = f"xstest_v2_completions_{_model}.csv"
    XSTEST_FILES[_name] = f"a3bb396ddc1939c6f264f17b7cf5b7a5d82833de/model_completions/{_name}"
XSTEST_SHA256 = {
    "xstest_prompts.csv":
        "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    "xstest_v2_completions_llama2orig.csv":
        "cbc52550e8ba8197a3e3d97a5af078d27bae4766737cd62df80270126a87ffc6",
    "xstest_v2_completions_mistralinstruct.csv":
        "6a146b65a5b96ec8249729bc2db459697175125998d7cbbcc88f7688ecf31dad",
}


def local(name: str) -> Path | None:
    """The file `name` below CAI_DATA_DIR, or None where there is no such file or folder."""
    folder = os.environ.get("CAI_DATA_DIR")
    path = Path(folder) / name if folder else None
    return path if path and path.exists() else None


def paper_file(name: str) -> Path:
    """A file of the paper's published repository, for example `evals/438HHHEvaluations.jsonl`:
    from $CAI_DATA_DIR/constitutional_harmlessness_paper, else fetched once at the pinned commit.

    FileNotFoundError when it is in neither place; NotWritten where the disk is full.
    """
    return _file("constitutional_harmlessness_paper", name, f"{name} of the paper", PAPER_URL, name,
                 PAPER_SHA256.get(name))


def xstest_file(name: str) -> Path:
    """A file of XSTest (Röttger et al. 2024): `xstest_prompts.csv`, or
    `xstest_v2_completions_<model>.csv` for a model of XSTEST_MODELS; from $CAI_DATA_DIR/xstest,
    else fetched once. CC BY 4.0; the completions are under their models' licences.

    ValueError for a file that XSTest does not have, FileNotFoundError when it is in neither place.
    """
    if name not in XSTEST_FILES:
        raise ValueError(f"{name!r} is no file of XSTest; there are: {', '.join(XSTEST_FILES)}")
    return _file("xstest", name, f"{name} of XSTest", XSTEST_URL, XSTEST_FILES[name],
                 XSTEST_SHA256.get(name))


def _file(folder, name, what, base_url, remote, sha256) -> Path:
    """`folder`/`name` below CAI_DATA_DIR, else `remote`, a path below `base_url`, fetched."""
    path = local(f"{folder}/{name}")
    if path:
        return path
    import pooch

    commit = base_url.rstrip("/").rpartition("/")[2]  # so that another commit is another file
    store = pooch.create(pooch.os_cache("cai_utils") / folder / commit, base_url,
                         registry={remote: sha256})
    try:
        with explained(store.abspath / remote):
            return Path(store.fetch(remote))
    except NotWritten:
        raise
    except Exception as error:  # pooch raises many kinds when offline: one message for the user
        given = os.environ.get("CAI_DATA_DIR") or "unset"
        raise FileNotFoundError(
            f"{what}: not in CAI_DATA_DIR ({given}) and not fetched from {store.get_url(remote)} "
            f"({type(error).__name__}: {error}). Set CAI_DATA_DIR to a folder that holds "
            f"{folder}/{name}, or go online"
        ) from error
