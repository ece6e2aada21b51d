"""What `shortcuts` looks at: the answers of questions and comparisons, and the cues on their
surface."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from cai_utils.evaluation import refusal_rule

FREQUENT = 100  # words, and as many pairs of words, that are cues
FIRST = 20  # first words
TOKENS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # a full stop is one, too

_WORDS = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCES = re.compile(r"[.!?…。！？]+|\n+")
_OPTIONS = re.compile(r"\n \(([A-I])\) ")
_TAIL = re.compile(r"\s*(?:Assistant: *)?The answer is:\s*$")
_ASSISTANT = re.compile(r"\n\n(?:A|Assistant): ")
_ANSWERED = re.compile(r"(.*\n \([B-I]\) [^\n]*)\n\nAssistant: .*The answer is: ?(\([A-I]\))\s*",
                       re.DOTALL)
_NEXT_TURN = re.compile(r"\n\n")


# ---------------------------------------------------------------------------- reading the rows
@dataclass(frozen=True)
class Item:
    """One question: its answers, which are right, where each stood (all 0: it is not known), what
    came before them, the conversation, which other questions may be about as well, and the id."""

    answers: list[str]
    right: list[bool]
    places: list[int]
    context: str
    conversation: str
    id: object


def read(rows, what: str) -> list[Item]:
    """Questions (the paper's fields) or comparisons as items, without those whose label prefers
    neither answer. `what` they are stands in messages.

    The answers of a question are the options of its prompt; where these cannot be read,
    `text_correct` and `text_incorrect`. ValueError, naming row and field, for a row without texts.
    """
    from cai_utils import multiple_choice  # it loads torch, which figures can do without

    rows = list(rows)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{what}, row {i}: {row!r:.60} is not a row with fields; give rows of "
                             "load_questions or load_comparisons")
    asked = [{"id": i, **row} for i, row in enumerate(rows) if "corrects" in row]
    about = multiple_choice.conversations(asked)
    read_as = {True: _question, False: _comparison}
    items = [read_as["corrects" in row](row, f"{what}, row {i}", row.get("id", i), about)
             for i, row in enumerate(rows)]
    return [item for item in items if any(item.right)]


def answered(texts) -> list[dict]:
    """The questions, in the paper's fields, that stand in texts with their answer, with a chain of
    thought or without; `id` counts them. So a corpus of them can be audited. A new question begins
    with a turn of "Human:", as in `multiple_choice`; what else is in the texts is left out."""
    rows = []
    parts = (part for text in texts for part in re.split(r"(?=\n\nHuman: )", text))
    for match in map(_ANSWERED.fullmatch, parts):
        letters = [f" ({c})" for c in _OPTIONS.findall(match[1])] if match else []
        if match and f" {match[2]}" in letters:
            rows.append({"id": len(rows), "prompt": f"{match[1]}\n\nAssistant: The answer is:",
                         "corrects": [f" {match[2]}"],
                         "incorrects": [c for c in letters if c != f" {match[2]}"]})
    return rows


def labels(items) -> list[str] | None:
    """The options of questions that all have the same ones, in whichever order; else None."""
    options = {tuple(sorted(item.answers)) for item in items}
    same = len(items) > 1 and len(options) == 1 and len(set(*options)) > 1
    return [*options.pop()] if same else None


def answer_in(context: str) -> str:
    """The last answer of the assistant in the text of a question about one conversation, or the
    whole text where no turn can be found."""
    parts = _ASSISTANT.split(context)
    return _NEXT_TURN.split(parts[-1])[0] if len(parts) > 1 else context


def _comparison(row, where, id_, _):
    sides = [_text(row, side, where) for side in ("chosen", "rejected")]
    context = _text(row, "prompt", where, all_turns=True)
    p = 1.0 if row.get("p_chosen") is None else row["p_chosen"]
    first = row.get("p_first")  # of an AI label: of the response that stood first
    places = [0, 0] if first is None else [0, 1] if first >= 0.5 else [1, 0]
    return Item(sides, [p > 0.5, p < 0.5], places, context, context, id_)


def _text(row, field, where, all_turns=False) -> str:
    """The text of a field: of its messages (the last one, or all), or as it is."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    try:
        turns = [turn["content"] or "" for turn in value]
        return "\n\n".join(turns) if all_turns else turns[-1].strip()
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{where}: '{field}' is {value!r:.60}; give a list of messages or a text"
                         ) from None


def _question(row, where, id_, about):
    for field in ("prompt", "corrects", "incorrects"):
        if not row.get(field):
            raise ValueError(f"{where}: missing field '{field}'; give the paper's fields of a "
                             "question, as load_questions does")
    head, *found = _OPTIONS.split(row["prompt"])
    letters = [f" ({letter})" for letter in found[::2]]
    answers = [_TAIL.sub("", text).strip().removeprefix("[[[").removesuffix("]]]")
               for text in found[1::2]]
    if sorted(letters) != sorted([*row["corrects"], *row["incorrects"]]):
        there = ",".join(letters) or " none"
        letters = [row["corrects"][0], row["incorrects"][0]]
        answers = [row.get(field) for field in ("text_correct", "text_incorrect")]
        if not all(isinstance(text, str) for text in answers):
            raise ValueError(f"{where}: 'prompt' has lines for the options{there}, 'corrects' and "
                             "'incorrects' have others; correct them, or give text_correct and "
                             "text_incorrect")
        answers = [text.rpartition("\n\nAssistant:")[2].strip() for text in answers]
    order = sorted(letters)
    return Item(answers, [letter in row["corrects"] for letter in letters],
                [order.index(letter) for letter in letters], head, str(about[id_]), id_)


# ---------------------------------------------------------------------------------------- cues
def measures(text: str, context: str = "") -> dict[str, float]:
    """The numbers of one text that are cues, by name; context: what the text answers."""
    words = [word.lower() for word in _WORDS.findall(text)]
    sentences = sum(bool(_WORDS.search(part)) for part in _SENTENCES.split(text))
    known, n = {*_WORDS.findall(context.lower())}, max(1, len(words))
    return {
        "characters": len(text), "words": len(words), "sentences": sentences,
        "lines": len(text.strip().splitlines()),
        "words per sentence": len(words) / max(1, sentences),
        "letters per word": sum(map(len, words)) / n,
        "share of different words": len({*words}) / n,
        "share of words from the prompt": sum(word in known for word in words) / n,
        "question marks": text.count("?"), "exclamation marks": text.count("!"),
        "commas": text.count(","), "digits": sum(c.isdigit() for c in text),
        "capital letters": sum(c.isupper() for c in text),
        "words of refusal": float(refusal_rule.declines(text)),
    }


def of_texts(texts, contexts, rows) -> tuple[list[str], np.ndarray]:
    """Names of the cues of T texts, and their values (C, T). rows (T,): the item of each text."""
    numbers = pd.DataFrame([measures(*pair) for pair in zip(texts, contexts, strict=True)])
    names, values = [*numbers], [numbers.to_numpy(float).T]
    found = (_WORDS.search(text.lower()) for text in texts)
    firsts = pd.Series([match[0] if match else "" for match in found])
    common = [word for word in firsts.value_counts().index[:FIRST + 1] if word][:FIRST]
    names += [f"first word {word!r}" for word in common]
    values += [(firsts == word).to_numpy(float)[None] for word in common]
    for size, kind in ((1, "word"), (2, "pair")):
        grams, counts = _frequent(texts, size, np.asarray(rows))
        names += [f"{kind} {gram!r}" for gram in grams]
        values.append((counts > 0).astype(float))
        if size == 1:  # some words come with every step of an answer
            names += [f"number of {gram!r}" for gram, row in zip(grams, counts) if row.max() > 1]
            values.append(counts[counts.max(1, initial=0) > 1])
    return names, np.concatenate(values)


def _frequent(texts, size, rows):
    """The n-grams of words that stand in some answers alone of most items (or, of one text an
    item, in about half of the items), and how often each is in a text, (C, T). Labels play no part.
    """
    names, found = ngrams(texts, (size,), _WORDS)
    of, items = np.bincount(rows), (rows, np.arange(len(rows)))
    sums = (csr_matrix((np.ones(len(rows)), items)) @ (found > 0).astype(float)).tocoo()
    if len(of) < len(rows):
        telling = np.bincount(sums.col[sums.data < of[sums.row]], minlength=len(names))
    else:
        n = np.bincount(sums.col, minlength=len(names))
        telling = np.minimum(n, len(of) - n)
    best = np.argsort(-telling, kind="stable")[:FREQUENT]
    best = best[telling[best] > 0]
    return [names[i] for i in best], found[:, best].toarray().T


def ngrams(texts, sizes, pattern=TOKENS) -> tuple[list[str], csr_matrix]:
    """The n-grams of lower-case tokens, and how often each is in each text, (T, V)."""
    known, data, columns, ends = {}, [], [], [0]
    for text in texts:
        tokens = pattern.findall(text.lower())
        counts = Counter(" ".join(tokens[i:i + n]) for n in sizes
                         for i in range(len(tokens) - n + 1))
        data += counts.values()
        columns += [known.setdefault(gram, len(known)) for gram in counts]
        ends.append(len(columns))
    shape = len(texts), max(1, len(known))
    return [*known], csr_matrix((data, columns, ends), shape, dtype=float)


def shared(counts, of) -> csr_matrix:
    """The columns of counts (T, V) that are above 0 in two or more of the texts `of`."""
    return counts[:, np.bincount(counts[of].indices, minlength=counts.shape[1]) > 1]
