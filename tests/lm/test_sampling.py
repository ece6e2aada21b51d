"""The local engine against transformers.generate, plain forward passes and known distributions."""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from cai_utils.experiment import journal
from cai_utils.lm import engine, kvcache
from cai_utils.lm.completion import Completion
from cai_utils.lm.engine import _pick
from cai_utils.lm.sampling import Sampler
from cai_utils.lm.tokens import text_ids

CONTEXT = 64
SPECIAL = ["<pad>", "<s>", "</s>"]
ALPHABET = [chr(c) for c in range(97, 123)] + list(" .:()AB\n")
MERGES = [(" ", "("), ("a", "b"), ("A", ")"), ("\n", "\n")]


def make_tokenizer():
    """Characters, and four merges: " (" | "ab" | "A)" | "\\n\\n"."""
    words = SPECIAL + ALPHABET + ["".join(m) for m in MERGES]
    bpe = models.BPE({w: i for i, w in enumerate(words)}, MERGES)
    inner = Tokenizer(bpe)
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZER = make_tokenizer()
SMALL = dict(
    vocab_size=len(TOKENIZER),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": GPT2Config(
        **{k: v for k, v in SMALL.items() if not k.startswith(("hidden", "num", "max"))},
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
    ),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    # A window shorter than the prompts, and an architecture that builds its own masks.
    "mistral": MistralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=5
    ),
}
PROMPTS = ["abc", "\n\na: b (A) or (B)?".replace("?", "."), "z", "the cat sat. " * 3, "ab ab", "q"]


def make_model(kind, attention="eager", sharp=2.0):
    """Random weights, large enough that attention and positions matter and that rounding cannot
    swap the best two tokens."""
    torch.manual_seed(4)
    config = copy.deepcopy(CONFIGS[kind])
    config.initializer_range, config.tie_word_embeddings = 0.3, False
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharp)
    return model


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def reference(model, prompt, max_new_tokens):
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("growing", [False, True])
def test_greedy_is_generate(kind, attention, growing, monkeypatch):
    grown, grow = [], kvcache.Layer._grow
    monkeypatch.setattr(kvcache.Layer, "_grow", lambda *a: grown.append(a) or grow(*a))
    if growing:
        monkeypatch.setattr(kvcache, "_LARGE", 0)
    model = make_model(kind, attention)
    got = Sampler(model, TOKENIZER, batch_tokens=150).generate(
        PROMPTS, temperature=0, max_new_tokens=20
    )
    for prompt, (completion,) in zip(PROMPTS, got, strict=True):
        assert completion.token_ids == reference(model, prompt, 20), prompt
    assert bool(grown) == growing


def test_greedy_is_generate_on_a_padded_batch(llama):
    enc = TOKENIZER(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    out = llama.generate(
        enc["input_ids"], attention_mask=enc["attention_mask"], do_sample=False, max_new_tokens=20
    )[:, enc["input_ids"].shape[1] :]
    got = Sampler(llama, TOKENIZER).generate(PROMPTS, temperature=0, max_new_tokens=20)
    for row, (completion,) in zip(out.tolist(), got, strict=True):
        k = len(completion.token_ids)
        assert row[:k] == completion.token_ids and set(row[k:]) <= {0}


def test_a_cache_that_grows_gives_the_same_when_rows_leave_early(llama, monkeypatch):
    how = dict(temperature=1.0, max_new_tokens=30, n=3, seed=5, stop=["a", "\n"])
    whole = Sampler(llama, TOKENIZER).generate(PROMPTS, **how)
    monkeypatch.setattr(kvcache, "_LARGE", 0)
    grown = Sampler(llama, TOKENIZER).generate(PROMPTS, **how)
    assert [[c.token_ids for c in row] for row in grown] == [
        [c.token_ids for c in row] for row in whole]
    lengths = {len(c.token_ids) for row in whole for c in row}
    assert min(lengths) < 5 and max(lengths) > 10, lengths


def test_room_ahead():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kvcache.room(60, 2**20, cpu) == kvcache.room(60, 2**30, cuda) == 60
    assert kvcache.room(60, 2**30, cpu) == 4 and kvcache.room(3, 2**30, cpu) == 3


def with_next_token_distribution(p):
    """A Llama whose next token has the distribution p whatever came before."""
    model = make_model("llama")
    logits = torch.full((len(TOKENIZER),), -1e4)
    logits[: len(p)] = torch.tensor(p).log()
    hook = lambda module, args, out: logits.expand(*out.shape[:-1], -1)  # noqa: E731
    model.lm_head.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.75)])
def test_sampling_follows_the_distribution(temperature, top_p):
    p = np.array([0.0, 0.05, 0.0, 0.4, 0.2, 0.25, 0.1])
    model = with_next_token_distribution(p)
    got = Sampler(model, TOKENIZER).generate(
        ["a", "bb"], n=500, temperature=temperature, top_p=top_p, max_new_tokens=4, seed=11
    )
    tokens = np.array([c.token_ids for row in got for c in row])
    assert tokens.shape == (1000, 4)
    q = p ** (1 / temperature)
    q /= q.sum()
    kept = q.copy()
    if top_p < 1:
        kept[[1, 6]] = 0  # .4 + .25 < .75 <= .4 + .25 + .2
        kept /= kept.sum()
    counts = np.bincount(tokens.ravel(), minlength=len(p))
    assert counts[kept == 0].sum() == 0
    assert chisquare(counts[kept > 0], kept[kept > 0] * tokens.size).pvalue > 1e-3
    # Neighbours in a stream, and the same position of different samples, are independent.
    joint = np.bincount(tokens[:, 0] * len(p) + tokens[:, 1], minlength=len(p) ** 2)
    expected = np.outer(kept, kept).ravel() * len(tokens)
    assert chisquare(joint[expected > 0], expected[expected > 0]).pvalue > 1e-3
    logprobs = np.array([c.logprobs for row in got for c in row])
    np.testing.assert_allclose(logprobs, np.log(q[tokens]), atol=1e-5)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    edges = torch.tensor([0.0, 0.5 - 2**-24, 0.5, 1 - 2**-24])  # the extremes of each interval
    for top_p in (1.0, 0.9):
        token, logprob = _pick(logits, 1.0, top_p, edges)
        assert token.tolist() == [1, 1, 3, 3]
        np.testing.assert_allclose(logprob, np.log(0.5), atol=1e-6)


def test_the_same_seed_gives_the_same_text_however_it_is_batched(llama):
    def run(batch_tokens, n=3, inputs=PROMPTS, **kw):
        sampler = Sampler(llama, TOKENIZER, batch_tokens=batch_tokens)
        return sampler.generate(inputs, n=n, max_new_tokens=12, temperature=1.2, seed=5, **kw)

    ids = lambda rows: [[c.token_ids for c in row] for row in rows]  # noqa: E731
    whole = ids(run(10**6))
    assert ids(run(1)) == ids(run(120)) == whole
    assert ids(run(10**6, n=2)) == [row[:2] for row in whole]  # n does not matter
    assert ids(run(10**6, inputs=PROMPTS[:2])) == whole[:2]  # nor does what comes after
    assert len({tuple(c) for row in whole for c in row}) > 12  # and the streams differ
    sampler = Sampler(llama, TOKENIZER)
    other = sampler.generate(PROMPTS, n=3, max_new_tokens=12, temperature=1.2, seed=6)
    assert ids(other) != whole


def test_stop_strings_and_finish_reasons(llama):
    sampler = Sampler(llama, TOKENIZER)
    kw = dict(n=40, temperature=3.0, max_new_tokens=24, seed=2)
    free = sampler.generate(PROMPTS, **kw)
    stop = ["ab", "(", "\n\n"]
    stopped = sampler.generate(PROMPTS, stop=stop, **kw)
    seen = set()
    for a, b in zip(sum(free, []), sum(stopped, []), strict=True):
        cut = [at for s in stop if (at := a.text.find(s)) >= 0]
        seen.add(b.finish_reason)
        k = len(b.token_ids)
        assert b.token_ids == a.token_ids[:k]
        if cut:
            assert (b.finish_reason, b.text) == ("stop", a.text[: min(cut)])
            # It ends with the token that completes the stop string, not later.
            before = TOKENIZER.decode(b.token_ids[:-1], skip_special_tokens=True)
            assert not any(s in before for s in stop)
        else:
            # Rows that stop leave the batch, and some CPUs sum a smaller one in another order.
            assert (b.token_ids, b.text, b.finish_reason) == (a.token_ids, a.text, a.finish_reason)
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
            eos = b.token_ids[-1] == 2
            assert b.finish_reason == ("eos" if eos else "length")
            assert eos or k == 24
            assert 2 not in b.token_ids[:-1] and "</s>" not in b.text
    assert seen == {"stop", "eos", "length"}


def test_a_special_token_can_be_a_stop_string():
    model = with_next_token_distribution([0.0, 0.3, 0.0, 0.7])  # <s> or "a"
    got = Sampler(model, TOKENIZER).generate(["b"], n=30, stop="<s>", max_new_tokens=50)
    assert all(c.finish_reason == "stop" and set(c.text) <= {"a"} for c in got[0])
    assert all(c.token_ids[-1] == 1 for c in got[0])


def test_a_stop_string_over_many_tokens_and_one_that_ends_in_a_space():
    p = np.zeros(len(TOKENIZER))
    a, space = TOKENIZER.convert_tokens_to_ids(["a", " "])
    p[[a, space]] = 0.5
    model = with_next_token_distribution(p.tolist())
    got = Sampler(model, TOKENIZER).generate(["b"], n=30, stop="a a ", max_new_tokens=100)
    for c in got[0]:
        whole = TOKENIZER.decode(c.token_ids)
        assert whole.endswith("a a ") and whole.find("a a ") == len(whole) - 4
        assert c.text == whole[:-4]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_a_forward_pass(kind, temperature):
    model = make_model(kind)
    got = Sampler(model, TOKENIZER, batch_tokens=200).generate(
        PROMPTS, n=2, temperature=temperature, max_new_tokens=15
    )
    for prompt, row in zip(PROMPTS, got, strict=True):
        for c in row:
            ids = TOKENIZER(prompt)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + c.token_ids])).logits[0, len(ids) - 1 : -1]
            want = torch.log_softmax(logits / (temperature or 1.0), -1)
            want = want.gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
            np.testing.assert_allclose(c.logprobs, want, atol=1e-4)


def plain_choice_logprobs(model, prompt_ids, sequences):
    out = []
    for ids in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + ids])).logits[0]
        lp = torch.log_softmax(logits, -1)
        out.append(sum(lp[len(prompt_ids) - 1 + k, i].item() for k, i in enumerate(ids)))
    return np.array(out) - np.logaddexp.reduce(out)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "mistral"])
def test_choices_are_scored_as_by_plain_forward_passes(kind, batch_tokens):
    model = make_model(kind, sharp=1.0)
    # " (" is one token and "A)" too, "B)" is two: choices of different lengths.
    choices = [" (A)", " (B)", " a long choice"]
    got = Sampler(model, TOKENIZER, batch_tokens=batch_tokens).choice_logprobs(PROMPTS, choices)
    assert got.shape == (len(PROMPTS), 3)
    np.testing.assert_allclose(np.exp(got).sum(1), 1)
    sequences = [TOKENIZER(c)["input_ids"] for c in choices]
    assert len(sequences[0]) == 2 and len(sequences[1]) == 3
    for prompt, row in zip(PROMPTS, got, strict=True):
        want = plain_choice_logprobs(model, TOKENIZER(prompt)["input_ids"], sequences)
        np.testing.assert_allclose(row, want, atol=1e-4)


def test_choices_of_one_token_and_choices_per_text(llama):
    got = Sampler(llama, TOKENIZER).choice_logprobs(["abc", "z z"], [["x", "y"], ["x", "y", "."]])
    assert got.shape == (2, 3) and got[0, 2] == -np.inf
    for prompt, row, cs in [("abc", got[0, :2], "xy"), ("z z", got[1], "xy.")]:
        seqs = [TOKENIZER(c)["input_ids"] for c in cs]
        want = plain_choice_logprobs(llama, TOKENIZER(prompt)["input_ids"], seqs)
        np.testing.assert_allclose(row, want, atol=1e-4)


def test_a_merge_across_the_boundary_leaves_the_prompt_alone(llama):
    # "xa" + "b" tokenises as x|ab: the choice must be scored after x|a, as "b".
    assert TOKENIZER("xab")["input_ids"][:2] != TOKENIZER("xa")["input_ids"]
    got = Sampler(llama, TOKENIZER).choice_logprobs(["xa"], ["b", "cd"])
    seqs = [TOKENIZER(c)["input_ids"] for c in ("b", "cd")]
    want = plain_choice_logprobs(llama, TOKENIZER("xa")["input_ids"], seqs)
    np.testing.assert_allclose(got[0], want, atol=1e-4)


def test_only_choices_that_overlap_in_tokens_are_an_error(llama):
    sampler = Sampler(llama, TOKENIZER)
    with pytest.raises(ValueError, match="text 0.*' x'.*' xy'.*overlap"):
        sampler.choice_logprobs(["q"], [" x", " xy"])
    with pytest.raises(ValueError, match="overlap"):
        sampler.choice_logprobs(["q"], [" x", " x"])
    # " (A" = " (" | "A" and " (A)" = " (" | "A)" share letters, not tokens.
    assert np.isfinite(sampler.choice_logprobs(["q"], [" (A", " (A)"])).all()


def test_a_text_near_the_end_of_the_context_is_scored():
    model = make_model("gpt2", sharp=1.0)  # learned positions: running past them would fail
    text = "a." * (CONTEXT // 2 - 2) + "b"  # 61 tokens; choices of 1 and 3
    got = Sampler(model, TOKENIZER).choice_logprobs(["q", text], [".", "xyz"])
    seqs = [TOKENIZER(c)["input_ids"] for c in (".", "xyz")]
    want = plain_choice_logprobs(model, TOKENIZER(text)["input_ids"], seqs)
    np.testing.assert_allclose(got[1], want, atol=1e-4)
    with pytest.raises(ValueError, match="text 0: 61 tokens and 4 .*context of 64"):
        Sampler(model, TOKENIZER).choice_logprobs([text], [".", "xyzz"])


def test_a_completion_is_cut_at_the_end_of_the_context():
    model = with_next_token_distribution([0.0, 0.0, 0.0, 1.0])
    got = Sampler(model, TOKENIZER).generate(["b" * 60, "b"], max_new_tokens=10)
    assert [len(c.token_ids) for (c,) in got] == [4, 10]
    assert got[0][0] == Completion("aaaa", [3] * 4, [0.0] * 4, "length")


def test_rows_cut_at_the_context_do_not_stop_the_others():
    model = make_model("gpt2")  # learned positions: a row that ran on would fail
    # Of ten rows one is cut, too few for the others to leave it behind.
    prompts = ["b" * 60, *"abcdefghi"]
    got = Sampler(model, TOKENIZER).generate(prompts, max_new_tokens=30, temperature=0)
    assert len(got[0][0].token_ids) <= 4
    for prompt, (completion,) in zip(prompts[1:], got[1:], strict=True):
        assert completion.token_ids == reference(model, prompt, 30)


@pytest.mark.parametrize("kind", ["legacy", "first", "always"])
def test_sentencepiece_choices_are_scored_as_they_are_spelled(kind):
    tokenizer = tiny.sentencepiece(kind)
    model = tiny.llama(vocab_size=len(tokenizer), sharp=40.0)
    of = tokenizer.convert_tokens_to_ids
    for text, first in (("Answer is: ", "("), ("Answer is:", "\u2581("), ("Answer is:\n", "(")):
        prompt = tokenizer(text)["input_ids"]
        lead = " " if text.endswith(":") else ""
        got = Sampler(model, tokenizer).choice_logprobs([text], [f"{lead}(A)", f"{lead}(B)"])
        sequences = [of([first, letter, ")"]) for letter in "AB"]
        want = plain_choice_logprobs(model, prompt, sequences)
        np.testing.assert_allclose(got[0], want, atol=1e-4)


@pytest.mark.parametrize("kind", ["legacy", "first", "always"])
def test_a_stop_string_that_begins_with_a_space_is_seen_as_the_first_token(kind):
    tokenizer = tiny.sentencepiece(kind)
    model = tiny.llama(vocab_size=len(tokenizer))
    of = tokenizer.convert_tokens_to_ids
    says = of(["\u2581N", "o", "\u2581H", "i"])
    steps = iter(says * 2)

    def speak(module, args, output):
        output.logits[:] = -100.0
        output.logits[..., next(steps)] = 100.0

    model.register_forward_hook(speak)
    ((stopped,),) = Sampler(model, tokenizer).generate(["Now:"], temperature=0, stop=[" N"])
    assert (stopped.text, stopped.finish_reason, stopped.token_ids) == ("", "stop", says[:1])
    steps = iter(says)
    ((whole,),) = Sampler(model, tokenizer).generate(["Now:"], temperature=0, max_new_tokens=4)
    assert whole.text == " No Hi"  # what the model wrote, its first space included
    steps = iter(says)
    ((cut,),) = Sampler(model, tokenizer).generate(["Now:"], temperature=0, stop=[" H", "zz"])
    assert (cut.text, cut.token_ids) == (" No", says[:3])


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-31, 1e-20])
def test_a_tiny_temperature_is_the_limit_of_small_ones(temperature):
    logits = torch.tensor([[80.0, 79.9, -1e4, float("-inf")], [-5.0, -5.0, -6.0, -7.0]])
    for top_p in (1.0, 0.9):
        token, logprob = _pick(logits, temperature, top_p, torch.tensor([0.7, 0.7]))
        assert token.tolist() == [0, 1]
        np.testing.assert_allclose(logprob, [0.0, np.log(0.5)], atol=1e-6)
    model = make_model("llama")
    sampler = Sampler(model, TOKENIZER)
    cold = sampler.generate(PROMPTS, temperature=temperature, max_new_tokens=8)
    greedy = sampler.generate(PROMPTS, temperature=0, max_new_tokens=8)
    assert [c.token_ids for (c,) in cold] == [c.token_ids for (c,) in greedy]


def test_conversations_are_rendered_and_a_leading_bos_is_not_doubled(llama):
    sampler = Sampler(llama, TOKENIZER)
    talk = [{"role": "user", "content": "abc"}]
    assert sampler._texts([talk]) == ["\n\nHuman: abc\n\nAssistant:"]
    bare = TOKENIZER("<s>ab", add_special_tokens=False).input_ids
    assert text_ids(["<s>ab"], TOKENIZER) == [bare]
    a = sampler.generate(["q", "\n\na: ."], temperature=0, max_new_tokens=5)
    b = sampler.generate(["\n\na: .", "q"], temperature=0, max_new_tokens=5)
    assert a == b[::-1] and dataclasses.is_dataclass(a[0][0])


def test_a_model_in_training_is_sampled_in_eval_mode_and_left_as_it_was():
    model = make_model("gpt2")  # has dropout
    quiet = Sampler(model, TOKENIZER).generate(PROMPTS, temperature=0, max_new_tokens=8)
    model.train()
    model.transformer.h[0].mlp.eval()
    modes = [m.training for m in model.modules()]
    assert Sampler(model, TOKENIZER).generate(PROMPTS, temperature=0, max_new_tokens=8) == quiet
    assert [m.training for m in model.modules()] == modes
    loss = model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()  # still trainable
    with pytest.raises(ValueError):
        Sampler(model, TOKENIZER).generate([])
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    "inputs, kw, message",
    [
        ([], {}, "at least one"),
        (["a", ""], {}, "input 1 is an empty prompt"),
        (["a" * CONTEXT], {}, "input 0: 64 tokens fill the model's context of 64"),
        (["a"], {"stop": "Human:"}, "stop string 'Human:'"),
        (["a"], {"stop": ["b", ""]}, "stop string ''"),
        (["a"], {"stop": "</s>\n"}, "'</s>' in it is a special token"),
        (["a", []], {}, "input 1: "),
        (["a"], {"temperature": -1}, "temperature"),
        (["a"], {"temperature": float("nan")}, "temperature=nan"),
        (["a"], {"top_p": 0}, "top_p"),
        (["a"], {"n": 0}, "n=0"),
        ("a", {}, "a list"),
    ],
)
def test_bad_input_is_named(llama, inputs, kw, message):
    with pytest.raises(ValueError, match=message):
        Sampler(llama, TOKENIZER).generate(inputs, **kw)


def test_bad_choices_are_named(llama):
    sampler = Sampler(llama, TOKENIZER)
    for choices, message in [([], "0 lists"), ([["a"], []], "empty"), ([["a"]], "1 lists"),
                             (["a", ""], "''")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sampler.choice_logprobs(["q", "r"], choices)


def test_logits_that_are_not_finite_are_an_error(llama):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        Sampler(model, TOKENIZER).generate(["a"], max_new_tokens=2)
    with pytest.raises(ValueError, match="not finite"):
        Sampler(model, TOKENIZER).choice_logprobs(["a"], ["b", "c"])


def test_a_live_model_that_is_not_causal_is_refused(llama):
    config = BertConfig(vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match="BertForMaskedLM: a bert is not a causal"):
        Sampler(BertForMaskedLM(config), TOKENIZER)
    with pytest.raises(ValueError, match="llama cannot be sampled"):
        Sampler(LlamaForSequenceClassification(CONFIGS["llama"]), TOKENIZER)


def test_progress_is_told_within_a_batch_of_questions(monkeypatch):
    """A batch may be hundreds of questions and take many minutes: its parts are counted, and where
    memory runs out in the middle, what has to be read again is taken back."""
    told = []
    monkeypatch.setattr(journal, "progress", lambda *_: contextlib.nullcontext(
        SimpleNamespace(update=told.append)))
    monkeypatch.setattr(engine, "_PREFILL_TOKENS", 40)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    texts = [f"a question of some length {'ab' * i}:" for i in range(6)] + ["a short one:"] * 2
    sampler = Sampler(model, TOKENIZER, share_prefixes=False)
    found = sampler.choice_logprobs(texts, [" (A)", " (B)"])
    assert sum(told) == len(texts) and max(told) < 3 and len(told) > 4
    del told[:]
    forward, calls = sampler.engine._forward, []

    def fails_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(sampler.engine, "_forward", fails_once)
    assert sampler.choice_logprobs(texts, [" (A)", " (B)"]) == pytest.approx(found, abs=1e-5)
    assert sum(told) == len(texts) and min(told) < 0
