"""Episodes in few dense rows, divided among processes. B: rows, L: tokens of a row, N: response
tokens of a batch, flat in the order of its episodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cai_utils.lm.packing import length_groups, multiple, packed_rows


@dataclass(frozen=True)
class Episode:
    """The token ids of a prompt and of the response to it (its eos included, if it has one)."""

    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


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
    width = multiple(width) if several else width
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    starts = [k * width + place for k, place in starts]
    spans = zip(starts, episodes, strict=True)
    at = torch.cat([torch.arange(s, s + len(e.response_ids)) for s, e in spans])
    if several:  # padding has position 0, as counting on could exceed the model's positions
        positions = torch.tensor([p + [0] * (width - len(p)) for p in positions])
    targets = ids.flatten()[at + 1]
    return (ids.to(device), at.to(device), targets.to(device),
            positions.to(device) if several else None)
