"""Requests to an OpenAI-compatible server, with retries.

The key, where a server wants one, is read from the environment variable `CAI_API_KEY` when a
request is sent. It is in no attribute, log or message, which the official `openai` client cannot
promise (LOG.md, 2026-11-27, has what else keeps this module from being that client).
`transport.py` sends a request, `replies.py` reads the answer.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import re
import reprlib
import threading
import time
from urllib.parse import urlsplit

import httpx

from cai_utils.experiment import secrets
from cai_utils.lm import replies
from cai_utils.lm.transport import Client, Fault, Halt, Slow

KEY = "CAI_API_KEY"
TIMEOUT = "CAI_SERVER_TIMEOUT"
_MOST_WAIT = 60.0  # seconds between two tries
_MOST_ASKED = 600.0  # seconds that are waited where a server's Retry-After asks for as many or more
_TOLD = 5.0  # seconds from which on a wait is announced
_PASSING = (408, 409, 425, 429)  # and 5xx: the same request may succeed later
# What vLLM, SGLang, llama.cpp, TGI, OpenAI and others say of a prompt beyond the model's context.
_TOO_LONG = re.compile(
    r"(?i)context[ _](?:length|size|window)|exceed_context|max(?:imum)?[ _]model[ _]len"
    r"|maximum allowed length|(?:prompt|input|request) is too long|too (?:long|large) for model"
    r"|`inputs` (?:tokens|must have less)|prompt is too long|reduce the length|too many tokens"
    r"|input tokens exceed")


class Refused(ValueError):
    """A server refuses a request. status: HTTP; said: its message; too_long: whether that names
    the model's context as the reason."""

    def __init__(self, text, status, said):
        super().__init__(text)
        self.status, self.said = status, said
        self.too_long = status in (400, 413, 422) and bool(_TOO_LONG.search(said))


class Endpoint:
    """One model on one server.

    url: up to /v1. timeout: seconds without a byte after which a request is repeated, 600 where
    None; deadline: seconds that one may take altogether, 1800 where None. The environment variable
    `CAI_SERVER_TIMEOUT` replaces both defaults, as on a machine that takes an hour for a long
    answer. tries: how often a request is sent before the work ends with an error. backoff: seconds
    before the second try, doubled from then on up to 60; a Retry-After header takes precedence, up
    to 600. Waits of 5 s and more are printed. ValueError for an address or a time that is none.
    """

    def __init__(self, url, model, *, connections=16, timeout=None, deadline=None, tries=8,
                 backoff=0.5):  # fmt: skip
        check_url(url)
        self.url, self.model, self.tries, self.backoff = url, model, tries, backoff
        given = _seconds_of(TIMEOUT)
        timeout = next(t for t in (timeout, given, 600.0) if t is not None)
        deadline = next(t for t in (deadline, given, 1800.0) if t is not None)
        # A proxy cannot reach a server on this machine.
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._client = Client(connections, timeout, deadline, trust_env=not local)
        self.alive, self._printing, self._told_until = False, threading.Lock(), 0.0

    def post(self, path, body, halt, tries=None):
        """The server's answer, whose "choices" hold one, that with index 0. Retries, with growing
        pauses, after 408, 409, 425, 429, 5xx, a timeout, a dropped connection and an answer that is
        no completion. halt: a `transport.Halt` that ends the retries.

        `Refused`, a ValueError, for a request that is refused; ConnectionError after `tries`.
        """
        tries = tries or self.tries
        self._reach(halt)
        content = _encoded({"model": self.model, **body})
        for attempt in range(tries):
            try:
                return self._answer(path, content, halt)
            except Fault as error:
                fault = error
            if attempt + 1 < tries:
                pause = min(_MOST_WAIT, self.backoff * 2**attempt) * random.uniform(0.75, 1.25)
                pause = self._announced(fault, pause, f"try {attempt + 2} of {tries}")
                if halt.wait(pause):
                    raise ConnectionError("given up: another request had failed")
        raise ConnectionError(
            f"{self.url} failed {tries} times on one request, at last with "
            f"{secrets.hidden(fault)}; what is finished is kept: look at the server, then run this "
            "again"
        )

    def _answer(self, path, content, halt):
        headers = {"Content-Type": "application/json", **_headers()}
        reply = self._client.send("POST", f"{self.url}/{path}", headers, halt, content)
        if reply.status in _PASSING or reply.status >= 500:
            fault = Fault(f"HTTP {reply.status}: {_message(reply)}")
            fault.retry_after = reply.headers.get("Retry-After")
            raise fault
        if reply.status != 200:
            self._refuse(reply)
        answer = _json(reply)
        try:
            answer["choices"] = [replies.first_choice(answer, "chat" in path)]
        except ValueError as error:
            raise Fault(f"{error} ({_message(reply)[:80]!r})") from None
        return answer

    def _refuse(self, reply):
        """Raises what a refusal means, with the mend."""
        said, status = _message(reply), reply.status
        text = f"{self.url} refuses it for {self.model} (HTTP {status}): {said}"
        if status in (401, 403):
            state = "another key in" if _key() else "the key in"
            text += f"; it wants {state} the environment variable {KEY}, or forbids this model"
        elif status == 404:
            text += (f"; look whether the address ends in /v1 and {self.url}/models lists "
                     f"{self.model}")
        elif 300 <= status < 400:
            where = secrets.host(reply.headers.get("Location", ""))
            text += (f"; it redirects to {where}, where the key is not sent: if that is the "
                     "server, write its address into the spec")
        raise Refused(text, status, said)

    def _announced(self, fault, pause, next_try):
        """The seconds to wait after a fault, printed where they are many or the server asks for
        what cannot be kept to; once for all requests that wait until then."""
        asked, wanted = fault.retry_after, None
        note = ""
        if asked is not None:
            wanted = _retry_after(asked)
            shown = secrets.hidden(reprlib.repr(asked))
            note = f" It asks for Retry-After: {shown}"
            if wanted is None:
                note += ", which is no time to come."
            elif wanted > _MOST_ASKED:
                note += f", but at most {_MOST_ASKED:g} s are waited."
            else:
                note += "."
        odd = asked is not None and (wanted is None or wanted > _MOST_ASKED)
        pause = min(wanted, _MOST_ASKED) if wanted else pause
        until = time.monotonic() + pause
        with self._printing:
            if (pause >= _TOLD or odd) and until > self._told_until + _TOLD:
                self._told_until = until
                print(f"{self.url}: {secrets.hidden(fault)}.{note} Waiting {pause:.0f} s before "
                      f"{next_try}", flush=True)  # fmt: skip
        return pause

    def root(self):
        """What the server says that it loaded for this model (vLLM: a folder or a hub id), or None.
        ConnectionError where no server answers."""
        self._reach(Halt())
        try:
            found = _json(self._models(Halt()))
        except Fault:
            return None
        data = found.get("data") if isinstance(found, dict) else None
        for entry in data if isinstance(data, list) else ():
            if isinstance(entry, dict) and entry.get("id") == self.model:
                return entry.get("root")
        return None

    def _models(self, halt):
        return self._client.send("GET", f"{self.url}/models", _headers(), halt, within=10.0)

    def _reach(self, halt):
        """Checks once, and quickly, that there is a server at all."""
        for attempt in range(3):
            if self.alive:
                return
            try:
                self._models(halt)
                self.alive = True
            except Slow:
                self.alive = True  # busy, not dead
                print(f"{self.url} takes connections, but has not answered /models in 10 s; going "
                      "on", flush=True)  # fmt: skip
            except Fault as error:
                why = error
                if halt.wait(self.backoff * 2**attempt):
                    raise ConnectionError("given up: another request had failed") from None
        if not self.alive:
            raise ConnectionError(
                f"no server answers at {self.url} ({secrets.hidden(why)}); start it, or correct "
                f"the address in server:{self.url}#{self.model}"
            )


def split_spec(spec):
    """`server:URL#model;NAME=VALUE...` -> (url, model, {name: value}), where the names are
    `tokenizer` (a spec), `form` (`transcript` or `chat`) and `parameters` (a number).

    ValueError for another form, and for a spec that holds a key.
    """
    spec = str(spec)
    if secrets.held(spec):
        check_url(spec.removeprefix("server:"))  # names the host where it can
        secrets.check(spec, "a server's spec")
    url, _, rest = spec.removeprefix("server:").partition("#")
    model, *more = rest.split(";")
    options = dict(part.partition("=")[::2] for part in more)
    try:
        check_url(url)
    except ValueError:
        model = ""
    if not model or not options.keys() <= {"tokenizer", "form", "parameters"}:
        raise ValueError(
            f"{secrets.hidden(spec)}: a server is given as server:http://host:port/v1#model, where "
            "model is the name under which it serves, with ;tokenizer=SPEC, ;form=transcript or "
            ";parameters=NUMBER behind it where they are needed"
        )
    if options.get("form", "chat") not in ("chat", "transcript") or len(
            options.keys() & {"form", "tokenizer"}) > 1:
        raise ValueError(
            f"{spec}: ;form= is transcript (conversations go as the text 'Human: ... Assistant:', "
            "for base models) or chat (the server renders them), and stands in place of "
            ";tokenizer=SPEC, with which they are rendered here"
        )
    return url, model, options


def check_url(url):
    """ValueError for what is no address of a server, and for one that holds a key, which is not
    repeated."""
    try:
        parts = urlsplit(url)
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        secrets.check(url, "a server's address")
        raise ValueError(f"{secrets.hidden(url)}: a server's address is http://host:port/v1"
                         ) from None
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"server:{parts.scheme}://{parts.hostname}...: no keys in a spec, which goes into "
            f"notebooks and records; put the key into the environment variable {KEY}"
        )
    secrets.check(url, "a server's address")
    try:
        parts.port  # noqa: B018 (raises)
    except ValueError:
        raise ValueError(f"{url}: its port is not a number from 0 to 65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: a server's address is http://host:port/v1")


def _seconds_of(variable):
    """A time that the environment gives, None without. ValueError for one that is none."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"the environment variable {variable} is {text[:40]!r}; give the seconds "
                         "that a request may take, as 7200")
    return seconds


def _key():
    """The key without surrounding whitespace. ValueError, which names the variable alone, for one
    that no header can carry."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {KEY} holds characters that no key has; "
                         "set it anew")
    return key


def _headers():
    return {"Authorization": f"Bearer {_key()}"} if _key() else {}


def _encoded(body):
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("the prompt holds half of a character (a lone surrogate, "
                         f"{error.object[error.start]!r}), which cannot be sent; mend that text"
                         ) from None


def _json(reply):
    """What an answer holds; None where it is not JSON, or too deep or too large to be read."""
    try:
        return json.loads(reply.data)
    except (ValueError, RecursionError):
        return None


def _message(reply):
    """A server's error message, or the beginning of what it sent instead, in one line."""
    text = _json(reply)
    if isinstance(text, dict):
        text = text.get("error", text.get("detail", text.get("message", text)))
        text = text.get("message", text) if isinstance(text, dict) else text
    elif text is None:
        text = reply.data[:2000].decode(errors="replace") or "an empty body"
    return secrets.hidden(" ".join(str(text).split()))[:300]


def _retry_after(value):
    """Seconds from a number or a date, at least 0; None for what is none of them, and for a time
    that is past."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, ArithmeticError):
            return None
    return seconds if seconds >= 0 else None  # NaN is neither
