"""Stands for the package vllm (the parts of its interface that are used, as vLLM 0.32 has them):
plain passes through transformers, one request after another, the last one first."""

import sys
import types
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CALLS = []  # what `LLM` was called with


class SamplingParams:
    def __init__(self, *, temperature=1.0, top_p=1.0, seed=None, max_tokens=16, stop=None,
                 stop_token_ids=None, ignore_eos=False, detokenize=True, logprobs=None,
                 logprob_token_ids=None, output_kind=None):
        assert output_kind == "final" and not (stop and not detokenize)
        self.__dict__.update(locals())


class LLM:
    def __init__(self, model, *, tokenizer, dtype, max_model_len=None, **options):
        CALLS.append(dict(options, model=model, dtype=dtype))
        torch.manual_seed(1)  # as the real one, in one process
        self.kind, self.resets = getattr(torch, dtype), 0
        self._load(model)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        most = max_model_len or self.net.config.max_position_embeddings
        self.model_config = SimpleNamespace(
            model=model, max_model_len=most, get_vocab_size=lambda: self.net.config.vocab_size)
        self.llm_engine, self.requests = self, {}
        self.engine_core = SimpleNamespace(shutdown=lambda: CALLS.append("shutdown"))

    def _load(self, folder):
        self.net = AutoModelForCausalLM.from_pretrained(folder, dtype=self.kind).eval()

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self._load(kwargs["weights_path"])

    def apply_model(self, function):
        return [function(self.net)]

    def reset_prefix_cache(self):
        self.resets += 1
        return True

    def add_request(self, request_id, prompt, params):
        assert request_id not in self.requests
        assert len(prompt["prompt_token_ids"]) < self.model_config.max_model_len
        self.requests[request_id] = prompt["prompt_token_ids"], params

    def abort_request(self, request_ids):
        for name in request_ids:
            del self.requests[name]

    @torch.no_grad()
    def step(self):
        name, (prompt, p) = self.requests.popitem()
        generator = torch.Generator().manual_seed(p.seed or 0)
        ids, steps, reason = [], [], "length"
        while len(ids) < p.max_tokens and reason == "length":
            logits = self.net(torch.tensor([prompt + ids])).logits[0, -1].float()
            logprobs = torch.log_softmax(logits / (p.temperature or 1.0), -1)
            token = int(logits.argmax() if p.temperature == 0 else
                        torch.multinomial(logprobs.exp(), 1, generator=generator))
            ids.append(token)
            wanted = {token, *(p.logprob_token_ids or ())}
            steps.append({t: SimpleNamespace(logprob=logprobs[t].item()) for t in wanted})
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if token in (p.stop_token_ids or ()) or any(s in text for s in p.stop or ()):
                reason = "stop"
        told = p.logprobs is not None or p.logprob_token_ids
        found = SimpleNamespace(token_ids=ids, logprobs=steps if told else None,
                                finish_reason=reason)
        return [SimpleNamespace(request_id=name, finished=True, outputs=[found])]


def install(monkeypatch):
    """Puts the stand-in where `import vllm` finds it."""
    parts = {name: types.ModuleType(name) for name in (
        "vllm", "vllm.sampling_params", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.core")}
    parts["vllm"].__spec__ = ModuleSpec("vllm", None)
    parts["vllm"].LLM, parts["vllm"].SamplingParams = LLM, SamplingParams
    parts["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    parts["vllm.v1.engine.core"].cleanup_dist_env_and_memory = None
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(parts[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    CALLS.clear()
