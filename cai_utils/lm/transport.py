"""One HTTP request that ends: in bounded time, with a bounded answer, and at once when told to.

Requests run on an event loop in a thread of its own, where they can be cancelled. A blocking read
cannot: it would hold a server's slow bytes for ever, and the interpreter at its exit.
"""

from __future__ import annotations

import asyncio
import threading
from typing import NamedTuple

import httpx

from cai_utils.experiment import secrets

MOST_BYTES = 2**26  # of an answer: 64 MiB, log-probabilities of 100,000 tokens are a tenth
_POLL = 0.2  # seconds in which a thread that waits for an answer notices that it is to stop
_ENCODINGS = ("", "identity", "gzip", "deflate")

_start = threading.Lock()
_running = None  # (loop, its thread)


class Fault(Exception):
    """A request failed, and may succeed when it is sent again. retry_after: the server's header,
    None without."""

    retry_after = None


class Slow(Fault):
    """The server is there and did not answer in time."""


class Stopped(ConnectionError):
    """The request was given up, as the work that wanted it has ended."""


class Halt(threading.Event):
    """Set: no more tries. After `now` the requests under way end, too."""

    cut = False

    def now(self):
        self.cut = True
        self.set()


class Reply(NamedTuple):
    status: int
    headers: httpx.Headers
    data: bytes


class Client:
    """Sends requests, at most `connections` at once.

    timeout: seconds without a byte after which one fails; deadline: seconds that it may take
    altogether. trust_env: whether proxies of the environment are used. ValueError for a proxy that
    is none. Redirects are not followed: they would carry the key to another host.
    """

    def __init__(self, connections, timeout, deadline, trust_env):
        self._options = {
            "timeout": httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None),
            "limits": httpx.Limits(max_connections=connections),
            "trust_env": trust_env,
        }
        self.deadline, self._lock = deadline, threading.Lock()
        self._loop, self._client = None, self._open()

    def _open(self):
        try:
            return httpx.AsyncClient(**self._options)
        except (ValueError, httpx.InvalidURL) as error:
            raise ValueError("a proxy variable of the environment holds no address: "
                             f"{secrets.hidden(error)}; set it anew") from None

    def send(self, method, url, headers, halt, content=None, within=None):
        """A `Reply`. content: the body, bytes; within: seconds, where fewer than `deadline`.
        `Fault` for a failed request; `Stopped` once `halt.cut`."""
        loop = _event_loop()
        with self._lock:
            if self._loop not in (None, loop):  # in a child of the process that opened it
                self._client = self._open()
            self._loop = loop
        sending = self._send(method, url, headers, content, min(within or 1e9, self.deadline))
        future = asyncio.run_coroutine_threadsafe(sending, loop)
        try:
            while True:
                try:
                    return future.result(_POLL)
                except TimeoutError:
                    if halt.cut:
                        raise Stopped("given up: the work was stopped") from None
        finally:
            future.cancel()  # nothing where it is done; a KeyboardInterrupt ends it here

    async def _send(self, method, url, headers, content, seconds):
        headers = {"Accept-Encoding": "identity", **headers}
        data = bytearray()
        try:
            async with asyncio.timeout(seconds), self._client.stream(
                method, url, headers=headers, content=content
            ) as response:
                encoding = response.headers.get("Content-Encoding", "").strip().lower()
                if encoding not in _ENCODINGS:
                    raise Fault(f"an answer in the encoding {encoding[:40]!r}, which is not read")
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > MOST_BYTES:
                        raise Fault(f"an answer of more than {MOST_BYTES / 2**20:g} MiB")
        except TimeoutError:
            raise Slow(f"no whole answer within {seconds:g} s") from None
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise Slow(f"{type(error).__name__}: not a byte for "
                       f"{self._options['timeout'].read:g} s") from None
        except httpx.HTTPError as error:
            raise Fault(f"{type(error).__name__}: {error}") from None
        return Reply(response.status_code, response.headers, bytes(data))


def _event_loop():
    """The loop that all clients share, in a thread that does not hold the interpreter's exit."""
    global _running
    with _start:
        if _running is None or not _running[1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
            thread.start()
            _running = loop, thread
        return _running[0]
