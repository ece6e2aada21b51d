"""Text of a model is shown as it is, character for character, by whatever renders the page."""

import html.parser
import re

import markdown_it
import pandas as pd
import pytest
from nbconvert.filters import markdown_mistune

from cai_utils.evaluation import chains, escape, paper_samples
from cai_utils.experiment import run
from cai_utils.figures import gallery
from scripts import cards

TEXTS = [
    "<script>document.title = 'ran'</script>", "<img src=x onerror=\"document.title='ran'\">",
    "</td></tr></table></details>", "<details>", "<!-- a --> b", "<?php ?> <![CDATA[x]]>",
    "a | b || c \\| d \\\\| e", "|", "\\", "`", "```py\ncode\n```", "`` ` ````", "~~~\ncode\n~~~",
    "$x$ $$y$$ \\$ \\(a\\) \\\\(b\\\\) \\[c\\] \\begin{align}x\\end{align} $`z`$ @@0@@",
    "&lt;b&gt; &amp; &#42; &copy;", "~~strike~~ ^sup^ *a* **b** _c_ __d__ my_own_name a_ _b",
    "[x](javascript:alert(1)) ![i](x) [r][1] [^1]\n[^1]: note\n[1]: http://a.b", "<http://a.b>",
    "http://a.example/x www.a.example a@b.example mailto:a@b.c", "@octocat org/repo#12 #123",
    ":tada: :+1: a:b :c:d:", "# h\n- a\n1. b\n> q\n---\n===\n\n    code", "{{ config }}",
    "a\r\nb\rc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i\tj", "x\ud800y",
    "a\u202eb\u2066c\u200bd\ufeff\x00\x1b",
    "  two  spaces   \n   and indented \n\n\nend", "👨‍👩‍👧 e\u0301 \u05d0\u05d1 x\u3000y\xa0z", "",
    "word" * 500,
]  # fmt: skip


def shown(text):
    """What a reader sees of a text: as it is, what has no look of its own as Python writes it."""
    return escape.visible(text).replace("\t", "\\t").replace("\xa0", " ") or "empty"


class Cells(html.parser.HTMLParser):
    """The texts of a page's table cells, headings and items, their text nodes, their elements."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.nodes, self.elements, self.inside = [], [], set(), False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in ("td", "h2", "li"):
            self.cells.append("")
            self.inside = True
        elif ("class", "anchor-link") in attrs:  # nbconvert's mark behind a heading
            self.inside = False
        elif self.inside:
            self.elements.add((tag, *attrs))
            self.cells[-1] += "\n" * (tag == "br")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "h2", "li")

    def handle_data(self, data):
        if self.inside:
            self.nodes.append(data)
            self.cells[-1] += data.replace("\xa0", " ")


RENDERERS = {
    "CommonMark with tables": markdown_it.MarkdownIt("commonmark").enable(
        ["table", "strikethrough"]).render,
    "Jupyter": markdown_mistune.markdown2html_mistune,
}


@pytest.mark.parametrize("render", RENDERERS.values(), ids=RENDERERS)
def test_every_page_shows_what_was_said(render):
    ask = [[{"role": "user", "content": text}] for text in TEXTS]
    page = Cells(render(chains.chains_markdown(
        [{"id": i, "prompt": prompt, "responses": ["", text], "critiques": [text],
          "principles": [text or "p"]} for i, (prompt, text) in enumerate(zip(ask, TEXTS))],
        "Title").encode().decode()))
    assert page.cells[:2] == [f"user: {shown(TEXTS[0])}", "response"]
    for i, text in enumerate(TEXTS):
        row = page.cells[7 * i:7 * i + 7]
        assert row == [f"user: {shown(text)}", "response", "empty",
                       f"critique 1\n{shown(text or 'p')}", shown(text), "revision 1", shown(text)]
    # Nothing but layout, and nothing left in one text node to make formulas, links or mentions of.
    assert page.elements <= {(tag,) for tag in ("br", "span", "code", "em", "strong")}
    made_into = r"\$.|.\$|\\[(\[{$]|\\begin|@\w|#\d|:[\w+-]+:|https?:|www\.|mailto:"
    assert not [node for node in page.nodes if re.search(made_into, node)]

    samples = [{"id": str(i), "prompt": prompt, "model": "m", "rank_in_file": 0, "response": text}
               for i, (prompt, text) in enumerate(zip(ask, TEXTS))]
    page = Cells(render(paper_samples.side_by_side(samples, "Title"))).cells
    assert page[2::4] == [shown(text) for text in TEXTS]

    rows = [{"x": text, "y": "1"} for text in TEXTS]
    assert Cells(render(cards.markdown(rows))).cells[::2] == [shown(t) if t else "" for t in TEXTS]
    facts = Cells(render(cards.bullets({text: text for text in TEXTS})))
    assert facts.cells == [f"{shown(text)}: {shown(text)}" for text in TEXTS]
    table = pd.DataFrame(rows, dtype=object).assign(estimate=0.5, ci_low=0.4, ci_high=0.6, n=3)
    lines = "\n".join(gallery._table(table))
    assert Cells(render(lines)).cells[::5] == [shown(text) for text in TEXTS]


def test_a_terminal_shows_what_it_would_obey():
    assert escape.visible("a\x1b[31m\r\u202eb\ud800\n\tc") == "a\\x1b[31m\\r\\u202eb\\ud800\n\tc"


def test_frames_in_a_notebook_show_no_formula_and_no_markup():
    frame = pd.DataFrame({"x": ["<b>$a$ and $b$</b>"]})
    with pd.option_context("display.html.use_mathjax", True, "styler.html.mathjax", True,
                           "styler.format.escape", None):
        run._show_text_as_it_is()
        for page in (frame._repr_html_(), frame.style.hide().to_html()):
            assert "<b>" not in page and "&lt;b&gt;" in page and "mathjax_ignore" in page
