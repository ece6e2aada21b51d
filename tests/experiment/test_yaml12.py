"""YAML as people write parameters."""

import math

import pytest
import yaml

from cai_utils.experiment import yaml12

# What section 10.3.2 of the YAML 1.2 specification says, written down by hand; and what of YAML 1.1
# is kept.
VALUES = {
    "5e-4": 0.0005, "1e5": 100000.0, ".5": 0.5, "1.": 1.0, "1e+4": 10000.0, "-2E3": -2000.0,
    "5.0e-4": 0.0005, ".inf": math.inf, "-.inf": -math.inf, "012": 12, "-7": -7, "0o17": 15,
    "0x1F": 31, "1_000": 1000, "0b11": 3, "12:30": "12:30", "2026-01-01": "2026-01-01",
    "0b_": "0b_", "0b_1": 1,
    "e5": "e5", "1e": "1e", "410m": "410m", "1.4b": "1.4b", "=": "=", "~": None, "": None,
    "no": False, "On": True, "true": True, "TRUE": True, "'5e-4'": "5e-4", '"no"': "no",
    "[no, off, 5e-4]": ["no", "off", 0.0005], "{no: on}": {"no": True},
    "{xs: 5e-4, s: {lora_dropout: 5e-2}}": {"xs": 0.0005, "s": {"lora_dropout": 0.05}},
    "a: &a {x: yes}\nb: {<<: *a, y: 1e3}": {"a": {"x": True}, "b": {"x": True, "y": 1000.0}},
}


@pytest.mark.parametrize("text", VALUES)
def test_values(text):
    found = yaml12.load(text)
    assert found == VALUES[text] and type(found) is type(VALUES[text])


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "b:\n  a: 1\n  a: 2", "- {no: 1, no: 2}",
                                  "{1000: x, 1_000: y}"])
def test_a_key_written_twice_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="the field .* is there twice"):
        yaml12.load(text)


def test_a_merged_key_may_be_overridden_and_merged_on():
    text = "b: &b {x: 1}\np: {q: {a: &a {<<: *b, x: 2}}}\nc: {<<: *a, y: 3}"
    assert yaml12.load(text) == {"b": {"x": 1}, "p": {"q": {"a": {"x": 2}}}, "c": {"x": 2, "y": 3}}


def test_what_is_written_is_read_back():
    texts = [t for t in VALUES if t] + ["no", "a\nb", "ä", "null", "<<", "1e400"]
    value = {"texts": texts, "yes": [1e-5, 1e22, math.inf, 3, None, True], **dict.fromkeys(texts)}
    assert yaml12.load(yaml12.dump(value)) == value
    assert yaml12.load(yaml.safe_dump("5e-4")) == 0.0005  # PyYAML's own writer does not do


def test_texts_that_spell_numbers():
    assert yaml12.number("5e-4") == 0.0005 and yaml12.number("012") == 12
    assert math.isnan(yaml12.number(".nan"))
    assert [yaml12.number(t) for t in ("", "no", "1e", "[1]", "5e-4 ", "1\n2")] == [None] * 6
    assert [t for t in ("5e-4", "5.0e-4", "12", "1e5", "012", "x")
            if yaml12.text_in_yaml11(t)] == ["5e-4", "1e5"]
