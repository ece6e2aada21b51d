"""From conversations and texts to token ids: the one way for sampling, choices, SFT, PMs and PPO.

`text_ids` decides whether a tokenizer adds its special tokens to a text, and every other function
here and in the package goes through it, so that a model is trained on the ids that it is sampled
with.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cai_utils import dialogue


def adds_special_tokens(text, tokenizer) -> bool:
    """Whether the tokenizer may add its special tokens to a text: not where the chat template has
    written the bos already."""
    bos = tokenizer.bos_token
    return not (bos and text.startswith(bos))


def closes_texts(tokenizer) -> bool:
    """Whether the tokenizer adds an eos at the end of every text."""
    # Where bos and eos are one token (OPT), only the text that is not empty shows which it is.
    return all(tokenizer(text)["input_ids"][-1:] == [tokenizer.eos_token_id] for text in ("", "a"))


def text_ids(texts, tokenizer) -> list[list[int]]:
    """N texts -> N lists of ids, from the first token that a model reads.

    Special tokens are those that the tokenizer adds before a text (bos where it adds one), text by
    text, and never a second bos. An eos that it puts behind every text is taken off: what follows
    belongs to the text.
    """
    rows = [None] * len(texts)
    for special in (True, False):
        chosen = [i for i, t in enumerate(texts) if adds_special_tokens(t, tokenizer) == special]
        if not chosen:
            continue
        found = tokenizer([texts[i] for i in chosen], add_special_tokens=special)["input_ids"]
        end = -1 if special and closes_texts(tokenizer) else None
        for i, ids in zip(chosen, found, strict=True):
            rows[i] = list(ids[:end])
    return rows


def continuation_ids(texts, prompts, continuations, tokenizer) -> list[list[int]]:
    """The ids of what follows each of N texts, whose ids are `prompts`.

    They are those after the text's in the tokenisation of both together; where that merges tokens
    across the boundary, those of the continuation alone, since a sampler continues from exactly the
    tokens of the text.
    """
    out = []
    joint = text_ids([t + c for t, c in zip(texts, continuations, strict=True)], tokenizer)
    for prompt, continuation, ids in zip(prompts, continuations, joint, strict=True):
        if ids[: len(prompt)] == prompt:
            out.append(ids[len(prompt) :])
        else:
            out.append(list(tokenizer(continuation, add_special_tokens=False)["input_ids"]))
    return out


def without_bos(text, tokenizer) -> str:
    """A text for an engine that adds special tokens itself, such as a server: a bos that the chat
    template wrote is taken off where the tokenizer adds one."""
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text


def prompt_ids_of(prompts, tokenizer, model, max_new_tokens):
    """Prompts (messages) -> token ids, as the sampler makes them; ValueError names one that with
    `max_new_tokens` more exceeds the positions of `model`."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    out = text_ids([dialogue.render(prompt, tokenizer) for prompt in prompts], tokenizer)
    for i, ids in enumerate(out):
        if positions and len(ids) + max_new_tokens > positions:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; with max_new_tokens="
                             f"{max_new_tokens} it exceeds the policy's {positions} positions: "
                             "drop it or lower max_new_tokens")
    return out


def encode(conversations, tokenizer):
    """Conversations that end in an assistant turn -> [(prompt ids, response ids)], one per row.

    Prompt ids are those of `render(messages[:-1])`; response ids are the last turn as the chat
    template renders it, and one eos (`continuation_ids`).
    """
    texts, responses = [], []
    eos = tokenizer.eos_token
    for messages in conversations:
        prompt = dialogue.render(messages[:-1], tokenizer, add_generation_prompt=True)
        whole = dialogue.render(messages, tokenizer, add_generation_prompt=False)
        if whole.startswith(prompt):
            response = whole[len(prompt) :]
        else:  # a template that rewrites earlier turns: the response follows the prompt as sampled
            gap = " " if dialogue.uses_transcript(tokenizer) else ""
            response = gap + messages[-1]["content"]
        response = response.rstrip()
        texts.append(prompt)
        responses.append(response.removesuffix(eos) if eos else response)
    prompts = text_ids(texts, tokenizer)
    found = continuation_ids(texts, prompts, responses, tokenizer)
    return [(prompt, ids + [tokenizer.eos_token_id])
            for prompt, ids in zip(prompts, found, strict=True)]


def shorten_prompt(prompt, response, max_length, bos_id=None):
    """Prompt ids, cut from the left (bos kept) until prompt + response fit `max_length`.

    None when the response leaves no room for two prompt tokens: a response is never cut, since its
    eos (and in a preference model its score) stands at the end.
    """
    excess = len(prompt) + len(response) - (max_length or math.inf)
    if excess <= 0:
        return prompt
    kept = len(prompt) - excess
    if kept < 2:
        return None
    head = prompt[:1] if bos_id is not None and prompt[0] == bos_id else []
    return head + prompt[len(prompt) - kept + len(head) :]


def pad(sequences, pad_id, multiple=None):
    """B lists of ids -> (ids, mask), both (B, T) int64, padded on the right to the longest, or to
    the next `multiple` of tokens."""
    multiple = multiple or 1
    width = -(-max(map(len, sequences)) // multiple) * multiple
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
