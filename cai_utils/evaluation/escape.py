"""Text that others wrote, shown as it is: in Markdown and HTML, on a terminal, in a label.

What a model says may be markup, a formula, a link or a control character to whatever shows it.
Every page, card and printed sample goes through `cell` or `visible`.
"""

from __future__ import annotations

import re
import unicodedata

# Controls, formats (right-to-left overrides, zero widths), surrogates, private use, separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # Persian, Hindi and many emoji are written with them
_PARTS = re.compile(
    r"(?P<line>\n)"
    r"|(?P<blank>(?:\A|(?<=[\n ])) | (?=\n|\Z))"  # HTML drops or joins these
    # MathJax, mentions, numbers of issues, emoji and links of bare addresses are made from what
    # stands in one text node, long after Markdown was read; an element of its own breaks them.
    r"|(?P<apart>[$\\@#]|:(?=[\w+-]+:|//)|(?<=mailto):|(?<=xmpp):|(?<=www)\.)"
    r"|(?P<mark>[&<>\[\]*`~|^]|(?<![a-z0-9])_|_(?![a-z0-9]))"  # my_name has no emphasis
    r"|(?P<other>[^ -~])", re.IGNORECASE)


def visible(text) -> str:
    """Text with every character that shows nothing of itself (controls but line breaks and tabs,
    right-to-left overrides, zero widths, lone surrogates) as Python writes it: \\x1b, \\u202e."""
    return "".join(c if c in "\n\t" else _name(c) or c for c in str(text))


def cell(text) -> str:
    """Text as one line of Markdown with HTML, for a table's cell, a heading or an item of a list:
    what is shown is the text, character for character, and nothing in it is markup.

    Line breaks are <br>, blanks that HTML would drop no-break spaces, and a character without a
    look of its own (`visible`, and tabs) stands in code as Python writes it. An empty text is
    "empty" in italics. It holds for GitHub, CommonMark and Jupyter, with MathJax.
    """
    return _PARTS.sub(_shown, str(text)) or "*empty*"


def _shown(match) -> str:
    character = match.group()
    if match.lastgroup == "line":
        return "<br>"
    if match.lastgroup == "blank":
        return "&nbsp;"
    if match.lastgroup == "other":
        name = _name(character)
        return f"<code>&#92;{name[1:]}</code>" if name else character
    entity = f"&#{ord(character)};"
    return f"<span>{entity}</span>" if match.lastgroup == "apart" else entity


def _name(character) -> str | None:
    """A character without a look of its own as Python writes it, None for any other."""
    if unicodedata.category(character) not in _UNSEEN or character in _JOINERS:
        return None
    return character.encode("unicode_escape").decode()
