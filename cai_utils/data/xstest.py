"""XSTest (Röttger et al. 2024, arXiv 2308.01263): its labels and completions of five models."""

from __future__ import annotations

from cai_utils.data.fetch import XSTEST_MODELS, xstest_file
from cai_utils.experiment import files

COMPLIANCE, FULL, PARTIAL = LABELS = ("full compliance", "full refusal", "partial refusal")
HUMAN_LABELS = {"1_full_compliance": COMPLIANCE, "2_full_refusal": FULL,
                "3_partial_refusal": PARTIAL}


def load_completions(model: str) -> list[dict]:
    """XSTest's completions of one model with their human labels (Röttger et al. 2024, section 4).

    {"id", "prompt": messages, "response", "type", "safe": whether the prompt is, "model", "human":
    the final label, "annotators": the two annotators' labels}; labels are of LABELS.
    ValueError for an unknown model or label, with file and row.
    """
    if model not in XSTEST_MODELS:
        raise ValueError(f"XSTest has no completions of {model!r}; there are: "
                         f"{', '.join(XSTEST_MODELS)}")
    path, rows = xstest_file(f"xstest_v2_completions_{model}.csv"), []
    for i, row in enumerate(files.read_rows(path)):
        try:
            given = [row[k] for k in ("final_label", "annotation_1", "annotation_2")]
            final, *two = [HUMAN_LABELS[label.strip()] for label in given]
            rows.append({
                "id": row["id"], "prompt": [{"role": "user", "content": row["prompt"]}],
                "response": row["completion"].strip(), "type": row["type"],
                "safe": not row["type"].startswith("contrast"), "model": model,
                "human": final, "annotators": two,
            })
        except (AttributeError, KeyError) as error:
            raise ValueError(f"{path}, row {i + 1}: no such column or label: {error}; labels are "
                             f"{', '.join(HUMAN_LABELS)}") from None
    return rows
