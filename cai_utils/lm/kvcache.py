"""The engine's key/value cache, which prefixes prompts share, and how much fits into memory."""

from __future__ import annotations

from itertools import groupby

import psutil
import torch
from transformers.cache_utils import CacheLayerMixin

_SHARE_FROM = 256  # tokens that a shared prefix has to save: about what its own pass costs
_SHARE_PART = 1 / 16  # and of its prompts' tokens: below it, copying costs as much as computing
_ROOM = 4  # columns allocated ahead in a large cache
_LARGE = 2**25  # bytes: about a CPU's last-level cache


class Layer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, columns, head size); it grows when it is full.

    `length` is the number of columns in use, of those that are allocated.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.length = 0

    def update(self, keys, values, *args, **kwargs):
        self.is_initialized = True
        if self.keys is None:  # a prefill: kept as computed
            self.keys, self.values, self.length = keys, values, keys.shape[2]
            return keys, values
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.keys.shape[2]:
            self._grow(start, self.length + _ROOM - 1)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _grow(self, length, capacity):
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :length] = old[:, :, :length]
            setattr(self, name, new)

    def start_from(self, prefix, column, capacity):
        """Fills every row with the columns `column` (rows, length) of a prefix's layer, which has
        one row; `capacity` columns are allocated."""
        for name in ("keys", "values"):
            old = getattr(prefix, name)[0]
            new = old.new_empty(len(column), old.shape[0], capacity, old.shape[2])
            new[:, :, : column.shape[1]] = old[:, column].transpose(0, 1)
            setattr(self, name, new)
        self.length = column.shape[1]

    def gather(self, parts, rows, width, capacity):
        """Fills this layer, right-aligned at `width`, from prefilled ones, which are emptied:
        parts of (rows here, rows there, layer). Columns to the left are set to zero, since a NaN
        would spread even if it is masked."""
        for name in ("keys", "values"):
            new = None
            for where, source, part in parts:
                old = getattr(part, name)
                if new is None:
                    new = old.new_empty(rows, old.shape[1], capacity, old.shape[3])
                left = width - old.shape[2]
                new[where, :, :left] = 0
                new[where, :, left:width] = old[source]
                setattr(part, name, None)
            setattr(self, name, new)
        self.length = width

    def select(self, rows):
        """Keeps these rows and drops the others."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length][rows]
            setattr(self, name, new)

    def lazy_initialization(self, keys, values):
        """Nothing to do: `update` and `gather` allocate."""

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1


def shared_prefixes(prompts):
    """Distinct prompts (tuples of ids) -> [(length of the prefix, prompts that share it)].

    Walks down the prompts' prefix tree and divides a group at its longest common prefix where the
    parts together save more tokens than the whole: questions under sixteen principles share sixteen
    long prefixes rather than one short one. Prompts whose sharing does not pay are left out.
    """

    def best(group, depth):
        """(tokens saved, groups) of prompts in lexicographic order."""
        first, last = group[0], group[-1]
        shared = min(len(first), len(last))
        shared = next((i for i in range(shared) if first[i] != last[i]), shared)
        # A prompt that is the prefix itself keeps its last token, whose logits are needed.
        common = min(shared, len(first) - 1)
        saved = (len(group) - 1) * common - _SHARE_FROM
        if saved <= _SHARE_PART * sum(map(len, group)):
            whole = 0, []
        else:
            whole = saved, [(common, group)]
        if depth == 0:
            return whole
        parts = []
        for _, part in groupby(group, lambda ids: ids[shared : shared + 1]):
            part = list(part)
            if (len(part) - 1) * max(map(len, part)) > _SHARE_FROM:
                parts.append(best(part, depth - 1))
        divided = sum(saved for saved, _ in parts)
        if divided <= whole[0]:
            return whole
        return divided, [group for _, groups in parts for group in groups]

    return best(sorted(prompts), depth=16)[1] if prompts else []


def room(steps, size, device):
    """Columns to allocate ahead for `steps` more tokens; `size`: bytes of the full cache.

    All of them, except where the cache is larger than a CPU's own caches: there a step is bound by
    reading keys and values, and free columns between one head's and the next make that 2.2 times
    slower (measured, from four columns of 128 bytes on: the prefetcher starts anew). Four columns
    at a time cost a copy every four steps.
    """
    large = device.type == "cpu" and size > _LARGE
    return min(steps, _ROOM) if large else steps


def bytes_per_token(model, config):
    """Bytes of one token's keys and values in all layers."""
    total = 0
    for layer in config.per_layer_config:  # in some models heads differ between layers
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        total += 2 * heads * size * model.dtype.itemsize
    return total


def memory_budget(device, token_bytes):
    """Tokens of a batch whose keys and values fill a quarter of the free memory: at most 2**15 on a
    CPU, where larger batches are no faster, and 2**19 on a GPU."""
    most = 2**19 if device.type == "cuda" else 2**15
    return int(min(most, max(1, free_memory(device) // 4 // token_bytes)))


def free_memory(device):
    """Bytes that are free on a GPU or, for a CPU, in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def out_of_memory(error):
    """Whether an exception says that memory ran out, on a GPU or, in torch's words, on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(s in str(error) for s in ("can't allocate memory", "not enough memory",
                                          "CUDA error: out of memory", "ALLOC_FAILED"))
    )
