"""Every parameter of every notebook, with values of wrong kinds and out of range."""

import math
from pathlib import Path

import pytest

from cai_utils.experiment import params, rules

ROOT = Path(__file__).parents[2]
NAMES = params.notebooks(ROOT)
CELLS = {name: params.defaults(ROOT / "notebooks" / f"{name}.ipynb") for name in NAMES}
WRONG = {  # by the type of what the notebook has; none of its parameters may be any of these
    bool: ["abc", 5, -1, [], ["a"], {}, {"a": True}, None, math.nan],
    float: ["abc", "", [1], {}, {"xs": "y"}, True, math.nan, math.inf, -1, None],
    int: ["abc", "", [1], {}, {"xs": "y"}, True, math.nan, math.inf, -1, 0.5],
    str: ["", "  ", "\0", [], ["xs"], {}, {"": "x"}, True, 0.5],
    list: ["xs", "", 5, {}, {"a": 1}, True, [[]], [None], [math.nan], math.nan],
    dict: ["abc", "", [1], ["a"], True, -1, 0.5, math.nan, {"a": []}, {"a": True}],
    type(None): ["", "\0", True, -1, 0.5, math.nan, [[]], [None], {"a": []}],
}
FREE = {"lora", "settings"}  # mappings whose content is read by peft and rl/config.py


@pytest.mark.parametrize("notebook", NAMES)
def test_every_parameter_refuses_wrong_kinds_in_one_line(notebook):
    cell = CELLS[notebook]
    for name, default in cell.items():
        assert rules.rule_of(notebook, name), f"{notebook}: {name} has no rule in rules.py"
        assert rules.fault(rules.rule_of(notebook, name), default) is None, name
        for wrong in WRONG[type(default)]:
            if (name == "profile" or name in FREE and isinstance(wrong, dict)
                    or name.endswith("epochs") and wrong == 0.5):
                continue
            with pytest.raises(ValueError) as caught:
                params._fitted(ROOT / "notebooks" / f"{notebook}.ipynb", {name: wrong})
                pytest.fail(f"{notebook}: {name}={wrong!r} is not refused")
            message = str(caught.value)
            assert name in message and "\n" not in message and len(message) < 300, message


@pytest.mark.parametrize("notebook, values, message", [
    ("03_critique_revision", {"sizes": "xs"}, "sizes='xs': give a list of at least one size"),
    ("03_critique_revision", {"sizes": ["xs", "xs"]}, "one of them is there twice"),
    ("03_critique_revision", {"sizes": ["xs"]}, r"size='s' is not in sizes=.*: give size, too"),
    ("08_ai_feedback", {"kinds_size": "s", "sizes": ["xs"], "size": "xs"}, "kinds_size='s' is not"),
    ("03_critique_revision", {"n_revisions": -1}, "n_revisions=-1: give a whole number from 0 up"),
    ("03_critique_revision", {"n_eval": "abc"}, "n_eval='abc'.*give a number"),
    ("03_critique_revision", {"critic": "own-{sizes}"}, "only {size} may stand in braces"),
    ("03_critique_revision", {"helpful": "../x"}, "cannot be the name of a file"),
    ("03_critique_revision", {"sft_lr": {"xs": 1e-3}}, "sft_lr=.*no value for size 's'"),
    ("04_revision_iterations", {"pms": ["pm_harmless"]}, "pms=.*give a mapping"),
    ("01_harm_identification", {"pms": {"harmless": "x"}}, "pms=.*give a list"),
    ("01_harm_identification", {"questions": {"classify": "x"}}, "the task hhh has to be among"),
    ("00_miniature", {"n_redteam": {"trian": 3, "eval": 1}}, "n_redteam=.*{train: count, eval"),
    ("00_miniature", {"n_questions": {"hhh": 3}}, "n_questions=.*{hhh: n, identify: n"),
    ("07_sl_cai", {"pretraining_share": 1}, "from 0 to below 1"),
    ("08_ai_feedback", {"clamp": [0.6, 0.7]}, "1/2 has to lie between"),
    ("08_ai_feedback", {"ai_share": 0}, "a number between 0 and 1"),
    ("09_rl", {"method": "rl_cia"}, "method='rl_cia': give one of .*rl_cai"),
    ("10_elo", {"methods": []}, "methods=.*or null"),
    ("10_elo", {"n_boot": -1}, "n_boot=-1: give a whole number from 0 up"),
    ("10_elo", {"pm_judge": {"helpfulness": "x"}}, "pm_judge=.*harmlessness"),
])
def test_values_are_refused_on_the_command_line_and_in_the_notebook(notebook, values, message):
    with pytest.raises(ValueError, match=message):
        params.merge_params(ROOT, notebook, "miniature", values)
    with pytest.raises(ValueError, match=f"{notebook}: .*{message}"):
        params.from_namespace(ROOT, notebook, {**CELLS[notebook], **values})


@pytest.mark.parametrize("notebook", NAMES)
def test_every_published_profile_is_allowed(notebook):
    for profile in params.profiles(ROOT):
        if (ROOT / "params" / profile / f"{notebook}.yaml").is_file():
            params.all_params(ROOT, notebook, profile)


def test_a_notebook_of_ones_own_may_use_a_name_for_something_else():
    rules.check("20_mine", {"n_eval": "half"}, {"n_eval": "all"})
    with pytest.raises(ValueError, match="20: n_eval=0"):
        rules.check("20_mine", {"n_eval": 0}, {"n_eval": 5}, "20: ")


@pytest.mark.parametrize("grid, message", [
    ({"method": ["rl_cai"]}, "grid: unknown parameters 'method'; nearest: methods"),
    ({"sizes": "xs"}, "grid.sizes='xs': give a list"),
    ({"sizes": []}, "give a list"),
    ([], "give a mapping"),
    ({"methods": ["rl_cia"]}, "grid.methods: method='rl_cia': give one of"),
])
def test_a_grid_holds_lists_of_values_of_parameters(grid, message):
    with pytest.raises(ValueError, match=message):
        rules.check_grid("09_rl", grid, CELLS["09_rl"], "p.yaml: ")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "a\0", "a\n", "-a", "x" * 201,
                                  "ä" * 101, "\ud800", None, 5])
def test_what_can_be_no_file_name(name):
    with pytest.raises(ValueError, match="size=.*cannot be the name of a file"):
        params.check_name(name, "size")
    assert params.check_name("410m rl-cai_ä.b", "size") == "410m rl-cai_ä.b"


@pytest.mark.parametrize("notebook, values", [
    ("01_harm_identification", {"cot_samples": 0, "long_limit": 0, "both_orders": 1}),
    ("03_critique_revision", {"helpful": None, "demonstrations": None, "pretraining": None}),
    ("03_critique_revision", {"n_shown": None, "n_demonstrations": None, "n_pretraining": None,
                              "n_eval": None, "few_shot": 0}),
    ("07_sl_cai", {"prompts_redteam": Path("a.jsonl"), "revisions": (1, 2)}),
    ("10_elo", {"n_boot": 0}), ("12_published_samples", {"n_boot": 0, "constitution": Path("x")}),
])
def test_values_that_the_notebooks_handle_are_allowed(notebook, values):
    params.from_namespace(ROOT, notebook, {**CELLS[notebook], **values})


def test_sizes_of_a_notebook_of_ones_own_may_mean_something_else():
    cell = {"sizes": ["xs", "s"], "size": "m", "n_train": {"m": 5}}
    rules.check("20_mine", {"sizes": ["s"]}, cell)
    with pytest.raises(ValueError, match="give size, too, as size=xs"):
        rules.check("20_mine", {"sizes": ["xs"]}, {"sizes": ["xs", "m"], "size": "m"})
