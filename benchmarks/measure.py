"""How benchmarks measure: two ways to do the same work in turn, and what the machine could do."""

import statistics
import time

import torch

from cai_utils.experiment import files, provenance


def side_by_side(ours, peer, rounds):
    """Runs ours(seed) and peer(seed) in turn, each first in every other round, after one unmeasured
    run of each. Both return how much they did (completions, tokens, questions).

    Returns ours and peer (medians, per second), ratio (median of the rounds' ratios), ratio_low and
    ratio_high (the smallest and largest of them).
    """
    def rate(way):
        def measured(seed):
            amount, seconds = timed(way, seed)
            return amount / seconds

        return measured

    return rates_side_by_side(rate(ours), rate(peer), rounds)


def rates_side_by_side(ours, peer, rounds):
    """As `side_by_side`, for ways that return a rate (per second) that they measured themselves."""
    ways = {"ours": ours, "peer": peer}
    for way in ways.values():
        way(0)
    rates = {name: [] for name in ways}
    for seed in range(1, rounds + 1):
        for name in sorted(ways, reverse=bool(seed % 2)):
            rates[name].append(ways[name](seed))
    ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
    return {
        "ours": statistics.median(rates["ours"]),
        "peer": statistics.median(rates["peer"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def timed(work, *arguments):
    """(what ``work`` returns, seconds)."""
    _wait()
    began = time.perf_counter()
    result = work(*arguments)
    _wait()
    return result, time.perf_counter() - began


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(model):
    """Where and in which dtype, in a few words: the ``machine`` of a row."""
    found = provenance.machine()
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    bf16 = torch.cpu._is_avx512_bf16_supported()
    knows = "AVX512-BF16" if bf16 else torch.backends.cpu.get_cpu_capability()
    return f"{found['cpu']} ({knows}), {found['cores']} cores, {found['threads']} threads, {dtype}"


def commit():
    """The commit, with a + where the work tree differs from it."""
    state = provenance.git_state(files.repo_root())
    return f"{(state['commit'] or 'unknown')[:12]}{'+' if state['dirty'] else ''}"


def peaks(model, seconds=1.0):
    """What this machine reaches in the model's dtype: (GFLOP/s of a large matrix product, GB/s read
    and written by a copy)."""
    on = {"device": model.device, "dtype": model.dtype}
    n = 8192 if model.device.type == "cuda" else 1024
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
    """GFLOP and GB that ``new`` tokens behind ``prompt`` tokens in each of ``rows`` need at least:
    two operations a weight and token, attention over what stands before; weights once a step, keys
    and values once a step and row."""
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= embedding
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    before = prompt + (new - 1) / 2  # tokens that a new one attends to, in the mean
    attention = config.num_hidden_layers * heads * size * 4
    tokens = rows * new
    prompts = rows * prompt * (2 * (weights - embedding) + attention * prompt / 2)
    flops = tokens * (2 * weights + attention * before) + prompts
    cached = 2 * config.num_hidden_layers * kv_heads * size * rows * before
    return flops / 1e9, (weights + cached) * new * model.dtype.itemsize / 1e9
