"""The hyperparameters of the trainers, checked before any work starts.

A config is built by `from_dict` (of a profile's values, of a YAML file) or by `resolve` (of values
by model size, in notebook 09). Both raise a ValueError of one line that names what is wrong.

Sources: "N+" is Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv
2403.17031); "HH" is Bai et al. 2022a (arXiv 2204.05862), whose RL setup the paper (section 4.2)
takes over; "trl" is the name in trl's config, where it is another one.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from cai_utils.experiment import registry
from cai_utils.experiment.params import for_size
from cai_utils.lm import vllm_spec

# Numbers as text, 1.0 for a whole number, and NaN are refused, not converted.
CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
CountOr0 = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MeanStd = Annotated[tuple[float, Positive], Field(strict=False)]  # YAML has lists, no tuples


@dataclass(config=CHECKED, frozen=True, kw_only=True)
class PPOConfig:
    """Every hyperparameter of `ppo.train`. Lengths are in tokens, KL in nats."""

    # The optimizer: Adam with eps 1e-5 (N+, "Adam")
    lr: Positive                      # of the policy (trl: learning_rate)
    value_lr: Positive | None = None  # of the value model; None: `lr`
    lr_decay: bool = False            # both fall linearly to 0 over the run (N+)
    max_grad_norm: Positive = 1.0     # clips the gradients of policy and value model, each its own

    # The amount of training
    iterations: Count = 40            # rounds of sampling and updates
    episodes: Count = 128             # sampled in one iteration (trl: batch_size)
    ppo_epochs: Count = 2             # passes over an iteration's episodes (trl: num_ppo_epochs)
    minibatch: Count = 32             # episodes of one step (trl: batch_size / num_mini_batches)

    # The reward: normalised PM score - penalty - kl_coef * KL(policy || start) (HH, section 4.1)
    kl_coef: NotNegative = 0.05       # N+, 4.1; trl has 0.05, HH 0.001 in the unit of their PM
    kl_target: Positive | None = None  # nats per response: adapts kl_coef to it (Ziegler 2019, 2.2)
    score_norm: Literal["start"] | MeanStd | None = None  # (mean, std) of the PM's scores, or
    # "start": those of the first iteration, and of the first one after each refresh
    missing_eos_penalty: float = 1.0  # in units of the normalised score, for a cut response (N+)
    whiten_rewards: bool = False      # variance 1 of the tokens' rewards (N+, "reward whitening")

    # Advantages and losses
    gamma: Fraction = 1.0             # discount by token (N+)
    lam: Fraction = 0.95              # lambda of GAE (Schulman et al. 2016, eq. 16; N+)
    clip: NotNegative = 0.2           # of the ratio (Schulman et al. 2017, eq. 7; trl: cliprange)
    vf_clip: NotNegative | None = 0.2  # of values, in their unit; None: none (trl: cliprange_value)
    vf_coef: NotNegative = 0.1        # weight of the value loss (N+, trl)
    target_kl: Positive | None = None  # nats per token: a minibatch whose approximate KL from the
    # policy that sampled exceeds it ends the iteration's updates

    # Sampling
    temperature: Positive = 1.0       # of sampling and of all log-probabilities (N+, trl has 0.7)
    max_new_tokens: Count = 48        # longest response (trl: response_length)
    seed: CountOr0 = 0                # order of prompts, samples, minibatches, LoRA's start
    engine: str | None = None         # "vllm": vLLM samples, with its arguments behind it as in
    # "vllm;gpu_memory_utilization=0.3" (`lm/vllm_spec.py`); None: the policy itself

    # What learns, and how it is computed
    lora: dict[str, Any] | None = None  # arguments of peft.LoraConfig; None: all weights learn
    bf16: bool | Literal["auto"] = "auto"  # passes in bfloat16; "auto": where it pays. Under
    # `accelerate launch` its config decides
    micro_tokens: Count = 2048        # padded tokens in one pass of a process: memory, not results

    # What is written, and online RLAIF
    snapshot_every: CountOr0 = 10     # iterations; 0: only at the start and the end
    checkpoint_every: CountOr0 = 5    # iterations; 0: a killed run begins anew
    print_every: CountOr0 = 5         # iterations; 0: silent
    refresh_every: CountOr0 = 0       # iterations between two calls of `refresh`; 0: none

    @field_validator("lora")
    @classmethod
    def _known_to_peft(cls, lora):
        if "quantize" in (lora or {}):
            raise ValueError("'quantize' is for sft and preference models; PPO samples from the "
                             "base with the adapter merged in: leave it out here")
        if (lora or {}).get("lora_dropout"):
            raise ValueError("PPO learns without dropout (N+), so 'lora_dropout' would have no "
                             "effect: leave it out here")
        from cai_utils.lm import training  # imports trl

        training.lora_config(lora, "CAUSAL_LM")
        return lora

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine):
        if engine is not None:
            name, *options = engine.split(";")
            if name != "vllm":
                raise ValueError("'vllm' (with ;NAME=VALUE for its arguments) or null")
            vllm_spec.parsed("engine", options)
        return engine

    @classmethod
    def from_dict(cls, values) -> PPOConfig:
        """As the function `from_dict`; a PPOConfig is returned as it is."""
        return from_dict(cls, values)


def from_dict(kind, values):
    """{field: value} -> a config of class `kind`.

    ValueError, one line: an unknown field (with the nearest known one), a missing one, or a value
    that is not allowed (with what is).
    """
    if isinstance(values, kind):
        return values
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        _check_name(kind, fields, name)
    try:
        return kind(**values)
    except ValidationError as error:
        found = {}
        for problem in error.errors():
            found.setdefault(str(problem["loc"][0]), []).append(problem)
        lines = [_problem(fields[name], problems) for name, problems in found.items()]
        raise ValueError(f"{kind.__name__}: {'; '.join(lines)}") from None


def _check_name(kind, fields, name):
    if name not in fields:
        near = difflib.get_close_matches(str(name), fields, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"unknown field {name!r} of {kind.__name__}{hint}; known: {', '.join(fields)}")


def _problem(field, problems):
    """What is wrong with a field and what is allowed; problems: pydantic's, one for each type that
    the field may have."""
    if problems[0]["type"].startswith("missing"):
        return f"{field.name} is missing"
    value = problems[0]["input"]
    allowed = [p["msg"].removeprefix("Value error, ") for p in problems]
    if "None" in str(field.type) and allowed[0].startswith("Input should"):
        allowed.append("null")
    text = " or ".join(dict.fromkeys(m.removeprefix("Input should be ") for m in allowed))
    text = f"must be {text}" if problems[0]["msg"].startswith("Input should be") else text
    hint = ""
    if isinstance(value, str) and value[-1:].isdigit():
        hint = " (a text: write the number without quotes)"
    return f"{field.name}={value!r}: {text}{hint}"


def settings_of(settings, trainer):
    """The entry of `trainer` in notebook 09's `settings` {trainer: {field: value}}, {} where it has
    none. ValueError, with the nearest one, for a trainer that no policy of the registry has."""
    known = sorted({p.trainer for p in registry.POLICIES.values() if p.trainer})
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"settings: unknown trainer {name!r}{hint}; known: {', '.join(known)}")
    return settings.get(trainer) or {}


def resolve(kind, values, size, **shared):
    """A config of class `kind` for one model size.

    values: {field: value, or {size: value}}. `lora`, itself a dict, is by size where each of its
    values is a dict or None. shared: parameters of other stages too (seed, temperature, ...), taken
    where `kind` has such a field and `values` has not. ValueError as `from_dict`, and for a field
    without a value for `size`.
    """
    if not isinstance(values or {}, dict):
        raise ValueError(f"{kind.__name__}: {values!r} has to be a mapping, field: value")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    found = {name: value for name, value in shared.items() if name in fields}
    for name, value in (values or {}).items():
        _check_name(kind, fields, name)
        arguments = name == "lora" and isinstance(value, dict) and not (
            value and all(v is None or isinstance(v, dict) for v in value.values()))
        try:
            found[name] = value if arguments else for_size(value, size)
        except ValueError as error:
            raise ValueError(f"{kind.__name__}: {name}: {error}") from None
    return from_dict(kind, found)
