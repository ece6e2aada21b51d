"""Episodes in few dense rows, divided among processes. B: rows, L: tokens of a row, N: response
tokens of a batch, flat in the order of its episodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Episode:
    """The token ids of a prompt and of the response to it (its eos included, if it has one)."""

    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


def length_groups(lengths, max_tokens, max_padding=0.1):
    """Indices of rows in groups of similar length, longest first.

    Padded to its longest row, a group holds at most `max_tokens` tokens (or one row), and at most a
    fraction `max_padding` of padding, unless it is small (a quarter of `max_tokens`), when one more
    pass would cost more than that.
    """
    groups, total = [], 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        padded = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else math.inf
        little = padded - total - lengths[i] <= max_padding * padded or padded <= max_tokens // 4
        if padded <= max_tokens and little:
            groups[-1].append(i)
            total += lengths[i]
        else:
            groups.append([i])
            total = lengths[i]
    return groups


def packed_rows(lengths, max_tokens):
    """Passes of dense rows: [[[index]]], indices of episodes by row and pass.

    First fit, longest first, into rows of one width: the longest episode's, half more or twice
    that, whichever takes the fewest tokens. A pass holds at most `max_tokens` of them (or one row).
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    widest = _multiple(lengths[order[0]])
    found = []
    for width in (widest, _multiple(widest * 3 // 2), 2 * widest):
        if found and width > max_tokens:
            break
        rows, room = [], []
        for i in order:
            k = next((k for k, free in enumerate(room) if free >= lengths[i]), len(rows))
            if k == len(rows):
                rows.append([])
                room.append(width)
            rows[k].append(i)
            room[k] -= lengths[i]
        found.append((len(rows) * width, width, rows))
    _, width, rows = min(found)
    size = max(1, max_tokens // width)
    return [rows[k : k + size] for k in range(0, len(rows), size)]


def _multiple(length, of=8):
    """Rounded up: few widths, as some libraries make a new kernel for each shape of a product."""
    return -(-length // of) * of


def passes_of_process(lengths, max_tokens, process=0, processes=1, packs=False):
    """The passes of one process over its episodes (every `processes`-th): [(rows, weight)], rows
    being lists of indices: one each, in passes of similar length, or with `packs` several.

    All processes make the same number of passes, as each pass exchanges messages: one with fewer
    repeats the shortest episode at weight 0. Every episode has weight 1 in exactly one process.
    """
    def passes(rank):
        mine = range(rank, len(lengths), processes)
        if not mine:
            return []
        sizes = [lengths[i] for i in mine]
        found = packed_rows(sizes, max_tokens) if packs else [
            [[i] for i in group] for group in length_groups(sizes, max_tokens)]
        return [[[mine[i] for i in row] for row in rows] for rows in found]

    found = passes(process)
    most = max(len(found), *(len(passes(r)) for r in range(processes) if processes > 1), 0)
    idle = [([[int(np.argmin(lengths))]], 0.0)] * (most - len(found))
    return [(rows, 1.0) for rows in found] + idle


def pack(episodes, device="cpu", counts=None):
    """Episodes -> what the networks take: ids (B, L), right-padded; `at` (N,), the flat place in
    (B, L) that predicts each response token, and these tokens (N,); positions (B, L), which begin
    again with each episode, or None if no row holds more than one.

    counts: (B,) how many episodes, in order, stand in each row; None: one.
    """
    counts = counts or [1] * len(episodes)
    several, left = max(counts) > 1, iter(episodes)
    rows, positions, starts = [], [], []
    for k, count in enumerate(counts):
        row, places = [], []
        for e in (next(left) for _ in range(count)):
            starts.append((k, len(row) + len(e.prompt_ids) - 1))
            row, places = row + e.prompt_ids + e.response_ids, places + list(range(len(e)))
        rows.append(row)
        positions.append(places)
    width = max(map(len, rows))
    width = _multiple(width) if several else width
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    starts = [k * width + place for k, place in starts]
    spans = zip(starts, episodes, strict=True)
    at = torch.cat([torch.arange(s, s + len(e.response_ids)) for s, e in spans])
    if several:  # padding has position 0, as counting on could exceed the model's positions
        positions = torch.tensor([p + [0] * (width - len(p)) for p in positions])
    targets = ids.flatten()[at + 1]
    return (ids.to(device), at.to(device), targets.to(device),
            positions.to(device) if several else None)
