"""Tiny models for tests: random weights, one token per byte, so that any text can be spelled."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(SPECIAL + letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sentencepiece(kind="legacy", single="<s> $A"):
    """Like the tokenizers of Llama 1 and 2: spaces are "\u2581", and a text begins with one.

    kind: "legacy", where every piece between special tokens begins with one, too; or the
    `prepend_scheme` ("first", "always") of the later ones.
    """
    merges = [("\u2581", "("), ("\u2581", "N"), ("\u2581", "H"), ("\u2581", "\u2581"), ("o", "w"),
              ("\u2581N", "ow")]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)),
              *(chr(c) for c in range(33, 127)), "\n", "\u2581", *map("".join, merges)]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(pieces)}, merges, byte_fallback=True))
    if kind == "legacy":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def llama(seed=0, context=1024, sharp=20.0, vocab_size=259):
    """A random Llama; `sharp` spreads its logits so that its choices are not all alike."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


class Chat:
    """A chat model's tokenizer, as far as rendering goes."""

    chat_template = "<{role}>{content}"

    @staticmethod
    def apply_chat_template(messages, tokenize=False, add_generation_prompt=True):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + "<assistant>" * add_generation_prompt
