"""Opens a model spec for sampling: a local model, one in vLLM, or one on a server.

All have the two methods that the stages use, `generate` and `choice_logprobs`, and a `tokenizer`,
on which it depends how conversations are rendered.
"""

from __future__ import annotations

from cai_utils.lm.sampling import Sampler
from cai_utils.lm.server import Server
from cai_utils.lm.vllm_engine import VLLMSampler


def from_spec(spec, **options):
    """A `Sampler` over the model of `spec` (options: `Sampler.from_spec`'s); for `vllm:MODEL` a
    `VLLMSampler`, which takes `runs_dir` of them; for `server:URL#model` a `Server`, which takes
    none. Errors as in theirs."""
    if str(spec).startswith("server:"):
        return Server.from_spec(spec)
    if str(spec).startswith("vllm:"):
        return VLLMSampler.from_spec(spec, runs_dir=options.get("runs_dir"))
    return Sampler.from_spec(spec, **options)
