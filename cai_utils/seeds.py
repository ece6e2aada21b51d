"""Counter-based random numbers: every draw is a function of its key (seed, row, step)."""

from __future__ import annotations

import hashlib

import numpy as np


def stable_int(*key, bits: int = 31) -> int:
    """A non-negative integer below 2**bits from any printable key, the same on every machine.

    All the seeds and draws of the stages come from it, so that each (seed, row, step) has a stream
    of its own.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") >> (128 - bits)


def stream(*key):
    """A random stream that depends on `key` alone, so that adding a model changes no other game."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def uniforms(seed, jobs, count):
    """(len(jobs), count) float32 in [0, 1): row j is the Philox stream of (seed, row, sample)."""
    out = np.empty((len(jobs), count), dtype=np.float32)
    for j, (row, sample) in enumerate(jobs):
        key = np.array([seed % 2**64, (row << 32) + sample], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(out=out[j], dtype=np.float32)
    return out
