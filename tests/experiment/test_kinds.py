"""Numbers and booleans where the notebook has numbers and booleans."""

import math

import pytest

from cai_utils.experiment.kinds import fitted, lines_of

CELL = '''
lr = 0.001
n = 4
n_train = {"xs": 800, "s": 800}
clamp = [0.4, 0.6]
both = True
size = "s"
few_shot = 2  # answered examples; "constitution": its own
lora = None
limit = None
settings = {
    "ppo": {"lr": {"xs": 0.0005}, "kl": 0.1, "score_norm": "start", "iterations": {"xs": 30}},
}
'''
DEFAULTS = {}
exec(CELL, {}, DEFAULTS)


@pytest.mark.parametrize("name, given, right", [
    ("lr", "5e-4", 0.0005),  # in quotes, or by `papermill -f`
    ("lr", {"xs": "5e-4", "410m": 1e-4}, {"xs": 0.0005, "410m": 0.0001}),
    ("clamp", ["4e-1", 0.6], [0.4, 0.6]),
    ("n_train", "1_000", 1000),
    ("n_train", {"410m": 1e5}, {"410m": 100000}),
    ("n", 1e3, 1000),
    ("n", 0.5, 0.5),
    ("limit", 1e3, 1000),
    ("limit", "1e3", 1000),
    ("limit", "all", "all"),
    ("lr", 1.0, 1.0),
    ("lr", None, None),
    ("both", "no", False),
    ("both", "True", True),
    ("size", "1e5", "1e5"),
    ("size", ["no", "012"], ["no", "012"]),
    ("few_shot", "constitution", "constitution"),
    ("lora", {"lora_dropout": "5e-2", "target_modules": ["0", "1"], "r": 8},
     {"lora_dropout": 0.05, "target_modules": ["0", "1"], "r": 8}),
    ("lora", {"lora_dropout": 0.0}, {"lora_dropout": 0.0}),
    ("settings", {"ppo": {"lr": {"s": "5e-4"}, "vf_clip": "2e-1", "score_norm": "1e5",
                          "iterations": 1e2, "lora": {"r": 8, "target_modules": "all-linear"}}},
     {"ppo": {"lr": {"s": 0.0005}, "vf_clip": 0.2, "score_norm": "1e5", "iterations": 100,
              "lora": {"r": 8, "target_modules": "all-linear"}}}),
    ("unknown", (1, "x"), (1, "x")),
])
def test_values(name, given, right):
    found = fitted({name: given}, DEFAULTS, lines_of(CELL))[name]
    assert found == right and repr(found) == repr(right)  # 1 is not 1.0


@pytest.mark.parametrize("name, given, message", [
    ("lr", "fast", r"07: lr='fast' is a text; give a number \(it is 0.001 where"),
    ("lr", {"xs": "5e"}, r"lr\.xs='5e' is a text; give a number"),
    ("clamp", [0.4, "x"], r"clamp\[1\]='x' is a text; give a number"),
    ("n_train", "[1", r"n_train='\[1' is a text; give a number"),
    ("few_shot", "own", "few_shot='own' is a text; give a number"),
    ("both", "maybe", "both='maybe' is a text; give a boolean"),
    ("settings", {"ppo": {"kl": "much"}}, r"settings\.ppo\.kl='much' is a text; give a number"),
    ("lr", True, r"07: lr: true \(or yes, on\) is no number"),
    ("lr", math.nan, "lr: NaN is not a number"),
    ("lora", {"lora_dropout": math.nan}, r"lora\.lora_dropout: NaN"),
])
def test_texts_in_place_of_numbers_are_refused_by_name(name, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        fitted({name: given}, DEFAULTS, lines_of(CELL), "07: ")
    assert "\n" not in str(caught.value)
