"""The configs of the trainers: what they accept, and how they refuse the rest."""

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

from cai_utils.experiment.params import read_params
from cai_utils.rl.config import PPOConfig, resolve, settings_of

ROOT = Path(__file__).resolve().parents[2]


def test_values_are_kept_as_they_are():
    values = {"lr": 5e-4, "value_lr": None, "score_norm": [0.5, 2.0], "bf16": False,
              "vf_clip": None, "lora": {"r": 4, "target_modules": ["q_proj"]}}
    config = PPOConfig.from_dict(values)
    assert {name: getattr(config, name) for name in values} == values | {"score_norm": (0.5, 2.0)}
    assert PPOConfig.from_dict(config) is config
    assert config == PPOConfig(**{**values, "score_norm": (0.5, 2.0)})
    assert dataclasses.asdict(PPOConfig(lr=1)) | {"lr": 1} == dataclasses.asdict(PPOConfig(lr=1.0))


@pytest.mark.parametrize("values, message", [
    ({"lrr": 1e-3}, "unknown field 'lrr' of PPOConfig; nearest: lr"),
    ({"lr": 1e-3, "mini_batch": 8}, "unknown field 'mini_batch' of PPOConfig; nearest: minibatch"),
    ({}, "PPOConfig: lr is missing"),
    ({"lr": None}, "lr=None: must be a valid number"),
    ({"lr": True}, "lr=True: must be a valid number"),
    ({"lr": "5e-4"}, "lr='5e-4': must be a valid number .a text: write the number without"),
    ({"lr": 0.0}, "lr=0.0: must be greater than 0"),
    ({"lr": float("nan")}, "lr=nan: must be a finite number"),
    ({"lr": 1e-3, "episodes": 0}, "episodes=0: must be greater than or equal to 1"),
    ({"lr": 1e-3, "episodes": 16.0}, "episodes=16.0: must be a valid integer"),
    ({"lr": 1e-3, "clip": -0.1}, "clip=-0.1: must be greater than or equal to 0"),
    ({"lr": 1e-3, "lam": 1.5}, "lam=1.5: must be less than or equal to 1"),
    ({"lr": 1e-3, "vf_clip": "no"}, "vf_clip='no': must be a valid number or null"),
    ({"lr": 1e-3, "score_norm": "begin"}, "score_norm='begin': must be 'start' or .* or null"),
    ({"lr": 1e-3, "score_norm": [1.0, 0.0]}, "score_norm=.*greater than 0"),
    ({"lr": 1e-3, "bf16": "yes"}, "bf16='yes': must be a valid boolean or 'auto'"),
    ({"lr": 1e-3, "lora": {"rr": 4}}, "lora=.*'rr'.*those of peft.LoraConfig"),
    ({"lr": 1e-3, "lora": {"lora_dropout": 0.1}}, "'lora_dropout' would have no effect"),
    ({"lr": 1e-3, "lora": {"quantize": "4bit"}}, "'quantize' is for sft and preference models"),
])  # fmt: skip
def test_a_value_that_is_not_allowed_is_named_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        PPOConfig.from_dict(values)
    assert "\n" not in str(error.value)


def test_every_field_says_what_it_is():
    lines = inspect.getsource(PPOConfig).splitlines()
    fields = [line for line in lines if line.startswith("    ") and ": " in line.split("#")[0]
              and line.strip().split(":")[0] in {f.name for f in dataclasses.fields(PPOConfig)}]
    assert len(fields) == len(dataclasses.fields(PPOConfig))
    assert all("  # " in line for line in fields)


def test_values_by_size_are_resolved():
    values = {"lr": {"xs": 1e-3, "s": 1e-4}, "minibatch": 8, "lora": {"r": 4}, "seed": 5}
    config = resolve(PPOConfig, values, "s", seed=1, temperature=0.5, prompts="ignored")
    assert (config.lr, config.minibatch, config.lora) == (1e-4, 8, {"r": 4})
    assert (config.seed, config.temperature) == (5, 0.5)
    by_size = {**values, "lora": {"xs": None, "s": {"r": 8}}}
    assert resolve(PPOConfig, by_size, "s").lora == {"r": 8}
    assert resolve(PPOConfig, by_size, "xs").lora is None
    assert resolve(PPOConfig, {**values, "lora": {}}, "xs").lora == {}
    with pytest.raises(ValueError, match="none for size 'm'"):
        resolve(PPOConfig, values, "m")


def of_profile(profile):
    """The `settings` of 09_rl: the profile's, or else the notebook's."""
    found = read_params(ROOT / "params" / profile / "09_rl.yaml").get("settings")
    if found is None:
        cells = json.loads((ROOT / "notebooks" / "09_rl.ipynb").read_text("utf-8"))["cells"]
        lines = ast.parse("".join(cells[1]["source"])).body
        found = next(ast.literal_eval(line.value) for line in lines
                     if line.targets[0].id == "settings")
    return found


@pytest.mark.parametrize("profile", ["miniature", "smoke", "smollm2", "paper"])
def test_the_settings_of_the_profiles_are_valid(profile):
    common = read_params(ROOT / "params" / profile / "_common.yaml")
    sizes = common.get("series", ["xs", "s", "m"])
    for trainer, values in of_profile(profile).items():
        config = importlib.import_module(f"cai_utils.rl.{trainer}").Config
        for size in sizes:
            assert resolve(config, values, size).seed == 0


def test_the_settings_of_the_miniature_are_those_of_its_figures():
    found = [resolve(PPOConfig, of_profile("miniature")["ppo"], size) for size in ("xs", "s", "m")]
    assert [(c.iterations, c.episodes, c.ppo_epochs, c.lr, c.snapshot_every) for c in found] == [
        (30, 128, 2, 5e-4, 10), (24, 128, 2, 4e-4, 4), (10, 80, 1, 4e-4, 5)]
    assert {(c.minibatch, c.kl_coef, c.score_norm, c.value_lr) for c in found} == {
        (32, 0.1, "start", None)}


@pytest.mark.parametrize("values, message", [
    ({"lr": {"s": 0.1}}, "PPOConfig: lr: .* none for size 'xs'"),
    ({"lrr": {"s": 1}}, "unknown field 'lrr' of PPOConfig; nearest: lr"),
    (5, "PPOConfig: 5 has to be a mapping"),
])
def test_settings_of_a_size_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        resolve(PPOConfig, values, "xs")


def test_settings_of_a_trainer_that_does_not_exist_are_refused():
    assert settings_of({"ppo": {"lr": 1.0}}, "ppo") == {"lr": 1.0}
    assert settings_of({"ppo": {"lr": 1.0}}, "dpo") == {}
    with pytest.raises(ValueError, match="unknown trainer 'pppo'; nearest: ppo"):
        settings_of({"pppo": {}}, "ppo")
