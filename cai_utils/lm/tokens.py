"""Between conversations, texts and token ids: the one way for sampling, choices, SFT, PMs and PPO.

`text_ids` decides which special tokens stand before a text, and every other function here and in
the package goes through it, so that a model is trained on the ids that it is sampled with.
"""

from __future__ import annotations

import itertools
import math
import re
from os.path import commonprefix

import numpy as np
import torch

from cai_utils import dialogue
from cai_utils.lm.completion import render_all

_LEADS = "\n.a0"  # letters that a text may stand behind, one of which it does not merge with
_OPEN = re.compile(r"<(\w*(?:think|reason)\w*)>\s*\Z")  # a prompt that ends in thoughts


def special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind every text: a bos, an eos, others."""
    bare = []
    # A text that shows where it stands: it has tokens, and none of them is special itself.
    for text in (text for texts in (lambda: "a1.", tokenizer.get_vocab) for text in texts()):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare and not set(bare) & set(tokenizer.all_special_ids):
            break
    full = tokenizer(text)["input_ids"]
    places = range(len(full) - len(bare) + 1)
    at = next((i for i in places if full[i : i + len(bare)] == bare), 0)
    return list(full[:at]), list(full[at + len(bare) :])


def adds_special_tokens(text, tokenizer) -> bool:
    """Whether the tokenizer may add its special tokens to a text: not to one that a chat template
    wrote (`dialogue.Rendered`), and not to one that begins with them already."""
    before, (ids,) = special_ids(tokenizer)[0], _ids([text], tokenizer)
    return not (isinstance(text, dialogue.Rendered) or (before and ids[: len(before)] == before))


def closes_texts(tokenizer) -> bool:
    """Whether the tokenizer adds an eos at the end of every text."""
    return special_ids(tokenizer)[1][-1:] == [tokenizer.eos_token_id]


def text_ids(texts, tokenizer) -> list[list[int]]:
    """N texts -> N lists of ids, from the first token that a model reads.

    What a chat template wrote (`dialogue.Rendered`) gets no special tokens: the ids are those of
    `apply_chat_template(tokenize=True)`. Any other text gets those that the tokenizer puts before
    texts, unless it begins with them already. None are put behind a text: what follows, a response
    or a choice, belongs to it.
    """
    if not texts:
        return []
    before = special_ids(tokenizer)[0]
    found = _ids(texts, tokenizer)
    return [list(ids) if isinstance(text, dialogue.Rendered) or ids[: len(before)] == before
            else before + list(ids) for text, ids in zip(texts, found, strict=True)]


def _ids(texts, tokenizer):
    """N texts -> N lists of ids, none added. What stands on the two sides of a `dialogue.SEAM` is
    read apart, the second side as it reads behind other text: a special token that a content spells
    is letters."""
    found = tokenizer([dialogue.pieces(text)[0] for text in texts],
                      add_special_tokens=False)["input_ids"]
    for i, text in enumerate(texts):
        if dialogue.SEAM not in text:
            continue
        found[i] = list(found[i])
        for piece in filter(None, dialogue.pieces(text)[1:]):
            found[i] += _behind(piece, tokenizer)
    return found


def _behind(text, tokenizer):
    """The ids of a text behind letters, without the space that SentencePiece puts before a text."""
    def ids_of(text):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for lead in _LEADS:
        head, ids = ids_of(lead), ids_of(lead + text)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return ids_of(text)


def documents(texts, tokenizer) -> list[str]:
    """Pretraining texts, of which the first and the last special tokens that the tokenizer would
    add may stand in them; those that they spell in between are letters (`dialogue.sealed`)."""
    start = "".join(tokenizer.convert_ids_to_tokens(special_ids(tokenizer)[0]))
    end = tokenizer.eos_token or ""
    out = []
    for text in texts:
        bare = text.removeprefix(start)
        body = bare.removesuffix(end)
        out.append(text[: len(text) - len(bare)] + dialogue.sealed(body, tokenizer)
                   + bare[len(body) :])
    return out


def continuation_ids(texts, prompts, continuations, tokenizer) -> list[list[int]]:
    """The ids of what follows each of N texts, whose ids are `prompts`; those stay as they are,
    since a sampler continues from exactly the tokens of the text.

    They are those after the text's in the tokenisation of both together; where that merges tokens
    across the boundary, others that spell the same. ValueError for a continuation that has none.
    """
    out = []
    joint = text_ids([t + c for t, c in zip(texts, continuations, strict=True)], tokenizer)
    for text, prompt, end, ids in zip(texts, prompts, continuations, joint, strict=True):
        found = ids[len(prompt) :]
        # A word that the vocabulary does not know may take in all that follows.
        if ids[: len(prompt)] != prompt or (not found and end.strip()):
            found = _spelled(prompt, end, ids, tokenizer)
        if found is None:
            raise ValueError(
                f"behind {text[-24:]!r} this vocabulary has no tokens that spell {end[:24]!r}: "
                "take the space at the end of the text off, and begin what follows with it")
        out.append(found)
    return out


def _spelled(prompt, continuation, joint, tokenizer):
    """Ids that behind those of `prompt` read as the continuation, or as it does in `joint`, the
    tokenisation of both together.

    SentencePiece puts a space before a text of its own, so that the continuation alone may say more
    than it stands for; behind a character that it does not merge with it has none. Where nothing
    reads the same (a decoder that writes other spaces): the ids of the continuation alone. None
    where those hold an unknown token, and the tokenisation of both together none.
    """
    def ids_of(text):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def read(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    whole, alone = read(joint), ids_of(continuation)
    tried = [alone]
    bare = continuation.removeprefix(" ")  # a tokenizer may join the spaces of both
    for lead, end in itertools.product(_LEADS, dict.fromkeys((continuation, bare))):
        head, ids = ids_of(lead), ids_of(lead + end)
        if ids[: len(head)] == head:
            tried.append(ids[len(head) :])
    right = (whole, read(prompt) + continuation)
    exact = next((ids for text in right for ids in tried if ids and read(prompt + ids) == text),
                 None)
    lost = tokenizer.unk_token_id in alone and whole.endswith(continuation)
    return alone if exact is None and not lost else exact


def leading_ids(tokenizer) -> list[int]:
    """Ids to put before those of a continuation for decoding it, where the decoder writes the first
    token of a text in another way (SentencePiece: without its space); else []."""
    head, both = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "a a"))
    head, tail = list(head), list(both[len(head) :])
    if both[: len(head)] != head:
        return []
    first, second, whole = decode([head, tail, head + tail], tokenizer)
    return [] if first + second == whole else head


def decode(rows, tokenizer, leading=()) -> list[str]:
    """N lists of ids -> their texts without special tokens, as they read behind other text where
    `leading` is `leading_ids(tokenizer)`."""
    leading = list(leading)
    texts = tokenizer.batch_decode([leading + list(row) for row in [[], *rows]],
                                   skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.removeprefix(texts[0]) for text in texts[1:]]


def without_bos(text, tokenizer) -> str:
    """A text for an engine that adds special tokens itself, such as a server: those that the
    tokenizer adds are taken off where the text begins with them.

    A text cannot tell such an engine to add none: where `adds_special_tokens` is false and nothing
    is taken off here, only ids (`text_ids`) or a setting of the engine say what is meant.
    """
    if not hasattr(tokenizer, "convert_ids_to_tokens"):  # not known here
        return text
    start = "".join(tokenizer.convert_ids_to_tokens(special_ids(tokenizer)[0]))
    return text[len(start) :] if text.startswith(start) else text


def prompt_ids_of(prompts, tokenizer, model, max_new_tokens):
    """Prompts (messages) -> token ids, as the sampler makes them; ValueError names one that the
    chat template refuses, or that with `max_new_tokens` more exceeds the positions of `model`."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    out = text_ids(render_all(prompts, tokenizer, "prompt"), tokenizer)
    for i, ids in enumerate(out):
        if positions and len(ids) + max_new_tokens > positions:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; with max_new_tokens="
                             f"{max_new_tokens} it exceeds the policy's {positions} positions: "
                             "drop it or lower max_new_tokens")
    return out


def encode(conversations, tokenizer, rows=None):
    """Conversations that end in an assistant turn -> [(prompt ids, response ids)], one per row.

    Prompt ids are those of `render(messages[:-1])`, the very ids that are sampled from; response
    ids are the last turn as the chat template renders it, and one eos (`continuation_ids`).
    ValueError names a conversation that cannot be rendered, by its number in `rows` if given.
    """
    texts, responses = [], []
    eos = tokenizer.eos_token
    for i, messages in enumerate(conversations):
        try:
            prompt, response = _halves(messages, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {rows[i] if rows else i}: {error}") from None
        texts.append(prompt)
        responses.append(response.removesuffix(eos) if eos else response)
    prompts = text_ids(texts, tokenizer)
    found = continuation_ids(texts, prompts, responses, tokenizer)
    return [(prompt, ids + [tokenizer.eos_token_id])
            for prompt, ids in zip(prompts, found, strict=True)]


def _halves(messages, tokenizer):
    """A conversation -> (the text of its prompt, the text of its last turn behind that)."""
    prompt = dialogue.render(messages[:-1], tokenizer, add_generation_prompt=True)
    content = dialogue.written(messages[-1]["content"], tokenizer)
    whole = dialogue.render(messages, tokenizer, add_generation_prompt=False)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :].rstrip()
    # A template that writes more into the prompt of a response than into a finished one (an empty
    # <think> block), or rewrites earlier turns: what it puts around a response is read off another
    # one, since it may rewrite this one too.
    other = dialogue.with_response(messages[:-1], "OTHER")
    start, _, end = dialogue.render(other, tokenizer, False).rpartition("OTHER")
    spaces = start[len(start.rstrip()) :]
    gaps = [spaces[len(spaces) - n :] for n in range(len(spaces) + 1)]

    def shared(gap):  # the prompt ends as `start` does without the gap
        return len(commonprefix([start.removesuffix(gap)[::-1], prompt[::-1]]))

    response = (max(gaps, key=shared) + content + end).rstrip()
    if opened := _OPEN.search(prompt):
        # It goes on in the thoughts that the prompt opens, or closes them before an answer alone.
        thoughts, close = response.removeprefix(f"<{opened[1]}>"), f"</{opened[1]}>"
        inside = thoughts.lstrip("\n") if thoughts != response else response
        response = inside if close in response else f"\n{close}\n\n{response}"
    return prompt, response


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
