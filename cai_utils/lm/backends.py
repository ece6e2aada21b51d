"""Opens a model spec for sampling: a local model, or one on a server.

Both backends have the two methods that the stages use, `generate` and `choice_logprobs`, and a
`tokenizer`, on which it depends how conversations are rendered.
"""

from __future__ import annotations

from cai_utils.lm.sampling import Sampler
from cai_utils.lm.server import Server


def from_spec(spec, **options):
    """A `Sampler` over the model of `spec` (options: `Sampler.from_spec`'s), or for
    `server:URL#model` a `Server`, which takes none of them. Errors as in theirs."""
    if str(spec).startswith("server:"):
        return Server.from_spec(spec)
    return Sampler.from_spec(spec, **options)
