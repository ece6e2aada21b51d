"""Responses of a model to prompt rows."""

from __future__ import annotations

from cai_utils.experiment import registry
from cai_utils.lm import backends, models
from cai_utils.lm.fitting import generate_fitting, report_left_out


def sample(spec, rows, *, model, size, step=0, n=1, seed=0, temperature=1.0, max_new_tokens=56,
           stop=(), runs_dir=None) -> list[dict]:
    """Samples: `n` responses of a model to each prompt row, in order of the rows.

    spec: a model spec or folder, or what `backends.from_spec` gave. model, size, step: written into
    the samples (ARCHITECTURE.md, Rows). `finish` says how a response ended.

    A row whose prompt with `max_new_tokens` behind it does not fit into the model's context is left
    out, and a line says how many are; PromptTooLong, a ValueError, where all are.
    """
    sampler = spec if hasattr(spec, "generate") else backends.from_spec(spec, runs_dir=runs_dir)
    responses = generate_fitting(
        sampler, [r["prompt"] for r in rows], n=n, temperature=temperature,
        max_new_tokens=max_new_tokens, stop=tuple(stop), seed=seed)
    report_left_out(f"samples of {model}", rows,
                    [i for i, found in enumerate(responses) if found is not None])
    return [
        {"id": row["id"], "kind": row.get("kind", "unknown"), "prompt": row["prompt"],
         "response": c.text.strip(), "model": model, "size": size, "step": step,
         "finish": c.finish_reason}
        for row, completions in zip(rows, responses, strict=True) for c in completions or ()
    ]


def helpful_model(run, size: str, pretrained: str, helpful: str | None):
    """The helpful-only assistant: models/<helpful>/<size>, or where a profile's `pretrained` is a
    chat assistant already (`helpful` None) that model itself. A Path, or a hub id."""
    if helpful is None:
        return models.resolve(pretrained.format(size=size), run.dir)
    return registry.folder(run, helpful, size)
