"""Counter-based random numbers: every random draw is a function of its key.

A key says what is drawn: the seed of the run, then names or numbers such as stage, row, step and
sample. No draw depends on another, so a result stays the same when rows are added, dropped or
computed in another order, in larger batches, or in a second run that goes on after a kill.

- `stable_int`: one integer, for a single choice (which principle) or as the seed of a stage.
- `stream`: a numpy generator, where one key needs many numbers (all draws of one game).
- `uniforms`: one Philox stream per completion, from which its tokens are sampled.

Training shuffles by `numpy.random.default_rng([seed, iteration, ...])`, which is the same scheme.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stable_int(*key, bits: int = 31) -> int:
    """An integer in [0, 2**bits) from any printable key (BLAKE2b of its `repr`), the same on
    every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") >> (128 - bits)


def stream(*key) -> np.random.Generator:
    """A generator seeded by the SHA-256 of the key's parts as text."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def uniforms(seed, jobs, count):
    """(len(jobs), count) float32 in [0, 1); jobs: pairs (row, sample). Line j is the Philox stream
    keyed by (seed, row, sample), so a larger `count` has the same numbers first."""
    out = np.empty((len(jobs), count), dtype=np.float32)
    for j, (row, sample) in enumerate(jobs):
        key = np.array([seed % 2**64, (row << 32) + sample], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(out=out[j], dtype=np.float32)
    return out
