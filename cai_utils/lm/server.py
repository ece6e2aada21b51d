"""Sampling and scoring on an OpenAI-compatible server: vLLM, SGLang, llama.cpp, transformers serve.

`server:http://host:port/v1#model` is a model spec like others. Every completion is a request of
its own, with a seed derived from (seed, input, sample): answers may come in any order, and a failed
request is repeated without duplicates. Where the model's tokenizer is known and the server takes
token ids, prompts go as the ids that a local model would read. `endpoint.py` sends the requests,
`replies.py` reads the answers; the key is read from the environment alone.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np

from cai_utils.dialogue import broken, guarded, uses_transcript
from cai_utils.experiment import journal
from cai_utils.lm import models, replies
from cai_utils.lm.completion import (
    Completion,
    check_choices,
    check_inputs,
    check_settings,
    check_texts,
    render_all,
)
from cai_utils.lm.endpoint import Endpoint, Refused, split_spec
from cai_utils.lm.sampling import PromptTooLong
from cai_utils.lm.tokens import continuation_ids, text_ids, without_bos
from cai_utils.lm.transport import Halt
from cai_utils.seeds import stable_int

# What turns off filters of the distribution that a server applies by itself: vLLM those of a
# model's generation_config.json, llama.cpp top_k 40 and min_p 0.05.
UNFILTERED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_LINGER, _SOON = 60.0, 2.0  # seconds for which answers under way are waited for after an error
_NO_TEMPLATE = re.compile(r"(?i)(?:no|provide a|without a|must set a) chat.?template"
                          r"|template.{0,40}(?:not found|not set|not defined|is missing)")
# Other vocabularies need other counts of tokens for it.
_PROBE = "Antidisestablishmentarianism: 31,415 naïve cafés?\n\n  (A) Zwölf; def f(x):\n\treturn"


class Server:
    """One model on one server, with the `generate` and `choice_logprobs` of a `Sampler`.

    tokenizer: the model's own. With it a conversation is rendered here, as for a local model, and
    sent as token ids, or as text where the server takes none. Without one the server renders it if
    it has a chat template, else it is the paper's transcript; form="transcript" or "chat" says
    which without asking. An assistant turn with a given beginning, as in `feedback`, needs a
    tokenizer for chat models. concurrency: requests sent at once. options: of `endpoint.Endpoint`.
    """

    context = None  # known to the server alone

    def __init__(self, url, model, tokenizer=None, *, form=None, concurrency=16, **options):
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.endpoint = Endpoint(self.url, model, connections=concurrency, **options)
        self.tokenizer = tokenizer if tokenizer is not None else _Unknown(self.endpoint, form)
        self.source = ["server", self.url, model]
        self._scoring, self._takes_ids, self._takes_stop = None, None, None
        self._refused = set()  # parameters that the server does not know

    @classmethod
    def from_spec(cls, spec, **options):
        """`server:URL#model`, with `;tokenizer=SPEC` behind it where conversations are to be
        rendered here (SPEC as in `models.resolve`; taken by itself where the model's name is a
        local folder), or `;form=transcript` for a base model whose server does not say that it has
        no chat template. Errors as in `endpoint.split_spec`."""
        url, model, more = split_spec(spec)
        named, form = more.get("tokenizer"), more.get("form")
        if not named and not form and os.path.isfile(os.path.join(model, "tokenizer_config.json")):
            named = model
        tokenizer = models.load_tokenizer(named) if named else None
        return cls(url, model, tokenizer, form=form, **options)

    def __repr__(self):
        return f"Server({self.url!r}, {self.model!r})"

    def generate(
        self, inputs, *, n=1, temperature=1.0, top_p=1.0, max_new_tokens=128, stop=(), seed=0,
        progress=None, rows=None,
    ):  # fmt: skip
        """As `Sampler.generate`, except: `token_ids` are empty, since servers return text;
        `logprobs` are the server's, empty where it returns none; "eos" and "stop" are
        distinguished as far as the server does. The same seed gives the same text if the server
        honours seeds. Filters of the distribution that the server applies by itself are turned off
        (`UNFILTERED`), where it knows them.

        ValueError for what the server refuses (an unknown model, a wrong key), naming the input;
        `PromptTooLong` where that is a prompt beyond the model's context; ConnectionError for a
        server that is down or keeps failing.
        """
        check_settings(n, temperature, top_p, max_new_tokens)
        check_inputs(inputs)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise ValueError("stop string '': it would end every completion at once")
        asked = self._asked(inputs)
        jobs = [(r, s) for r in range(len(asked)) for s in range(n)]
        rows = range(len(asked)) if rows is None else rows
        out = [[None] * n for _ in asked]
        settings = [temperature, top_p, max_new_tokens, list(stop), seed]

        def put(job, value):
            out[job[0]][job[1]] = Completion(*value)

        left, keep = journal.pick_up(
            self.source, jobs,
            lambda job: ["generate", asked[job[0]], rows[job[0]], job[1], settings], put,
        )  # fmt: skip

        def sample(job, halt):
            body = {
                "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "seed": stable_int("server", seed, rows[job[0]], job[1]),
            }  # fmt: skip
            if stop:
                body["stop"] = list(stop)
            completion = self._complete(asked[job[0]], body, halt)
            return [completion.text, [], completion.logprobs, completion.finish_reason]

        names = {job: f"input {job[0]}" for job in left}
        try:
            self._work(left, sample, keep, names, "completion", len(jobs), progress)
        except PromptTooLong as error:
            error.found = [None if None in row else row for row in out]
            raise
        return out

    def choice_logprobs(self, texts, choices, progress=None):
        """As `Sampler.choice_logprobs`, from the log-probabilities that the server returns for
        a prompt's tokens (`prompt_logprobs`, or `echo` with `logprobs`).

        ValueError also for a server that returns none, for numbers that are none, and, where only
        the server can make tokens, for a vocabulary that merges the end of a text with the choice.
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
            found = self._scored(texts[i], choices[i], halt)
            for a, (first, logprobs) in enumerate(found):
                replies.check_logprobs(logprobs, choices[i][a])
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
            self._scoring = self._way_to_score()
        names = {i: f"text {i}" for i in left}
        try:
            self._work(left, score, keep, names, "question", len(texts), progress)
        except PromptTooLong as error:
            error.found = [row if np.isfinite(row).any() else None for row in out]
            raise
        return out

    # Work

    def _work(self, jobs, run, keep, names, unit, total, progress):
        """Runs jobs in threads and keeps each result at once; the first error ends the rest, an
        interrupt (^C) the requests under way, too."""
        halt, waiting = Halt(), iter(jobs)
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
                        job = pending[future]
                        try:
                            value = future.result()
                        except ValueError as error:
                            kind = PromptTooLong if _too_long(error) else ValueError
                            raise kind(f"{names[job]}: {error}") from None
                        keep([job], [value])
                        del pending[future]  # last: an interrupt before it loses nothing
                        bar.update(1)
        except (ValueError, ConnectionError):
            halt.set()  # no more tries, but answers under way are waited for and kept
            pool.shutdown(wait=False, cancel_futures=True)
            # Those that were cancelled in the queue are never done for `wait`.
            sent = [future for future in pending if not future.cancelled()]
            if wait(sent, timeout=_SOON).not_done:
                print(f"{self.url}: a request failed; at most {_LINGER:g} s are waited for the "
                      "answers under way", flush=True)  # fmt: skip
                wait(sent, timeout=_LINGER)
            raise
        finally:
            halt.now()
            pool.shutdown(wait=False, cancel_futures=True)
            for future, job in pending.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    keep([job], [future.result()])

    def _asked(self, inputs):
        """What is sent for each input: token ids, text, or messages where the server is to render
        them."""
        talks = [item for item in inputs if not isinstance(item, str)]
        if talks and isinstance(self.tokenizer, _Unknown) and not uses_transcript(self.tokenizer):
            check_texts(inputs)
            return [item if isinstance(item, str) else guarded(item) for item in inputs]
        texts = render_all(inputs, self.tokenizer)
        check_texts(texts)
        if not self._sends_ids():
            return [self._as_text(text, f"input {r}: ") for r, text in enumerate(texts)]
        asked = text_ids(texts, self.tokenizer)
        for r, ids in enumerate(asked):
            if not ids:
                raise ValueError(f"input {r}, {texts[r]!r}, has no tokens in this vocabulary")
        return asked

    def _sends_ids(self):
        """Whether prompts go as token ids: where the tokenizer is known, is the served model's, and
        the server takes ids and adds none. Found out once."""
        if self._takes_ids is None:
            self._takes_ids = not isinstance(self.tokenizer, _Unknown) and self._try_ids()
        return self._takes_ids

    def _try_ids(self):
        ids = list(self.tokenizer(_PROBE)["input_ids"])
        for prompt, tries in ((_PROBE, None), (ids, 3)):
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            try:
                answer = self.endpoint.post("completions", body, Halt(), tries)
            except (ValueError, ConnectionError) as error:
                down = prompt is _PROBE and isinstance(error, ConnectionError)
                if down or _is_about_the_key(error):
                    raise
                return False
            usage = answer.get("usage")
            if not isinstance(usage, dict) or usage.get("prompt_tokens") != len(ids):
                return False
        return True

    def _as_text(self, text, name=""):
        """A text as it is sent. ValueError where the server's tokenizer makes other tokens of it
        than a local model reads."""
        text = broken(text)
        sent = without_bos(text, self.tokenizer)
        if not isinstance(self.tokenizer, _Unknown):
            ids = list(self.tokenizer(sent)["input_ids"])
            if ids != text_ids([text], self.tokenizer)[0]:
                raise ValueError(
                    f"{name}{self.url} takes no token ids, and from text its tokenizer makes other "
                    "special tokens than the model was trained with (around "
                    f"{text[:24]!r}...{text[-24:]!r}); serve it with vLLM, or load it here"
                )
        return sent

    def _complete(self, asked, body, halt):
        as_text = isinstance(asked, str) or isinstance(asked[0], int)
        path = "completions" if as_text else "chat/completions"
        body = {**body, **UNFILTERED, "logprobs": 1 if as_text else True,
                ("prompt" if as_text else "messages"): asked}  # fmt: skip
        strings = body.get("stop", ())
        for name in self._refused:
            del body[name]
        if strings and self._takes_stop is False:
            del body["stop"]
        answer = None
        while answer is None:
            unsure = "stop" in body and self._takes_stop is None
            try:
                answer = self.endpoint.post(path, body, halt, tries=2 if unsure else None)
            except (ValueError, ConnectionError) as error:
                if _too_long(error):
                    raise
                said = str(error)
                unknown = [p for p in (*UNFILTERED, "logprobs") if p in body and p in said]
                # Texts are cut here anyway, so stop strings that a server refuses are left out:
                # some take four of them, `transformers serve` none with some tokenizers.
                if unsure and ("stop" in said or "HTTP 5" in said):
                    del body["stop"]
                elif unknown:
                    self._refused = self._refused | set(unknown)  # other threads read it
                    for name in unknown:
                        del body[name]
                elif unsure and isinstance(error, ConnectionError):
                    answer = self.endpoint.post(path, body, halt)
                else:
                    raise
        # One request's finding holds for all, unless another was accepted with stop strings.
        if strings and self._takes_stop is None:
            self._takes_stop = "stop" in body
        text, logprobs, reason = replies.completion(
            answer["choices"][0], as_text, strings, answer.get("usage"))
        return Completion(text, [], logprobs, reason)

    def _way_to_score(self):
        """The parameter by which this server returns log-probabilities of a prompt, by trying."""
        refused, probe = "", "1 or 2? (2)"
        if self._sends_ids():
            probe = text_ids([probe], self.tokenizer)[0]
        for way in ("prompt_logprobs", "echo"):  # the first tells token ids
            try:
                # A server that ignores the parameter tells of one token at most, the sampled one.
                if len(self._tokens(probe, Halt(), way).keys) > 1:
                    return way
            except ValueError as error:
                if _is_about_the_key(error):
                    raise
                refused = f". It says: {error}"
        raise ValueError(
            f"{self.url} returns no log-probabilities of a prompt's tokens for {self.model} "
            "(neither `echo` with `logprobs` nor `prompt_logprobs`), so choices cannot be scored "
            f"there; serve the model with vLLM or SGLang, or load it here{refused}"
        )

    def _scored(self, text, choices, halt):
        """For each choice behind a text: what tells its tokens apart, and the log-probability of
        each."""
        way = self._scoring
        if self._sends_ids():
            return self._scored_by_ids(text, choices, halt)
        text = broken(text)
        found = [self._tokens(self._as_text(text + c), halt, way) for c in choices]
        spans = [replies.choice_span(t, text, c) for t, c in zip(found, choices, strict=True)]
        if None in spans:  # letters do not tell where the choices begin
            head = self._tokens(self._as_text(text), halt, way).keys
            spans = [(len(head), len(t.keys)) if t.keys[: len(head)] == head else (0, 0)
                     for t in found]
        for choice, (first, last) in zip(choices, spans, strict=True):
            if first == last:
                raise ValueError(
                    f"the tokens of {self.model} do not end where the text {text[-24:]!r} does "
                    f"before the choice {choice!r}, so the server's numbers are not those of the "
                    "choice; begin it with a space or a mark, name the model's tokenizer "
                    "(;tokenizer=SPEC), or load the model here"
                )
        return [(replies.distinct(t, span, choice), t.logprobs[slice(*span)])
                for t, span, choice in zip(found, spans, choices, strict=True)]

    def _scored_by_ids(self, text, choices, halt):
        ids, out = text_ids([text], self.tokenizer)[0], []
        many = [text] * len(choices), [ids] * len(choices)
        ends = continuation_ids(*many, choices, self.tokenizer)
        for choice, end in zip(choices, ends, strict=True):
            logprobs = self._tokens(ids + end, halt, self._scoring).logprobs
            hidden = len(ids + end) - len(logprobs)  # some do not show the first token
            if not end or hidden not in (0, 1):
                raise ValueError(
                    f"{self.url} tells of {len(logprobs)} tokens where {len(ids + end)} were sent, "
                    f"{len(end)} of them for the choice {choice!r}; look at the server"
                )
            out.append((end, logprobs[len(ids) - hidden :]))
        return out

    def _tokens(self, prompt, halt, way):
        """The `replies.Tokens` of a prompt."""
        ask = {"echo": True, "logprobs": 1} if way == "echo" else {"prompt_logprobs": 0}
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **ask}
        return replies.prompt_tokens(self.endpoint.post("completions", body, halt), way)


def _too_long(error):
    return isinstance(error, Refused) and error.too_long


def _is_about_the_key(error):
    return isinstance(error, Refused) and error.status in (401, 403)


class _Unknown:
    """In place of the tokenizer of a served model when that is not available here."""

    def __init__(self, endpoint, form=None):
        self._endpoint = endpoint
        self._template = {None: None, "chat": "the server's", "transcript": ""}[form]

    @property
    def chat_template(self):
        """Not empty where the server renders conversations itself; requested once, of its chat
        route. Empty, with a printed line, where it says there that the model has no chat template.
        Any other error is raised, with how to ask for the transcript: a wrong key or name or a
        passing fault must not turn a chat model's run into a base model's."""
        if self._template is None:
            url, model = self._endpoint.url, self._endpoint.model
            hello = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            try:
                self._endpoint.post("chat/completions", hello, Halt())
                self._template = "the server's"
            except (ValueError, ConnectionError) as error:
                bare = isinstance(error, Refused) and error.status in (400, 422)
                if bare and _NO_TEMPLATE.search(error.said):
                    print(f"{url}: {model} has no chat template (it says: {error.said[:120]}), so "
                          "conversations go to it as text, 'Human: ... Assistant:'", flush=True)
                    self._template = ""
                else:
                    if not _is_about_the_key(error) and self._endpoint.alive:
                        error.args = (f"{error}. If this server has no chat route, or {model} is a "
                                      "base model, ask for the transcript form: "
                                      f"server:{url}#{model};form=transcript",)
                    raise
        return self._template

    def apply_chat_template(self, *_, **__):
        url, model = self._endpoint.url, self._endpoint.model
        raise ValueError(
            f"{url} applies the chat template of {model} itself, so an answer cannot be begun for "
            f"it; name its tokenizer: server:{url}#{model};tokenizer=FOLDER"
        )
