"""From conversations and texts to token ids, one way for sampling, SFT, PMs and PPO."""

from __future__ import annotations

import math

import numpy as np
import torch

from cai_utils import dialogue
from cai_utils.dialogue import render, uses_transcript


def prompt_ids_of(prompts, tokenizer, model, max_new_tokens):
    """Prompts -> token ids, as the sampler makes them; ValueError when one leaves no room."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids, bos = [], tokenizer.bos_token
    for i, prompt in enumerate(prompts):
        text = dialogue.render(prompt, tokenizer)
        special = not (bos and text.startswith(bos))
        ids.append(list(tokenizer(text, add_special_tokens=special)["input_ids"]))
        if room and len(ids[-1]) + max_new_tokens > room:
            raise ValueError(f"prompt {i} has {len(ids[-1])} tokens; with max_new_tokens="
                             f"{max_new_tokens} it exceeds the policy's {room} positions: drop it "
                             "or lower max_new_tokens")
    return ids


def pad(ids, pad_id, multiple=None):
    multiple = multiple or 1
    width = -(-max(map(len, ids)) // multiple) * multiple
    tokens = np.full((len(ids), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def encode(conversations, tokenizer):
    """Conversations that end in an assistant turn -> [(prompt ids, completion ids)], one per row.

    Prompt ids are those of ``render(messages[:-1])`` with the tokenizer's own special tokens (bos
    where it adds one); completion ids are the last turn as the chat template renders it, and one
    eos. The two are tokenized together where that leaves the prompt's tokens alone, else apart, as
    sampling would meet them.
    """
    prompts, tails = [], []
    eos = tokenizer.eos_token
    for messages in conversations:
        prompt = render(messages[:-1], tokenizer, add_generation_prompt=True)
        whole = render(messages, tokenizer, add_generation_prompt=False)
        if whole.startswith(prompt):
            tail = whole[len(prompt) :]
        else:  # a template that rewrites earlier turns: the response follows the prompt as sampled
            tail = (" " if uses_transcript(tokenizer) else "") + messages[-1]["content"]
        tail = tail.rstrip()
        prompts.append(prompt)
        tails.append(tail.removesuffix(eos) if eos else tail)
    if not prompts:
        return []
    joint = _token_ids([p + t for p, t in zip(prompts, tails, strict=True)], tokenizer)
    out = []
    for prompt, tail, ids in zip(_token_ids(prompts, tokenizer), tails, joint, strict=True):
        if ids[: len(prompt)] == prompt:
            completion = ids[len(prompt) :]
        else:
            completion = tokenizer(tail, add_special_tokens=False)["input_ids"]
        out.append((prompt, completion + [tokenizer.eos_token_id]))
    return out


def _token_ids(texts, tokenizer):
    """Texts -> lists of ids: special tokens as in sampling, no second bos, no eos of its own."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    special = not (bos and texts[0].startswith(bos))
    rows = tokenizer(texts, add_special_tokens=special)["input_ids"]
    if special and rows and tokenizer("")["input_ids"][-1:] == [eos]:
        rows = [ids[:-1] for ids in rows]  # a tokenizer that closes every text
    return rows


def shorten(prompt, completion, max_length, bos_id=None):
    """Prompt ids, cut from the left (bos kept) until prompt + completion fit ``max_length``.

    None when the completion leaves no room for two prompt tokens: a response is never cut, since
    its eos (and in a preference model its score) stands at the end.
    """
    excess = len(prompt) + len(completion) - (max_length or math.inf)
    if excess <= 0:
        return prompt
    kept = len(prompt) - excess
    if kept < 2:
        return None
    head = prompt[:1] if bos_id is not None and prompt[0] == bos_id else []
    return head + prompt[len(prompt) - kept + len(head) :]
