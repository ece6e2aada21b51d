"""What a model's architecture allows: whether it is sampled here, how long its rows may be, and
which of its passes may be shortened."""

from __future__ import annotations

import inspect

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from cai_utils.lm.kvcache import out_of_memory

# They take no positions, and need none: attention depends on the distance of two tokens.
_BY_DISTANCE = {"bloom", "mpt"}
# They take what a decoder takes, and do something else with it.
_UNLIKE = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta",
                     "xlm-roberta-xl", "xmod"), "it counts positions from its pad id"),
    "blt": "it reads bytes in patches",
    "git": "its positions and masks are those of captions, without padding",
}
_INSTEAD = "give a decoder such as a Llama, Qwen, GPT-NeoX or GPT-2"


def check_causal(name, config):
    """ValueError that names the model, unless the config is that of a causal LM."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    if masked or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: a {config.model_type} is not a causal language model; {_INSTEAD}")


def has_plain_layers(config):
    """Whether all layers are attention, over a whole row or a window of it, as far as the config
    says."""
    return not other_layers(config)


def other_layers(config):
    """The kinds of layers, sorted, that are neither full nor sliding attention."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return sorted(kinds - {"full_attention", "sliding_attention"})


def inner_model(model):
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_plain(model):
    """ValueError, with the reason, unless `model` is a causal LM that keeps keys and values of each
    token, and nothing else, and whose positions can be given."""
    inner, config = inner_model(model), model.config.get_text_config()
    check_causal(type(model).__name__, model.config)
    accepted = inspect.signature(inner.forward).parameters
    why = _UNLIKE.get(model.config.model_type)
    if inner.get_output_embeddings() is None:
        why = "it has no head over a vocabulary"
    elif other := other_layers(config):
        why = f"it has layers of other kinds: {', '.join(other)}"
    elif "past_key_values" not in accepted:
        why = "it keeps no keys and values"
    elif "position_ids" not in accepted and config.model_type not in _BY_DISTANCE:
        why = "it takes no positions, so that padded rows would be misread"
    if why:
        raise ValueError(f"a {model.config.model_type} cannot be sampled here: it is not a causal "
                         f"LM with plain attention ({why}); {_INSTEAD}")


@torch.no_grad()
def head_of(model):
    """Two facts of a causal LM's head: whether it reads the base model's last hidden states, at
    most scaled by a number, and whether moreover its logits are the model's: nothing is scaled or
    capped, before the head or behind it.

    The logits of a pass are replaced by large ones, so that this shows whatever the weights and
    their precision are.
    """
    ids, seen = torch.arange(4, device=model.device)[None], []
    drawn = torch.Generator().manual_seed(0)

    def give_logits(module, args, output):
        seen.extend((args[0], (100 * torch.randn(output.shape, generator=drawn)).to(output)))
        return seen[1]

    training = model.training
    hook = model.get_output_embeddings().register_forward_hook(give_logits)
    try:
        model.eval()
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        read = seen[0].to(states.dtype)
        scale = (states * read).sum() / (states * states).sum()
        off = (scale * states - read).abs().max()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        return False, False  # a base model or a head of another form
    finally:
        hook.remove()
        model.train(training)
    reads = not off >= 0.01 * read.abs().max()  # of weights that are not finite, others complain
    same = bool((scale - 1).abs() < 0.01) and torch.equal(logits, seen[1].to(logits.dtype))
    return reads, reads and same


def check_head(model):
    """ValueError where trl cannot train a causal LM: it takes the head's weight and reads the last
    hidden states with it (scaled and capped as the config says)."""
    if not head_of(model)[0]:
        raise ValueError(f"a {model.config.model_type} cannot be trained here: its head transforms "
                         f"the last hidden states before it reads them, which trl leaves out; "
                         f"{_INSTEAD}")


def _rope(config, kind):
    """The rope parameters (a model may have several) of the type that has `kind` in its name."""
    found = getattr(config, "rope_parameters", None) or {}
    several = [found] if "rope_type" in found else found.values()
    return [rope for rope in several
            if isinstance(rope, dict) and kind in (rope.get("rope_type") or "")]


def switch_of(config):
    """Up to how many tokens a row is read with a model's short position factors, and from there on
    with its long ones (LongRoPE, arXiv 2402.13753: Phi-3-128k); None for other models.

    transformers decides it by the longest row of a batch, for all rows. So rows of both sides may
    not stand in one batch, and one that crosses the switch is computed anew from there.
    """
    config = config.get_text_config()
    found = [r["original_max_position_embeddings"] for r in _rope(config, "longrope")]
    return min(found, default=None)


def longest_of(config):
    """Tokens up to which a row is computed independently of other rows and, in it, of later tokens;
    None where there is no such limit.

    Beyond it, dynamic NTK scaling takes its frequencies from the longest row that was read, and
    Doge picks the keys to keep among all of a row's, BigBird reads blocks of both sides.
    """
    config = config.get_text_config()
    if _rope(config, "dynamic"):
        return config.max_position_embeddings
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        return (5 + 2 * config.num_random_blocks) * config.block_size
    return config.keep_window_size if config.model_type == "doge" else None


def check_rows(config, lengths, lower):
    """ValueError when rows of these lengths (tokens) cannot be read in one batch without changing
    each other; `lower`: the parameter to lower, named in the message."""
    switch, most = switch_of(config), longest_of(config)
    longest = max(lengths)
    if most is not None and longest > most:
        raise ValueError(f"a row of {longest} tokens exceeds the {most} up to which a "
                         f"{config.model_type} reads each row by itself: lower {lower}")
    if switch is not None and min(lengths) <= switch < longest:
        raise ValueError(
            f"rows of {min(lengths)} to {longest} tokens: this {config.model_type} reads rows of "
            f"more than {switch} tokens with other position factors (LongRoPE), and a batch with "
            f"both kinds would be misread: lower {lower}, so that no row exceeds {switch}")
