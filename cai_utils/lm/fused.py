"""The decoder of Llama-like models with fewer and larger operations than transformers' modules.

A step of decoding is bound by the number of operations in small models, and by reading the weights
in larger ones. So here queries, keys and values are one product, the gate and the values of the MLP
another; residuals are added by the products; a group of heads that shares keys is one attention
with several queries; rotary tables are made once; and a prefill computes its last layer only where
logits are wanted. The model's modules are not called, its weights are copied (`Product`).

The engine uses it only for a model that it reads as the model itself does: it is one of the
families below, nobody listens to its modules or replaced them (`fits`), and the logits of a ragged
batch are those of a plain pass. All others are computed by the model. So is every model on a GPU,
where this was never run, and in bf16, where a row would depend on the rows beside it: of 96
completions of 24 tokens by the miniature's `s` 12 to 23 differed between one batch and small ones,
none by the model's modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import xxhash
from torch import nn
from torch.nn.modules import module as torch_module

from cai_utils.lm.kvcache import Layer, free_memory
from cai_utils.lm.products import Product, can_multiply

FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_ROPE = {"default", "linear", "llama3"}  # whose tables depend on the position alone
_SMALL = 2**22  # weights; below, copying them again costs no more than looking for a change


class Decoder:
    """Logits of a Llama-like model for ids at given positions, with the engine's cache."""

    def __init__(self, model):
        config, body = model.config, model.model
        self.model, self.heads, self.groups = (
            model, config.num_attention_heads, config.num_key_value_heads)
        self.blocks = [_Block(layer) for layer in body.layers]
        self.head = Product([model.lm_head])
        self.norm, self.embed, self.rotary = body.norm, body.embed_tokens, body.rotary_emb
        self.size = body.layers[0].self_attn.head_dim
        self.scale = body.layers[0].self_attn.scaling
        self.cos = self.sin = self.stamp = None

    def refresh(self):
        """Takes the model's weights as they are now."""
        stamp, before = _stamp(self.model), self.stamp
        self.stamp = None  # should it fail midway
        if stamp is None or stamp != before:
            for block in self.blocks:
                for product in (block.qkv, block.out, block.gate_up, block.down):
                    product.refresh()
            self.head.refresh()
            self.cos = None
        self.stamp = stamp

    def __call__(self, ids, position, mask, cache, keep):
        """Logits (B, keep, V) of the last `keep` of the tokens `ids` (B, L).

        position: (B, L). mask: additive, (B, 1, L, columns); or None where all of them are seen, as
        far as they are not later. cache: its layers get the keys and values.
        """
        rows, new = ids.shape
        cos, sin = self._rotation(position)
        x = F.embedding(ids, self.embed.weight).view(rows * new, -1)
        while len(cache.layers) < len(self.blocks):
            cache.layers.append(Layer())
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            qkv = block.qkv(_normed(x, block.before))
            qkv = qkv.view(rows, new, self.heads + 2 * self.groups, self.size)
            turned = qkv[:, :, : self.heads + self.groups]
            if block.q_norm is not None:
                turned = torch.cat((_normed(turned[:, :, : self.heads], block.q_norm),
                                    _normed(turned[:, :, self.heads :], block.k_norm)), 2)
            turned = torch.addcmul(turned * cos, turned.roll(self.size // 2, -1), sin)
            keys = turned[:, :, self.heads :].transpose(1, 2)
            values = qkv[:, :, self.heads + self.groups :].transpose(1, 2)
            if layer.keys is None:  # they are kept as they are, without what they are parts of
                keys, values = keys.contiguous(), values.contiguous()
            keys, values = layer.update(keys, values)
            queries = turned[:, :, : self.heads]
            if block is self.blocks[-1] and keep == 1 < new:
                queries, x = queries[:, -1:], x.view(rows, new, -1)[:, -1]
                mask, new = None if mask is None else mask[:, :, -1:], 1
            y = self._attend(queries, keys, values, mask)
            x = block.out.add_to(x, y.reshape(rows * new, -1))
            gate, up = block.gate_up(_normed(x, block.after)).chunk(2, -1)
            x = block.down.add_to(x, F.silu(gate).mul_(up))
        x = x.view(rows, new, -1)[:, -keep:].reshape(rows * keep, -1)
        return self.head(_normed(x, self.norm)).view(rows, keep, -1)

    def _attend(self, queries, keys, values, mask):
        """Attention of queries (B, L, heads, size) -> (B, L, heads * size)."""
        rows, new = queries.shape[:2]
        if new == 1:  # the heads of a group as queries of one attention
            queries = queries.view(rows, self.groups, -1, self.size)
            y = F.scaled_dot_product_attention(queries, keys, values, mask, scale=self.scale)
            return y.reshape(rows, -1)
        queries = queries.transpose(1, 2)
        y = F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=self.scale,
            enable_gqa=self.groups != self.heads)
        return y.transpose(1, 2)

    def _rotation(self, position):
        """Cosines and sines (B, L, 1, size) of the rotary embedding; of the sines the first half is
        negated, since they meet rolled, not rotated halves."""
        most = int(position.max()) + 1
        if self.cos is None or len(self.cos) < most:
            most = 1 << (most - 1).bit_length()
            steps = torch.arange(max(most, 64), device=position.device)[None]
            cos, sin = self.rotary(self.embed.weight, steps)
            sin[..., : self.size // 2].neg_()
            self.cos, self.sin = cos[0], sin[0]
        return self.cos[position][:, :, None], self.sin[position][:, :, None]


class _Block:
    """The products and norms of one layer."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Product([attention.o_proj])
        self.gate_up, self.down = Product([mlp.gate_proj, mlp.up_proj]), Product([mlp.down_proj])
        self.before, self.after = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)


def _normed(x, norm):
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def fits(model):
    """Whether a `Decoder` knows this model's parts, and whether they compute what they are called
    for: no hooks, adapters, quantized weights or replaced methods; on a CPU, in float32."""
    config, cls = model.config, type(model)
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    if (cls.__name__ not in FAMILIES or not cls.__module__.startswith("transformers.")
            or config.hidden_act != "silu" or config._attn_implementation not in ("eager", "sdpa")
            or config.rope_parameters.get("rope_type") not in _ROPE
            or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
            or (model.config.model_type == "mistral" and config.sliding_window is not None)):
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if isinstance(module, nn.Linear) and not can_multiply(module):
            return False
        if not isinstance(module, nn.Linear) and not type(module).__module__.startswith(
                ("torch.nn.modules.", "transformers.")):
            return False
    if torch.is_autocast_enabled(model.device.type):
        return False
    return len({(w.dtype, w.device) for w in model.parameters()}) == 1


def parts_of(model):
    """All that a `Decoder` takes over when it is made, weights aside: where two lists of the same
    model differ, it needs another one."""
    found = [model.dtype]
    for module in model.modules():
        bias = getattr(module, "bias", None) is not None
        found += module, bias, getattr(module, "scaling", None)
    return found


def has_room(model):
    """Whether the copies of the weights fit into an eighth of the free memory."""
    return 8 * sum(w.nbytes for w in model.parameters()) <= free_memory(model.device)


def _stamp(model):
    """Changes when the weights or rotary frequencies do, whoever changes them; None for small
    models, which are copied anyway."""
    if model.num_parameters() < _SMALL:
        return None
    return [(w.data_ptr(), _digest(w.detach())) for w in (*model.parameters(), *model.buffers())]


def _digest(w):
    """Reads at the speed of the memory (9 GB/s)."""
    return xxhash.xxh3_64_intdigest(w.contiguous().view(torch.uint8).numpy())
