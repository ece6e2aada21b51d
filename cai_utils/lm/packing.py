"""Training rows in few dense passes: several examples in a row, and answers that share a prompt.

A preference model reads a prompt twice, with one answer and with the other, and real prompts are
longer than answers. Here it is read once, and both answers attend to it and to themselves.
B: rows of a pass, W: tokens of a row, N: places that are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cai_utils.lm.architectures import has_plain_layers, longest_of, switch_of
from cai_utils.lm.kvcache import out_of_memory


@dataclass(frozen=True)
class Example:
    """The token ids of a prompt, and of the answers behind it, none of which reads another."""

    prompt: list[int]
    answers: tuple[list[int], ...] = ()

    def __len__(self):
        return len(self.prompt) + sum(map(len, self.answers))


def pair(chosen, rejected):
    """Two rows of token ids -> the Example of them: their common beginning as its prompt, but for
    the last token of each, where a score is read."""
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return Example(chosen[:same], (chosen[same:], rejected[same:]))


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
    """Passes of dense rows: [[[index]]], indices of examples by row and pass.

    First fit, longest first, into rows of one width: the longest example's, half more or twice
    that, whichever takes the fewest tokens. A pass holds at most `max_tokens` of them (or one row).
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    widest = multiple(lengths[order[0]])
    found = []
    for width in (widest, multiple(widest * 3 // 2), 2 * widest):
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


def multiple(length, of=8):
    """Rounded up: few widths, as some libraries make a new kernel for each shape of a product."""
    return -(-length // of) * of


def pack(rows):
    """Rows of Examples -> what `read` takes: `input_ids`, `position_ids` (B, W), which begin again
    with each example and go on behind the prompt with each answer, and `owner` (2, B, W): the
    number of each token's example, and that of its answer (0: the prompt); and where the examples
    begin, flat places in (B, W), row by row. Padding is an example of its own."""
    width = multiple(max(sum(map(len, row)) for row in rows))
    ids, positions = np.zeros((2, len(rows), width), np.int64)
    owner = np.zeros((2, len(rows), width), np.int32)
    starts = []
    for b, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, 1):
            starts.append(b * width + at)
            first = 0
            for answer, part in enumerate((example.prompt, *example.answers)):
                end = at + len(part)
                ids[b, at:end] = part
                positions[b, at:end] = np.arange(first, first + len(part))
                owner[0, b, at:end], owner[1, b, at:end] = number, answer
                at, first = end, len(example.prompt)
    batch = {"input_ids": ids, "position_ids": positions, "owner": owner}
    return {name: torch.from_numpy(array) for name, array in batch.items()}, starts


def attention_mask(owner, implementation, dtype=torch.float32):
    """(2, B, W) of `pack` -> (B, 1, W, W), which token may read which: earlier ones of its own
    example that belong to the prompt or to its own answer. For eager attention the number that is
    added to its weights, else bool."""
    example, answer = owner
    seen = (example[:, :, None] == example[:, None]) & (
        (answer[:, None] == 0) | (answer[:, :, None] == answer[:, None]))
    seen = seen.tril()[:, None]
    if implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min)


def read(base, input_ids, position_ids, owner, at):
    """Hidden states (N, H) of a causal base model at the flat places `at` (N,) of a pass."""
    mask = attention_mask(owner, base.config._attn_implementation)
    hidden = base(input_ids=input_ids, position_ids=position_ids, attention_mask=mask,
                  use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, at)


def can_pack(base, longest):
    """Whether `read` gives every token the state that it has in a row alone, for rows of up to
    `longest` tokens: not where layers keep a state or see a window, where what a row is depends on
    the rows beside it, nor where attention takes no such mask."""
    config = base.config.get_text_config()
    windows = [getattr(config, name, None) or longest
               for name in ("sliding_window", "window_size", "attention_window")]
    if (not has_plain_layers(base.config) or longest_of(config) or switch_of(config)
            or config._attn_implementation not in ("eager", "sdpa")
            or any(not isinstance(n, int) or n < longest for n in windows)):
        return False
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(base.get_input_embeddings().num_embeddings, (16,), generator=drawn).tolist()
    first, second = Example(ids[:3]), Example(ids[3:9], (ids[9:12], ids[12:]))
    batch = {name: x.to(base.device) for name, x in pack([[first, second]])[0].items()}
    at = torch.arange(3, 16, device=base.device)
    plain = torch.tensor([ids[3:12] + [0], ids[3:9] + ids[12:]], device=base.device)

    def whole():
        states = base(input_ids=plain, use_cache=False).last_hidden_state
        return torch.cat([states[0, :9], states[1, 6:]])

    was_training = base.training
    base.eval()
    try:
        return equal_and_told_apart(
            whole, lambda: read(base, **batch, at=at),
            lambda: read(base, **batch | {"owner": torch.zeros_like(batch["owner"])}, at=at))
    finally:
        base.train(was_training)


@torch.no_grad()
def equal_and_told_apart(whole, shorter, wrong):
    """Whether `shorter()` gives the states of `whole()` up to rounding, and `wrong()`, what it
    gives if the model does not do as it should, others. Near a start of zeros, and in low
    precision, these may be alike: then the answer is no, which costs time and no precision."""
    try:
        right, found, other = whole(), shorter(), wrong()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        return False  # hybrid and recurrent models fail in ways of their own
    off, shown = (found - right).abs().max(), (other - right).abs().max()
    rounding = torch.finfo(right.dtype).eps * right.abs().max()
    return bool(shown > 20 * rounding and off <= max(4 * rounding, 0.01 * shown))
