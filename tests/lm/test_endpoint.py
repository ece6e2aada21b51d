"""What goes wrong between us and a server: times, bodies, refusals, interrupts.

Most tests ask a server made here that sends given bytes.
"""

import contextlib
import email.utils
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_server import Fake, fast

from cai_utils.lm import replies, transport
from cai_utils.lm.endpoint import Endpoint, Refused
from cai_utils.lm.sampling import PromptTooLong
from cai_utils.lm.server import Server
from cai_utils.lm.transport import Halt

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret-0123456789"
GOOD = b'{"choices": [{"index": 0, "text": "b"}]}'


class Raw:
    """A server that answers request k with the bytes `sends[k]`, the last of them from then on, or
    with what `sends[k](socket)` does. GET is answered, too, and not counted."""

    def __init__(self, *sends):
        self.sends, self.asked = sends, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self.answer, args=(self.socket.accept()[0],), daemon=True).start()

    def answer(self, link):
        with link, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += link.recv(65536)
            head, body = request.split(b"\r\n\r\n", 1)
            if head.startswith(b"GET"):
                link.sendall(http(b"{}"))
                return
            length = int(head.lower().split(b"content-length: ")[1].split()[0])
            while len(body) < length:
                body += link.recv(65536)
            self.asked.append(head)
            send = self.sends[min(len(self.asked), len(self.sends)) - 1]
            send(link) if callable(send) else link.sendall(send)


def http(body, status=200, *headers, length=None):
    head = [f"HTTP/1.1 {status} X", "Connection: close", *headers,
            f"Content-Length: {len(body) if length is None else length}"]  # fmt: skip
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Watch(Halt):
    """Notes what is waited for, and does not wait."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        return False


def ask(url, halt=None, **options):
    endpoint = Endpoint(url, "m", **{"backoff": 0.01, "timeout": 5.0, **options})
    return endpoint.post("completions", {"prompt": "a"}, halt or Halt())


@pytest.mark.parametrize("asked, waited, said", [
    ("1e400", 600, "'1e400', but at most 600 s are waited"), ("inf", 600, "at most 600 s"),
    ("a far date", 600, "at most 600 s are waited"), ("86400", 600, "'86400', but at most 600 s"),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 600, "at most 600 s"),
    ("nan", 0.01, "'nan', which is no time to come"), ("-5", 0.01, "'-5', which is no time"),
    ("soon", 0.01, "'soon', which is no time"),
    ("Mon, 01 Jan 0001 00:00:00 -0000", 0.01, "no time"),
    ("Thu, 01 Jan 1970 00:00:00 GMT", 0.01, "no time to come"), ("", 0.01, "no time"),
    ("7", 7, "asks for Retry-After: '7'. Waiting 7 s before try 2 of 8"),
    ("0", 0.01, None), ("1", 1, None), (None, 0.01, None),
])  # fmt: skip
def test_a_wait_is_bounded_and_told(asked, waited, said, capsys):
    if asked == "a far date":
        asked = email.utils.formatdate(time.time() + 1e7, usegmt=True)
    headers = [f"Retry-After: {asked}"] if asked is not None else []
    with Raw(http(b'{"error": "busy"}', 429, *headers), http(GOOD)) as server:
        halt = Watch()
        assert ask(server.url, halt)["choices"][0]["text"] == "b"
    assert halt.pauses == [pytest.approx(waited, rel=0.3)]
    out = capsys.readouterr().out
    if said is None:
        assert not out
    else:
        assert said in out and f"{server.url}: HTTP 429: busy." in out and out.count("\n") == 1


def drip(head):
    def send(link):
        link.sendall(head)
        while True:
            link.sendall(b"x")
            time.sleep(0.05)

    return send


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: ",
], ids=["body", "head"])
def test_a_slow_drip_ends_at_the_deadline_and_is_asked_again(head, monkeypatch):
    with Raw(drip(head), http(GOOD)) as server:
        began = time.monotonic()
        assert ask(server.url, deadline=0.4)["choices"][0]["text"] == "b"
        assert 0.4 <= time.monotonic() - began < 3
    with Raw(drip(head)) as server:
        monkeypatch.setenv("CAI_SERVER_TIMEOUT", "0.3")
        with pytest.raises(ConnectionError, match="failed 2 times .*no whole answer within 0.3 s"):
            ask(server.url, tries=2)
        for wrong in ("soon", "-1", "nan", "1e999"):
            monkeypatch.setenv("CAI_SERVER_TIMEOUT", wrong)
            with pytest.raises(ValueError, match="CAI_SERVER_TIMEOUT is .*give the seconds"):
                ask(server.url)


def reset(link):
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def listed(*indices):
    choices = [{"text": str(i)} | ({} if i == "none" else {"index": i}) for i in indices]
    return http(json.dumps({"choices": choices}).encode())


BOMB = gzip.compress(b" " * 2**20)
BAD = [
    (http(b"", 502), "HTTP 502: an empty body"), (http(b"x", 500), "HTTP 500: x"),
    (http(b'{"error": {"message": "full"}}', 503), "HTTP 503: full"), (http(b"", 408), "HTTP 408"),
    (http(b""), "no completion .'an empty body'"), (http(GOOD[:-9]), "an answer that is no compl"),
    (http(b"<html><body>Sign in</body></html>"), "no completion .'<html><body>Sign in"),
    (http(b'{"error": {"message": "broken"}}'), "an answer that is no completion .'broken'"),
    (http(b"[]"), "no completion"), (http(b'{"choices": {"0": {"text": "a"}}}'), "no completion"),
    (http(b'{"choices": [{"text": ["a"]}]}'), "no completion"), (reset, "ReadError"),
    (http(GOOD, length=1000), "RemoteProtocolError"), (http(GOOD, length=9), "no completion"),
    (http(BOMB, 200, "Content-Encoding: gzip"), "an answer of more than 0.5 MiB"),
    (http(b" " * 2**20 + GOOD), "an answer of more than 0.5 MiB"),
    (http(GOOD, 200, "Content-Encoding: gzip, gzip"), "the encoding 'gzip, gzip'"),
    (http(GOOD, 200, "Content-Encoding: gzip"), "DecodingError"),
    (listed(1), r"the indices \[1\]"), (listed(0, 0), r"the indices \[0, 0\]"),
    (listed("0"), r"the indices \['0'\]"), (listed(0.0), r"indices \[0.0\]"),
    (listed(True, 0), r"the indices \[True, 0\]"), (listed("none", 1), r"indices \[None, 1\]"),
    (listed(2, 0), r"the indices \[2, 0\]"), (listed(-1, 0), r"the indices \[-1, 0\]"),
]  # fmt: skip


@pytest.mark.parametrize("bad, said", BAD, ids=[said for _, said in BAD])
def test_a_bad_answer_is_asked_again_and_in_the_end_named(bad, said, monkeypatch):
    monkeypatch.setattr(transport, "MOST_BYTES", 2**19)
    with Raw(bad, http(GOOD)) as server:
        assert ask(server.url)["choices"][0]["text"] == "b"
        assert len(server.asked) == 2
    with Raw(bad) as server:
        with pytest.raises(ConnectionError, match=f"failed 2 times on one request.*{said}"):
            ask(server.url, tries=2)


def test_choices_are_taken_by_their_index():
    with Raw(listed(1, 2, 0)) as server:
        assert ask(server.url)["choices"] == [{"text": "0", "index": 0}]
    with Raw(http(gzip.compress(GOOD), 200, "Content-Encoding: gzip")) as server:
        assert ask(server.url)["choices"][0]["text"] == "b"

    class Turned(Fake):
        def completion(self, path, body):
            (choice,) = super().completion(path, body)["choices"]
            other = {"index": 1, "text": "other", "message": {"content": "other"}}
            return {"choices": [other, choice | {"index": 0}]}

    talk = [{"role": "user", "content": "Hi"}]
    with Turned(tells=None) as fake:
        got = fast(fake.url).generate([talk, "ab"], n=2)
        assert [c.text for c in got[0]] == ["chat: ['Hi']"] * 2
        assert {c.text[:4] for c in got[1]} == {" ba|"}
        assert len({body["seed"] for body in fake.asked if body.get("prompt")}) == 2


def test_a_redirect_is_named_and_not_followed_with_the_key(monkeypatch):
    monkeypatch.setenv("CAI_API_KEY", KEY)
    with Raw(http(GOOD)) as other:
        place = f"Location: {other.url}/completions?token={KEY}"
        with Raw(http(b"", 307, place)) as server:
            with pytest.raises(Refused, match=f"HTTP 307.*redirects to {other.url[:-3]}, where"):
                ask(server.url)
            assert KEY.encode() in server.asked[0] and not other.asked


REFUSALS = {
    401: "Incorrect API key provided; it wants .* the environment variable CAI_API_KEY",
    403: "Incorrect.*; it wants the key in the environment variable CAI_API_KEY",
    404: "Incorrect.*/v1/models lists m.*;form=transcript", 400: "Incorrect.*;form=transcript",
    422: "Incorrect.*#m;form=transcript", 405: "Incorrect.*#m;form=transcript",
}
TALK = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("status", list(REFUSALS))
def test_a_refused_chat_request_does_not_turn_a_run_into_transcripts(status, monkeypatch):
    monkeypatch.delenv("CAI_API_KEY", raising=False)
    body = b'{"error": {"message": "Incorrect API key provided"}}'
    chat = http(b'{"choices": [{"message": {"content": "c"}, "finish_reason": "stop"}]}')
    with Raw(http(body, status), chat) as server:
        model = fast(server.url)
        with pytest.raises(ValueError, match=f"HTTP {status}.*{REFUSALS[status]}"):
            model.generate([TALK])
        assert len(server.asked) == 1
        assert model.generate([TALK])[0][0].text == "c"  # it was a passing fault


@pytest.mark.parametrize("status, said", [
    (400, "As of transformers v4.44, default chat template is no longer allowed, so you must "
          "provide a chat template if the tokenizer does not define one."),
    (422, "Template error: template not found"),
    (400, "Cannot use chat template functions because tokenizer.chat_template is not set"),
])  # fmt: skip
def test_a_base_model_whose_server_says_so_is_sent_transcripts_and_that_is_told(
        status, said, capsys):
    with Raw(http(json.dumps({"message": said}).encode(), status), http(GOOD)) as server:
        assert fast(server.url).generate([TALK])[0][0].text == "b"
        assert b"/v1/completions" in server.asked[-1]
    assert f"m has no chat template (it says: {said[:60]}" in capsys.readouterr().out


def test_the_form_of_conversations_is_asked_for():
    spec = "server:http://127.0.0.1:1/v1#m"
    assert not Server.from_spec(f"{spec};form=transcript").tokenizer.chat_template
    assert Server.from_spec(f"{spec};form=chat").tokenizer.chat_template
    for more in ("form=", "form=text", "form=chat;tokenizer=miniature/xs"):
        with pytest.raises(ValueError, match=";form= is transcript .* or chat"):
            Server.from_spec(f"{spec};{more}")


@pytest.mark.parametrize("message, more, usage, text", [
    ({"content": ""}, {"finish_reason": "stop"}, None, ""),
    ({"content": None}, {"finish_reason": "stop"}, {"completion_tokens": 1}, ""),
    ({"content": None}, {"finish_reason": "stop", "matched_stop": "x"}, None, ""),
    ({"content": None}, {"finish_reason": "tool_calls"}, None, ""),
    ({"content": None}, {"finish_reason": "content_filter"}, None, ""),
    ({"content": None, "reasoning_content": "So"}, {"finish_reason": "length"}, None, ""),
    ({"content": None, "reasoning": "So"}, {"finish_reason": "length"}, None, ""),
    ({"content": None}, {"finish_reason": "length"}, {"completion_tokens": 9}, None),
    ({"content": None}, {"finish_reason": "stop"}, {"completion_tokens": 9}, None),
    ({"content": None}, {"finish_reason": "stop"}, None, None), ({}, {}, None, None),
    ({"content": [{"type": "text", "text": "a"}]}, {"finish_reason": "stop"}, None, None),
    ({"content": 3}, {"finish_reason": "content_filter"}, None, None),
])  # fmt: skip
def test_content_that_is_no_text_is_refused_and_a_reason_makes_null_empty(
        message, more, usage, text):
    choice = {"message": message, **more}
    if text is not None:
        assert replies.completion(choice, False, (), usage)[0] == text
    else:
        with pytest.raises(ValueError, match="which is no text; look at the server"):
            replies.completion(choice, False, (), usage)


@pytest.mark.parametrize("status, said", [
    (400, "This model's maximum context length is 64 tokens. However, you requested 90 tokens (60 "
          "in the messages, 30 in the completion)."),  # vLLM, SGLang, OpenAI
    (400, "The decoder prompt (length 90) is longer than the maximum model length of 64."),
    (400, "request (90 tokens) exceeds the available context size (64 tokens)"),  # llama.cpp
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64. Given: 60 "
          "`inputs` tokens and 30 `max_new_tokens`"),  # TGI
    (422, "Input validation error: `inputs` must have less than 64 tokens. Given: 90"),
    (400, "The input (90 tokens) is longer than the model's context length (64 tokens)."),  # SGLang
    (400, "Input length (90 tokens) exceeds the maximum allowed length (64 tokens)."),
    (400, "prompt is too long: 90 tokens > 64 maximum"), (413, "context_length_exceeded"),
    (400, "Input tokens exceed the configured limit of 64 tokens."),
])  # fmt: skip
def test_a_prompt_beyond_the_context_is_told_apart(status, said):
    with Raw(http(json.dumps({"error": {"message": said}}).encode(), status)) as server:
        with pytest.raises(PromptTooLong, match=f"input 0: .*HTTP {status}"):
            fast(server.url).generate(["a"])
        assert len(server.asked) == 1


# ^C

WAITS = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
class Any(types.ModuleType):  # torch takes seconds to import, and none of it is needed
    def __getattr__(self, name):
        return type(name, (ValueError,), {})
for name in ("models", "sampling", "tokens"):
    sys.modules["cai_utils.lm." + name] = Any(name)
import cai_utils.lm
cai_utils.lm.models = sys.modules["cai_utils.lm.models"]
from cai_utils.experiment.journal import recording
from cai_utils.lm.server import Server
Server._sends_ids, Server._as_text = lambda self: False, lambda self, text, name="": text
with recording(PATH, 1):
    Server(URL, "m").generate([f"text {i}" for i in range(20)])
"""


def hangs_from(number):
    """A server that answers `number` requests; the event is set when all the others are there."""
    hung = threading.Event()

    def fault(k, body):
        if k >= number:
            if k >= number + 15:
                hung.set()
            time.sleep(30)

    return Fake(fault, tells=None), hung


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_script_that_waits_for_a_hanging_server(sent, tmp_path):
    fake, hung = hangs_from(4)
    path = tmp_path / "x.partial"
    code = WAITS.replace("PATH", repr(str(path))).replace("URL", repr(fake.url))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE,
                             env={**os.environ, "CAI_API_KEY": ""})  # fmt: skip
    try:
        assert hung.wait(30)
        time.sleep(0.3)
        began = time.monotonic()
        child.send_signal(sent)
        said = child.communicate(timeout=20)[1].decode()
        assert time.monotonic() - began < 5
    finally:
        child.kill()
        fake.http.server_close()
    if sent == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt") and "destroyed" not in said
    assert len(path.read_text().splitlines()) == 1 + 4


def test_an_interrupted_kernel_goes_on_with_nothing_left_of_the_requests(tmp_path):
    from jupyter_client.manager import start_new_kernel

    fake, hung = hangs_from(4)
    path = tmp_path / "x.partial"
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        code = WAITS.replace("PATH", repr(str(path))).replace("URL", repr(fake.url))
        asked, message = client.execute(code, stop_on_error=False), None
        assert hung.wait(30)
        began = time.monotonic()
        manager.interrupt_kernel()
        while message is None or message["parent_header"]["msg_id"] != asked:
            message = client.get_shell_msg(timeout=20)  # late answers to the start come before
        reply = message["content"]
        assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
        assert time.monotonic() - began < 5
        left = ("import threading, time; end = time.time() + 5\n"
                "while any('ThreadPool' in t.name for t in threading.enumerate()):\n"
                "    assert time.time() < end; time.sleep(0.05)")
        reply = client.execute_interactive(left, timeout=20, output_hook=lambda _: None)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        manager.shutdown_kernel(now=True)
        client.stop_channels()
        fake.http.server_close()
    assert len(path.read_text().splitlines()) == 1 + 4
