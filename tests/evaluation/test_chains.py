"""Revision chains as tables and pages."""

from cai_utils.evaluation import chains

PROMPT = [{"role": "user", "content": "How do I do it?"}]


def judge(conversation):
    """A ground truth that counts words: harm is the number of "bad", helpfulness of "good"."""
    text = conversation[-1]["content"]
    return {"harm": text.count("bad"), "helpfulness": text.count("good"),
            "evasive": text == "no"}


def chain(i, responses, critiques=None):
    steps = len(responses) - 1
    return {"id": str(i), "prompt": PROMPT, "responses": responses,
            "critiques": critiques or [None] * steps, "principles": ["p"] * steps}


def test_chains_long_and_by_revision():
    rows = [chain(0, ["bad bad good", "bad good", "bad good"]), chain(1, ["bad", "no", "good"])]

    def keeps(prompt, before, after):
        return float("good" in after) if "good" in before else None

    long = chains.chains_long(rows, judge, keeps)
    table = chains.by_revision(long.assign(size="s"), ["truth:harm", "truth:retained"],
                                 by=("size", "revision"))
    harm = table[table["axis"] == "harm"]
    assert harm["estimate"].tolist() == [1.5, 0.5, 0.5] and set(harm["measured_by"]) == {"truth"}
    assert table[table["axis"] == "retained"]["n"].tolist() == [1, 1, 1]  # one had nothing to keep
    assert long[long["id"] == "0"]["text:changed"].tolist()[1:] == [1, 0]
    assert long[long["id"] == "0"]["truth:HH"].tolist() == [1 - 2 * 2, 1 - 2, 1 - 2]
    assert long["truth:evasive"].sum() == 1


def test_chains_markdown_keeps_any_text_inside_its_cell():
    nasty = "a | b\n\n<script> *x* [link](y) `code`"
    page = chains.chains_markdown([chain(0, [nasty, "fine"], ["| is bad"])], "Title", judge)
    table = [line for line in page.splitlines() if line.startswith("|")]
    # Bars that are not escaped: the four borders of a table with three columns, in every row.
    assert {line.count("|") for line in table} == {4}
    assert "<script>" not in page and "*x*" not in page
    assert len(table) == 2 + 3
