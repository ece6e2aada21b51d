"""AI feedback (section 4.1 of the paper): which of two responses follows a principle better.

A comparison is asked as a multiple-choice question (`multiple_choice`); the probabilities of
" (A)" and " (B)" are the label.
"""

from __future__ import annotations

import numpy as np

from cai_utils.constitution import draw
from cai_utils.lm.fitting import report_left_out
from cai_utils.multiple_choice import (
    LETTERS,
    comparison_question,
    few_shot_examples,
    form_of,
    letter_probabilities,
)
from cai_utils.seeds import stable_int


def label(
    sampler, pairs, constitution, *, cot=False, n_samples=1, clamp=None, both_orders=True,
    n_principles=None, few_shot=False, seed=0, temperature=1.0, max_new_tokens=256, stop=(),
    progress=None,
) -> list[dict]:
    """AI preference labels: which of two responses follows a principle better (section 4.1).

    pairs: {"prompt": messages, "responses": [first, second], "id", ...}; other fields are kept.
    For each pair one comparison principle is drawn, reproducibly from (seed, position of the pair),
    from the first `n_principles`.

    The label is the probability that the model gives to the first response, normalised over the
    two letters. With `both_orders` the pair is asked twice, the responses swapped, and the two are
    averaged; otherwise the order is drawn per pair from the seed and mapped back.

    The question has the form of the constitution: the published one for the paper's files, else the
    project's own (`multiple_choice.form_of`).

    With `cot`, `n_samples` chains of thought per order are sampled at `temperature`, up to the lead
    of the answer ("The answer is:" in the project's form). A chain that ends without it (end of
    text, `max_new_tokens`, or the model's context, where its last words are cut) is used too: the
    lead is appended. The
    probabilities of all chains (and orders) are averaged, and `clamp=(0.4, 0.6)` is applied to that
    average, as the paper does because CoT labels are over-confident.

    Returns comparison rows (`prompt`, `chosen`, `rejected`, `p_chosen` >= 0.5, `source` "ai",
    `axis` "harmless", `principle` id; ARCHITECTURE.md, Rows) with
    - `p_first`: the label, for `responses[0]` of the pair; exactly 0.5 chooses the first;
    - `position_bias`: how much likelier a response is as (A) than as (B), p(A|order 1) +
      p(A|order 2) - 1 before clamping, in [-1, 1]. With one drawn order it is 2 p(A) - 1, whose
      mean over pairs estimates the same;
    - `cot`: the chains, in order.

    A pair of which a question, with the tokens asked for, does not fit into the model's context is
    left out, and a line says how many are; PromptTooLong, a ValueError, where all are.

    ValueError for malformed pairs or parameters, an empty constitution, or few-shot examples
    that are asked for and missing.
    """
    low, high = _check_clamp(clamp)
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: has to be at least 1")
    pairs = list(pairs)
    _check_pairs(pairs)
    if not pairs:
        return []
    examples = few_shot_examples(constitution, cot) if few_shot else []
    form = form_of(constitution, cot)
    principles, asked, swapped = [], [], []
    for i, pair in enumerate(pairs):
        principle = draw(constitution.comparisons, seed, i, 0, n_principles)
        principles.append(principle)
        for order in (0, 1) if both_orders else (stable_int("order", seed, i, bits=1),):
            a, b = pair["responses"][::-1] if order else pair["responses"]
            asked.append(comparison_question(sampler, pair["prompt"], a, b, principle["principle"],
                                             examples, cot, form))
            swapped.append(order)
    probs, chains = letter_probabilities(
        sampler, asked, LETTERS[:2], cot=cot, n_samples=n_samples, seed=stable_int("label", seed),
        temperature=temperature, max_new_tokens=max_new_tokens, stop=stop, progress=progress,
        form=form,
    )
    p_a = probs[:, 0].reshape(len(pairs), -1)  # (pairs, orders)
    swapped = np.array(swapped).reshape(p_a.shape)
    p_first = np.clip(np.where(swapped == 1, 1 - p_a, p_a).mean(1), low, high)
    bias = (2 * p_a - 1).mean(1)
    orders, kept = p_a.shape[1], np.flatnonzero(~np.isnan(bias)).tolist()
    report_left_out("AI labels", pairs, kept)
    return [
        _row(i, pairs[i], principles[i], float(p_first[i]), float(bias[i]),
             [chain for k in range(i * orders, (i + 1) * orders) for chain in chains[k]])
        for i in kept
    ]


def _check_pairs(pairs):
    for i, pair in enumerate(pairs):
        if not isinstance(pair.get("responses"), (list, tuple)) or len(pair["responses"]) != 2:
            raise ValueError(f"pair {i}: 'responses' has to be a list of two texts")
        if not pair.get("prompt") or pair["prompt"][-1].get("role") != "user":
            raise ValueError(f"pair {i}: 'prompt' has to be messages that end with a user message")


def _row(i, pair, principle, p, bias, chains):
    """The comparison row of one pair; p: the label of its first response."""
    chosen, rejected = pair["responses"] if p >= 0.5 else pair["responses"][::-1]
    return {
        "id": str(i),
        **{k: v for k, v in pair.items() if k != "responses"},
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "p_chosen": max(p, 1 - p),
        "source": "ai",
        "axis": "harmless",
        "principle": principle["id"],
        "p_first": p,
        "position_bias": bias,
        "cot": chains,
    }


def relabel(rows, clamp=None, hard=False) -> list[dict]:
    """Rows of `label`, made without clamping, with other targets for the same choices (4.1, 4.3):
    `clamp=(low, high)` limits `p_first` to that range, `hard` makes every `p_chosen` 1 (ties stay
    1/2). ValueError for a bad range."""
    low, high = _check_clamp(clamp)
    out = []
    for row in rows:
        p = min(max(row["p_first"], low), high)
        soft = max(p, 1 - p)
        out.append({**row, "p_first": p, "p_chosen": 1.0 if hard and p != 0.5 else soft})
    return out


def _check_clamp(clamp):
    if clamp is None:
        return 0.0, 1.0
    low, high = clamp
    if not 0 <= low <= 0.5 <= high <= 1:
        raise ValueError(f"clamp={clamp}: give (low, high) with 0 <= low <= 0.5 <= high <= 1")
    return low, high


def response_pairs(samples) -> list[dict]:
    """Samples, two per prompt and side by side -> pairs {"id", "prompt", "kind", "responses"}.

    Pairs with an empty response and pairs of two equal ones are left out: they have nothing to
    compare. How many is printed. ValueError where the samples are not two per prompt, and where no
    pair is left of some.
    """
    pairs, samples = [], list(samples)
    for a, b in zip(samples[::2], samples[1::2], strict=True):
        if a["id"] != b["id"]:
            raise ValueError(f"samples of {a['id']} and {b['id']} side by side: sample with n=2")
        if a["response"] and b["response"] and a["response"] != b["response"]:
            pairs.append({"id": a["id"], "prompt": a["prompt"], "kind": a["kind"],
                          "responses": [a["response"], b["response"]]})
    left_out = len(samples) // 2 - len(pairs)
    if left_out:
        print(f"{left_out} of {len(samples) // 2} pairs left out: equal or empty responses")
    if samples and not pairs:
        raise ValueError("no pair of responses is left to compare, all are equal or empty: raise "
                         "temperature (0 samples the same twice) or max_new_tokens")
    return pairs
