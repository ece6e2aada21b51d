"""`vllm:MODEL;NAME=VALUE...`: a model spec and options for the engine that samples it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

# Arguments of vLLM's `LLM` that a spec may give, with their types.
OPTIONS = {
    "dtype": str, "quantization": str, "max_model_len": int, "tensor_parallel_size": int,
    "pipeline_parallel_size": int, "gpu_memory_utilization": float, "kv_cache_memory_bytes": int,
    "max_num_seqs": int, "max_num_batched_tokens": int, "enforce_eager": bool,
}  # fmt: skip
# Those that decide what a model computes. The others divide the work, and are not part of what
# stored rows were made from.
_IN_KEY = ("dtype", "quantization", "max_model_len")


@dataclass(frozen=True, init=False)
class InVLLM:
    """A resolved `vllm:` spec. As part of a fingerprint it stands for the model's content (where it
    is local) and the options that change numbers; `str` of it is the whole spec again."""

    model: Path | str    # as `models.resolve` gives it: a folder, a GGUF file or a hub id
    computed: tuple      # (name, value) of the options that change numbers

    def __init__(self, model, options):
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "options", dict(options))
        object.__setattr__(self, "computed", tuple(
            (name, options[name]) for name in _IN_KEY if name in options))

    def __str__(self):
        return ";".join([f"vllm:{self.model}", *(f"{k}={v}" for k, v in self.options.items())])


def split(spec):
    """`vllm:MODEL;NAME=VALUE...` -> (MODEL, {name: value}). ValueError without a model, and as in
    `parsed`."""
    model, *pairs = str(spec).removeprefix("vllm:").split(";")
    if not model or model.startswith(("server:", "vllm:")):
        raise ValueError(f"{spec}: give vllm:MODEL, where MODEL is a folder, a GGUF file, "
                         "miniature/<size> or a hub id, with ;NAME=VALUE for vLLM's arguments")
    return model, parsed(spec, pairs)


def parsed(spec, pairs):
    """Texts NAME=VALUE -> {name: value}. ValueError, which begins with `spec`, for a name that is
    not in `OPTIONS` and for a value that is not of its type."""
    options = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.5)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ValueError(f"{spec}: unknown option {name!r}{hint}; known: {', '.join(OPTIONS)}")
        kind = OPTIONS[name]
        try:
            options[name] = ({"true": True, "false": False}[text.lower()] if kind is bool
                             else kind(text))
        except (KeyError, ValueError):
            options[name] = ""
        if options[name] == "" or (kind in (int, float) and options[name] <= 0):
            what = {int: "a whole number above 0", float: "a number above 0", bool: "true or false",
                    str: "a name"}[kind]
            raise ValueError(f"{spec}: {name}={text!r} is not {what}")
    return options
