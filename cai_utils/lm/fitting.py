"""Rows that are too long for a model: left out of a stage with a count, while the rest goes on."""

from __future__ import annotations

import re

import numpy as np

from cai_utils.lm.sampling import PromptTooLong


def generate_fitting(sampler, inputs, keys=None, need=None, **options):
    """`sampler.generate`, with None in place of the completions of an input that is too long: that
    with `need` tokens behind it (None: `max_new_tokens`) does not fit into the model's context.

    keys: numbers of the inputs for the random draws (None: 0 to N-1). The others' completions are
    those that they have without the long one. A sampler without `fits` (a server) finds out by
    itself what is too long, and raises `PromptTooLong`.
    """
    keys = range(len(inputs)) if keys is None else keys

    def run(kept):
        rows = [keys[i] for i in kept]
        keyed = {} if rows == [*range(len(rows))] else {"rows": rows}
        return sampler.generate([inputs[i] for i in kept], **keyed, **options)

    return _those_that_fit(sampler, inputs, need or options["max_new_tokens"], run)


def choice_probs(sampler, texts, choices, progress=None):
    """Probabilities of the choices behind each text, (N, C) float64: NaN for a text that is too
    long.

    choices: C texts for all, or one list for each text. Texts are scored in groups with the same
    number of choices; the columns that a text lacks hold zeros.
    """
    if choices and not isinstance(choices[0], list):
        choices = [list(choices)] * len(texts)
    counts = [len(c) for c in choices]
    probs = np.zeros((len(texts), max(counts, default=1)))
    for count in sorted(set(counts)):
        rows = [i for i, c in enumerate(counts) if c == count]

        def run(kept, rows=rows):
            rows = [rows[k] for k in kept]
            return sampler.choice_logprobs([texts[i] for i in rows], [choices[i] for i in rows],
                                           progress=progress)

        found = _those_that_fit(sampler, [texts[i] for i in rows], 1, run)
        scored = {i: row for i, row in zip(rows, found, strict=True) if row is not None}
        probs[rows] = np.nan
        if scored:
            probs[[*scored]] = 0.0
            probs[[*scored], :count] = np.exp(np.asarray([*scored.values()], dtype=float))
        bad = [i for i in scored if not np.isfinite(probs[i]).all()]
        if bad:  # 0/0: no option has a probability
            raise ValueError(f"the model gives no probability to any option of {len(bad)} of "
                             f"{len(texts)} texts, text {bad[0]} first: its weights are damaged, "
                             "or its server says nothing of the options")
    return probs


def _those_that_fit(sampler, inputs, new_tokens, run):
    """[result or None of each input]; run(indices) -> their results."""
    fits = getattr(sampler, "fits", None)
    fit = fits(inputs, new_tokens) if fits and inputs else [True] * len(inputs)
    kept, found = [i for i, yes in enumerate(fit) if yes], [None] * len(inputs)
    while kept:
        try:
            results = run(kept)
        except PromptTooLong as error:
            number = re.match(r"(?:input|text) (\d+)\b", str(error))
            if number is None:
                raise
            # A server is not asked again for what it has answered.
            for i, result in zip(kept, error.found or (), strict=False):
                found[i] = result
            del kept[int(number[1])]
            kept = [i for i in kept if found[i] is None]
            continue
        for i, result in zip(kept, results, strict=True):
            found[i] = result
        break
    return found


def report_left_out(stage, rows, kept):
    """Prints how many rows a stage has left out as too long, all but those with the indices
    `kept`, and the id of the first. PromptTooLong where none is kept."""
    lost = sorted(set(range(len(rows))) - set(kept))
    if not lost:
        return
    first = rows[lost[0]].get("id", lost[0])
    said = (f"{stage}: {len(lost)} of {len(rows)} rows are left out: with the tokens asked for "
            f"they are longer than the model's context; the first has id {first!r}")
    if not kept:
        raise PromptTooLong(f"{said}. Shorten the prompts, lower max_new_tokens (cot_tokens), or "
                            "take a model with a longer context")
    print(said, flush=True)
