"""Sampling completions, and the log-probabilities of choices, with one local model.

A `Sampler` runs any Hugging Face causal LM (Llama-, Qwen-, GPT-NeoX-, GPT-2-like) on CPU or
CUDA. How it works:

- Prompts are sorted by length and cut into batches by tokens, as many as memory has room for. A
  batch is padded on the left; each distinct prompt is prefilled once, and its keys and values are
  copied to its samples. A prefix that prompts share is computed once too, where that pays.
- A batch that does not fit into memory is halved, and the work goes on.
- Llama, Mistral, Qwen2 and Qwen3 in float32 on a CPU are computed by a fused decoder (`fused.py`)
  where it gives the model's own logits; all others, also with adapters or hooks, by their modules.
- Decoding writes into a key/value cache that is allocated once per batch, or for a large one on a
  CPU a few columns ahead. Finished rows are dropped from the batch once they make up a fifth of it.
- Sampling uses counter-based random numbers (`seeds.uniforms`): completion `s` of input `r`
  has the Philox stream keyed by (seed, r, s), and each token inverts the model's CDF at the next
  number. So the same seed gives the same text whatever the batch size, the order of work or `n`,
  up to the numerics of the dtype.
- Inside a `Run.rows` each finished completion is written to disk at once
  (`experiment/journal.py`).

`backends.from_spec` gives a `Sampler` for a local model, and for a server an object with the
same two methods.
"""

from __future__ import annotations

import contextlib
import gc
import itertools

import numpy as np
import torch

from cai_utils.experiment import journal
from cai_utils.lm import models, tokens
from cai_utils.lm.completion import (
    Completion,
    check_choices,
    check_inputs,
    check_settings,
    check_texts,
    render_all,
)
from cai_utils.lm.engine import SCORE_ELEMENTS, Engine, eval_mode
from cai_utils.lm.kvcache import out_of_memory
from cai_utils.seeds import uniforms


class PromptTooLong(ValueError):
    """A prompt and the tokens asked for behind it are more than the model's context. found: the
    results of the inputs before the error, None where there is none yet; or None."""

    found = None


class Sampler:
    """Samples from, and scores choices under, one causal LM and its tokenizer.

    The model is used live and left as it was found: modules in train mode sample in eval mode and
    go back. `batch_tokens` bounds rows x (prompt + new tokens) of one batch; None takes what fits
    into a quarter of the free memory. `share_prefixes=False` computes every prompt in full.
    ValueError for a model that is not causal or keeps no plain key/value cache.
    """

    def __init__(self, model, tokenizer, batch_tokens=None, share_prefixes=True):
        self.model, self.tokenizer, self.share_prefixes = model, tokenizer, share_prefixes
        self.engine = Engine(model, batch_tokens)
        self.context = self.engine.context
        self.source = None  # a live model may change between two calls: nothing of it is kept
        self._stop_tokens, self._leading = {}, tokens.leading_ids(tokenizer)

    @classmethod
    def from_spec(cls, spec, *, batch_tokens=None, **load):
        """A `Sampler` over `models.load(spec, **load)`; errors as there."""
        sampler = cls(*models.load(spec, **load), batch_tokens=batch_tokens)
        where = models.resolve(spec, load.get("runs_dir"))
        sampler.source = [models.fingerprint(where), str(sampler.model.dtype),
                          load.get("revision"), load.get("quantize")]
        return sampler

    def generate(
        self, inputs, *, n=1, temperature=1.0, top_p=1.0, max_new_tokens=128, stop=(), seed=0,
        progress=None, rows=None,
    ):  # fmt: skip
        """Samples `n` completions of each input: a list of N lists of n `Completion`.

        inputs: N conversations (rendered for this model by `dialogue.render`) or raw texts.
        temperature: 0 is greedy. top_p: the smallest set of most likely tokens that holds this
        probability is kept. stop: strings (or one) that end a completion; one that is a special
        token of the vocabulary works too. progress: as in `journal.progress`. rows: N numbers
        that key the random draws of the inputs, instead of 0 to N-1: with them, a part of a batch
        draws what it would draw in the whole, while other processes sample the rest.
        ValueError for an empty list, an empty prompt, a prompt that fills the model's context, a
        stop string that the vocabulary cannot spell, and logits that are not finite. A completion
        that reaches the end of the context is cut there ("length").
        """
        check_settings(n, temperature, top_p, max_new_tokens)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._stops(stop)
        prompts = self._text_ids(self._texts(inputs))
        limits = [max_new_tokens] * len(prompts)
        for r, ids in enumerate(prompts):
            if self.context is not None:
                if len(ids) >= self.context:
                    raise PromptTooLong(
                        f"input {r}: {len(ids)} tokens fill the model's context of "
                        f"{self.context}; shorten the prompt"
                    )
                limits[r] = min(max_new_tokens, self.context - len(ids))
        jobs = [(r, s) for r in range(len(prompts)) for s in range(n)]
        jobs.sort(key=lambda job: (-len(prompts[job[0]]), job))
        out = [[None] * n for _ in prompts]
        settings = [temperature, top_p, max_new_tokens, list(stop), seed]
        rows = range(len(prompts)) if rows is None else rows

        def put(job, value):
            out[job[0]][job[1]] = Completion(*value)

        left, keep = journal.pick_up(
            self.source, jobs,
            lambda job: ["generate", prompts[job[0]], rows[job[0]], job[1], settings], put,
        )  # fmt: skip

        with journal.progress(len(jobs), "completion", progress, len(jobs) - len(left)) as bar:
            self._sample(left, prompts, limits, rows, settings, keep, bar)
        return out

    def _sample(self, jobs, prompts, limits, rows, settings, keep, bar):
        """Samples the completions `jobs`, pairs (index of a prompt, number of its sample), and
        gives them to `keep`. limits: new tokens at most of each prompt; settings: temperature,
        top_p, max_new_tokens, stop strings, seed; rows: as in `generate`."""
        temperature, top_p, max_new_tokens, stop, seed = settings

        def next_batch(jobs):
            width = len(prompts[jobs[0][0]]) + max_new_tokens
            size = min(self.engine.batch_tokens // width, self._most_rows())
            return jobs[: max(1, size)], width

        def sample(batch):
            done = self._complete(
                [prompts[r] for r, _ in batch],
                [limits[r] for r, _ in batch],
                uniforms(seed, [(rows[r], s) for r, s in batch], max_new_tokens)
                if temperature > 0 else None,
                temperature, top_p, tuple(stop),
            )  # fmt: skip
            keep(batch, [(c.text, c.token_ids, c.logprobs, c.finish_reason) for c in done])

        self._run_batches(jobs, next_batch, sample, [prompts[r] for r, _ in jobs], bar)

    def fits(self, inputs, new_tokens):
        """Whether each input fits into the model's context with `new_tokens` behind it: N bools."""
        if self.context is None:
            return [True] * len(inputs)
        prompts = self._text_ids(self._texts(inputs))
        return [len(ids) + new_tokens <= self.context for ids in prompts]

    def choice_logprobs(self, texts, choices, progress=None):
        """Log-probability (nats) of each choice as the continuation of each text: (N, C) float64,
        normalised over the choices of the text (rows of exp sum to 1).

        texts: N raw texts (or conversations). choices: C strings for all texts, or one list per
        text; with lists of different lengths, C is the longest and missing choices are -inf.
        A choice may be any number of tokens (`tokens.continuation_ids`); its log-probability is
        the sum over them, given exactly the tokens of the text alone.
        ValueError for an empty list, text or choice, a text that with its choice exceeds the
        context, and for two choices of which one's tokens begin the other's: the probability of
        the shorter then contains that of the longer, so that normalising would count it twice. A
        choice that is a prefix of another only in its letters (" (A" and " (A)" where "A)" is one
        token) is no such case and is scored.
        """
        texts = self._texts(texts)
        choices = check_choices(texts, choices)
        prompts = self._text_ids(texts)
        sequences = self._choice_ids(texts, prompts, choices)
        out = np.full((len(texts), max(map(len, choices))), -np.inf)

        def put(i, row):
            out[i, : len(row)] = row

        # Tokens that all choices of a text begin with cancel in the softmax: they join the prompt,
        # so that they are computed once.
        prefixes, rest = list(prompts), list(sequences)
        for i, row in enumerate(sequences):
            k = next((k for k, ids in enumerate(zip(*row)) if len(set(ids)) > 1), 0)
            prefixes[i], rest[i] = prompts[i] + row[0][:k], [ids[k:] for ids in row]
        todo = sorted(range(len(texts)), key=lambda i: -len(prefixes[i]))
        left, keep = journal.pick_up(
            self.source, todo, lambda i: ["choices", prompts[i], sequences[i]], put
        )

        def next_batch(todo):
            longest, rows, fed, batch = len(prefixes[todo[0]]), 0, 0, []
            for i in todo:
                fed = max(fed, max(map(len, rest[i])) - 1)
                rows += len(rest[i])
                logits = rows * (fed + 1) * self.engine.vocab_size
                too_many = rows * (longest + fed) > self.engine.batch_tokens
                if batch and (too_many or logits > SCORE_ELEMENTS):
                    break
                batch.append(i)
            return batch, sum(len(rest[i]) for i in batch) * (longest + fed) // len(batch)

        def score(batch):
            rows, read, shown = sum(len(rest[i]) for i in batch), 0, 0

            def told(n):  # a batch may take minutes
                nonlocal read, shown
                read, before = read + n, shown
                shown = min(len(batch) * read // rows, len(batch))
                bar.update(shown - before)

            self.engine.told = told
            try:
                scores = self.engine.score([prefixes[i] for i in batch], [rest[i] for i in batch])
            except (RuntimeError, MemoryError):
                bar.update(-shown)
                raise
            finally:
                self.engine.told = None
            keep(batch, [(row - np.logaddexp.reduce(row)).tolist() for row in scores])
            return shown

        with journal.progress(len(todo), "question", progress, len(todo) - len(left)) as bar:
            self._run_batches(left, next_batch, score, [prefixes[i] for i in left], bar)
        return out

    def _run_batches(self, jobs, next_batch, run, prompts, bar):
        """Runs jobs in batches: next_batch(jobs) -> (the next batch, tokens of one of its jobs);
        run(batch) -> how many of them the bar has shown already, if any.
        Where memory runs out, the batch is halved, and so are those after it."""
        sharing = (self.engine.sharing_prefixes(prompts) if self.share_prefixes
                   else contextlib.nullcontext())
        with eval_mode(self.model), sharing:
            if jobs:
                self.engine.prepare()
            while jobs:
                batch, job_tokens = next_batch(jobs)
                try:
                    shown = run(batch) or 0
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        raise MemoryError(
                            f"memory ran out on a single row of {job_tokens} tokens: shorten it, "
                            "lower max_new_tokens, or take a smaller model or dtype"
                        ) from None
                    failed = True
                else:
                    failed = False
                if failed:  # here, not above: the exception held the batch's memory
                    self.engine.batch_tokens = len(batch) // 2 * job_tokens
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    continue
                jobs = jobs[len(batch) :]
                bar.update(len(batch) - shown)

    def _most_rows(self):
        """Rows of a batch whose logits fit beside the cache; sampling makes a few copies of
        them."""
        elements = SCORE_ELEMENTS * (8 if self.model.device.type == "cuda" else 1)
        return elements // self.engine.vocab_size

    def _texts(self, inputs):
        check_inputs(inputs)
        texts = render_all(inputs, self.tokenizer)
        check_texts(texts)
        return texts

    def _text_ids(self, texts):
        prompts = tokens.text_ids(texts, self.tokenizer)
        for r, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"input {r}, {texts[r]!r}, has no tokens in this vocabulary")
        return prompts

    def _choice_ids(self, texts, prompts, choices):
        """One list of the ids of its choices for each text, checked."""
        owners = [i for i, row in enumerate(choices) for _ in row]
        found = iter(tokens.continuation_ids(
            [texts[i] for i in owners], [prompts[i] for i in owners],
            [choice for row in choices for choice in row], self.tokenizer))
        out = []
        for i, (prompt, row) in enumerate(zip(prompts, choices, strict=True)):
            sequences = [next(found) for _ in row]
            for choice, ids in zip(row, sequences, strict=True):
                if not ids:
                    raise ValueError(f"text {i}: the choice {choice!r} is empty; drop it")
                if self.context is not None and len(prompt) + len(ids) > self.context:
                    raise PromptTooLong(
                        f"text {i}: {len(prompt)} tokens and {len(ids)} of the choice {choice!r} "
                        f"exceed the model's context of {self.context}; shorten the text"
                    )
            for (a, first), (b, second) in itertools.permutations(enumerate(sequences), 2):
                if second[: len(first)] == first:
                    raise ValueError(
                        f"text {i}: the tokens of choice {row[a]!r} begin those of {row[b]!r}, "
                        "so their probabilities overlap; end both with a mark, as in ' (A)'"
                    )
            out.append(sequences)
        return out

    def _complete(self, prompts, limits, draws, temperature, top_p, stop):
        strings, may_stop, eos, stop_token = self._stops(stop)

        def cut(ids):
            text = self._decode([ids])[0]
            found = [at for s in strings if (at := text.find(s)) >= 0]
            return text[: min(found)] if found else None

        flags = [torch.tensor(f, device=self.model.device) for f in (eos | stop_token, may_stop)]
        ids, logprobs, cuts = self.engine.decode(
            prompts, limits, draws, temperature, top_p, flags[0], flags[1] if strings else None, cut
        )
        # An ending token that is no special token would else show up in the text.
        ended = [eos[row[-1]] or stop_token[row[-1]] for row in ids]
        texts = self._decode([row[:-1] if e else row for row, e in zip(ids, ended, strict=True)])
        out = []
        for j, row in enumerate(ids):
            stopped = j in cuts or (stop_token[row[-1]] and not eos[row[-1]])
            reason = "stop" if stopped else "eos" if ended[j] else "length"
            out.append(Completion(cuts.get(j, texts[j]), row, logprobs[j], reason))
        return out

    def _stops(self, stop):
        """The stop strings to look for, and which tokens (V,) may complete one of them, are an eos,
        or are a stop string by themselves (special tokens, which decoding leaves out)."""
        if stop in self._stop_tokens:
            return self._stop_tokens[stop]
        count = len(self.tokenizer)
        may_stop, eos, stop_token = np.zeros((3, max(self.engine.vocab_size, count)), dtype=bool)
        config = getattr(self.model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        ids = [*(ids if isinstance(ids, (list, tuple)) else [ids]), self.tokenizer.eos_token_id]
        eos[[i for i in ids if i is not None]] = True
        added = self.tokenizer.added_tokens_decoder.items()
        special = {str(token): i for i, token in added if token.special}
        stop_token[[special[s] for s in stop if s in special]] = True
        strings = [s for s in stop if s not in special]
        for s in strings:
            mixed = next((token for token in special if token in s), None)
            if mixed is not None:
                raise ValueError(f"stop string {s!r}: {mixed!r} in it is a special token, which "
                                 f"texts do not show; stop at {mixed!r} alone")
        if strings:
            raw = self.tokenizer.convert_ids_to_tokens(range(count))
            texts = self._decode([[i] for i in range(count)])
            pieces = [f"{text}{token}" for text, token in zip(texts, raw, strict=True)]
            letters = set("".join(pieces)) | {" "}
            for s in strings:
                # The bytes of a character decode to U+FFFD by themselves.
                odd = [c for c in s if c not in letters]
                if not s or (odd and ("\ufffd" not in letters or any(map(str.isascii, odd)))):
                    raise ValueError(f"stop string {s!r}: this model has no tokens to write it")
            last = {s[-1] for s in strings}
            # Some decoders put the spaces between tokens themselves: then any may bring one.
            may_stop[:count] = [
                " " in last or "\ufffd" in p or not last.isdisjoint(p) for p in pieces
            ]
        self._stop_tokens[stop] = strings, may_stop, eos, stop_token
        return self._stop_tokens[stop]

    def _decode(self, rows):
        return tokens.decode(rows, self.tokenizer, self._leading)
