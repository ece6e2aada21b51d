"""One batch of token ids -> token ids: the loop under ``sampling.py``.

Everything here works on prompts as lists of ids, longest first. A batch is padded on the left, so
that its newest tokens share a column of the key/value cache, which is allocated once per batch.
"""

import contextlib
import inspect

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

# Architectures whose attention takes a ready-made additive mask in every layer. It is built once
# per batch instead of in every step; all others get the usual 0/1 mask.
_MASK_ONCE = {"llama", "gpt_neox", "gpt2", "qwen2", "qwen3", "olmo2", "smollm3"}
_COMPACT_BELOW = 0.8  # live share of a batch under which the finished rows are dropped
_PREFILL_TOKENS = 2048  # on a CPU: activations that stay near the caches
SCORE_ELEMENTS = 2**25  # attention scores or logits held at once


class Engine:
    """Prefills, decodes and scores with one causal LM.

    ValueError for a model that is not causal or keeps no plain key/value cache.
    """

    def __init__(self, model, batch_tokens):
        self.model, self.batch_tokens = model, batch_tokens
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if config.is_encoder_decoder or kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"a {config.model_type} cannot be sampled here: it is not a causal LM with plain "
                "attention; give a decoder such as a Llama, Qwen, GPT-NeoX or GPT-2"
            )
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.vocab_size = config.vocab_size
        self.context = getattr(config, "max_position_embeddings", None)
        self._mask_once = (
            config.model_type in _MASK_ONCE
            and "sliding_attention" not in kinds
            and config._attn_implementation in ("eager", "sdpa")
        )
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self._accepts = set(inspect.signature(inner.forward).parameters)

    def decode(self, prompts, limits, uniforms, temperature, top_p, ends, may_stop, cut):
        """Samples one continuation of each of B prompts, up to ``limits[b]`` tokens.

        uniforms: (B, max limit) in [0, 1), None at temperature 0. ends: (V,) bool, tokens that end
        a row. may_stop: (V,) bool or None, tokens after which ``cut(ids)`` is asked for the text up
        to a stop string (None: there is none yet).
        Returns a list of ids and one of log-probabilities per row, and {row: text} of those cut.
        """
        logits, cache, pad = self._prefill(prompts, extra=max(limits))
        device = logits.device
        steps = max(limits)
        rows, width = len(prompts), cache.layers[0].length
        mask = self._mask(pad, width + steps - 1, 1)
        limits = torch.tensor(limits, device=device)
        if uniforms is not None:
            uniforms = torch.from_numpy(uniforms).to(device)
        tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, steps, device=device)
        lengths, cuts = limits.clone(), {}
        live = torch.arange(rows, device=device)
        open_ = torch.ones(rows, dtype=torch.bool, device=device)
        for t in range(steps):
            u = None if uniforms is None else uniforms[live, t]
            token, logprob = _pick(logits, temperature, top_p, u)
            tokens[live, t], logprobs[live, t] = token, logprob
            ended = ends[token] | (t + 1 >= limits[live])
            if may_stop is not None:
                for b in (may_stop[token] & open_ & ~ends[token]).nonzero()[:, 0].tolist():
                    text = cut(tokens[live[b], : t + 1].tolist())
                    if text is not None:
                        cuts[live[b].item()] = text
                        ended[b] = True
            ended &= open_
            lengths[live[ended]] = t + 1
            open_ &= ~ended
            n_open = int(open_.sum())
            if n_open == 0:
                break
            if n_open < _COMPACT_BELOW * len(live):
                keep = open_.nonzero()[:, 0]
                live, pad, mask, token = live[keep], pad[keep], mask[keep], token[keep]
                open_ = open_[keep]
                for layer in cache.layers:
                    layer.select(keep)
            position = self._within((width + t - pad)[:, None])
            logits = self._forward(
                token[:, None], position, mask[..., : width + t + 1], cache, keep=1
            )[:, -1]
        if not torch.isfinite(logprobs).all():
            raise ValueError("the model's logits are not finite; look at its weights and dtype")
        lengths = lengths.tolist()
        ids = [row[:k] for row, k in zip(tokens.tolist(), lengths, strict=True)]
        return ids, [row[:k] for row, k in zip(logprobs.tolist(), lengths, strict=True)], cuts

    def score(self, prompts, sequences):
        """Summed log-probabilities: one float64 array of C per prompt."""
        flat = [ids for row in sequences for ids in row]
        owner = [i for i, row in enumerate(sequences) for _ in row]
        fed = max(map(len, flat)) - 1
        logits, cache, pad = self._prefill([prompts[i] for i in owner], extra=fed)
        device = logits.device
        ids = torch.tensor([row + [0] * (fed + 1 - len(row)) for row in flat], device=device)
        real = torch.tensor([[1] * len(r) + [0] * (fed + 1 - len(r)) for r in flat], device=device)
        logprobs = torch.log_softmax(logits.float(), -1)[:, None]
        total = logprobs.gather(-1, ids[:, :1, None])[:, 0, 0].double()
        if fed:
            width = cache.layers[0].length
            position = width - pad[:, None] + torch.arange(fed, device=device)
            position = self._within(position)
            mask = self._mask(pad, width, fed)
            logits = self._forward(ids[:, :-1], position, mask, cache, keep=fed)
            logprobs = torch.log_softmax(logits.float(), -1)
            more = logprobs.gather(-1, ids[:, 1:, None])[..., 0].double()
            total += torch.where(real[:, 1:].bool(), more, 0.0).sum(-1)
        bounds = np.cumsum([len(row) for row in sequences])[:-1]
        return np.split(total.cpu().numpy(), bounds)

    def _prefill(self, prompts, extra):
        """Prompts, longest first -> last logits (B, V), the cache with room for ``extra`` tokens
        (None without), and each row's padding (B,). Equal neighbours are computed once and copied.
        """
        distinct, owner = [], []
        for ids in prompts:
            if not distinct or distinct[-1] != ids:
                distinct.append(ids)
            owner.append(len(distinct) - 1)
        device = self.model.device
        owner = torch.tensor(owner, device=device)
        width = len(distinct[0])
        parts, start = [], 0
        while start < len(distinct):
            longest = len(distinct[start])
            tokens = self.batch_tokens if device.type != "cpu" else _PREFILL_TOKENS
            size = min(tokens // longest, SCORE_ELEMENTS // (self.n_heads * longest**2))
            part = distinct[start : start + max(1, size)]
            pad = torch.tensor([longest - len(ids) for ids in part], device=device)
            ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in part], device=device)
            position = (torch.arange(longest, device=device) - pad[:, None]).clamp(min=0)
            cache = Cache(layers=[_Layer() for _ in range(self.n_layers)])
            mask = self._mask(pad, 0, longest)
            parts.append((start, self._forward(ids, position, mask, cache, keep=1)[:, -1], cache))
            start += len(part)
        logits = torch.cat([part for _, part, _ in parts])[owner]
        pad = torch.tensor([width - len(ids) for ids in distinct], device=device)[owner]
        if not extra:
            return logits, None, pad
        whole = Cache(layers=[_Layer() for _ in range(self.n_layers)])
        for i, layer in enumerate(whole.layers):
            layer.gather([(s, c.layers[i]) for s, _, c in parts], owner, width, width + extra)
        return logits, whole, pad

    def _within(self, position):
        """Rows that have ended, and the padding after a short choice, would run out of the learned
        positions; what they compute there is void."""
        return position if self.context is None else position.clamp(max=self.context - 1)

    def _mask(self, pad, past, new):
        """For ``new`` queries after ``past`` cached columns, the first ``pad`` of a row void:
        an additive mask (B, 1, new, past + new), or where the model must build it 0/1 (B, ...)."""
        column = torch.arange(past + new, device=pad.device)
        void = column < pad[:, None]
        if not self._mask_once:
            return (~void).long()
        later = column > past + torch.arange(new, device=pad.device)[:, None]
        mask = torch.zeros(len(pad), 1, new, past + new, dtype=self.model.dtype, device=pad.device)
        lowest = torch.finfo(mask.dtype).min
        return mask.masked_fill_(void[:, None, None] | later, lowest)

    def _forward(self, ids, position, mask, cache, keep):
        """Logits (B, keep, V) of the last ``keep`` positions."""
        extra = {"position_ids": position, "logits_to_keep": keep}
        extra = {k: v for k, v in extra.items() if k in self._accepts}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        )
        return out.logits[:, -keep:]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, columns, head size), allocated once."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.length = 0

    def update(self, keys, values, *args, **kwargs):
        if self.keys is None:  # a prefill: kept as computed
            self.keys, self.values, self.length = keys, values, keys.shape[2]
            return keys, values
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def gather(self, parts, owner, width, capacity):
        """Fills this layer from prefilled ones, right-aligned at ``width``: row b from the prompt
        ``owner[b]``. The columns to their left are zero, for a masked NaN would still spread."""
        for name in ("keys", "values"):
            for start, part in parts:
                old = getattr(part, name)
                if start == 0:
                    _, heads, _, size = old.shape
                    new = old.new_empty(len(owner), heads, capacity, size)
                    setattr(self, name, new)
                where = ((owner >= start) & (owner < start + len(old))).nonzero()[:, 0]
                first, last, left = where[0], where[-1] + 1, width - old.shape[2]
                new[first:last, :, :left] = 0
                new[first:last, :, left:width] = old[owner[where] - start]
        self.length = width

    def select(self, rows):
        """Keeps these rows."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length][rows]
            setattr(self, name, new)

    def lazy_initialization(self, keys, values):
        """Nothing to do: ``update`` and ``gather`` allocate."""

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1


def _pick(logits, temperature, top_p, uniforms):
    """One token per row and its log-probability: logits (B, V), uniforms in [0, 1) (B,)."""
    logits = logits.float()
    if temperature == 0:
        logprobs = torch.log_softmax(logits, -1)
        token = logits.argmax(-1)
    else:
        logprobs = torch.log_softmax(logits / temperature, -1)
        weights, order = logprobs.exp(), None
        if top_p < 1:
            weights, order = weights.sort(-1, descending=True)
            weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0.0)
        cdf = weights.cumsum(-1)
        # The first token whose cumulative weight passes u: never one of weight zero.
        token = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)
        token = token.clamp_(max=cdf.shape[-1] - 1)
        token = (token if order is None else order.gather(-1, token))[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def uniforms(seed, jobs, count):
    """(len(jobs), count) float32 in [0, 1): row j is the Philox stream of (seed, row, sample)."""
    out = np.empty((len(jobs), count), dtype=np.float32)
    for j, (row, sample) in enumerate(jobs):
        key = np.array([seed % 2**64, (row << 32) + sample], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(out=out[j], dtype=np.float32)
    return out


@contextlib.contextmanager
def evaluating(model):
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
