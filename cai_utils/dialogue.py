"""Conversations: lists of messages, and their text forms.

A conversation is `[{"role": "user" | "assistant", "content": str}, ...]`. Its plain text form is
the transcript of the paper (Bai et al. 2022, arXiv 2212.08073)::

    "\\n\\nHuman: ...\\n\\nAssistant: ..."

One `{"role": "system", ...}` may stand before the first turn. A chat template that has that role
renders it, `render` refuses any other; a transcript has no such turn and begins with its text, as
a paragraph.

Contents are written verbatim, but for what would forge the text around them:

- A content's paragraph that begins like a turn ("Human:", "Assistant:") gets a backslash, which
  `parse_transcript` takes off again (`Marks`). What a chat template writes around turns and is no
  special token (`[INST]`) gets one behind its first character.
- A special token that a content spells gets a `SEAM` behind its first character: `lm/tokens.py`
  reads both sides apart, so that it stays letters, and nobody else sees it.

Outer whitespace is removed where text becomes a message (`parse_transcript`, `with_response`), so
that messages round-trip.
"""

from __future__ import annotations

import datetime
import re
import weakref
from contextlib import suppress

from jinja2 import TemplateError

SPEAKERS = {"user": "Human", "assistant": "Assistant"}
ROLES = ("system", *SPEAKERS)

# The transcript as a chat template, for tokenizers that are used in other tools. It ends a finished
# conversation with eos, as training does (`tokens.encode`); `uses_transcript` recognises it.
TEMPLATE = (
    "{% for m in messages %}{{ '\n\n' if m['role'] == 'system' else "
    "'\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}"
    "{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)

# Stands inside a special token that a content spells. A noncharacter, which a text may hold all the
# same: then another one behind it says that it is the text's own.
SEAM = "\ufdd0"
_OWN = f"{SEAM}\ufdd1"
_PARTS = re.compile(f"{SEAM}(?!\ufdd1)")

_ROLES = {speaker: role for role, speaker in SPEAKERS.items()}
_LEADS = {"system": "", **{role: f"{speaker}: " for role, speaker in SPEAKERS.items()}}
_SYSTEM = {}  # chat template -> whether it has a system role
_SEALED = weakref.WeakKeyDictionary()  # tokenizer -> what `_token_marks` found out
_SPACE = r"[\s\u200b-\u200f\u2060\ufeff]"  # and what looks like none at all
_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Special tokens and marks of turns of common families, for models whose tokenizer is not known.
_FAMILIES = re.compile(
    r"<[|｜][^|｜<>\n]{1,48}[|｜]>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
    r"|\[/?INST\]|<</?SYS>>")
_WRITTEN = re.compile(r"[<\[{|]+[^\s<>\[\]{}|]+[>\]}|]+|^[^\n]*\w[^\n]*:$", re.MULTILINE)
_THOUGHTS = re.compile(r"</?\w*(?:think|reason)\w*>")  # which are a response's own
_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")
_TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
         {"role": "user", "content": "Go on"}]
_READS = {}  # what `_reads` found out

# The date in templates that write one (Llama 3.1's fall back to the same): rows made today equal
# those of tomorrow, and a model is sampled with the prompts that it is trained on. A template sees
# no function that is passed to it, so this one stands before its text.
_DATE = datetime.datetime(2024, 7, 26)
_CODES = {f"%{c}": _DATE.strftime(f"%{c}") for c in "aAbBcdDefFGhHIjmMpSTuUVwWxXyYzZ"}
_CODES |= {f"%-{c[1]}": value.lstrip("0") or "0" for c, value in _CODES.items()}
_DATED = ("{% macro strftime_now(format) %}{{ format"
          + "".join(f"|replace('{code}', '{value}')" for code, value in _CODES.items())
          + " }}{% endmacro %}\n")  # jinja drops the line break behind a block


class Marks:
    """What a content must not spell, since it would end it: hidden behind a backslash.

    starts: regular expressions of what begins a turn, an option or a section, a mark where it
    stands `breaks` line breaks (2: after an empty line) and spaces behind other text. inside:
    texts that are marks wherever they stand, of two characters or more.
    """

    def __init__(self, starts=(), inside=(), breaks=2):
        self._breaks, whole = breaks, [f"{re.escape(m[0])}\\\\*{re.escape(m[1:])}" for m in inside]
        # Few texts have one of the words, and to look for them alone is several times as fast.
        self._words = starts and re.compile("|".join(starts))
        # A run of spaces is read once, whatever its length.
        self._starts = starts and re.compile(
            rf"(?<!{_SPACE})({_SPACE}*+)(\\*+(?:{'|'.join(starts)}))")
        self._inside = whole and re.compile("|".join(whole))

    def hide(self, text, behind="") -> str:
        """The text of a content, written after the text `behind`, with no mark in it."""
        if self._starts and self._words.search(text):
            text = self._starts.sub(lambda m: self._at(m, behind, f"\\{m[2]}"), text)
        return self._inside.sub(lambda m: f"{m[0][0]}\\{m[0][1:]}", text) if self._inside else text

    def show(self, text, behind="") -> str:
        """The content that `hide` made this text of."""
        def bare(m):
            return m[0][0] + m[0][1:].removeprefix("\\")

        if self._starts and self._words.search(text):
            text = self._starts.sub(lambda m: self._at(m, behind, m[2].removeprefix("\\")), text)
        return self._inside.sub(bare, text) if self._inside else text

    def _at(self, match, behind, new):
        gap = match[1] if match.start() else behind[len(behind.rstrip()) :] + match[1]
        return match[1] + new if len(_BREAK.findall(gap)) >= self._breaks else match[0]


TURNS = Marks([f"{speaker}:" for speaker in SPEAKERS.values()])


class Rendered(str):
    """Text that a chat template wrote: it has its special tokens already, and a tokenizer adds
    none (`lm/tokens.py`). Text put behind it belongs to it, so the sum is `Rendered` too."""

    __slots__ = ()

    def __add__(self, other):
        return Rendered(str.__add__(self, other))


def transcript(messages, add_generation_prompt=False, marks=TURNS):
    """Messages -> the paper's transcript, which begins with "\\n\\nHuman:", or with the text of a
    system message. marks: what contents must not spell.

    With `add_generation_prompt` it ends in "\\n\\nAssistant:" without a trailing space: the
    completion brings its own. ValueError on a role other than user or assistant (or system before
    the first turn), on an empty list, and on a generation prompt asked for after an assistant
    message.
    """
    _check(messages, add_generation_prompt)
    leads = [f"\n\n{_LEADS[m['role']]}" for m in messages]
    text = "".join(lead + marks.hide(m["content"], lead)
                   for lead, m in zip(leads, messages, strict=True))
    return text + "\n\nAssistant:" if add_generation_prompt else text


def parse_transcript(text):
    """The paper's transcript -> messages, contents stripped of outer whitespace, without the
    backslashes of `Marks`.

    An empty last assistant turn is a generation prompt and is dropped. Two turns of one speaker in
    a row are kept (hh-rlhf has some). ValueError when the text does not begin with a turn.
    """
    text = "\n\n" + text.lstrip()
    if not _TURN.match(text):
        raise ValueError(
            f"not a transcript: {text[2:62]!r} should begin with 'Human:' or 'Assistant:'"
        )
    parts = _TURN.split(text)[1:]
    messages = [
        {"role": _ROLES[speaker], "content": TURNS.show(content).strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def uses_transcript(tokenizer):
    """Whether this model reads conversations as "Human: / Assistant:" text: it has no chat template
    (a base LM), or one that renders a conversation as `transcript` does (the miniature), a bos
    before it aside."""
    return not getattr(tokenizer, "chat_template", None) or _reads(tokenizer)[1]


def render(conversation, tokenizer, add_generation_prompt=True):
    """A conversation -> the text a model reads: its own chat template, else the transcript.

    What a chat template wrote is `Rendered`. The transcript is a plain `str`, also where a template
    renders it: to its model a conversation is text like any other, with the special tokens that
    the tokenizer adds to texts. A `str` passes through as it is. A template that writes the date
    writes 26 July 2024. For text that ends with a finished response (scoring, training) pass
    `add_generation_prompt=False`. ValueError as in `transcript`, and for a conversation that the
    template refuses, or whose system message it leaves out or gives to the user or the assistant.
    """
    if isinstance(conversation, str):
        return conversation
    _check(conversation, add_generation_prompt)
    if not getattr(tokenizer, "chat_template", None):
        return sealed(transcript(conversation, add_generation_prompt), tokenizer)
    if conversation[0]["role"] == "system" and not _has_system_role(tokenizer):
        raise ValueError("this model's chat template has no system role: put the text of the "
                         "system message into the first user turn, or leave it out")
    write = _writer(tokenizer)
    messages = [{**m, "content": write(m["content"], m["role"])} for m in conversation]
    text = _from_template(messages, tokenizer, add_generation_prompt)
    return text if uses_transcript(tokenizer) else Rendered(text)


def written(content, tokenizer, role="assistant"):
    """A content as `render` writes it for this model."""
    return _writer(tokenizer)(content, role)


def _writer(tokenizer):
    """`written` for many contents: what depends on the tokenizer alone is asked once."""
    found = _token_marks(tokenizer)
    if uses_transcript(tokenizer):
        return lambda content, role: _sealed(
            TURNS.hide(content, f"\n\n{_LEADS[role]}"), tokenizer, found)
    return lambda content, role: _sealed(found[1].hide(content), tokenizer, found)


def sealed(text, tokenizer):
    """A text that holds contents alone, with a `SEAM` in each special token that it spells.

    Special tokens are those that the tokenizer calls so and, of its other added tokens, those with
    which the chat template parts turns; not one that is a single character or only spaces. Where
    the tokenizer is not known, those of common families.
    """
    return _sealed(text, tokenizer, _token_marks(tokenizer))


def _sealed(text, tokenizer, marks):
    found, _, normal = marks
    text, before = text.replace(SEAM, _OWN), None
    while before != text:  # one may stand across two others
        before, text = text, found.sub(lambda m: f"{m[0][0]}{SEAM}{m[0][1:]}", text)
    # A normalizer may make one of letters that are none: then each is read by itself.
    if normal and any(normal & set(tokenizer(piece, add_special_tokens=False)["input_ids"])
                      for piece in text.split(SEAM) if piece):
        text = SEAM.join(re.findall(f"{_OWN}|[^{SEAM}]", text))
    return text


def broken(text):
    """A text for an engine that makes tokens of it itself, such as a server: where a content spells
    a special token, a backslash stands in it, since text cannot say what is meant."""
    return "\\".join(pieces(text))


def pieces(text):
    """What stands between the `SEAM`s of a text."""
    return [part.replace(_OWN, SEAM) for part in _PARTS.split(text)]


def guarded(messages):
    """Messages for an engine that renders them itself, with a backslash in each special token or
    mark of a turn, of common families, that a content spells."""
    return [{**m, "content": broken(sealed(m["content"], None))} for m in messages]


def _token_marks(tokenizer):
    """(special tokens as a regular expression, other `Marks` of the chat template, ids of special
    tokens that a normalizer may write) of a tokenizer, kept while they are the same."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = hasattr(type(tokenizer), "added_tokens_decoder")  # to read it takes long
    if not known and not template:
        return _FAMILIES, Marks(), set()
    names = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token", None)
    key = template, len(tokenizer) if known else 0, names
    with suppress(TypeError):  # one that cannot be a key is asked each time
        if _SEALED.get(tokenizer, (None,))[0] == key:
            return _SEALED[tokenizer][1]
    found = _found_marks(tokenizer, tokenizer.added_tokens_decoder if known else {}, template)
    with suppress(TypeError):
        _SEALED[tokenizer] = key, found
    return found


def _from_template(messages, tokenizer, add_generation_prompt, parts=None):
    """parts: contents are given as lists, which is the one form that templates of models with
    images read (others drop them, without a word); None: what this template reads."""
    if _reads(tokenizer)[0] if parts is None else parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    dated = "strftime_now" in str(tokenizer.chat_template)
    more = {"chat_template": _DATED + tokenizer.get_chat_template()} if dated else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **more)
    except (TemplateError, TypeError, AttributeError, LookupError) as error:
        if type(error) is not TemplateError:  # which a template raises itself
            raise ValueError("the model's chat template fails on a conversation "
                             f"({type(error).__name__}: {error}); mend it where it stands: "
                             "chat_template.jinja or tokenizer_config.json") from None
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(
            f"the model's chat template refuses a conversation of these turns: {roles} ({error}); "
            "join turns of one speaker that follow each other, begin with the user's, or leave the "
            "row out") from None


def _found_marks(tokenizer, added, template):
    frame = ""
    if template and not uses_transcript(tokenizer):
        talk = [{**m, "content": SEAM} for m in _TALK]
        system = [{"role": "system", "content": SEAM}] if _has_system_role(tokenizer) else []
        with suppress(ValueError):
            frame = _from_template(system + talk, tokenizer, True)
    named = set(getattr(tokenizer, "all_special_ids", ()))  # some of them are called ordinary
    special = {i: t for i, t in added.items() if t.special or i in named or (
        str(t) in frame and re.search(r"[^\w\s]", str(t)) and not _THOUGHTS.fullmatch(str(t)))}
    names = sorted((str(t) for t in special.values() if len(str(t).strip()) > 1),
                   key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    words = {w.strip() for part in found.sub("\n", frame).split(SEAM)
             for w in _WRITTEN.findall(part.strip(" "))}
    inside = sorted((w for w in words if len(w) > 2 and not _THOUGHTS.fullmatch(w)), key=len,
                    reverse=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normal = {i for i, t in special.items() if t.normalized and str(t) in names}
    return found, Marks(inside=inside), normal if getattr(backend, "normalizer", None) else set()


def _reads(tokenizer):
    """(whether a tokenizer's template reads contents as lists of parts, whether it renders the
    transcript), found by a sample of its own and kept."""
    bos = getattr(tokenizer, "bos_token", None) or ""
    key = type(tokenizer), str(tokenizer.chat_template), bos
    if key not in _READS:
        _READS[key] = False, False
        for parts in (False, True):
            with suppress(ValueError):
                text = _from_template(_TALK, tokenizer, True, parts)
                if _TALK[-1]["content"] in text:
                    _READS[key] = parts, text.removeprefix(bos) == transcript(_TALK, True)
                    break
    return _READS[key]


def _has_system_role(tokenizer):
    """Whether the chat template shows a system message, and not as the user's or assistant's."""
    def shown(role):
        talk = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        try:
            return _from_template(talk, tokenizer, False)
        except ValueError:
            return ""

    template = str(tokenizer.chat_template)
    if template not in _SYSTEM:
        text = shown("system")
        _SYSTEM[template] = "Be brief." in text and text not in map(shown, SPEAKERS)
    return _SYSTEM[template]


def with_response(prompt, text):
    """The prompt's messages followed by one assistant message, its outer whitespace stripped.

    Returns a new list; `prompt` is not changed.
    """
    return [*prompt, {"role": "assistant", "content": text.strip()}]


def _check(messages, add_generation_prompt):
    if not messages:
        raise ValueError("an empty conversation: give at least one message")
    for i, m in enumerate(messages):
        fine = isinstance(m, dict) and isinstance(m.get("content"), str)
        if not fine or m.get("role") not in (ROLES if i == 0 and len(messages) > 1 else SPEAKERS):
            raise ValueError(
                f"message {i} is {m!r}: it needs 'content', a text, and a 'role' of 'user' or "
                "'assistant'; a 'system' message may stand before the first turn, or its text can "
                "begin the first user turn"
            )
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(
            "the conversation already ends with an assistant message: pass "
            "add_generation_prompt=False, or drop that message to sample a new one"
        )
