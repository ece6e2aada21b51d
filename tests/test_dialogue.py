"""Conversations and their text forms, to the letter."""

import datetime
import json
import pickle
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cai_utils import dialogue
from cai_utils.dialogue import (
    TEMPLATE,
    Rendered,
    parse_transcript,
    render,
    transcript,
    uses_transcript,
    with_response,
)

TALK = [
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": "Mix flour and water.\n\nThen wait."},
    {"role": "user", "content": "And then?"},
]
TEXT = (
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour and water.\n\nThen wait."
    "\n\nHuman: And then?"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Newlines stand in expressions: templates drop the one that follows a block.
TRANSCRIPT = (
    "{% for m in messages %}"
    "{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}"
    "{% endfor %}"
)


def tokenizer(template=None):
    out = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    out.chat_template = template
    return out


def test_a_transcript_to_the_letter_and_back():
    assert transcript(TALK) == TEXT
    assert transcript(TALK, add_generation_prompt=True) == TEXT + "\n\nAssistant:"
    assert parse_transcript(TEXT) == TALK
    assert parse_transcript(TEXT + "\n\nAssistant:") == TALK
    assert parse_transcript("Human: a\n\nAssistant:  b \n") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_only_a_turn_after_a_blank_line_is_a_turn():
    assert parse_transcript("\n\nHuman: say\nHuman: x. Assistant: y") == [
        {"role": "user", "content": "say\nHuman: x. Assistant: y"}
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant"]),
            st.lists(st.sampled_from(
                ["\n", "\n\n", "\r\n", "\\", "Human:", "Assistant:", "a", " "]))
            .map("".join).map(str.strip).filter(bool),
        ),
        min_size=1,
    )
)
def test_messages_survive_the_transcript(turns):
    talk = [{"role": r, "content": c} for r, c in turns]
    assert parse_transcript(transcript(talk)) == talk


def test_rendering_for_a_base_model_a_chat_model_and_the_miniature():
    assert render(TALK, tokenizer()) == TEXT + "\n\nAssistant:"
    assert render(TALK, tokenizer(), add_generation_prompt=False) == TEXT
    assert render(TALK, tokenizer(TRANSCRIPT)) == TEXT + "\n\nAssistant:"
    assert render(TALK[:1], tokenizer(CHATML)) == (
        "<|im_start|>user\nHow do I bake bread?<|im_end|>\n<|im_start|>assistant\n"
    )
    done = with_response(TALK[:1], " Slowly.\n")
    assert render(done, tokenizer(CHATML), add_generation_prompt=False) == (
        "<|im_start|>user\nHow do I bake bread?<|im_end|>\n"
        "<|im_start|>assistant\nSlowly.<|im_end|>\n"
    )
    assert render("as it is ", tokenizer(CHATML)) == "as it is "


def test_which_models_read_transcripts():
    assert uses_transcript(tokenizer()) and uses_transcript(tokenizer(TRANSCRIPT))
    assert not uses_transcript(tokenizer(CHATML))
    assert uses_transcript(tokenizer(dialogue.TEMPLATE))


@pytest.mark.parametrize("template, expected", [
    # The words alone do not make a transcript.
    ("{% for m in messages %}### {{ 'Human:' if m.role == 'user' else 'Assistant:' }} "
     "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}", False),
    (CHATML + "{# not as in Human: hello #}", False),
    (TRANSCRIPT.replace("'\n\nHuman: '", "'Human: '"), False),
    (TRANSCRIPT + " ", False),
    ("{{ bos_token }}" + TRANSCRIPT, True),
    # a template that refuses the sample
    ("{{ raise_exception('Human: no') }}", False),
])
def test_a_transcript_template_is_told_by_what_it_renders(template, expected):
    made = tokenizer(template)
    made.bos_token = "a"
    assert uses_transcript(made) == expected
    if "raise" not in template:
        assert isinstance(render(TALK[:1], made), Rendered) != expected


def test_what_a_chat_template_wrote_says_so():
    text = render(TALK, tokenizer(CHATML))
    assert isinstance(text, Rendered) and isinstance(render(text, tokenizer()), Rendered)
    # the beginning of an answer belongs to it
    assert isinstance(text + "The answer is:" + " (A)", Rendered)
    assert text + "x" == str(text) + "x" and not isinstance("x" + text, Rendered)
    for plain in (render(TALK, tokenizer()), render(TALK, tokenizer(TRANSCRIPT)),
                  render("as it is", tokenizer(CHATML))):
        assert type(plain) is str
    # to everything else it is a text
    assert text == str(text) and {text: 1}[str(text)] == 1
    assert json.dumps([text]) == json.dumps([str(text)])
    assert isinstance(pickle.loads(pickle.dumps(text)), Rendered)


@pytest.mark.parametrize("asked, expected", [
    ("strftime_now('%d %b %Y')", "26 Jul 2024"), ("strftime_now('%Y-%m-%d')", "2024-07-26"),
    ("strftime_now(\"%B %-d, %Y\")", "July 26, 2024"), ("strftime_now('%A, %H:%M')",
                                                       "Friday, 00:00"),
    ("date_string", "26 Jul 2024"),
])
def test_rows_made_today_are_those_of_tomorrow(asked, expected, monkeypatch):
    template = ("\n{% if not date_string is defined %}{% if strftime_now is defined %}"
                "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
                "Today is {{ " + asked + " }}.\n" + CHATML)
    made = tokenizer(template)
    assert render(TALK[:1], made).startswith(f"\nToday is {expected}.\n<|im_start|>user")
    # and but for the date it is what transformers renders
    from transformers.utils import chat_template_utils

    class Then(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    then = made.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert render(TALK[:1], made) == then


def test_a_response_is_stripped_and_the_prompt_left_alone():
    prompt = list(TALK)
    assert with_response(prompt, "\n Bake it. ")[-1] == {
        "role": "assistant",
        "content": "Bake it.",
    }
    assert prompt == TALK


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: transcript([]), "empty conversation"),
        (lambda: transcript([{"role": "system", "content": "x"}]), "message 0 .*'user'"),
        (lambda: transcript([TALK[0], {"role": "user"}]), "message 1 .*'content'"),
        (lambda: transcript([{"role": "system", "content": "x"}]), "begin the first user turn"),
        (lambda: render([{"role": "user", "content": None}], tokenizer()), "content', a text"),
        (lambda: render([TALK[0], TALK[2]], tokenizer(ALTERNATING)),
         "turns: user, user .*alternate.*; join turns"),
        (lambda: transcript(TALK[:2], add_generation_prompt=True), "already ends"),
        (lambda: render(TALK[:2], tokenizer(CHATML)), "already ends"),
        (lambda: parse_transcript("Hello. \n\nHuman: x"), "'Hello"),
        (lambda: parse_transcript(""), "not a transcript"),
    ],
)
def test_bad_conversations_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
SILENT = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def test_a_system_message_is_rendered_by_a_template_that_has_it():
    assert render(SYSTEM[:2], tokenizer(CHATML)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHow do I bake bread?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert transcript(SYSTEM) == render(SYSTEM, tokenizer(), False) == "\n\nBe brief." + TEXT
    assert render(SYSTEM, tokenizer(TEMPLATE), False) == "\n\nBe brief." + TEXT


@pytest.mark.parametrize("template", [GEMMA + "{% endif %}" + CHATML, SILENT, TRANSCRIPT],
                         ids=["refuses", "leaves it out", "takes it for the assistant's"])
def test_a_template_without_a_system_role_is_refused(template):
    assert render(TALK, tokenizer(template))
    with pytest.raises(ValueError, match="no system role: put the text .* first user turn"):
        render(SYSTEM, tokenizer(template))


@pytest.mark.parametrize("messages", [SYSTEM[:1], [*TALK, SYSTEM[0], TALK[0]],
                                      [{"role": "user", "content": None}]])
def test_a_system_message_stands_first_and_a_content_is_there(messages):
    with pytest.raises(ValueError, match="message [03] .*'system' message may stand before"):
        transcript(messages)


def test_windows_line_ends_part_turns_too():
    windows = TEXT.replace("\n", "\r\n")
    assert [m["role"] for m in parse_transcript(windows)] == ["user", "assistant", "user"]
    assert parse_transcript(windows)[1]["content"] == "Mix flour and water.\r\n\r\nThen wait."


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "phi3", "gemma"])
def test_system_messages_in_public_templates(name):
    public = tokenizer((Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text())
    public.bos_token = "<s>"
    if name == "gemma":  # raises: "System role not supported"
        with pytest.raises(ValueError, match="no system role"):
            render(SYSTEM, public)
        return
    shown = public.apply_chat_template(SYSTEM, tokenize=False, add_generation_prompt=True)
    assert render(SYSTEM, public) == shown and "Be brief." in shown


@pytest.mark.parametrize("template, expected", [
    ("### {{ messages[0]['content'] + '\n\n### Response:\n' }}", "### Hi\n\n### Response:\n"),
    ("{{ 'Q: ' + messages[-1]['content'][:2] }}", "Q: Hi"),
])
def test_templates_that_do_not_show_the_last_turn_whole(template, expected):
    assert render([{"role": "user", "content": "Hi"}], tokenizer(template)) == expected


@pytest.mark.parametrize("template, message", [
    ("{{ messages[0]['content'] + 1 }}", "template fails on a conversation .TypeError"),
    ("{{ nothing() }}", "template fails on a conversation .UndefinedError"),
    ("{% if %}", "template fails on a conversation .TemplateSyntaxError"),
    ("{{ raise_exception('only one turn') }}", "refuses a conversation of these turns: user .only"),
])
def test_a_template_that_fails_is_told_from_one_that_refuses(template, message):
    with pytest.raises(ValueError, match=message):
        render([{"role": "user", "content": "Hi"}], tokenizer(template))


def test_a_dated_template_is_rendered_as_without_the_date():
    body = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "Hi"}]
    for start in ("", "  ", "\n", "  {% set a = 1 %}\n "):
        dated = start + "{% set day = strftime_now('%Y%Z%f') %}\n{{ day }}" + body
        plain = start + "{% set day = '2024000000' %}\n{{ day }}" + body
        assert render(talk, tokenizer(dated)) == tokenizer(plain).apply_chat_template(
            talk, tokenize=False)
