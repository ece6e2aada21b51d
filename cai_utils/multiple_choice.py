"""Multiple-choice questions (paper, section 2): their text, probabilities of the letters, chains of
thought, and answers.

A base LM reads a question as text and continues it; for a chat model the question is a user turn,
and the assistant's turn is started for it with "The answer is:". The probabilities of " (A)",
" (B)" and so on after that are the answer. With chain of thought the model writes its steps first.

Comparisons are asked in the project's own form, or with a constitution of the paper's files in the
published one (`Constitution.forms`): to a base LM then to the character. In the published form with
chain of thought the answer is a new human turn; a chat model gives it in the turn of its chain.
"""

from __future__ import annotations

import re
import time
import warnings

import numpy as np

from cai_utils import dialogue
from cai_utils.data import question_form
from cai_utils.data.question_form import QuestionForm
from cai_utils.lm import tokens
from cai_utils.lm.fitting import choice_probs, generate_fitting, report_left_out
from cai_utils.seeds import stable_int

ANSWER_LEAD = "The answer is:"
COT_LEAD = "Step by step:"
LETTERS = tuple(f" ({c})" for c in "ABCDEFGHI")
_OPTIONS = re.compile(
    r"(?P<head>.*\n) \(A\) (?P<a>.*)\n \(B\) (?P<b>.*?)"
    r"(?P<tail>\n+(?:Assistant: )?The answer is:)", re.DOTALL,
)


_HEAD = dict(
    opening="\n\nHuman: ", lead="Read this conversation.", user="\n\nH: ", assistant="\n\nA: ",
    gap="\n\n", first="\n (A) ", second="\n (B) ", end="", turn="\n\nAssistant: ",
)
OWN = {  # the forms of the project's own constitutions
    "comparison": QuestionForm(**_HEAD, reply=ANSWER_LEAD),
    "comparison_cot": QuestionForm(**_HEAD, reply=COT_LEAD, answer_turn="\n\n",
                                   answer=ANSWER_LEAD),
}
_ANY_PRINCIPLE = "Which response is better?"


def question_text(prompt: list[dict], a: str, b: str, principle: str, cot: bool = False) -> str:
    """A comparison as a multiple-choice question, in the project's own text form for base LMs
    (section 4.1).

    Ends in "The answer is:" or, with `cot`, in "Step by step:"; the answer or the chain follows
    after one space.
    """
    return OWN[_kind(cot)].text(prompt, a, b, principle)


def _kind(cot):
    return "comparison_cot" if cot else "comparison"


def form_of(constitution, cot: bool = False) -> QuestionForm:
    """The form in which a constitution's comparisons are asked: the published one of the paper's
    files, else the project's own; a warning says so where the paper's file with it is missing."""
    found = constitution.forms.get(_kind(cot))
    if found is None and constitution.forms:
        file = ("RLMadisonPrecogFewShotPrompts.json beside its principles" if cot else
                "evals/438HHHEvaluations.jsonl beside their folder, or in CAI_DATA_DIR")
        warnings.warn(f"constitution {constitution.name!r}: the paper's form of a question is not "
                      f"here, so the project's own is asked; put {file}", stacklevel=3)
    return found or OWN[_kind(cot)]


def cot_form(text: str) -> str:
    """The chain-of-thought form of a question's text: its ending asks for steps, not the answer.

    Raises ValueError where the text does not end in "The answer is:".
    """
    if not text.endswith(ANSWER_LEAD):
        raise ValueError(
            f'a question\'s text has to end in "{ANSWER_LEAD}", but this one ends in {text[-40:]!r}'
        )
    return text[: -len(ANSWER_LEAD)] + COT_LEAD


def few_shot_examples(constitution, cot: bool = False) -> list[dict]:
    """The constitution's comparison examples, with `cot` those that have reasoning. ValueError
    where it has none."""
    kind = _kind(cot)
    examples = constitution.few_shot.get(kind, [])
    if not examples:
        raise ValueError(
            f"constitution {constitution.name!r} has no few_shot {kind} examples: add some to its "
            "file or pass few_shot=False"
        )
    return examples


def few_shot_text(constitution, cot: bool = False, form=None, principle=None) -> str:
    """The constitution's comparison examples, answered, as a plain text prefix for questions.

    With `cot` those of `few_shot["comparison_cot"]`, each with its reasoning. form: that of the
    questions (None: the constitution's). An example without a principle takes that of the question
    in `comparison_question`; here it takes `principle`, or "Which response is better?".
    """
    form = form or form_of(constitution, cot)
    if principle is None:
        known = constitution.comparisons if constitution.forms else ()
        principle = _worded(_ANY_PRINCIPLE, known[0]["principle"] if known else "")
    return "".join(_answered(e, _worded(e.get("principle", principle), principle), form)
                   for e in few_shot_examples(constitution, cot))


def _worded(principle, like):
    """A principle between the marks of another one: line breaks before it, "Options:" behind."""
    start = like[: len(like) - len(like.lstrip("\n"))]
    end = " Options:" if like.endswith(" Options:") and not principle.endswith("Options:") else ""
    return start + principle.lstrip("\n") + end


def comparison_question(sampler, prompt, a, b, principle, examples=(), cot=False, form=None) -> str:
    """The text that this sampler's model continues to compare two responses: `examples` (of
    `few_shot_examples`) with their answers, then the question. form: `form_of` the constitution
    (None: the project's own)."""
    form = form or OWN[_kind(cot)]
    if dialogue.uses_transcript(getattr(sampler, "tokenizer", None)):
        prefix = "".join(_answered(e, e.get("principle", principle), form) for e in examples)
        return _sealed(prefix + form.text(prompt, a, b, principle), sampler)
    messages = []
    for e in examples:
        body = form.body(e["prompt"], e["a"], e["b"], e.get("principle", principle))
        reply = f"{form.reply}{_reasons(e, form)} ({e['answer']})"
        messages.append({"role": "user", "content": body})
        messages.append({"role": "assistant", "content": reply})
    messages.append({"role": "user", "content": form.body(prompt, a, b, principle)})
    return dialogue.render(messages, sampler.tokenizer) + form.reply


def _sealed(text, sampler):
    return dialogue.sealed(text, getattr(sampler, "tokenizer", None))


def _answered(example, principle, form):
    """One example in the text form; a published chain of thought as it stands in its file."""
    if form.verbatim and "published" in example:
        return example["published"].replace("{}\n (A) ", f"{principle}\n (A) ", 1)
    question = form.text(example["prompt"], example["a"], example["b"], principle)
    return f"{question}{_reasons(example, form, form.answer_turn)} ({example['answer']})"


def _reasons(example, form, turn="\n\n"):
    """The reasoning of an example and the lead of its answer; nothing without chain of thought."""
    return f" {example['reasoning']}{turn}{form.answer}" if form.answer else ""


def _question_input(sampler, prompt, few_shot, form):
    """A published question behind a few-shot text, as the text that the model continues. form: that
    of its chain of thought, None without."""
    text, reply = prompt, form.reply if form else ANSWER_LEAD
    # Without the marks of the text form: what a chat user would send.
    body = prompt[: -len(ANSWER_LEAD)].rstrip().removesuffix("Assistant:")
    body = body.strip().removeprefix("Human:").strip()
    if form and form.verbatim:
        parts = question_form.parse(prompt)[1]
        text, body = form.text(**parts), form.body(**parts)
    elif form:
        text = cot_form(prompt)
    if dialogue.uses_transcript(getattr(sampler, "tokenizer", None)):
        return _sealed(few_shot + _gap(few_shot, text) + text, sampler)
    content = f"{few_shot}\n\n{body}".strip()
    return dialogue.render([{"role": "user", "content": content}], sampler.tokenizer) + reply


def _gap(before, text):
    """What a text needs before it to begin a paragraph behind another."""
    return "\n\n" if before and not text.startswith("\n") else ""


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
            f"before '{ANSWER_LEAD}', found {letters or 'none'}: correct the prompt or pass "
            "both_orders=False"
        )
    head, a, b, tail = match.group("head", "a", "b", "tail")
    return f"{head} (A) {b}\n (B) {a}{tail}"


def _letters(question, i):
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


def check(questions, both_orders=False):
    """Raises ValueError, naming the question's row, for what `answer` cannot ask."""
    for i, question in enumerate(questions):
        _letters(question, i)
        if both_orders:
            swap_options(question["prompt"], row=i)


def letter_probabilities(sampler, asked, choices, *, cot, n_samples, seed, temperature,
                         max_new_tokens, stop, progress, form=None):
    """Probabilities of the letters behind each text, averaged over its chains; and the chains.

    asked: N texts that end in the lead of an answer or, with `cot`, of a chain. choices: C letters
    for all texts, or one list per text. form: the `QuestionForm` of the chains (None: the project's
    own). Returns ((N, C) float64, N lists of n_samples str, empty without `cot`). A text that, with
    the tokens asked for, does not fit into the model's context has NaN and no chains.
    """
    if not cot:
        return choice_probs(sampler, asked, choices, progress), [[] for _ in asked]
    form = form or OWN["comparison_cot"]
    as_text = dialogue.uses_transcript(getattr(sampler, "tokenizer", None))
    # The bare lead as a stop string matches whatever spacing the model writes before it.
    stops = [*stop, form.answer]
    if as_text:
        stops.append("\n\nHuman:")
    sampled = generate_fitting(  # a long chain is cut, so that only the question has to fit
        sampler, asked, need=1, n=n_samples, temperature=temperature, max_new_tokens=max_new_tokens,
        stop=tuple(dict.fromkeys(stops)), seed=seed, progress=progress,
    )
    kept, count = [i for i, found in enumerate(sampled) if found is not None], len(asked)
    if not kept:
        return np.full((count, 1), np.nan), [[] for _ in asked]
    asked, sampled = [asked[i] for i in kept], [sampled[i] for i in kept]
    if isinstance(choices[0], list):
        choices = [choices[i] for i in kept]
    end = (form.answer_turn if as_text else "\n\n") + form.answer
    written = [[_chain(c.text, form) for c in completions] for completions in sampled]
    marks = dialogue.TURNS if as_text else dialogue.Marks()
    shown = [[_sealed(marks.hide(chain), sampler) for chain in row] for row in written]
    texts = _with_chains(sampler, asked, shown, end)
    if choices and isinstance(choices[0], list):
        choices = [letters for letters in choices for _ in range(n_samples)]
    probs = choice_probs(sampler, texts, choices, progress)
    found, written = np.full((count, probs.shape[1]), np.nan), dict(zip(kept, written, strict=True))
    found[kept] = probs.reshape(len(asked), n_samples, -1).mean(1)
    return found, [[chain.strip() for chain in written.get(i, ())] for i in range(count)]


def _chain(text, form):
    """A sampled chain as it is read behind its lead."""
    return text.rstrip() if form.verbatim else " " * bool(text.strip()) + text.strip()


def _with_chains(sampler, asked, chains, end):
    """Each text with each of its chains and the answer's lead: N * n_samples texts, in order.

    A chain that fills the model's context loses its last words, so that the answer can still be
    read.
    """
    pairs = [(text, chain) for text, row in zip(asked, chains, strict=True) for chain in row]
    texts = [text + chain + end for text, chain in pairs]
    context = getattr(sampler, "context", None)
    if context is None:
        return texts
    room = context - 8  # a choice is a few tokens
    for i, ids in enumerate(tokens.text_ids(texts, sampler.tokenizer)):
        (text, chain), excess = pairs[i], len(ids) - room
        while excess > 0 and chain:
            chain = " ".join(chain.split(" ")[:-excess])
            texts[i] = text + chain + end
            excess = len(tokens.text_ids([texts[i]], sampler.tokenizer)[0]) - room
    return texts


def answer(
    sampler, questions, *, cot=False, n_samples=1, both_orders=False, random_order=False,
    few_shot="", forms=None, seed=0, temperature=1.0, max_new_tokens=256, stop=(), progress=None,
) -> list[dict]:
    """Answers to multiple-choice questions in the paper's published fields (Figures 4 and 12).

    questions: {"prompt" (ends in "The answer is:"), "corrects": [" (B)"], "incorrects": [" (A)",
    ...]}, 2 to 9 options. `few_shot` is a text put before every question. `cot` samples
    `n_samples` chains per question (and order) and averages the probabilities after them; `forms`
    (`Constitution.forms`) has comparisons asked for them as the paper does.
    `both_orders` asks two-option questions also with their options swapped, and averages;
    `random_order` asks each in one order, drawn from the seed and mapped back. With neither they
    are asked as they stand.

    Returns, per question, `p_correct`: the probability of the correct options; `correct`: whether
    the likeliest correct option is likelier than every incorrect one (a tie is not); `probs`:
    {" (A)": p, ...} with the letters of the question as it stands; `answer`: the likeliest of them,
    the first where several are; `cot`: the chains; and with
    `both_orders` or `random_order` `position_bias`, as in `feedback.label`. A question that with
    the tokens asked for does not fit into the model's context has None, and a line says how many.

    ValueError, naming the question's row, for missing fields, unknown options, a prompt without
    its ending, and for options that cannot be swapped exactly.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: has to be at least 1")
    questions = list(questions)
    options = [_letters(q, i) for i, q in enumerate(questions)]
    if not questions:
        return []
    form = _cot_form_for(questions, forms) if cot else None
    asked, choices, orders = [], [], []
    for i, question in enumerate(questions):
        if both_orders:
            orders.append((0, 1))
        else:
            orders.append((stable_int("order", seed, i, bits=1) if random_order else 0,))
        prompts = [question["prompt"]]
        if both_orders or random_order:
            prompts.append(swap_options(question["prompt"], row=i))
        asked += [_question_input(sampler, prompts[order], few_shot, form) for order in orders[i]]
        choices += [list(options[i])] * len(orders[i])
    probs, chains = letter_probabilities(
        sampler, asked, choices, cot=cot, n_samples=n_samples, seed=stable_int("answer", seed),
        temperature=temperature, max_new_tokens=max_new_tokens, stop=stop, progress=progress,
        form=form,
    )
    out, at = [], 0
    for i, question in enumerate(questions):
        rows = range(at, at + len(orders[i]))
        at = rows.stop
        found = [probs[k][: len(options[i])] for k in rows]
        if np.isnan(found).any():
            out.append(None)
            continue
        p = np.mean([x[::-1] if swapped else x for x, swapped in zip(found, orders[i])], axis=0)
        by_option = dict(zip(options[i], map(float, p), strict=True))
        right = [by_option[c] for c in question["corrects"]]
        result = {
            "p_correct": sum(right),
            "correct": max(right) > max(by_option[c] for c in question["incorrects"]),
            "probs": by_option,
            "answer": max(by_option, key=by_option.get),
            "cot": [c for k in rows for c in chains[k]],
        }
        if both_orders or random_order:
            result["position_bias"] = float(np.mean([2 * x[0] - 1 for x in found]))
        out.append(result)
    report_left_out("questions", questions, [i for i, result in enumerate(out) if result])
    return out


def _cot_form_for(questions, forms):
    """The form of chains for these questions: the published one for comparisons alone."""
    published = (forms or {}).get("comparison_cot")
    if published and question_form.common([q["prompt"] for q in questions]):
        return published
    return OWN["comparison_cot"]


def ask(sampler, questions, methods, **common) -> list[dict]:
    """Answers of one model to questions by several methods: {name: arguments of answer}.

    A method's `limit` asks only the first so many questions. Returns a row per question and
    method: id, method, correct (0/1), answer (the letter chosen), probs (of all letters),
    p_correct, position_bias (both orders only), cot.
    """
    rows = []
    for method, arguments in methods.items():
        arguments, began = dict(arguments), time.time()
        asked = questions[: arguments.pop("limit", None)]
        found = answer(sampler, asked, **{**common, **arguments})
        rows += [{"id": q["id"], "method": method, "correct": int(a["correct"]),
                  "answer": a["answer"], "probs": a["probs"], "p_correct": a["p_correct"],
                  "position_bias": a.get("position_bias"), "cot": a["cot"]}
                 for q, a in zip(asked, found, strict=True) if a is not None]
        print(f"  {method}: {len(asked)} questions, {time.time() - began:.0f} s", flush=True)
    return rows


def ask_pm(scorer, questions, method) -> list[dict]:
    """A PM's choice between `text_correct` and `text_incorrect` of each question: rows of `ask`."""
    both = [q[k] for k in ("text_correct", "text_incorrect") for q in questions]
    right, wrong = scorer.score(both).reshape(2, -1)
    return [{"id": q["id"], "method": method, "correct": int(gap > 0),
             "p_correct": float(1 / (1 + np.exp(min(-gap, 700))))}
            for q, gap in zip(questions, right - wrong, strict=True)]


def predictions(sampler, questions, ways, **common) -> list[dict]:
    """Two-option questions asked in several ways ({name: arguments of `answer`}) -> rows
    {"id", "labels": name of the way, "p": probability of (A), "y": 1 where (A) is right}."""
    rows = []
    for name, arguments in ways.items():
        began = time.time()
        answers = answer(sampler, questions, **{**common, **arguments})
        rows += [{"id": q["id"], "labels": name, "p": min(1.0, a["probs"][" (A)"]),
                  "y": int(" (A)" in q["corrects"])}
                 for q, a in zip(questions, answers, strict=True) if a is not None]
        print(f"  {name}: {len(questions)} questions, {time.time() - began:.0f} s", flush=True)
    return rows


def shots(questions, n, constitution=None):
    """Answered examples before questions -> (few-shot text, the questions that are left).

    n: how many of the questions, the first ones, become examples; or "constitution": its comparison
    examples, in the form of the questions and for their principle. Questions that compare no two
    responses (harmful or not, which of nine kinds) get as many of their own instead, and a line
    says so.
    """
    if n == "constitution":
        found = question_form.common([q["prompt"] for q in questions])
        if found:
            return few_shot_text(constitution, form=found[0], principle=found[1]), questions
        n = len(few_shot_examples(constitution))
        print(f"these questions compare no two responses: the first {n} of them are the examples, "
              "not the constitution's")
    text = ""
    for q in questions[:n]:
        text += _gap(text, q["prompt"]) + q["prompt"] + q["corrects"][0]
    return text, questions[n:]


def conversations(questions) -> dict:
    """{a question's id: the conversation that its options answer}, where it gives their texts.

    It is what `text_correct` and `text_incorrect` have before their last answer. Questions about
    one conversation are not independent, and are resampled together: the 438 published ones are
    about 188. A question without such texts, or whose two differ before the answer, has its id
    instead.
    """
    found = {}
    for q in questions:
        before = {str(q.get(k, "")).rpartition("\n\nAssistant:")[0].strip()
                  for k in ("text_correct", "text_incorrect")}
        found[q["id"]] = (before.pop() if len(before) == 1 else "") or q["id"]
    return found
