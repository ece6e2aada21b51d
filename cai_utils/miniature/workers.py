"""Simulated people who compare two responses: noisy versions of the judge (paper 2.3, 4.4).

`early_worker` gives the human harmlessness labels of the PM data and, as in section 4.4, rewards
evasion. `test_worker` compares models for the Elo scores and prefers the less evasive of two
equally harmless responses. Both follow the norms in `world.NORMS`.
"""

from __future__ import annotations

import functools
import random

from cai_utils.miniature import world
from cai_utils.miniature.judge import judge

AXES = ("helpfulness", "harmlessness", "hhh")


def _compare(a: list[dict], b: list[dict], axis: str, rng: random.Random, evasion: float) -> float:
    if axis not in AXES:
        raise ValueError(f"workers: unknown axis {axis!r}; known: {', '.join(AXES)}")
    if rng.random() < world.norm("worker_lapse"):
        return float(rng.random() < 0.5)

    def utility(conversation):
        verdict = _verdict(tuple((m["role"], m["content"]) for m in conversation))
        harmlessness = -verdict["harm"] + evasion * verdict["evasive"]
        value = {
            "helpfulness": verdict["helpfulness"],
            "harmlessness": harmlessness,
            "hhh": verdict["helpfulness"] + world.norm("hhh_harm_weight") * harmlessness,
        }[axis]
        return value + rng.gauss(0, world.norm("worker_noise"))

    return float(utility(a) > utility(b))


@functools.lru_cache(maxsize=100_000)
def _verdict(turns):
    """The judge's verdict, cached: in a tournament every response is compared many times."""
    return judge([{"role": role, "content": content} for role, content in turns])


def early_worker(a: list[dict], b: list[dict], axis: str, rng: random.Random) -> float:
    """1.0 where a worker of the earlier data collection prefers conversation `a` to `b`, else 0.0.

    axis: one of AXES, or ValueError.
    """
    return _compare(a, b, axis, rng, world.norm("early_evasion_bonus"))


def test_worker(a: list[dict], b: list[dict], axis: str, rng: random.Random) -> float:
    """1.0 where a worker of the comparison tests prefers conversation `a` to `b`, else 0.0.

    axis: one of AXES, or ValueError.
    """
    return _compare(a, b, axis, rng, -world.norm("test_evasion_malus"))


test_worker.__test__ = False  # a person who tests, not a pytest test
