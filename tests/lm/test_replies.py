"""What servers answer, parts of characters, token ids, numbers that are none.

The numbers that are wanted are hand-computed or a local model's. VLLM holds replies that vLLM 0.32
gave for SmolLM2-135M-Instruct.
"""

import json
import math
import os

import numpy as np
import pytest
import tiny
from test_sampling import TOKENIZER
from test_server import Fake, fast

from cai_utils.dialogue import render
from cai_utils.lm import backends, models, replies
from cai_utils.lm.sampling import Sampler
from cai_utils.lm.tokens import text_ids

TEXT, BIRDS = "Is it ü or", [" 🦜", " 🦏"]
SHOWN = {
    "": lambda part, last: last,  # vLLM: the whole character in its last token
    "\ufffd": lambda part, last: "\ufffd",  # SGLang
    "raw": lambda part, last: "".join(chr(0x100 + byte) for byte in part),
}


class Parts(Fake):
    """A server whose vocabulary has words, and for other characters two bytes a token. The tokens
    behind TEXT have the log-probabilities of `told`, in turn; all others -1."""

    def __init__(self, tells, shown="", told=None, ids=False, change=lambda answer: answer):
        super().__init__(tells=None)
        self.way, self.shown, self.ids, self.change = tells, shown, ids, change
        self.told = told or {" 🦜": [-2.0, -0.1, -0.1], " 🦏": [-0.5, -0.1, -0.1]}

    def split(self, text):
        out = []
        for word in text.replace(" ", "\n ").split("\n"):
            if word.isascii():
                out.append((word.encode(), word))
                continue
            data = word.encode()
            parts = [data[k : k + 2] for k in range(0, len(data), 2)]
            for k, part in enumerate(parts):
                last = word if k == len(parts) - 1 else ""
                out.append((part, SHOWN[self.shown](part, last)))
        return out

    def completion(self, path, body):
        tokens = self.split(body["prompt"])
        numbers = self.told.get(body["prompt"].removeprefix(TEXT), [])
        logprobs = [None] + [-1.0] * (len(tokens) - 1 - len(numbers)) + numbers
        choice = {"index": 0, "text": "a"}
        if self.way == "echo" and body.get("echo"):
            choice["logprobs"] = {"tokens": [shown for _, shown in tokens] + ["a"],
                                  "token_logprobs": [*logprobs, -3.0]}  # fmt: skip
            if self.ids:
                choice["prompt_token_ids"] = [int.from_bytes(part) for part, _ in tokens]
        if self.way == "prompt_logprobs" and "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [
                None if logprob is None
                else {int.from_bytes(part): {"logprob": logprob, "decoded_token": shown}}
                for (part, shown), logprob in zip(tokens, logprobs, strict=True)]
        return self.change({"choices": [choice], "usage": {"completion_tokens": 1}})


@pytest.mark.parametrize("shown", list(SHOWN))
@pytest.mark.parametrize("tells, ids", [("echo", False), ("echo", True), ("prompt_logprobs", True)])
def test_choices_whose_characters_are_several_tokens(tells, shown, ids):
    with Parts(tells, shown, ids=ids) as server:
        got = np.exp(fast(server.url).choice_logprobs([TEXT, TEXT], BIRDS))
    # exp(-2.2) : exp(-0.7)
    np.testing.assert_allclose(got, [[0.18243, 0.81757]] * 2, atol=1e-5)


@pytest.mark.parametrize("wrong", [
    math.nan, -math.inf, math.inf, None, "-0.5", True, [-0.5], {}, 3.2, -9999.0,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tells", ["echo", "prompt_logprobs"])
def test_numbers_that_are_no_log_probabilities_are_refused(tells, wrong):
    told = {" 🦜": [-2.0, wrong, -0.1], " 🦏": [-0.5, -0.1, -0.1]}
    with Parts(tells, told=told, ids=True) as server:
        with pytest.raises(ValueError, match="text 1: the server gives .* of the choice ' 🦜'"):
            fast(server.url, concurrency=1).choice_logprobs([TEXT[3:], TEXT], BIRDS)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("change", [
    {"logprobs": [-0.5, -0.1]}, {"logprobs": "no"}, {"logprobs": nested(200)},
    {"logprobs": {"tokens": [1, 2], "token_logprobs": [-0.5, -0.1]}},
    {"logprobs": {"tokens": ["a", "b", "c", "d"], "token_logprobs": [-0.5]}},
], ids=lambda change: str(change)[:60])  # fmt: skip
def test_log_probabilities_of_another_form_are_one_clear_error(change):
    def rot(answer):
        if "logprobs" in answer["choices"][0]:
            answer["choices"][0].update(change)
        return answer

    with Parts("echo", change=rot) as server:
        with pytest.raises(ValueError, match="returns no log-probabilities.*the server"):
            fast(server.url).choice_logprobs([TEXT], BIRDS)


def sampled(**choice):
    choice = {"index": 0, "text": "b", "finish_reason": "stop"} | choice
    return lambda answer: {"choices": [choice]}


@pytest.mark.parametrize("change, said", [
    (sampled(logprobs=[-0.5]), "a completion in a form that is not OpenAI's"),
    (sampled(logprobs={"content": [{}]}), "a completion in a form that is not OpenAI's"),
    (sampled(logprobs={"token_logprobs": ["-0.5"]}), "'-0.5' as log-probability"),
    (sampled(logprobs={"token_logprobs": [math.nan]}), "nan as log-probability"),
    (sampled(logprobs={"token_logprobs": [3.0]}), "3.0 as log-probability"),
    (sampled(logprobs={"token_logprobs": [-9999.0]}), "-9999.0 as log-probability"),
    (sampled(finish_reason="abort"), "broke a completion off .*'abort'"),
    (sampled(finish_reason="error"), "broke a completion off .*'error'"),
    (sampled(logprobs={"token_logprobs": nested(200)}), "as log-probability"),
])  # fmt: skip
def test_a_completion_with_rotten_numbers_is_named(change, said):
    with Parts("echo", change=change) as server:
        with pytest.raises(ValueError, match=f"input 0: .*{said}"):
            fast(server.url).generate(["a"])


@pytest.mark.parametrize("given, stops, reason", [
    ("stop", (), "eos"), ("stop", ("x",), "stop"), ("length", ("x",), "length"),
    ("eos_token", (), "eos"), ("content_filter", ("x",), "content_filter"),
    ("tool_calls", (), "tool_calls")])
def test_how_a_completion_ended(given, stops, reason):
    choice = {"text": "b", "finish_reason": given}
    assert replies.completion(choice, True, stops) == ("b", [], reason)


def test_content_that_is_no_text_is_named():
    for content in (["b"], 3, {"text": "b"}):
        with pytest.raises(ValueError, match="which is no text"):
            replies.completion({"message": {"content": content}}, False)


@pytest.mark.parametrize("status", [200, 400])
def test_json_that_cannot_be_read_is_one_clear_error(status):
    for raw in (b"[" * 200_000, b'{"choices": [' + b"9" * 5000 + b"]}"):
        class Deep(Fake):
            def answer(self, handler, number, path, body, raw=raw):
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(raw)))
                handler.end_headers()
                handler.wfile.write(raw)

        with Deep(tells=None) as server:
            error, said = {200: (ConnectionError, "failed 2 times .* no completion"),
                           400: (ValueError, "input 0: .*HTTP 400")}[status]
            with pytest.raises(error, match=said):
                fast(server.url, tries=2).generate(["a"])


def test_the_choice_with_index_0_is_the_answer():
    other = {"index": 1, "text": "wrong", "finish_reason": "stop"}
    with Parts("echo", change=lambda a: {"choices": [other, *a["choices"]]}) as server:
        assert fast(server.url).generate(["a"])[0][0].text == "a"


# Token ids: the tokenizer is known


class ByIds(Fake):
    """A server of the tiny model that counts tokens, and takes ids as prompts or refuses them."""

    def __init__(self, tokenizer=TOKENIZER, ids=True, tells="prompt_logprobs"):
        super().__init__(tells=tells)
        self.tokenizer, self.ids = tokenizer, ids

    def completion(self, path, body):
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        if isinstance(prompt, list) and not self.ids:
            return None
        if "echo" in body or "prompt_logprobs" in body:
            answer = self.scored(ids, body)
        else:
            answer = {"choices": [{"text": "a", "finish_reason": "stop"}]}
        return answer | {"usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("tells", ["echo", "prompt_logprobs"])
def test_with_a_tokenizer_choices_are_those_of_the_local_model(tells, ids):
    texts, choices = ["\n\na: b (A) or (B).", "x", "q" * 30], [" (A)", " (B)", " a long choice"]
    with ByIds(ids=ids, tells=tells) as server:
        local, there = Sampler(server.model, TOKENIZER), fast(server.url, tokenizer=TOKENIZER)
        np.testing.assert_allclose(there.choice_logprobs(texts, choices),
                                   local.choice_logprobs(texts, choices), atol=1e-5)
        sent = {type(body["prompt"]) for body in server.served if "seed" not in body}
        assert sent == ({str, list} if ids else {str})
        if ids:  # "xa" + "b" is x|ab in one text, but a sampler goes on behind x|a
            args = ["x", "xa"], ["b", "cd"]
            np.testing.assert_allclose(there.choice_logprobs(*args), local.choice_logprobs(*args),
                                       atol=1e-5)


def closing_tokenizer():
    """One that puts `<s>` before a text and `</s>` behind it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
                               "{% endfor %}:")
    return tokenizer


def test_prompts_are_sent_as_the_ids_that_a_local_model_reads():
    closing, talk = closing_tokenizer(), [{"role": "user", "content": "Hi"}]
    want = [[1, *closing("ab", add_special_tokens=False)["input_ids"]],
            closing("<s>Hi:", add_special_tokens=False)["input_ids"]]
    with ByIds(closing) as server:
        fast(server.url, tokenizer=closing, concurrency=1).generate(["ab", talk])
        assert [body["prompt"] for body in server.asked[2:]] == want
    assert want == text_ids(["ab", render(talk, closing)], closing)
    with ByIds(closing, ids=False) as server:  # as text they would end in </s>
        with pytest.raises(ValueError, match="input 0: .*takes no token ids"):
            fast(server.url, tokenizer=closing).generate(["ab"])
    plain = tiny.tokenizer()
    with ByIds(plain, ids=False) as server:
        fast(server.url, tokenizer=plain).generate(["ab"])
        assert server.asked[-1]["prompt"] == "ab"
    with ByIds(TOKENIZER) as server:  # another vocabulary: ids would mean other words there
        fast(server.url, tokenizer=plain).generate(["ab"])
        assert server.asked[-1]["prompt"] == "ab"


def test_filters_that_a_server_applies_by_itself_are_turned_off():
    with Fake(tells=None) as server:
        fast(server.url).generate(["a"])
        wanted = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert wanted.items() <= server.asked[-1].items()
    with Fake(lambda _, body: "400" if "top_k" in body else None, tells=None) as server:
        fast(server.url, concurrency=1).generate(["a", "b"])
        assert [("top_k" in body) for body in server.asked] == [True, False, False]


# Parameters of a served model


def test_parameters_of_a_served_model_are_told_or_refused(tmp_path):
    folder, free = models.resolve("miniature/xs"), "server:http://127.0.0.1:1/v1#"
    want = models.parameters(folder)
    assert models.parameters(f"{free}{folder}") == want
    assert models.parameters(f"{free}m;parameters=1.3e9") == 1_300_000_000
    spec = f"{free}m;tokenizer=miniature/xs;parameters=77"
    assert models.parameters(spec) == 77
    assert models.resolve(spec) == f"{free}m;tokenizer=miniature/xs"
    assert backends.from_spec(spec).model == "m"
    for number in ("0", "many", "1e999", "-3", ""):
        with pytest.raises(ValueError, match="is not a number of parameters"):
            models.parameters(f"{free}m;parameters={number}")
    with pytest.raises(ValueError, match="not tell .*no server answers.*;parameters="):
        models.parameters(f"{free}m")
    with pytest.raises(ValueError, match="server:http://host:port/v1#model"):
        models.parameters(f"{free}m;param=3")
    entry = {"id": "m", "root": str(folder)}

    class Rooted(Fake):
        def models(self):
            return {"data": [{"id": "other", "root": "no/such"}, entry]}

    with Rooted(tells=None) as server:
        spec = f"server:{server.url}#m"
        assert models.parameters(spec) == want
        for root in (None, "m", str(tmp_path)):
            entry["root"] = root
            with pytest.raises(ValueError, match="does not tell.*;parameters="):
                models.parameters(spec)


# A real vLLM

VLLM = {
    "prompt_logprobs": """{"choices": [{"index": 0, "text": ".", "logprobs": null,
        "finish_reason": "length", "stop_reason": null, "prompt_logprobs": [null,
        {"15107": {"logprob": -19.155258178710938, "rank": 40824, "decoded_token": ""}},
        {"116": {"logprob": -5.3838419914245605, "rank": 19, "decoded_token": ""}},
        {"246": {"logprob": -4.32579231262207, "rank": 18, "decoded_token": " 🦜"}},
        {"253": {"logprob": -7.6854071617126465, "rank": 137, "decoded_token": " a"}}]}],
        "usage": {"prompt_tokens": 5, "total_tokens": 6, "completion_tokens": 1}}""",
    "echo": """{"choices": [{"index": 0, "text": "Is 🦜 a.", "logprobs": {
        "text_offset": [0, 2, 2, 2, 4, 6], "token_logprobs": [null, -19.155258178710938,
        -5.3838419914245605, -4.32579231262207, -7.6854071617126465, -3.7639620304107666],
        "tokens": ["Is", "", "", " 🦜", " a", "."]}, "finish_reason": "length",
        "stop_reason": null, "prompt_logprobs": [null]}],
        "usage": {"prompt_tokens": 5, "total_tokens": 6, "completion_tokens": 1}}""",
}
SAMPLED = """{"index": 0, "text": ".b.", "logprobs": {"text_offset": [0, 1, 2], "token_logprobs":
    [-3.7639620304107666, -3.174797534942627, -0.5155786275863647], "tokens": [".", "b", "."]},
    "finish_reason": "length", "stop_reason": null, "token_ids": null}"""


@pytest.mark.parametrize("way", list(VLLM))
def test_what_vllm_said_of_a_prompt(way):
    tokens = replies.prompt_tokens(json.loads(VLLM[way]), way)
    assert tokens.logprobs[0] is None and tokens.pieces[1:] == ["", "", " 🦜", " a"]
    assert replies.choice_span(tokens, "Is", " 🦜 a") == (1, 5)
    assert replies.choice_span(tokens, "Is 🦜", " a") == (4, 5)
    assert replies.choice_span(tokens, "Is ", "🦜 a") is None  # the space belongs to the bird
    text, logprobs, reason = replies.completion(json.loads(SAMPLED), True, ("b",))
    assert (text, reason, len(logprobs)) == (".", "stop", 3)


@pytest.mark.skipif("CAI_TEST_SERVER" not in os.environ, reason="CAI_TEST_SERVER names no running "
                    "vLLM: server:URL#MODEL;tokenizer=FOLDER, the folder that it serves in float32")
def test_a_running_vllm_says_what_the_local_engine_says():
    spec = os.environ["CAI_TEST_SERVER"]
    there = [backends.from_spec(spec), backends.from_spec(spec.partition(";")[0])]
    local = Sampler.from_spec(spec.partition("tokenizer=")[2], dtype="float32", device="cpu")
    inputs = [[{"role": "user", "content": "Name three birds."}], "The capital of France is"]
    choices = [" 🦜", " 🦏", " dog"]
    texts, want = (s.generate(inputs, temperature=0, max_new_tokens=24) for s in (there[0], local))
    assert [row[0].text for row in texts] == [row[0].text for row in want]
    for server in there:
        np.testing.assert_allclose(server.choice_logprobs(["It is a"], choices),
                                   local.choice_logprobs(["It is a"], choices), atol=1e-3)
