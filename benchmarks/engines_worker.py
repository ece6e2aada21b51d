"""The peer of a benchmark in engines.py: engines_worker.py vllm|llamacpp SETTINGS.

It runs in the peer's own environment, and imports nothing else. It reads one task a line and
answers each with a line: {"seconds": of one call, "out": what the call returned}.
"""

import ctypes
import json
import os
import signal
import sys
import time


def serve(works, least=0.5):
    """Carries out tasks until there are no more. A task is repeated until `least` seconds are over,
    so that a short one can be timed; one with `once` is not."""
    facts = {}
    while True:
        print("@" + json.dumps(facts), flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        task = json.loads(line)
        calls, began = 0, time.perf_counter()
        while not calls or (not task.get("once") and time.perf_counter() - began < least):
            out = works[task["work"]](task)
            calls += 1
        facts = {"seconds": (time.perf_counter() - began) / calls}
        if task.get("once"):
            facts["out"] = out


def vllm(settings):
    from vllm import LLM, SamplingParams

    llm = LLM(seed=0, **settings)
    prefixes = settings["enable_prefix_caching"]

    def generate(rows, params):
        if prefixes:  # what an earlier call left there was not computed in this one
            llm.reset_prefix_cache()
        asked = [{"prompt_token_ids": ids} for ids in rows]
        return [done.outputs[0] for done in llm.generate(asked, params, use_tqdm=False)]

    def sample(task):
        # Without a seed of its own for each row, which would cost vLLM time.
        how = {"temperature": 0.0 if task.get("greedy") else 1.0, "ignore_eos": True,
               "detokenize": False}  # fmt: skip
        rows = generate(task["ids"], [SamplingParams(max_tokens=n, **how) for n in task["limits"]])
        assert [len(row.token_ids) for row in rows] == task["limits"]
        return [list(row.token_ids) for row in rows]

    def labels(task):
        how = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        params = [SamplingParams(logprob_token_ids=pair, **how) for pair in task["letters"]]
        rows = generate(task["ids"], params)
        return [[row.logprobs[0][i].logprob for i in pair]
                for row, pair in zip(rows, task["letters"], strict=True)]  # fmt: skip

    serve({"sample": sample, "labels": labels})


def llamacpp(settings):
    import llama_cpp as lib  # the C functions; the package's loop over them is slower

    quiet = lib.llama_log_callback(lambda *_: None)  # referred to as long as the library lives
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(
        settings["model"].encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = settings["positions"]
    params.n_threads = params.n_threads_batch = settings["threads"]
    context = lib.llama_init_from_model(model, params)
    memory = lib.llama_get_memory(context)
    chains = {}
    for greedy in (True, False):
        chains[greedy] = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        step = lib.llama_sampler_init_greedy() if greedy else lib.llama_sampler_init_dist(0)
        lib.llama_sampler_chain_add(chains[greedy], step)

    def row(ids, limit, chain):
        lib.llama_memory_clear(memory, False)
        out, tokens = [], (lib.llama_token * len(ids))(*ids)
        for _ in range(limit):
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(tokens))):
                raise RuntimeError("llama_decode failed")
            out.append(lib.llama_sampler_sample(chain, context, -1))
            tokens = (lib.llama_token * 1)(out[-1])
        return out

    def sample(task):
        chain = chains[bool(task.get("greedy"))]
        return [row(*at, chain) for at in zip(task["ids"], task["limits"], strict=True)]

    serve({"sample": sample})


if __name__ == "__main__":
    if sys.platform == "linux":  # a stopped one would not see that what started it has ended
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    {"vllm": vllm, "llamacpp": llamacpp}[sys.argv[1]](json.loads(sys.argv[2]))
