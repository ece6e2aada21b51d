"""AI feedback (section 4.1 of the paper) and multiple-choice evaluation (section 2).

A comparison is asked as a multiple-choice question; the probabilities of " (A)" and " (B)" are the
label. With chain of thought the model first writes its steps, and the answer is read after them.
A base LM reads the question as text and continues it; for a chat model the question is a user turn
and the assistant's turn is begun for it with "The answer is:".
"""

from __future__ import annotations

import re

import numpy as np

from cai_utils import dialogue
from cai_utils.constitution import draw, stable_int

ANSWER_LEAD = "The answer is:"
COT_LEAD = "Step by step:"
LETTERS = tuple(f" ({c})" for c in "ABCDEFGHI")
_OPTIONS = re.compile(
    r"(?P<head>.*\n) \(A\) (?P<a>.*)\n \(B\) (?P<b>.*?)"
    r"(?P<tail>\n+(?:Assistant: )?The answer is:)", re.DOTALL,
)


def question_body(prompt: list[dict], a: str, b: str, principle: str) -> str:
    """The question itself: the conversation with short names, the principle, the two options."""
    short = {"user": "H", "assistant": "A"}
    turns = "".join(f"\n\n{short[turn['role']]}: {turn['content']}" for turn in prompt)
    return f"Read this conversation.{turns}\n\n{principle}\n (A) {a}\n (B) {b}"


def question_text(prompt: list[dict], a: str, b: str, principle: str, cot: bool = False) -> str:
    """A comparison as a multiple-choice question, in the text form of base LMs (section 4.1).

    Ends in "The answer is:" or, with `cot`, in "Step by step:"; the answer or the chain follows
    after one space.
    """
    body = question_body(prompt, a, b, principle)
    return f"\n\nHuman: {body}\n\nAssistant: {COT_LEAD if cot else ANSWER_LEAD}"


def cot_form(text: str) -> str:
    """The chain-of-thought form of a question's text: its ending asks for steps, not the answer.

    Raises ValueError where the text does not end in "The answer is:".
    """
    if not text.endswith(ANSWER_LEAD):
        raise ValueError(
            f'a question\'s text has to end in "{ANSWER_LEAD}", but this one ends in {text[-40:]!r}'
        )
    return text[: -len(ANSWER_LEAD)] + COT_LEAD


def few_shot_text(constitution, cot: bool = False) -> str:
    """The constitution's comparison examples, answered, as a plain text prefix for questions.

    With `cot` those of `few_shot["comparison_cot"]`, each with its reasoning. Examples without a
    principle of their own need a question to borrow it from, which `answer` does not have: they
    are shown with "Which response is better?".
    """
    shots = _shots(constitution, cot)
    return "".join(_answered(shot, "Which response is better?", cot) for shot in shots)


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

    With `cot`, `n_samples` chains of thought per order are sampled at `temperature`, up to
    "The answer is:". A chain that ends without it (end of text, `max_new_tokens`, or the model's
    context, where its last words give way) is read all the same, after "The answer is:" is
    appended. The probabilities of all chains (and orders) are averaged, and `clamp=(0.4, 0.6)` is
    applied to that average, as the paper does because CoT labels are over-confident.

    Returns comparison rows (`prompt`, `chosen`, `rejected`, `p_chosen` >= 0.5, `source` "ai",
    `axis` "harmless", `principle` id) with
    - `p_first`: the label, for `responses[0]` of the pair; exactly 0.5 chooses the first;
    - `position_bias`: how much likelier a response is as (A) than as (B), p(A|order 1) +
      p(A|order 2) - 1 before clamping, in [-1, 1]. With one drawn order 2 p(A) - 1, whose mean over
      pairs estimates the same;
    - `cot`: the chains, in order.

    ValueError for malformed pairs or parameters, an empty constitution, or few-shot examples
    that are asked for and missing.
    """
    low, high = _check_clamp(clamp)
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: has to be at least 1")
    pairs = list(pairs)
    for i, pair in enumerate(pairs):
        if not isinstance(pair.get("responses"), (list, tuple)) or len(pair["responses"]) != 2:
            raise ValueError(f"pair {i}: 'responses' has to be a list of two texts")
        if not pair.get("prompt") or pair["prompt"][-1].get("role") != "user":
            raise ValueError(f"pair {i}: 'prompt' has to be messages that end with a user message")
    if not pairs:
        return []
    shots = _shots(constitution, cot) if few_shot else []
    principles, asked, swapped = [], [], []
    for i, pair in enumerate(pairs):
        principle = draw(constitution.comparisons, seed, i, 0, n_principles)
        principles.append(principle)
        orders = (0, 1) if both_orders else (stable_int("order", seed, i, bits=1),)
        for order in orders:
            a, b = pair["responses"][::-1] if order else pair["responses"]
            asked.append(_ask(sampler, pair["prompt"], a, b, principle["principle"], shots, cot))
            swapped.append(order)
    probs, chains = _read(
        sampler, asked, LETTERS[:2], cot, n_samples, stable_int("label", seed), temperature,
        max_new_tokens, stop, progress,
    )
    p_a = probs[:, 0].reshape(len(pairs), -1)  # (pairs, orders)
    swapped = np.array(swapped).reshape(p_a.shape)
    p_first = np.where(swapped == 1, 1 - p_a, p_a).mean(1)
    bias = (2 * p_a - 1).mean(1)
    p_first = np.clip(p_first, low, high)
    per_pair = p_a.shape[1]
    out = []
    for i, (pair, principle) in enumerate(zip(pairs, principles, strict=True)):
        p = float(p_first[i])
        best, worst = pair["responses"] if p >= 0.5 else pair["responses"][::-1]
        out.append({
            "id": str(i),
            **{k: v for k, v in pair.items() if k != "responses"},
            "chosen": [{"role": "assistant", "content": best}],
            "rejected": [{"role": "assistant", "content": worst}],
            "p_chosen": max(p, 1 - p),
            "source": "ai",
            "axis": "harmless",
            "principle": principle["id"],
            "p_first": p,
            "position_bias": float(bias[i]),
            "cot": [c for k in range(per_pair) for c in chains[i * per_pair + k]],
        })
    return out


def relabel(rows, clamp=None, hard=False) -> list[dict]:
    """Rows of `label`, made without clamping, with other targets for the same choices (4.1, 4.3):
    `clamp=(low, high)` brings `p_first` into that range, `hard` makes every `p_chosen` 1 (ties stay
    1/2). ValueError for a bad range."""
    low, high = _check_clamp(clamp)
    out = []
    for row in rows:
        p = min(max(row["p_first"], low), high)
        soft = max(p, 1 - p)
        out.append({**row, "p_first": p, "p_chosen": 1.0 if hard and p != 0.5 else soft})
    return out


def answer(
    sampler, questions, *, cot=False, n_samples=1, both_orders=False, random_order=False,
    few_shot="", seed=0, temperature=1.0, max_new_tokens=256, stop=(), progress=None,
) -> list[dict]:
    """Answers to multiple-choice questions in the paper's published fields (Figures 4 and 12).

    questions: {"prompt" (ends in "The answer is:"), "corrects": [" (B)"], "incorrects": [" (A)",
    ...]}, 2 to 9 options. `few_shot` is a text put before every question. `cot` samples
    `n_samples` chains per question (and order) and averages the probabilities read after them.
    `both_orders` asks two-option questions also with their options swapped, and averages;
    `random_order` asks each in one order, drawn from the seed and mapped back. With neither they
    are asked as they stand.

    Returns, per question, `p_correct`: the probability of the correct options; `correct`: whether
    the likeliest correct option is likelier than every incorrect one (a tie is not); `probs`:
    {" (A)": p, ...} with the letters of the question as it stands; `cot`: the chains; and with
    `both_orders` or `random_order` `position_bias`, as in `label`.

    ValueError, naming the question's row, for missing fields, unknown options, a prompt without
    its ending, and for options that cannot be swapped exactly.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: has to be at least 1")
    questions = list(questions)
    options = [_options(q, i) for i, q in enumerate(questions)]
    if not questions:
        return []
    as_text = dialogue.uses_transcript(getattr(sampler, "tokenizer", None))
    asked, choices, orders = [], [], []
    for i, question in enumerate(questions):
        if both_orders:
            orders.append((0, 1))
        else:
            orders.append((stable_int("order", seed, i, bits=1) if random_order else 0,))
        both = [question["prompt"]]
        if both_orders or random_order:
            both.append(swap_options(question["prompt"], row=i))
        for prompt in (both[order] for order in orders[i]):
            if as_text:
                gap = "\n\n" if few_shot and not prompt.startswith("\n") else ""
                asked.append(few_shot + gap + (cot_form(prompt) if cot else prompt))
            else:
                body = f"{few_shot}\n\n{_body(prompt)}".strip()
                asked.append(_turn(sampler, [{"role": "user", "content": body}], cot))
            choices.append(list(options[i]))
    probs, chains = _read(
        sampler, asked, choices, cot, n_samples, stable_int("answer", seed), temperature,
        max_new_tokens, stop, progress,
    )
    out, at = [], 0
    for i, question in enumerate(questions):
        rows = range(at, at + len(orders[i]))
        at = rows.stop
        own = [probs[k][: len(options[i])] for k in rows]
        p = np.mean([o[::-1] if swapped else o for o, swapped in zip(own, orders[i])], axis=0)
        by_option = dict(zip(options[i], map(float, p), strict=True))
        right = [by_option[c] for c in question["corrects"]]
        result = {
            "p_correct": sum(right),
            "correct": max(right) > max(by_option[c] for c in question["incorrects"]),
            "probs": by_option,
            "cot": [c for k in rows for c in chains[k]],
        }
        if both_orders or random_order:
            result["position_bias"] = float(np.mean([2 * o[0] - 1 for o in own]))
        out.append(result)
    return out


def swap_options(prompt: str, row: int = 0) -> str:
    """A two-option question with the texts of (A) and (B) exchanged, all else as it is.

    ValueError, naming `row`, unless the prompt holds exactly one block " (A) ..." and one
    " (B) ..." at line beginnings before its ending "The answer is:".
    """
    match = _OPTIONS.fullmatch(prompt)
    letters = re.findall(r"\n (\([A-I]\)) ", prompt)
    if match is None or letters != ["(A)", "(B)"]:
        raise ValueError(
            f"question {row}: both_orders needs one option block ' (A) ...' and one ' (B) ...' "
            f"before '{ANSWER_LEAD}', found {letters or 'none'}: mend the prompt or pass "
            "both_orders=False"
        )
    head, a, b, tail = match.group("head", "a", "b", "tail")
    return f"{head} (A) {b}\n (B) {a}{tail}"


def _options(question, i):
    """The letters of question i, in order, checked."""
    for name in ("prompt", "corrects", "incorrects"):
        if not question.get(name):
            raise ValueError(f"question {i}: missing field '{name}'")
    letters = sorted([*question["corrects"], *question["incorrects"]])
    if letters != list(LETTERS[: len(letters)]):
        raise ValueError(
            f"question {i}: its options are {letters}; they have to be ' (A)', ' (B)' and so on, "
            "2 to 9 of them, each once in corrects or incorrects"
        )
    if not question["prompt"].endswith(ANSWER_LEAD):
        raise ValueError(
            f'question {i}: its prompt has to end in "{ANSWER_LEAD}", but ends in '
            f"{question['prompt'][-40:]!r}"
        )
    return tuple(letters)


def _body(prompt):
    """A question's text without the marks of the text form: what a chat user would send."""
    body = prompt[: -len(ANSWER_LEAD)].rstrip().removesuffix("Assistant:")
    return body.strip().removeprefix("Human:").strip()


def _shots(constitution, cot):
    kind = "comparison_cot" if cot else "comparison"
    shots = constitution.few_shot.get(kind, [])
    if not shots:
        raise ValueError(
            f"constitution {constitution.name!r} has no few_shot {kind} examples: add some to its "
            "file or pass few_shot=False"
        )
    return shots


def _reply(shot, cot):
    """How an example is answered, from the lead on."""
    if cot:
        return f"{COT_LEAD} {shot['reasoning']}\n\n{ANSWER_LEAD} ({shot['answer']})"
    return f"{ANSWER_LEAD} ({shot['answer']})"


def _answered(shot, principle, cot):
    """One example in the text form."""
    body = question_body(shot["prompt"], shot["a"], shot["b"], shot.get("principle", principle))
    return f"\n\nHuman: {body}\n\nAssistant: {_reply(shot, cot)}"


def _ask(sampler, prompt, a, b, principle, shots, cot):
    """One comparison as the text that the model continues."""
    if dialogue.uses_transcript(getattr(sampler, "tokenizer", None)):
        prefix = "".join(_answered(shot, principle, cot) for shot in shots)
        return prefix + question_text(prompt, a, b, principle, cot)
    turns = []
    for s in shots:
        body = question_body(s["prompt"], s["a"], s["b"], s.get("principle", principle))
        turns.append({"role": "user", "content": body})
        turns.append({"role": "assistant", "content": _reply(s, cot)})
    turns.append({"role": "user", "content": question_body(prompt, a, b, principle)})
    return _turn(sampler, turns, cot)


def _turn(sampler, turns, cot):
    """A chat model's text up to the lead with which its own turn is begun."""
    return dialogue.render(turns, sampler.tokenizer) + (COT_LEAD if cot else ANSWER_LEAD)


def _read(
    sampler, asked, choices, cot, n_samples, seed, temperature, max_new_tokens, stop, progress
):
    """Probabilities of the choices after each text, averaged over its chains; and the chains.

    asked: N texts; choices: one list for all, or one per text. Returns ((N, C), N lists of str).
    """
    if not cot:
        return _choice_probs(sampler, asked, choices, progress), [[] for _ in asked]
    # The bare lead as a stop catches it in whatever spacing the model writes it.
    stops = [*stop, ANSWER_LEAD]
    if dialogue.uses_transcript(getattr(sampler, "tokenizer", None)):
        stops.append("\n\nHuman:")
    sampled = sampler.generate(
        asked, n=n_samples, temperature=temperature, max_new_tokens=max_new_tokens,
        stop=tuple(dict.fromkeys(stops)), seed=seed, progress=progress,
    )
    chains = [[c.text.strip() for c in completions] for completions in sampled]
    texts = _with_chains(sampler, asked, chains)
    if choices and isinstance(choices[0], list):
        choices = [own for own in choices for _ in range(n_samples)]
    probs = _choice_probs(sampler, texts, choices, progress)
    return probs.reshape(len(asked), n_samples, -1).mean(1), chains


def _with_chains(sampler, asked, chains):
    """Each text with each of its chains and the answer's lead: N * n_samples texts, in order.

    A chain that ran up to the end of the model's context loses its last words there, so that the
    answer can still be read.
    """
    pairs = [(text, chain) for text, own in zip(asked, chains, strict=True) for chain in own]

    def joined(text, chain):
        return text + (f" {chain}" if chain else "") + f"\n\n{ANSWER_LEAD}"

    texts = [joined(*pair) for pair in pairs]
    context = getattr(sampler, "context", None)
    if context is None:
        return texts
    room = context - 8  # a choice is a few tokens
    for i, ids in enumerate(sampler.tokenizer(texts)["input_ids"]):
        (text, chain), excess = pairs[i], len(ids) - room
        while excess > 0 and chain:
            chain = " ".join(chain.split(" ")[:-excess])
            texts[i] = joined(text, chain)
            excess = len(sampler.tokenizer(texts[i])["input_ids"]) - room
    return texts


def _choice_probs(sampler, texts, choices, progress):
    """(N, C) probabilities; questions with fewer options are grouped so that rows stay equal, and
    the columns that they lack hold zeros."""
    if not isinstance(choices[0], list):
        choices = [list(choices)] * len(texts)
    counts = [len(c) for c in choices]
    probs = np.zeros((len(texts), max(counts)))
    for count in sorted(set(counts)):
        rows = [i for i, c in enumerate(counts) if c == count]
        logprobs = sampler.choice_logprobs(
            [texts[i] for i in rows], [choices[i] for i in rows], progress=progress
        )
        probs[rows, :count] = np.exp(np.asarray(logprobs, dtype=float))
    return probs


def _check_clamp(clamp):
    if clamp is None:
        return 0.0, 1.0
    low, high = clamp
    if not 0 <= low <= 0.5 <= high <= 1:
        raise ValueError(f"clamp={clamp}: give (low, high) with 0 <= low <= 0.5 <= high <= 1")
    return low, high
