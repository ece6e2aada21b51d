"""Prefill, decoding and scoring of one batch of token ids, for `sampling.py`.

Everything here works on prompts as lists of ids. A batch is padded on the left, so that its newest
tokens share a column of the key/value cache, which is allocated once per batch (a large one on a
CPU: a few columns ahead, see `kvcache.room`).

A prefix that many prompts of a call share (few-shot examples) is computed once, and its keys and
values are copied into the rows before the rest of each prompt is computed. This needs no special
mask: every row feeds its last tokens, as many as the longest row has behind the prefix, so rows are
padded on the left only. A shorter row recomputes some tokens of the prefix where it would compute
padding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from itertools import groupby

import numpy as np
import torch
from transformers.cache_utils import Cache

from cai_utils.lm import fused
from cai_utils.lm.architectures import check_plain, inner_model, longest_of, switch_of
from cai_utils.lm.kvcache import Layer, bytes_per_token, memory_budget, room, shared_prefixes

# Architectures whose attention takes a ready-made additive mask in every layer. It is built once
# per batch instead of in every step; all others get the usual 0/1 mask.
_MASK_ONCE = {"llama", "gpt_neox", "gpt2", "qwen2", "qwen3", "olmo2", "smollm3"}
_COMPACT_BELOW = 0.8  # fraction of unfinished rows below which the finished ones are dropped
_COLD = 1e-30  # temperature below which logits are made at most 0, since quotients could overflow
_SDPA_FROM = 192  # tokens
_PREFILL_TOKENS = 2048  # tokens prefilled at once on a CPU, so that activations stay in its caches
SCORE_ELEMENTS = 2**25  # attention scores or logits held at once


class Engine:
    """Prefills, decodes and scores with one causal LM.

    ValueError for a model that is not causal or keeps no plain key/value cache.
    """

    def __init__(self, model, batch_tokens=None):
        self.model = model
        check_plain(model)
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self.n_heads = max(layer.num_attention_heads for layer in config.per_layer_config)
        self.vocab_size = config.vocab_size
        limits = (getattr(config, "max_position_embeddings", None), longest_of(config))
        self.context = min((n for n in limits if n is not None), default=None)
        self._switch = switch_of(config)
        self._token_bytes = bytes_per_token(model, config)
        self.batch_tokens = batch_tokens or memory_budget(model.device, self._token_bytes)
        self.decoder = None  # during a call: a fused one, if there is one for this model
        self._fused = None  # until the first call; False: none, for want of room or other logits
        self._parts = []  # of the model, from which it was made
        self.told = None  # called with the number of rows that each part of a prefill has read
        # Of this call's prompts: {ids: tokens of its shared prefix}, {prefix: its cache}.
        self._shared, self._prefixes = {}, OrderedDict()
        self._mask_once = (
            config.model_type in _MASK_ONCE
            and "sliding_attention" not in kinds
            and config._attn_implementation in ("eager", "sdpa")
        )
        inner = inner_model(model)
        self._has_sdpa = bool(getattr(inner, "_supports_sdpa", False))
        self._accepts = set(inspect.signature(inner.forward).parameters)

    def prepare(self):
        """To be called before a call's first pass, in eval mode: the fused decoder, if the model
        has one, takes the weights as they are now."""
        self.decoder = None
        if fused.fits(self.model):
            parts = fused.parts_of(self.model)
            if self._fused is None or parts != self._parts:
                self._parts = parts
                self._fused = (fused.has_room(self.model)
                               and self._checked(fused.Decoder(self.model)))
            if self._fused:
                self._fused.refresh()
                self.decoder = self._fused

    def _checked(self, decoder):
        """A fused decoder, or False where it gives other logits than the model: of two rows, one
        of them padded, prefilled and one token further."""
        drawn = torch.Generator().manual_seed(0)
        prompts = [torch.randint(self.vocab_size, (n,), generator=drawn).tolist() for n in (9, 5)]
        token = torch.randint(self.vocab_size, (2, 1), generator=drawn).to(self.model.device)
        decoder.refresh()
        found = []
        for self.decoder in (None, decoder):
            logits, cache, pad = self._prefill(prompts, extra=1)
            step = self._forward(token, 9 - pad[:, None], self._mask(pad, 9, 1), cache, keep=1)
            found.append(torch.cat((logits, step[:, 0])).float())
        error = (found[1] - found[0]).norm() / found[0].norm()
        self.decoder = None
        return decoder if error < 1e-3 else False

    def decode(self, prompts, limits, uniforms, temperature, top_p, ends, may_stop, cut):
        """Samples one continuation of each of B prompts, up to `limits[b]` tokens.

        uniforms: (B, max limit) in [0, 1), None at temperature 0. ends: (V,) bool, tokens that end
        a row. may_stop: (V,) bool or None, tokens that may complete a stop string; after one of
        them `cut(ids)` returns the text up to the stop string, or None where there is none.
        Returns the ids and the log-probabilities (nats) of each row, B lists each, and {row: text}
        of the rows that were cut. ValueError for logits that are not finite.
        """
        settings = temperature, top_p, ends, may_stop
        if self._switch is None:
            return self._decode(prompts, limits, uniforms, *settings, lambda _, ids: cut(ids))
        done, logprobs, cuts = [[] for _ in prompts], [[] for _ in prompts], {}
        # As `generate` does: a row that reaches the switch is computed anew from there.
        for end in (self._switch, None):
            rows = [b for b, ids in enumerate(prompts) if (end is None or len(ids) <= end)
                    and b not in cuts and len(done[b]) < limits[b]
                    and not (done[b] and ends[done[b][-1]])]
            if not rows:
                continue
            before = [done[b] for b in rows]
            left = [limits[b] - len(done[b]) for b in rows]
            if end is not None:
                left = [min(n, end + 1 - len(prompts[b])) for n, b in zip(left, rows, strict=True)]
            draws = None if uniforms is None else np.zeros((len(rows), max(left)))
            for k, b in enumerate(rows if uniforms is not None else ()):
                draws[k, : left[k]] = uniforms[b, len(before[k]) :][: left[k]]
            found, scores, stopped = self._decode(
                [prompts[b] + done[b] for b in rows], left, draws, *settings,
                lambda k, ids, before=before: cut(before[k] + ids), end)
            for k, b in enumerate(rows):
                done[b], logprobs[b] = before[k] + found[k], logprobs[b] + scores[k]
            cuts |= {rows[k]: text for k, text in stopped.items()}
        return done, logprobs, cuts

    def _decode(self, prompts, limits, uniforms, temperature, top_p, ends, may_stop, cut, end=None):
        """As `decode`, of rows on one side of the switch, if there is one: before `end` or (None)
        behind it. `cut` takes the row and its ids."""
        rows, steps, width = len(prompts), max(limits), max(map(len, prompts))
        ahead = room(steps, rows * (width + steps) * self._token_bytes, self.model.device)
        logits, cache, pad = self._prefill(prompts, extra=ahead)
        device = logits.device
        mask, after = self._mask(pad, width + steps - 1, 1), width - pad[:, None]
        shortest, limits = min(limits), torch.tensor(limits, device=device)
        if uniforms is not None:
            uniforms = torch.from_numpy(uniforms.T.copy()).to(device)
        tokens = torch.zeros(steps, rows, dtype=torch.long, device=device)
        logprobs = torch.zeros(steps, rows, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        live, goes_on = list(range(rows)), ~ends  # rows still in the batch: all above are of these
        done, cuts = [None] * rows, {}

        def put(leaving):
            if not torch.isfinite(logprobs).all():
                raise ValueError("the model's logits are not finite; look at its weights and dtype")
            for b, k in zip(leaving, lengths[list(leaving)].tolist(), strict=True):
                done[live[b]] = tokens[:k, b].tolist(), logprobs[:k, b].tolist()

        for t in range(steps):
            u = None if uniforms is None else uniforms[t]
            token, logprobs[t] = _pick(logits, temperature, top_p, u)
            tokens[t] = token
            lengths += unfinished
            alive = unfinished & goes_on[token]
            if may_stop is not None:
                for b in (may_stop[token] & alive).nonzero()[:, 0].tolist():
                    text = cut(live[b], tokens[: t + 1, b].tolist())
                    if text is not None:
                        cuts[live[b]], alive[b] = text, False
            unfinished = alive if t + 1 < shortest else alive & (limits > t + 1)
            n_unfinished = int(unfinished.sum())
            if n_unfinished == 0:
                break
            if n_unfinished < _COMPACT_BELOW * len(live):
                put((~unfinished).nonzero()[:, 0].tolist())
                keep = unfinished.nonzero()[:, 0]
                live = [live[b] for b in keep.tolist()]
                token, after, limits = token[keep], after[keep], limits[keep]
                lengths, unfinished = lengths[keep], unfinished[keep]
                tokens, logprobs = tokens[:, keep], logprobs[:, keep]
                uniforms = None if uniforms is None else uniforms[:, keep]
                mask = None if mask is None else mask[keep]
                for layer in cache.layers:
                    layer.select(keep)
            seen = None if mask is None else mask[..., : width + t + 1]
            logits = self._forward(
                token[:, None], self._within(after + t, end), seen, cache, keep=1)[:, -1]
        put(range(len(live)))
        ids, scores = zip(*done, strict=True)
        return list(ids), list(scores), cuts

    @contextlib.contextmanager
    def sharing_prefixes(self, prompts):
        """A context in which prefixes that these prompts share are computed once, where that
        pays."""
        for shared, group in shared_prefixes(list(dict.fromkeys(map(tuple, prompts)))):
            self._shared.update(dict.fromkeys(group, shared))
        try:
            yield
        finally:
            self._shared.clear()
            self._prefixes.clear()

    def score(self, prompts, sequences):
        """Summed log-probabilities (nats) of C continuations of each of B prompts.

        sequences: B lists of C lists of ids (C may differ between prompts). Returns B float64
        arrays (C,). ValueError for logits that are not finite.
        """
        flat = [ids for row in sequences for ids in row]
        starts = [prompt for prompt, row in zip(prompts, sequences, strict=True) for _ in row]
        if self._switch is None:
            total = self._score(starts, flat)
        else:
            total, sides = np.zeros(len(flat)), {}
            for k, (start, ids) in enumerate(zip(starts, flat, strict=True)):
                # How many of its two ends lie behind the switch; one that crosses it is scored by
                # itself, in one pass.
                behind = sum(n > self._switch for n in (len(start), len(start) + len(ids) - 1))
                sides.setdefault((behind, k * (behind == 1)), []).append(k)
            for (behind, _), rows in sides.items():
                parts = [starts[k] for k in rows], [flat[k] for k in rows]
                total[rows] = (self._score_whole(parts[0][0], parts[1][0]) if behind == 1 else
                               self._score(*parts, end=None if behind else self._switch))
        if not np.isfinite(total).all():
            raise ValueError("the model's logits are not finite; look at its weights and dtype")
        return np.split(total, np.cumsum([len(row) for row in sequences])[:-1])

    def _score_whole(self, prompt, ids):
        """The summed log-probability of one continuation of one prompt, in one pass."""
        fed = torch.tensor([[*prompt, *ids[:-1]]], device=self.model.device)
        mask = self._mask(fed.new_zeros(1), 0, fed.shape[1])
        position = torch.arange(fed.shape[1], device=fed.device)[None]
        logits = self._forward(fed, position, mask, Cache(layer_class_to_replicate=Layer), len(ids))
        logprobs = torch.log_softmax(logits[0].float(), -1).double()
        return logprobs[range(len(ids)), ids].sum().item()

    def _score(self, prompts, flat, end=None):
        """The summed log-probability of one continuation of each prompt, all on one side of the
        switch, if there is one (as in `_decode`): (N,) float64."""
        fed = max(map(len, flat)) - 1
        logits, cache, pad = self._prefill(prompts, extra=fed)
        device = logits.device
        ids = torch.tensor([row + [0] * (fed + 1 - len(row)) for row in flat], device=device)
        real = torch.tensor([[1] * len(r) + [0] * (fed + 1 - len(r)) for r in flat], device=device)
        logprobs = torch.log_softmax(logits.float(), -1)[:, None]
        total = logprobs.gather(-1, ids[:, :1, None])[:, 0, 0].double()
        if fed:
            width = cache.layers[0].length
            position = width - pad[:, None] + torch.arange(fed, device=device)
            position = self._within(position, end)
            mask = self._mask(pad, width, fed)
            logits = self._forward(ids[:, :-1], position, mask, cache, keep=fed)
            logprobs = torch.log_softmax(logits.float(), -1)
            more = logprobs.gather(-1, ids[:, 1:, None])[..., 0].double()
            total += torch.where(real[:, 1:].bool(), more, 0.0).sum(-1)
        return total.cpu().numpy()

    def _prefill(self, prompts, extra):
        """Prompts -> last logits (B, V), the cache with room for `extra` tokens (None without),
        and each row's padding (B,). Equal prompts are computed once and copied.
        """
        device = self.model.device
        rows = {}
        for b, ids in enumerate(prompts):
            rows.setdefault(tuple(ids), []).append(b)
        width, parts = max(map(len, rows)), []

        def prefix_of(ids):
            if self._switch is not None and len(ids) > self._switch:
                return ()  # a prefix by itself would stand before the switch
            return ids[: self._shared.get(ids, 0)]

        ordered = sorted(rows, key=lambda ids: (prefix_of(ids), -len(ids)))
        for prefix, members in groupby(ordered, prefix_of):
            group, start = list(members), 0
            while start < len(group):
                part = group[start : start + self._part_size(len(group[start]), len(prefix))]
                start += len(part)
                where = [b for ids in part for b in rows[ids]]
                source = [i for i, ids in enumerate(part) for _ in rows[ids]]
                where, source = (torch.tensor(x, device=device) for x in (where, source))
                parts.append((where, source, *self._compute(part, prefix)))
                if self.told:
                    self.told(len(where))
        pad = torch.tensor([width - len(ids) for ids in prompts], device=device)
        logits = parts[0][2].new_empty(len(prompts), parts[0][2].shape[1])
        for where, source, part, _ in parts:
            logits[where] = part[source]
        if not extra:
            return logits, None, pad
        whole = Cache(layers=[Layer() for _ in parts[0][3].layers])
        for i, layer in enumerate(whole.layers):
            found = [(where, source, cache.layers[i]) for where, source, _, cache in parts]
            layer.gather(found, len(prompts), width, width + extra)
        return logits, whole, pad

    def _part_size(self, longest, shared):
        """How many prompts of `longest` tokens are prefilled at once, the first `shared` tokens
        being in the cache."""
        tokens = self.batch_tokens if self.model.device.type != "cpu" else _PREFILL_TOKENS
        fed = longest - shared
        return max(1, min(tokens // fed, SCORE_ELEMENTS // (self.n_heads * fed * longest)))

    def _compute(self, prompts, prefix):
        """Last logits (B, V) and cache of prompts, longest first, that all have this prefix."""
        shared, longest = len(prefix), len(prompts[0])
        fed = longest - shared
        device = self.model.device
        ids = [(0,) * (fed - len(ids)) + ids[-fed:] for ids in prompts]
        pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)
        position = (torch.arange(shared, longest, device=device) - pad[:, None]).clamp(min=0)
        cache = Cache(layer_class_to_replicate=Layer)  # as many as the model has keys for
        if shared:
            # Row b's columns hold the prefix from its padding on; those before it are masked.
            column = (torch.arange(shared, device=device) - pad[:, None]).clamp(min=0)
            for done in self._prefix_cache(prefix).layers:
                cache.layers.append(Layer())
                cache.layers[-1].start_from(done, column, longest)
        ids, mask = torch.tensor(ids, device=device), self._mask(pad, shared, fed)
        with self._attention_for(longest):
            return self._forward(ids, position, mask, cache, keep=1)[:, -1], cache

    @contextlib.contextmanager
    def _attention_for(self, longest):
        """SDPA for long prompts of a small model on a CPU: eager attention, the faster one for
        short ones, writes all scores to memory (measured: 1.5 to 1.8 times slower from 256 on)."""
        usual = self.model.config._attn_implementation
        if (longest < _SDPA_FROM or usual != "eager" or not self._mask_once or not self._has_sdpa
                or self.decoder is not None):
            yield
            return
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)

    def _prefix_cache(self, prefix):
        """The cache of a shared prefix, kept while the call lasts and memory allows."""
        cache = self._prefixes.pop(prefix, None)
        if cache is None:
            _, cache = self._compute([prefix], ())
        self._prefixes[prefix] = cache
        # Batches are sorted by length, so each may need every prefix: all of them should fit.
        while len(self._prefixes) > 1 and sum(map(len, self._prefixes)) > self.batch_tokens:
            self._prefixes.popitem(last=False)
        return cache

    def _within(self, position, end=None):
        """Positions before `end` and the end of the context: finished rows, and the padding after
        a short choice, would run beyond; what they compute there is not used."""
        ends = [n for n in (self.context, end) if n is not None]
        return position.clamp(max=min(ends) - 1) if ends else position

    def _mask(self, pad, past, new):
        """The mask of `new` queries after `past` cached columns, the first `pad` of a row
        being padding: additive (B, 1, new, past + new), or 0/1 (B, past + new) where the model has
        to build the additive one itself, or None where the decoder needs none."""
        if self.decoder is not None and (new == 1 or past == 0) and not pad.any():
            return None
        column = torch.arange(past + new, device=pad.device)
        padding = column < pad[:, None]
        if not self._mask_once and self.decoder is None:
            return (~padding).long()
        later = column > past + torch.arange(new, device=pad.device)[:, None]
        mask = torch.zeros(len(pad), 1, new, past + new, dtype=self.model.dtype, device=pad.device)
        lowest = torch.finfo(mask.dtype).min
        return mask.masked_fill_(padding[:, None, None] | later, lowest)

    def _forward(self, ids, position, mask, cache, keep):
        """Logits (B, keep, V) of the last `keep` positions."""
        if self.decoder is not None:
            return self.decoder(ids, position, mask, cache, keep)
        extra = {"position_ids": position, "logits_to_keep": keep}
        extra = {k: v for k, v in extra.items() if k in self._accepts}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        )
        return out.logits[:, -keep:]


def _pick(logits, temperature, top_p, uniforms):
    """One token per row and its log-probability: logits (B, V), uniforms in [0, 1) (B,)."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.log_softmax(logits, -1).gather(-1, token[:, None])[:, 0]
    if temperature < _COLD:
        logits = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        logits = logits / max(temperature, 1e-37)
    weights, order = torch.softmax(logits, -1), None
    kept = weights
    if top_p < 1:
        kept, order = weights.sort(-1, descending=True)
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= top_p, 0.0)
    cdf = kept.cumsum(-1)
    # The first token whose cumulative weight passes u: never one of weight zero.
    token = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)
    token = token.clamp_(max=cdf.shape[-1] - 1)
    token = token if order is None else order.gather(-1, token)
    return token[:, 0], weights.gather(-1, token)[:, 0].log()


@contextlib.contextmanager
def eval_mode(model):
    """Inside, `model` is in eval mode and no gradients are kept; each module that was in train
    mode goes back to it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
