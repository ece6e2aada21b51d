"""Sampling and scoring on an OpenAI-compatible server: vLLM, SGLang, llama.cpp, transformers serve.

`server:http://host:port/v1#model` is a model spec like others. Every completion is a request of
its own, with a seed derived from (seed, input, sample): answers may come in any order, and a failed
request is repeated without duplicates. `endpoint.py` sends the requests; the key is read from the
environment alone.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import accumulate

import numpy as np

from cai_utils.dialogue import render, uses_transcript
from cai_utils.experiment import journal
from cai_utils.lm import models
from cai_utils.lm.completion import (
    Completion,
    check_choices,
    check_inputs,
    check_settings,
    check_texts,
    render_all,
)
from cai_utils.lm.endpoint import Endpoint, check_url
from cai_utils.lm.tokens import without_bos
from cai_utils.seeds import stable_int

_TAIL = 24  # characters of a text by which its end is found among a server's tokens


class Server:
    """One model on one server, with the `generate` and `choice_logprobs` of a `Sampler`.

    tokenizer: the model's own. With it a conversation is rendered here and sent as text, as for a
    local model. Without one the server renders it if it has a chat template, else it is the paper's
    transcript; an assistant turn with a given beginning, as in `feedback`, needs a tokenizer for
    chat models. concurrency: requests sent at once. options: of `endpoint.Endpoint`.
    """

    context = None  # known to the server alone

    def __init__(self, url, model, tokenizer=None, *, concurrency=16, **options):
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.endpoint = Endpoint(self.url, model, connections=concurrency, **options)
        self.tokenizer = tokenizer if tokenizer is not None else _Unknown(self.endpoint)
        self.source = ["server", self.url, model]
        self._scoring, self._gives_logprobs, self._takes_stop = None, True, None

    @classmethod
    def from_spec(cls, spec, **options):
        """`server:URL#model`, with `;tokenizer=SPEC` behind it where conversations are to be
        rendered here (SPEC as in `models.resolve`; taken by itself where the model's name is a
        local folder). ValueError for another form, and for a URL that holds a key."""
        url, _, rest = str(spec).removeprefix("server:").partition("#")
        model, _, named = rest.partition(";tokenizer=")
        try:
            check_url(url)
        except ValueError as error:
            if "keys" in str(error):
                raise
            model = ""
        if not model:
            raise ValueError(
                f"{spec}: a server is given as server:http://host:port/v1#model, where model is "
                "the name under which it serves"
            )
        if not named and os.path.isfile(os.path.join(model, "tokenizer_config.json")):
            named = model
        tokenizer = models.load_tokenizer(named) if named else None
        return cls(url, model, tokenizer, **options)

    def __repr__(self):
        return f"Server({self.url!r}, {self.model!r})"

    def generate(
        self, inputs, *, n=1, temperature=1.0, top_p=1.0, max_new_tokens=128, stop=(), seed=0,
        progress=None,
    ):  # fmt: skip
        """As `Sampler.generate`, except: `token_ids` are empty, since servers return text;
        `logprobs` are the server's, empty where it returns none; "eos" and "stop" are
        distinguished as far as the server does. The same seed gives the same text if the server
        honours seeds.

        ValueError for what the server refuses (a prompt beyond its context, an unknown model),
        naming the input; ConnectionError for a server that is down or keeps failing.
        """
        check_settings(n, temperature, top_p, max_new_tokens)
        check_inputs(inputs)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise ValueError("stop string '': it would end every completion at once")
        asked = self._rendered(inputs)
        jobs = [(r, s) for r in range(len(asked)) for s in range(n)]
        out = [[None] * n for _ in asked]
        settings = [temperature, top_p, max_new_tokens, list(stop), seed]

        def put(job, value):
            out[job[0]][job[1]] = Completion(*value)

        left, keep = journal.pick_up(
            self.source, jobs, lambda job: ["generate", asked[job[0]], *job, settings], put
        )

        def sample(job, halt):
            body = {
                "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "seed": stable_int("server", seed, *job),
            }  # fmt: skip
            if stop:
                body["stop"] = list(stop)
            completion = self._complete(asked[job[0]], body, halt)
            return [completion.text, [], completion.logprobs, completion.finish_reason]

        names = {job: f"input {job[0]}" for job in left}
        self._work(left, sample, keep, names, "completion", len(jobs), progress)
        return out

    def choice_logprobs(self, texts, choices, progress=None):
        """As `Sampler.choice_logprobs`, from the log-probabilities that the server returns for
        a prompt's tokens (`echo` with `logprobs`, or `prompt_logprobs`).

        ValueError also for a server that returns none, and where its vocabulary merges the end of
        a text with the choice.
        """
        check_inputs(texts)
        texts = render_all(texts, self.tokenizer)
        check_texts(texts)
        choices = check_choices(texts, choices)
        for i, options in enumerate(choices):
            if "" in options:
                raise ValueError(f"text {i}: the choice '' is empty; drop it")
        out = np.full((len(texts), max(map(len, choices))), -np.inf)

        def put(i, row):
            out[i, : len(row)] = row

        left, keep = journal.pick_up(
            self.source, list(range(len(texts))), lambda i: ["choices", texts[i], choices[i]], put
        )

        def score(i, halt):
            found = [self._score(texts[i], choice, halt) for choice in choices[i]]
            for a, (first, _) in enumerate(found):
                for b, (second, _) in enumerate(found):
                    if a != b and second[: len(first)] == first:
                        raise ValueError(
                            f"the tokens of choice {choices[i][a]!r} begin those of "
                            f"{choices[i][b]!r}, so their probabilities overlap; end both with a "
                            "mark, as in ' (A)'"
                        )
            row = np.array([sum(logprobs) for _, logprobs in found])
            return (row - np.logaddexp.reduce(row)).tolist()

        if left and self._scoring is None:
            # Characters that are several tokens cannot be found again in a server's answer.
            probe = texts[left[0]][-200:] + choices[left[0]][0]
            self._scoring = self._way_to_score(probe if probe.isascii() else "1 or 2? (2)")
        names = {i: f"text {i}" for i in left}
        self._work(left, score, keep, names, "question", len(texts), progress)
        return out

    # Work

    def _work(self, jobs, run, keep, names, unit, total, progress):
        """Runs jobs in threads and keeps each result at once; the first error ends the rest."""
        halt, waiting = threading.Event(), iter(jobs)
        pool = ThreadPoolExecutor(self.concurrency)
        pending = {}
        try:
            with journal.progress(total, unit, progress, total - len(jobs)) as bar:
                while True:
                    for job in waiting:
                        pending[pool.submit(run, job, halt)] = job
                        if len(pending) >= 2 * self.concurrency:
                            break
                    if not pending:
                        return
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        job = pending.pop(future)
                        try:
                            value = future.result()
                        except ValueError as error:
                            raise ValueError(f"{names[job]}: {error}") from None
                        keep([job], [value])
                        bar.update(1)
        except (ValueError, ConnectionError):
            halt.set()  # no more tries, but pending answers are waited for and kept
            pool.shutdown(cancel_futures=True)
            for future, job in pending.items():
                if not future.cancelled() and future.exception() is None:
                    keep([job], [future.result()])
            raise
        finally:
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _rendered(self, inputs):
        """Texts, or messages where the server is to render them."""
        here = not isinstance(self.tokenizer, _Unknown)
        asked = [
            item if not isinstance(item, str) and not here and not uses_transcript(self.tokenizer)
            else render(item, self.tokenizer) for item in inputs
        ]  # fmt: skip
        check_texts(asked)
        return [without_bos(a, self.tokenizer) if isinstance(a, str) else a for a in asked]

    def _complete(self, asked, body, halt):
        as_text = isinstance(asked, str)
        path = "completions" if as_text else "chat/completions"
        body = {**body, ("prompt" if as_text else "messages"): asked}
        strings = body.get("stop", ())
        if self._gives_logprobs:
            body["logprobs"] = 1 if as_text else True
        if strings and self._takes_stop is False:
            del body["stop"]
        answer = None
        while answer is None:
            unsure = "stop" in body and self._takes_stop is None
            try:
                answer = self.endpoint.post(path, body, halt, tries=2 if unsure else None)
            except (ValueError, ConnectionError) as error:
                # Texts are cut here anyway, so stop strings that a server refuses are left out:
                # some take four of them, `transformers serve` none with some tokenizers.
                if unsure and ("stop" in str(error) or "HTTP 5" in str(error)):
                    del body["stop"]
                elif "logprobs" in body and "logprobs" in str(error):
                    self._gives_logprobs = False
                    del body["logprobs"]
                elif unsure and isinstance(error, ConnectionError):
                    answer = self.endpoint.post(path, body, halt)
                else:
                    raise
        # One request's finding holds for all, unless another was accepted with stop strings.
        if strings and self._takes_stop is None:
            self._takes_stop = "stop" in body
        choice = answer["choices"][0]
        text = choice["text"] if as_text else choice["message"].get("content") or ""
        given = choice.get("logprobs") or {}
        logprobs = given.get("token_logprobs") or [t["logprob"] for t in given.get("content") or ()]
        reason = choice.get("finish_reason")
        found = [at for s in strings if (at := text.find(s)) >= 0]  # some servers leave it in
        named = [choice[k] for k in ("stop_reason", "matched_stop") if k in choice]
        if found or any(isinstance(stop, str) for stop in named):
            text, reason = text[: min(found, default=len(text))], "stop"
        elif reason != "length":
            reason = "stop" if strings and not named else "eos"
        return Completion(text, [], list(logprobs or ()), reason)

    def _way_to_score(self, text):
        """The parameter by which this server returns log-probabilities of a prompt, by trying."""
        refused = ""
        for way in ("echo", "prompt_logprobs"):
            try:
                pieces, _ = self._tokens(text, threading.Event(), way)
            except ValueError as error:
                refused = f". It says: {error}"
                continue
            if text[-_TAIL:] in "".join(pieces):
                return way
        raise ValueError(
            f"{self.url} returns no log-probabilities of a prompt's tokens for {self.model} "
            "(neither `echo` with `logprobs` nor `prompt_logprobs`), so choices cannot be scored "
            f"there; serve the model with vLLM or SGLang, or load it here{refused}"
        )

    def _score(self, text, choice, halt):
        """The tokens of a choice behind a text, and the log-probability of each."""
        pieces, logprobs = self._tokens(text + choice, halt, self._scoring)
        whole, end = "".join(pieces), text[-_TAIL:] + choice
        at = whole.rfind(end) + len(end)
        bounds = {length: k for k, length in enumerate(accumulate(map(len, pieces), initial=0))}
        first, last = bounds.get(at - len(choice)), bounds.get(at)
        if end not in whole or first is None or last is None or None in logprobs[first:last]:
            raise ValueError(
                f"the tokens of {self.model} do not end where the text {text[-_TAIL:]!r} does "
                f"before the choice {choice!r}, so the server's numbers are not those of the "
                "choice; begin it with a space or a mark, or load the model here"
            )
        return pieces[first:last], logprobs[first:last]

    def _tokens(self, text, halt, way):
        """A prompt's tokens as text, and their log-probabilities (the first's is None)."""
        ask = {"echo": True, "logprobs": 1} if way == "echo" else {"prompt_logprobs": 0}
        prompt = without_bos(text, self.tokenizer)
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **ask}
        answer = self.endpoint.post("completions", body, halt)
        choice = answer["choices"][0]
        if way == "echo":
            given = choice.get("logprobs") or {}
            pieces, logprobs = given.get("tokens") or [], given.get("token_logprobs") or []
            made = (answer.get("usage") or {}).get("completion_tokens", 0)
            pieces, logprobs = pieces[: len(pieces) - made], logprobs[: len(pieces) - made]
        else:
            given = choice.get("prompt_logprobs") or answer.get("prompt_logprobs") or []
            given = [next(iter((entry or {}).values()), {}) for entry in given]
            pieces = [entry.get("decoded_token") or "" for entry in given]
            logprobs = [entry.get("logprob") for entry in given]
        marks = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n"})  # raw vocabularies
        pieces = [piece.translate(marks) for piece in pieces]
        rest = "".join(pieces[1:])
        if pieces and not pieces[0] and text.endswith(rest):  # the first may have no text
            pieces[0] = text[: len(text) - len(rest)]
        return pieces, logprobs


class _Unknown:
    """In place of the tokenizer of a served model when that is not available here."""

    def __init__(self, endpoint):
        self._endpoint, self._template = endpoint, None

    @property
    def chat_template(self):
        """Not empty where the server renders conversations itself; requested once."""
        if self._template is None:
            hello = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            try:
                self._endpoint.post("chat/completions", hello, threading.Event())
                self._template = "the server's"
            except ValueError:
                self._template = ""
        return self._template

    def apply_chat_template(self, *_, **__):
        url, model = self._endpoint.url, self._endpoint.model
        raise ValueError(
            f"{url} applies the chat template of {model} itself, so an answer cannot be begun for "
            f"it; name its tokenizer: server:{url}#{model};tokenizer=FOLDER"
        )
