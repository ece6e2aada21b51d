"""Requests to an OpenAI-compatible server, with retries.

The key, where a server wants one, is read from the environment variable `CAI_API_KEY` when a
request is sent. It is in no attribute, log or message, which the official `openai` client cannot
promise (LOG.md, 2026-11-27, has what else keeps this module from being that client).
"""

from __future__ import annotations

import email.utils
import os
import random
import time
from urllib.parse import urlsplit

import httpx

KEY = "CAI_API_KEY"
_MOST_WAIT = 60.0  # seconds between two tries; a server's Retry-After may ask for ten times that
_NO_COMPLETION = (LookupError, TypeError, AttributeError)


class Endpoint:
    """One model on one server.

    url: up to /v1. timeout: seconds without a byte from the server after which a request is
    repeated. tries: how often one is sent before the work ends with an error. backoff: seconds
    before the second try, doubled from then on; a Retry-After header takes precedence.
    """

    def __init__(self, url, model, *, connections=16, timeout=600.0, tries=8, backoff=0.5):
        check_url(url)
        self.url, self.model, self.tries, self.backoff = url, model, tries, backoff
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None),
            limits=httpx.Limits(max_connections=connections),
            # A proxy cannot reach a server on this machine.
            trust_env=not local,
        )
        self._alive = False

    def post(self, path, body, halt, tries=None):
        """The server's answer, which holds at least one choice. Retries, with growing pauses, after
        429, 5xx, a timeout, a dropped connection and a truncated answer. halt: an Event that ends
        the retries.

        ValueError for a request that is refused; ConnectionError after `tries`.
        """
        tries = tries or self.tries
        self._reach()
        pause = 0.0
        for attempt in range(tries):
            if halt.wait(pause):
                raise ConnectionError("given up: another request had failed")
            pause = min(_MOST_WAIT, self.backoff * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                response = self._client.post(
                    f"{self.url}/{path}", json={"model": self.model, **body}, headers=_headers()
                )
                if response.status_code == 429 or response.status_code >= 500:
                    pause = _retry_after(response) or pause
                    why = f"HTTP {response.status_code}: {_message(response)}"
                elif response.status_code != 200:
                    raise ValueError(
                        f"{self.url} refuses it for {self.model} (HTTP {response.status_code}): "
                        f"{_message(response)}"
                    )
                else:
                    why = "an answer that is no completion"
                    answer = _json(response)
                    answer["choices"].sort(key=lambda choice: choice.get("index") or 0)
                    choice = answer["choices"][0]
                    reply = choice["message"] if "chat" in path else choice["text"]
                    if isinstance(reply, dict if "chat" in path else str):
                        return answer
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
            except _NO_COMPLETION:
                pass
        raise ConnectionError(
            f"{self.url} failed {tries} times on one request, at last with {_hidden(why)}; "
            "what is finished is kept: look at the server, then run this again"
        )

    def root(self):
        """What the server says that it loaded for this model (vLLM: a folder or a hub id), or None.
        ConnectionError where no server answers."""
        self._reach()
        try:
            found = _json(self._client.get(f"{self.url}/models", headers=_headers()))
        except httpx.HTTPError:
            return None
        for entry in found.get("data") or () if isinstance(found, dict) else ():
            if isinstance(entry, dict) and entry.get("id") == self.model:
                return entry.get("root")
        return None

    def _reach(self):
        """Checks once, and quickly, that there is a server at all."""
        for attempt in range(3):
            if self._alive:
                return
            try:
                self._client.get(f"{self.url}/models", headers=_headers())
                self._alive = True
            except (httpx.ReadTimeout, httpx.WriteTimeout):
                self._alive = True  # busy, not dead
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
                time.sleep(self.backoff * 2**attempt)
        if not self._alive:
            raise ConnectionError(
                f"no server answers at {self.url} ({_hidden(why)}); start it, or correct the "
                f"address in server:{self.url}#{self.model}"
            )


def split_spec(spec):
    """`server:URL#model;NAME=VALUE...` -> (url, model, {name: value}), where the names are
    `tokenizer` (a spec) and `parameters` (a number).

    ValueError for another form, and for a URL that holds a key.
    """
    url, _, rest = str(spec).removeprefix("server:").partition("#")
    model, *more = rest.split(";")
    options = dict(part.partition("=")[::2] for part in more)
    try:
        check_url(url)
    except ValueError as error:
        if "keys" in str(error):
            raise
        model = ""
    if not model or not options.keys() <= {"tokenizer", "parameters"}:
        raise ValueError(
            f"{spec}: a server is given as server:http://host:port/v1#model, where model is "
            "the name under which it serves, with ;tokenizer=SPEC or ;parameters=NUMBER behind it "
            "where they are needed"
        )
    return url, model, options


def check_url(url):
    """ValueError for what is no address of a server, and for one that holds a key, which is not
    repeated."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"server:{parts.scheme}://{parts.hostname}...: no keys in a spec, which goes into "
            f"notebooks and records; put the key into the environment variable {KEY}"
        )
    try:
        parts.port  # noqa: B018 (raises)
    except ValueError:
        raise ValueError(f"{url}: its port is not a number from 0 to 65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: a server's address is http://host:port/v1")


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


def _hidden(text):
    """The text with the key hidden, since servers quote requests in their errors."""
    return text.replace(_key(), "***") if _key() else text


def _json(response):
    """What an answer holds; None where it is not JSON, or too deep or too large to be read."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _message(response):
    """A server's error message, in one line."""
    text = _json(response)
    if isinstance(text, dict):
        text = text.get("error", text.get("detail", text.get("message", text)))
        text = text.get("message", text) if isinstance(text, dict) else text
    else:
        text = response.text
    return _hidden(" ".join(str(text).split()))[:300]


def _retry_after(response):
    """Seconds, from a number or a date; None without."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), 10 * _MOST_WAIT)
