"""How benchmarks measure: two ways to do the same work in turn, and the peak of the machine."""

import atexit
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from cai_utils.experiment import files, provenance


def side_by_side(ours, peer, rounds):
    """Run ours(seed) and peer(seed) in turn, each first in every other round, after one unmeasured
    run of each. Both return the amount of work done (completions, tokens, questions); a short one
    is repeated until half a second is over.

    Returns ours and peer (medians, per second), ratio (median of the rounds' ratios), ratio_low and
    ratio_high (the smallest and largest of them).
    """
    return rates_side_by_side(rate(ours), rate(peer), rounds)


def rate(work, least=0.5):
    """`work` (seed -> amount) as a function seed -> amount per second."""

    def measured(seed):
        amount = seconds = 0.0
        while seconds < least:
            more, took = timed(work, seed)
            amount, seconds = amount + more, seconds + took
        return amount / seconds

    return measured


def rates_side_by_side(ours, peer, rounds):
    """As `side_by_side`, for functions that return a rate (per second) measured by themselves."""
    sides = {"ours": ours, "peer": peer}
    for side in sides.values():
        side(0)
    rates = {name: [] for name in sides}
    for seed in range(1, rounds + 1):
        for name in sorted(sides, reverse=bool(seed % 2)):
            rates[name].append(sides[name](seed))
    ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
    return {
        "ours": statistics.median(rates["ours"]),
        "peer": statistics.median(rates["peer"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


class Worker:
    """One side of a benchmark in a process of its own, stopped between two turns, so that it uses
    no core while the other side works. What it does before its first line is not measured."""

    def __init__(self, script, side, settings, path=(), python=sys.executable, env=()):
        env = {**os.environ, **dict(env)}
        if path:
            env["PYTHONPATH"] = os.pathsep.join(map(str, path))
        self.turns = []  # the worker's report of each
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name(script), side, json.dumps(settings)], env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)
        self._read()

    def _signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)  # with the processes that it started

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("@"):  # the libraries print, too
                self._signal(signal.SIGSTOP)
                return json.loads(line[1:])
        raise RuntimeError(f"{self.process.args[2]} ended with {self.process.wait()}")

    def step(self, task=None):
        """Lets it do one turn -> its report."""
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        self.turns.append(self._read())
        return self.turns[-1]

    def close(self):
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def timed(work, *arguments):
    """(the result of `work`, seconds)."""
    _wait()
    began = time.perf_counter()
    result = work(*arguments)
    _wait()
    return result, time.perf_counter() - began


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(model):
    """The `machine` of a row: processor, cores, threads and dtype."""
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    return cpu(provenance.machine(), dtype)


def cpu(found, dtype):
    """The same of a record of `provenance.machine` that this machine made."""
    bf16 = torch.cpu._is_avx512_bf16_supported()
    simd = "AVX512-BF16" if bf16 else torch.backends.cpu.get_cpu_capability()
    return f"{found['cpu']} ({simd}), {found['cores']} cores, {found['threads']} threads, {dtype}"


def commit():
    """The commit, with a + where the working tree differs from it."""
    state = provenance.git_state(files.repo_root())
    return f"{(state['commit'] or 'unknown')[:12]}{'+' if state['dirty'] else ''}"


def peaks(dtype, device, seconds=1.0):
    """Measured peak of this machine: (GFLOP/s of a large matrix product, GB/s read and written by a
    copy)."""
    on = {"device": device, "dtype": dtype}
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = torch.randn(n, n, **on), torch.randn(n, n, **on)
    flops = 2 * n**3 / _best(lambda: a @ b, seconds)
    x = torch.empty(2**28 // a.itemsize, **on).normal_()  # 256 MB: beyond every cache
    y = torch.empty_like(x)
    moved = 2 * x.numel() * x.itemsize / _best(lambda: y.copy_(x), seconds)
    return flops / 1e9, moved / 1e9


def _best(work, seconds):
    work()
    times, until = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        times.append(timed(work)[1])
    return min(times)


def decode_work(model, rows, prompt, new):
    """Least GFLOP and GB for `new` tokens after `prompt` tokens in each of `rows`.

    Two operations per weight and token, and attention over the tokens before; weights are read once
    per step, keys and values once per step and row.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= embedding
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    before = prompt + (new - 1) / 2  # tokens that a new one attends to, on average
    attention = config.num_hidden_layers * heads * size * 4
    tokens = rows * new
    prompts = rows * prompt * (2 * (weights - embedding) + attention * prompt / 2)
    flops = tokens * (2 * weights + attention * before) + prompts
    cached = 2 * config.num_hidden_layers * kv_heads * size * rows * before
    return flops / 1e9, (weights + cached) * new * model.dtype.itemsize / 1e9
