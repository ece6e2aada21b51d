"""Products of activations with the weights of linear layers, laid out for the CPU."""

from __future__ import annotations

import torch
from torch import nn


class Product:
    """x (M, K) -> x W^T + b (M, N), for the weights of one linear layer or of several at once.

    They are copies: `refresh` takes what the layers hold now. They are transposed, up to twice as
    fast as the layout of `nn.Linear` on small weights.
    """

    def __init__(self, layers):
        self.layers = layers
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
        if self.weight is None:
            self.weight = weights[0].new_empty(weights[0].shape[1], self.width)
        start = 0
        for weight in weights:
            self.weight[:, start : start + len(weight)] = weight.t()
            start += len(weight)

    def __call__(self, x):
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, x, y):
        """x (M, N), to which the product with y (M, K) is added, in place."""
        if self.bias is not None:
            x += self.bias
        return x.addmm_(y, self.weight)


def can_multiply(layer):
    """Whether a module is a plain linear layer on a CPU whose weights a `Product` can take."""
    weight = getattr(layer, "weight", None)
    return (type(layer) is nn.Linear and type(weight) is nn.Parameter
            and weight.device.type == "cpu" and weight.dtype == torch.float32)
