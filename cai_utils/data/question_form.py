"""The form of a comparison question: the words around a conversation, a principle and two options.

The project has a form of its own (`multiple_choice.OWN`). The paper's is read out of its published
files (`common`), so that none of its words stand here: texts in which a conversation begins with
"Human:" or "H:", and options with " (A) " and " (B) ".

A line of a message or a response that begins like a turn, an option or an answer of the form stands
behind a backslash, so that it is none (`QuestionForm.marks`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property

from cai_utils.dialogue import Marks

_HEAD = (
    r"(?P<opening>\s*(?:Human: )?)(?P<lead>\S.*?)(?P<user>\n\n(?:Human|H): )(?P<talk>.*[^\n])"
    r"(?P<gap>\n\n)(?P<principle>\n*\S[^\n]*)"
    r"(?P<first>\n \(A\) (?:\[\[\[)?)(?P<a>.*?)"
    r"(?P<second>(?:\]\]\])?\n \(B\) (?:\[\[\[)?)(?P<b>.*?)(?P<end>(?:\]\]\])?)"
    r"(?P<turn>\n+(?:Assistant: )?)(?P<reply>[^\n:]*:)"
)
_QUESTION = re.compile(_HEAD, re.DOTALL)
_REASONED = re.compile(
    _HEAD + r"(?P<reasoning>.*)(?P<answer_turn>\n\nHuman:\s*)(?P<answer>[^\n]*:)"
    r" \((?P<letter>[AB])\)", re.DOTALL,
)


@dataclass(frozen=True)
class QuestionForm:
    """The words of a question, in order: `opening` of the human turn, `lead`, the turns after
    `user` and `assistant`, `gap`, the principle, the options after `first` and `second`, `end`;
    then `turn` and `reply`, from which the model goes on. After a chain of thought `answer_turn`
    and `answer` follow, and the letter; both are empty in a form without one.

    verbatim: a chain is read as it was written, with its first space or line break; otherwise it
    stands stripped after one space.
    """

    opening: str
    lead: str
    user: str
    assistant: str
    gap: str
    first: str
    second: str
    end: str
    turn: str
    reply: str
    answer_turn: str = ""
    answer: str = ""
    verbatim: bool = False

    @cached_property
    def marks(self) -> Marks:
        """What no message and no response may begin a line with."""
        turns = re.findall(r"\w+:", " ".join(
            (self.opening, self.user, self.assistant, self.turn, self.answer_turn)))
        leads = ["Options:", "The answer is:", self.reply.strip(), self.answer.strip()]
        starts = sorted({"Human:", "Assistant:", *turns, *filter(None, leads)})
        ends = (self.end,) if len(self.end) > 1 else ()
        return Marks([*map(re.escape, starts), r"\([A-I]\)"], ends, breaks=1)

    def body(self, prompt: list[dict], a: str, b: str, principle: str) -> str:
        """The question without the marks of its turn: what a chat user would send."""
        marks = {"system": "\n\n", "user": self.user, "assistant": self.assistant}
        turns = "".join(marks[turn["role"]] + self.marks.hide(turn["content"], marks[turn["role"]])
                        for turn in prompt)
        options = (f"{self.first}{self.marks.hide(a, self.first)}"
                   f"{self.second}{self.marks.hide(b, self.second)}{self.end}")
        return f"{self.lead}{turns}{self.gap}{principle}{options}"

    def text(self, prompt: list[dict], a: str, b: str, principle: str) -> str:
        """The question as a base LM reads it, up to `reply`."""
        return f"{self.opening}{self.body(prompt, a, b, principle)}{self.turn}{self.reply}"


def parse(text: str, reasoned: bool = False) -> tuple[QuestionForm, dict] | None:
    """A comparison as published -> its form, and its parts: `prompt` (messages, verbatim), `a`,
    `b`, `principle`, and with `reasoned`, for an answered chain of thought, `reasoning`, `letter`.

    None for a text that is no such question: its last turn has to be the human's, since the options
    answer it.
    """
    match = (_REASONED if reasoned else _QUESTION).fullmatch(text)
    if match is None or "\n (C) " in match["b"]:
        return None
    found = match.groupdict()
    found["assistant"] = {"\n\nH: ": "\n\nA: "}.get(found["user"], "\n\nAssistant: ")
    form = QuestionForm(**{f.name: found[f.name] for f in fields(QuestionForm) if f.name in found},
                        verbatim=reasoned)
    marks = {form.user[:-1]: "user", form.assistant[:-1]: "assistant"}
    parts = re.split("(" + "|".join(marks) + ") ?", form.user + found["talk"])[1:]
    prompt = [{"role": marks[mark], "content": content}
              for mark, content in zip(parts[::2], parts[1::2], strict=True)]
    if prompt[-1]["role"] != "user":
        return None
    for turn in prompt:
        turn["content"] = form.marks.show(turn["content"])
    found |= {k: form.marks.show(found[k]) for k in "ab"}
    kept = ("a", "b", "principle", "reasoning", "letter")
    return form, {"prompt": prompt, **{k: found[k] for k in kept if k in found}}


def common(texts, reasoned: bool = False) -> tuple[QuestionForm, str] | None:
    """The form that most of these questions have, and the principle that most of them ask for.

    None where one of them is no comparison, or all questions have the same two options (those are
    labels, not responses).
    """
    found = [parse(text, reasoned) for text in texts]
    if not found or None in found:
        return None
    options = {frozenset((parts["a"], parts["b"])) for _, parts in found}
    if len(found) > 1 and len(options) == 1 and not reasoned:
        return None
    forms, principles = zip(*((form, parts["principle"]) for form, parts in found))
    return Counter(forms).most_common(1)[0][0], Counter(principles).most_common(1)[0][0]
