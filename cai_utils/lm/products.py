"""Products of activations with the weights of linear layers, laid out for the CPU."""

from __future__ import annotations

import torch
from torch import nn

_PACKED_FOR = 8  # rows that oneDNN is told to expect; measured: as fast for 1 and for 128
_WIDE_FROM = 64  # rows from which weights are widened to fp32, where that pays
_CHUNK = 2**18  # weights widened at once: 1 MB, so that they stay in a core's cache


def is_slow_in_bf16():
    """Whether this CPU multiplies bf16 slower than fp32: an Intel one whose AVX512-BF16 comes
    without AMX has half the rate (measured: 75 of 147 GFLOP/s)."""
    found = torch.cpu.get_capabilities()
    return "Intel" in found.get("cpu_name", "") and not found.get("amx_bf16", False)


class Product:
    """x (M, K) -> x W^T + b (M, N), for the weights of one linear layer or of several at once.

    They are copies: `refresh` takes what the layers hold now. In bf16 they are packed in
    oneDNN's blocks (1.3 to 1.7 times as fast as plain weights up to 32 rows), else transposed
    (up to twice as fast as the layout of `nn.Linear` on small weights).
    """

    def __init__(self, layers):
        self.layers = layers
        weight = layers[0].weight
        self.packed = weight.dtype == torch.bfloat16
        self.wide = self.packed and is_slow_in_bf16()
        self.width = sum(len(layer.weight) for layer in layers)
        self.weight = self.bias = None

    def refresh(self):
        """Copies the layers' weights."""
        biases = [layer.bias for layer in self.layers]
        if any(bias is not None for bias in biases):
            self.bias = torch.cat([layer.weight.new_zeros(len(layer.weight)) if bias is None
                                   else bias for layer, bias in zip(self.layers, biases,
                                                                    strict=True)])
        weights = [layer.weight for layer in self.layers]
        if self.packed:
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(whole.detach(), _PACKED_FOR)
            return
        if self.weight is None:
            self.weight = weights[0].new_empty(weights[0].shape[1], self.width)
        start = 0
        for weight in weights:
            self.weight[:, start : start + len(weight)] = weight.t()
            start += len(weight)

    def __call__(self, x):
        if self.wide and len(x) >= _WIDE_FROM:
            return self._widened(x)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, x, y):
        """x (M, N), to which the product with y (M, K) is added, in place where that is faster."""
        if self.wide and len(x) >= _WIDE_FROM:
            return x.add_(self._widened(y))
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(y, x, self.weight, self.bias, "add")
        if self.bias is not None:
            x += self.bias
        return x.addmm_(y, self.weight)

    def _widened(self, x):
        out = torch.empty(len(x), self.width, dtype=torch.float32)
        wide, start = x.float(), 0
        for layer in self.layers:
            for part in layer.weight.split(max(1, _CHUNK // x.shape[1])):
                torch.mm(wide, part.float().t(), out=out[:, start : start + len(part)])
                start += len(part)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype)


def can_multiply(layer):
    """Whether a module is a plain linear layer on a CPU whose weights a `Product` can take."""
    weight = getattr(layer, "weight", None)
    if (type(layer) is not nn.Linear or type(weight) is not nn.Parameter
            or weight.device.type != "cpu"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
