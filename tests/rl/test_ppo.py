"""PPO: every formula against naive loops and hand-computed numbers, the networks against plain
forwards, and whole runs on tiny tasks whose optimum is known."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from cai_utils import preference
from cai_utils.lm import models
from cai_utils.rl import losses, networks, packing, ppo

WORDS = 16
VOCAB = ["<pad>", "<bos>", "<eos>", "Human:", "Assistant:"] + [f"w{i}" for i in range(WORDS)]
TEMPLATE = (
    "{% for m in messages %}{{ ' Human: ' if m['role'] == 'user' else ' Assistant: ' }}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} Assistant:{% endif %}"
)
PROMPTS = [
    {"prompt": [{"role": "user", "content": " ".join(f"w{(i * 7 + j) % WORDS}" for j in range(n))}]}
    for i, n in enumerate([1, 2, 4] * 14)
]


def tokenizer(words=VOCAB):
    rules = Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=rules, chat_template=TEMPLATE, **special)


def llama_config(vocab=5 + WORDS, **more):
    return LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


def save(model, folder, words=VOCAB):
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Folders of a policy (random, of real entropy), a PM, a PM of zeros and a foreign PM."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("ppo")
    policy = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        policy.lm_head.weight *= 8
    save(policy, root / "policy")
    judge = LlamaForSequenceClassification(llama_config(num_labels=1))
    judge.config.score_mean = 0.3
    with torch.no_grad():
        judge.score.weight *= 40
    save(judge, root / "pm")
    with torch.no_grad():
        judge.score.weight.zero_()
    judge.config.score_mean = 0.0
    save(judge, root / "pm-zero")
    words = VOCAB + ["more"]
    foreign = LlamaForSequenceClassification(llama_config(len(words), num_labels=1))
    save(foreign, root / "pm-foreign", words)
    return root


class Rule:
    """A PM that is a rule on the text of the last message."""

    def __init__(self, rule):
        self.rule = rule

    def score(self, conversations):
        return np.array([self.rule(c[-1]["content"].split()) for c in conversations], float)


def run(lab, out, judge="pm", **options):
    defaults = dict(
        lr=1e-3, iterations=2, episodes=16, minibatch=8, max_new_tokens=6, print_every=0,
        missing_eos_penalty=0.0,
    )  # fmt: skip
    scorer = lab / judge if isinstance(judge, str) else judge
    call = {name: options.pop(name) for name in ("log", "refresh") if name in options}
    return ppo.train(lab / "policy", scorer, PROMPTS, out, {**defaults, **options}, **call)


# --- the formulas ----------------------------------------------------------------------------


@st.composite
def ragged(draw, fields):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = (np.arange(max(lengths) + draw(st.integers(0, 2))) < np.array(lengths)[:, None]) * 1.0
    arrays = [torch.tensor(rng.normal(size=mask.shape)) for _ in range(fields)]
    return torch.tensor(mask), arrays, lengths


def flat(x, lengths):
    return [x[b, t].item() for b, n in enumerate(lengths) for t in range(n)]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(ragged(2), st.floats(0.5, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_errors(data, gamma, lam):
    mask, (rewards, values), lengths = data
    advantages, returns = losses.gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        for t in range(mask.shape[1]):
            expected = 0.0
            for k in range(t, n):
                following = values[b, k + 1].item() if k + 1 < n else 0.0
                error = rewards[b, k].item() + gamma * following - values[b, k].item()
                expected += (gamma * lam) ** (k - t) * error
            close(advantages[b, t], expected)
            close(returns[b, t], expected + values[b, t].item() if t < n else 0.0)


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 9.0], [0.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 0.25, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    advantages, returns = losses.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # errors: row 0: .25 - .5, 1 - .25; row 1: 0, 0, 2 - 1
    close(advantages, [[-0.25 + 0.375, 0.75, 0], [0.25, 0.5, 1.0]])
    close(returns, [[0.625, 1.0, 0], [1.25, 1.5, 2.0]])
    # lam = 1: the return is what was received, whatever the values say
    close(losses.gae(rewards, values, mask, 1.0, 1.0)[1], [[1, 1, 0], [2, 2, 2]])


@settings(max_examples=25, deadline=None)
@given(ragged(1), st.booleans())
def test_whitening(data, shift):
    mask, (x,), lengths = data
    mine = flat(x, lengths)
    n, mean = len(mine), sum(mine) / len(mine)
    variance = sum((v - mean) ** 2 for v in mine) / max(n - 1, 1)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean) for v in mine]
    white = losses.masked_whiten(x, mask, shift)
    close(flat(white, lengths), expected)
    assert (white[mask == 0] == 0).all()
    close(losses.masked_mean(x, mask), mean)


def test_kl_estimators():
    half, quarter = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    k1, k2, k3 = losses.kl_estimators(half, quarter)
    np.testing.assert_allclose(k1, [math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(k2, [math.log(2) ** 2 / 2], rtol=1e-6)
    np.testing.assert_allclose(k3, [0.5 - 1 + math.log(2)], rtol=1e-6)
    # Under p, k1 and k3 average to KL(p || q) exactly; k3 is never negative.
    torch.manual_seed(0)
    p, q = torch.randn(2, 9, dtype=torch.float64).softmax(-1)
    exact = (p * (p / q).log()).sum()
    k1, k2, k3 = losses.kl_estimators(p.log(), q.log())
    close((p * k1).sum(), exact)
    close((p * k3).sum(), exact)
    assert (k3 >= 0).all() and (k2 >= 0).all()


@settings(max_examples=40, deadline=None)
@given(ragged(3), st.floats(0, 2))
def test_token_rewards(data, kl_coef):
    mask, (logp, ref, scores), lengths = data
    scores = scores[:, 0]
    rewards = losses.token_rewards(logp, ref, scores, mask, kl_coef)
    for b, n in enumerate(lengths):
        for t in range(mask.shape[1]):
            penalty = -kl_coef * (logp[b, t] - ref[b, t]).item() if t < n else 0.0
            close(rewards[b, t], penalty + (scores[b].item() if t == n - 1 else 0.0))


@settings(max_examples=25, deadline=None)
@given(ragged(4), st.floats(0.05, 0.5))
def test_losses_against_loops(data, clip):
    mask, (new, old, goal, advantage), lengths = data
    new, old, goal, advantage = (flat(x, lengths) for x in (new, old, goal, advantage))
    terms, hits = [], 0
    for a, b, c in zip(new, old, advantage, strict=True):
        ratio = math.exp(a - b)
        kept = min(max(ratio, 1 - clip), 1 + clip)
        terms.append(max(-c * ratio, -c * kept))
        hits += -c * kept > -c * ratio
    loss, fraction = losses.policy_loss(data[1][0], data[1][1], data[1][3], mask, clip)
    close((loss, fraction), (sum(terms) / len(terms), hits / len(terms)))
    terms, hits = [], 0
    for a, b, c in zip(new, old, goal, strict=True):
        kept = min(max(a, b - clip), b + clip)
        terms.append(max((a - c) ** 2, (kept - c) ** 2) / 2)
        hits += (kept - c) ** 2 > (a - c) ** 2
    loss, fraction = losses.value_loss(*data[1][:3], mask, clip)
    close((loss, fraction), (sum(terms) / len(terms), hits / len(terms)))
    plain = sum((a - c) ** 2 for a, c in zip(new, goal, strict=True)) / 2 / len(new)
    close(losses.value_loss(*data[1][:3], mask, None)[0], plain)


def test_losses_by_hand():
    one = torch.ones(4)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logp = ratio.log().requires_grad_()
    loss, fraction = losses.policy_loss(logp, torch.zeros(4), advantage, one, 0.2)
    np.testing.assert_allclose(loss.item(), (-1.2 + 1.5 - 0.5 + 0.8) / 4, rtol=1e-6)
    assert fraction == 0.5
    loss.backward()  # no gradient where the ratio has left the clip range on the good side
    np.testing.assert_allclose(logp.grad, [0, 1.5 / 4, -0.5 / 4, 0], rtol=1e-6)


def test_adaptive_kl_coefficient():
    times = {"target": 6.0, "episodes": 100, "horizon": 1000}
    assert losses.adapt_kl_coef(0.1, 12.0, **times) == pytest.approx(0.102)  # error cut to 0.2
    assert losses.adapt_kl_coef(0.1, 5.4, **times) == pytest.approx(0.099)


# --- batches and networks --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(16, 500))
def test_length_groups(lengths, max_tokens):
    groups = packing.length_groups(lengths, max_tokens)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for g in groups:
        padded = len(g) * max(lengths[i] for i in g)
        assert len(g) == 1 or padded <= max_tokens
        waste = padded - sum(lengths[i] for i in g)
        assert waste <= 0.1 * padded or padded <= max_tokens // 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(16, 500))
def test_packed_rows(lengths, max_tokens):
    passes = packing.packed_rows(lengths, max_tokens)
    assert sorted(i for rows in passes for row in rows for i in row) == list(range(len(lengths)))
    for rows in passes:
        # Of one width, to the multiple of 8 that `pack` pads to.
        width = -(-max(sum(lengths[i] for i in row) for row in rows) // 8) * 8
        assert len(rows) == 1 or width * len(rows) <= max_tokens


def test_rows_are_packed_as_densely_as_they_can_be():
    (rows,) = packing.packed_rows([40, 24, 8, 16, 32], 2048)
    assert len(rows) == 3 and sorted(map(sorted, rows)) == [[0], [1, 3], [2, 4]]
    (rows,) = packing.packed_rows([32, 31, 30, 29], 2048)  # as many tokens two by two
    assert rows == [[0], [1], [2], [3]]
    (rows,) = packing.packed_rows([48, 24, 23, 24, 24, 48], 2048)
    assert len(rows) == 4 and sorted(map(len, rows)) == [1, 1, 2, 2]
    (rows,) = packing.packed_rows([48, 40, 32, 24], 2048)  # wider rows have less padding
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 2]]
    assert len(packing.packed_rows([48, 40, 32, 24], 60)) == 4


def test_prompts_are_drawn_once_a_pass():
    whole = [ppo._next_prompts(10, 4, start, seed=3) for start in range(0, 40, 4)]
    whole = sum(whole, [])
    for p in range(4):
        assert sorted(whole[10 * p : 10 * p + 10]) == list(range(10))
    assert whole[:10] != whole[10:20] and whole[:4] != ppo._next_prompts(10, 4, 0, seed=4)
    assert ppo._next_prompts(3, 7, 2, seed=0) == ppo._next_prompts(3, 9, 0, seed=0)[2:9]


EPISODES = [
    packing.Episode([1, 3, 7], [9, 4, 2]),
    packing.Episode([1, 3, 5, 6, 8, 9], [2]),
    packing.Episode([1], [5, 6, 7, 8, 9]),
]


def tiny(kind):
    torch.manual_seed(1)
    if kind == "llama":
        return LlamaForCausalLM(llama_config()).eval()
    if kind == "gpt2":
        config = dict(vocab_size=21, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        return GPT2LMHeadModel(GPT2Config(**config, bos_token_id=1, eos_token_id=2)).eval()
    config = Gemma2Config(
        vocab_size=21, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.05,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_response_logprobs_equal_plain_forwards(kind):
    model = tiny(kind)
    net = networks.ResponseLogprobs(model, temperature=0.7)
    assert net.plain_head == (kind != "gemma2")  # its logits are capped after the head
    with torch.no_grad():
        logp, entropy = net(*packing.pack(EPISODES), with_entropy=True)
        expected, spread = [], []
        for e in EPISODES:
            ids, n = e.prompt_ids + e.response_ids, len(e.prompt_ids)
            logs = (model(input_ids=torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
            expected += [logs[t - 1, ids[t]].item() for t in range(n, len(ids))]
            spread += [-(logs[t].exp() * logs[t]).sum().item() for t in range(n - 1, len(ids) - 1)]
    np.testing.assert_allclose(logp, expected, atol=1e-5)
    np.testing.assert_allclose(entropy, spread, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_shared_prefix_passes_once_and_changes_nothing(kind, monkeypatch):
    base = tiny(kind).double().base_model
    assert networks.can_share_prefix(base, "cpu")
    system = [3, 4, 5, 6, 7]
    episodes = [packing.Episode(system + e.prompt_ids, e.response_ids) for e in EPISODES]
    ids, at, *_ = packing.pack(episodes)
    widths, passed = [], base.forward
    monkeypatch.setattr(base, "forward", lambda **how: (
        widths.append(tuple(how["input_ids"].shape)) or passed(**how)))
    found = []
    for least in (float("inf"), 0):
        states = networks.response_states(base, ids, at, least_work=least)
        weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
        grads = torch.autograd.grad((weights * states).sum(), list(base.parameters()))
        found.append([states, *grads])
    whole, prefix, rest = widths
    assert prefix == (1, whole[1] - rest[1]) and prefix[1] >= len(system)
    assert whole[0] == rest[0] == len(episodes)
    for plain, shared in zip(*found, strict=True):
        # The norms of Llama and Gemma compute in float32 whatever the model's dtype.
        close = {"atol": 1e-10, "rtol": 1e-8} if kind == "gpt2" else {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(plain, shared, **close)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_episodes_in_one_row_do_not_see_each_other(kind):
    model = tiny(kind).double()
    assert networks.can_pack(model.base_model, "cpu")
    net = networks.ResponseLogprobs(model, temperature=0.7)
    ids, *_, positions = packing.pack(EPISODES, counts=[2, 1])
    assert ids.shape == positions.shape == (2, 16)
    assert positions[0].tolist() == [*range(6), *range(7), 0, 0, 0]
    assert positions[1].tolist() == [*range(6)] + [0] * 10
    found = []
    for counts in (None, [2, 1], [3]):
        logp, entropy = net(*packing.pack(EPISODES, counts=counts), with_entropy=True)
        weights = torch.linspace(-1, 1, len(logp), dtype=logp.dtype)
        grads = torch.autograd.grad((weights * (logp + entropy)).sum(), list(model.parameters()))
        found.append([logp, entropy, *grads])
    for packed in found[1:]:
        for plain, other in zip(found[0], packed, strict=True):
            torch.testing.assert_close(plain, other, atol=2e-5, rtol=1e-4)


def test_padding_stays_within_the_positions_that_a_model_has():
    lengths, config = [30, 30, 31, 27, 40], dict(vocab_size=21, n_embd=16, n_layer=1, n_head=2)
    lm = GPT2LMHeadModel(GPT2Config(**config, n_positions=41, bos_token_id=1, eos_token_id=2))
    (rows,) = packing.packed_rows(lengths, 2048)
    episodes = [packing.Episode([3] * (lengths[i] - 2), [4, 5])
                for row in rows for i in row]
    ids, *rest = packing.pack(episodes, counts=[len(row) for row in rows])
    assert ids.shape[1] > 41  # a row is longer than an episode may be
    logp, _ = networks.ResponseLogprobs(lm.eval(), 1.0)(ids, *rest)
    assert torch.isfinite(logp).all()


def test_rows_are_not_packed_where_something_is_carried_along_them(monkeypatch):
    base = tiny("llama").base_model
    assert networks.can_pack(base, "cpu")
    plain = base.forward

    def sees_all(position_ids=None, **how):  # as a recurrent model does
        return plain(**how)

    monkeypatch.setattr(base, "forward", sees_all)
    assert not networks.can_pack(base, "cpu")

    def breaks(**how):
        if "position_ids" in how:
            raise TypeError("unexpected keyword position_ids")
        return plain(**how)

    monkeypatch.setattr(base, "forward", breaks)
    assert not networks.can_pack(base, "cpu")


def test_prefixes_are_not_shared_where_that_is_not_exact(monkeypatch):
    base = tiny("llama").base_model
    plain = base.forward

    def forgets(**how):  # as a model does that keeps something else than keys and values
        how.pop("past_key_values", None)
        return plain(**how)

    monkeypatch.setattr(base, "forward", forgets)
    assert not networks.can_share_prefix(base, "cpu")

    def breaks(past_key_values=None, **how):  # as models of mixed layers do
        if past_key_values is not None:
            raise RuntimeError("sizes of tensors must match")
        return plain(**how)

    monkeypatch.setattr(base, "forward", breaks)
    assert not networks.can_share_prefix(base, "cpu")


def test_values_at_the_end_are_the_scores_of_the_pm(lab):
    scorer = preference.Scorer(lab / "pm")
    words = [["w1"], ["w3", "w4", "w5"], ["w9", "w0"]]
    said = [p["prompt"] + [{"role": "assistant", "content": " ".join(w)}]
            for p, w in zip(PROMPTS, words, strict=False)]
    scores = scorer.score(said)
    net = networks.ResponseValues(scorer.model)
    net.mean, net.std = scorer.mean + 0.5, 2.0
    text = [scorer.tokenizer.apply_chat_template(m, tokenize=False) for m in said]
    ids = [scorer.tokenizer(t)["input_ids"] for t in text]
    # The value that predicts a token after the eos is read at the eos.
    episodes = [packing.Episode(row, [0]) for row in ids]
    with torch.no_grad():
        values = net(*packing.pack(episodes)[:2])
    np.testing.assert_allclose(values, (scores - 0.5) / 2, atol=1e-5)
    assert np.std(scores) > 0.1


def test_gradient_of_the_losses_by_finite_differences():
    lm = tiny("gpt2").double()
    torch.manual_seed(2)
    judge = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=21, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1,
        pad_token_id=0)).double().eval()
    policy, value = networks.ResponseLogprobs(lm, 0.8), networks.ResponseValues(judge)
    value.mean, value.std = 0.1, 0.5
    ids, at, targets, _ = packing.pack(EPISODES)
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(len(at), generator=g, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        old, old_values = policy(ids, at, targets)[0] + 0.3 * noise[0], value(ids, at)

    def loss():
        mask = torch.ones_like(old)
        pg, _ = losses.policy_loss(policy(ids, at, targets)[0], old, noise[1], mask)
        vf, _ = losses.value_loss(value(ids, at), old_values + 0.3 * noise[2], noise[3], mask)
        return pg + 0.1 * vf

    weights = [*policy.parameters(), *value.parameters()]
    grads = torch.autograd.grad(loss(), weights, allow_unused=True)
    assert sum(g is None for g in grads) == 0
    for _ in range(4):
        way = [torch.randn(w.shape, generator=g, dtype=w.dtype) for w in weights]
        step, ends = 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                for w, d in zip(weights, way, strict=True):
                    w += sign * step * d
                ends.append(loss().item())
            for w, d in zip(weights, way, strict=True):
                w += step * d
        slope = sum((a * b).sum() for a, b in zip(grads, way, strict=True)).item()
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7)


# --- whole runs ------------------------------------------------------------------------------


def distribution(folder, prompt, temperature=1.0):
    model, tok = models.load(folder, dtype="float32")
    ids = tok(tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids["input_ids"]])).logits[0, -1]
    return (logits.double() / temperature).softmax(-1)


def test_ppo_finds_the_optimum_of_a_bandit(lab, tmp_path):
    """Responses of one token: the optimum is known, ref * exp(score / kl_coef), normalised."""
    coef, temperature = 0.5, 1.2
    values = {f"w{i}": 0.1 * i for i in range(WORDS)}
    judge = Rule(lambda words: values.get(words[0], 0.0) if words else 0.0)
    run(lab, tmp_path, judge, iterations=40, episodes=32, minibatch=16, ppo_epochs=2, lr=3e-3,
        max_new_tokens=1, kl_coef=coef, temperature=temperature, lr_decay=True, seed=1)
    score = torch.tensor([values.get(w, 0.0) for w in VOCAB])
    gaps, starts = [], []
    for row in PROMPTS[:8]:
        ref = distribution(tmp_path / "step-0", row["prompt"], temperature)
        best = ref * (score / coef).exp()
        best /= best.sum()
        got = distribution(tmp_path, row["prompt"], temperature)
        gaps.append((got - best).abs().sum().item() / 2)
        starts.append((ref - best).abs().sum().item() / 2)
    assert np.mean(starts) > 0.3
    assert np.mean(gaps) < 0.12, (gaps, starts)


def test_ppo_learns_to_repeat_a_word_and_to_stop(lab, tmp_path):
    judge = Rule(lambda words: (words == ["w7", "w7"]) + 0.2 * sum(w == "w7" for w in words[:2]))
    history = run(lab, tmp_path, judge, iterations=45, episodes=32, minibatch=16, lr=3e-3,
                  kl_coef=0.005, missing_eos_penalty=0.5)
    assert history["objective/scores"].iloc[:2].mean() < 0.3
    assert history["objective/scores"].iloc[-5:].mean() > 1.1  # of 1.4
    assert history["val/missing_eos_rate"].iloc[-5:].mean() < 0.1
    assert history["val/response_length"].iloc[-5:].mean() == pytest.approx(3, abs=0.3)
    # Sampling and training see the same, moving policy at every iteration.
    assert history["val/sampler_gap"].max() < 1e-4


def test_a_pm_raises_its_own_score_and_kl_holds_the_policy(lab, tmp_path):
    # Responses that spell "Human:" are scored as words, not as turns, which slows the start.
    same = dict(iterations=20, episodes=32, minibatch=16, lr=3e-4)
    free = run(lab, tmp_path / "free", kl_coef=0.01, **same)
    tied = run(lab, tmp_path / "tied", kl_coef=100.0, **same)
    gains = [h["objective/scores"].iloc[-4:].mean() - h["objective/scores"].iloc[:2].mean()
             for h in (free, tied)]
    assert gains[0] > 1.5 and abs(gains[1]) < 0.6
    assert free["objective/kl_k3"].iloc[-1] > 3 and tied["objective/kl_k3"].max() < 0.4
    change = [(distribution(tmp_path / "tied", p["prompt"])
               - distribution(lab / "policy", p["prompt"])).abs().sum() / 2 for p in PROMPTS[:6]]
    assert np.mean(change) < 0.15


def test_zero_reward_does_not_drift(lab, tmp_path):
    history = run(lab, tmp_path, "pm-zero", iterations=4)
    assert history["objective/kl"].abs().max() < 1e-5
    before, after = (models.load(f, dtype="float32")[0].state_dict() for f in
                     (lab / "policy", tmp_path))
    assert max((before[k] - after[k]).abs().max() for k in before) < 1e-6


def steady(history):
    speed = ("eps", "tokens_per_second")
    return history.drop(columns=[c for c in history if c.startswith("time/") or c in speed])


def test_a_seed_fixes_the_history_and_micro_batches_do_not_matter(lab, tmp_path):
    first = steady(run(lab, tmp_path / "a", seed=5))
    pd.testing.assert_frame_equal(first, steady(run(lab, tmp_path / "b", seed=5)), check_exact=True)
    assert not first.equals(steady(run(lab, tmp_path / "c", seed=6)))
    small = steady(run(lab, tmp_path / "d", seed=5, micro_tokens=30))
    pd.testing.assert_frame_equal(first, small, rtol=1e-2, atol=1e-4)


def test_what_is_written(lab, tmp_path):
    (tmp_path / "step-999").mkdir()
    logged = []
    history = run(lab, tmp_path, iterations=3, snapshot_every=2, log=logged.append)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    assert [row["episode"] for row in logged] == list(history["episode"]) == [16, 32, 48]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0", "step-32", "step-48"]
    assert not [p.name for p in tmp_path.rglob(".*")]
    prompt = PROMPTS[0]["prompt"]
    first, final = distribution(tmp_path / "step-0", prompt), distribution(tmp_path, prompt)
    assert torch.equal(final, distribution(tmp_path / "step-48", prompt))
    assert torch.equal(first, distribution(lab / "policy", prompt))
    assert not torch.equal(first, final)
    rows = [json.loads(line) for line in open(tmp_path / "step-32" / "samples.jsonl")]
    assert [r["messages"][:-1] for r in rows] == [p["prompt"] for p in PROMPTS[:8]]
    scores = preference.Scorer(lab / "pm").score([r["messages"] for r in rows])
    np.testing.assert_allclose([r["score"] for r in rows], scores, atol=1e-4)


def test_scores_penalties_and_normalisation_enter_the_reward(lab, tmp_path):
    plain, fined, normed = (
        run(lab, tmp_path / name, iterations=1, **options).iloc[0]
        for name, options in (("plain", {}), ("fined", {"missing_eos_penalty": 2.0}),
                              ("normed", {"score_norm": "start"}))
    )  # fmt: skip
    missing = plain["val/missing_eos_rate"]
    assert 0 < missing < 1 and plain["val/num_eos_tokens"] == round(16 * (1 - missing))
    assert plain["objective/rlhf_reward"] == pytest.approx(plain["objective/scores"], abs=1e-5)
    fine = plain["objective/rlhf_reward"] - fined["objective/rlhf_reward"]
    assert fine == pytest.approx(2 * missing, abs=1e-5)
    assert normed["objective/scores"] == pytest.approx(plain["objective/scores"])
    assert normed["objective/rlhf_reward"] == pytest.approx(0, abs=1e-5)


def test_metrics_have_trls_names(lab, tmp_path):
    # What trl 1.12's PPOTrainer logs: W&B dashboards made for it carry over.
    names = """eps episode lr loss/policy_avg loss/value_avg objective/entropy objective/kl
        objective/non_score_reward objective/rlhf_reward objective/scores policy/approxkl_avg
        policy/clipfrac_avg policy/entropy_avg val/clipfrac_avg val/num_eos_tokens val/ratio
        val/ratio_var"""
    logged = []
    history = run(lab, tmp_path, log=logged.append)
    assert len(logged) == 2
    for row in logged:
        assert not set(names.split()) - set(row)
        assert all(math.isfinite(row[name]) for name in names.split())
    assert list(history["episode"]) == [16, 32]


def test_schedules_and_early_stop(lab, tmp_path):
    history = run(lab, tmp_path / "a", iterations=4, lr=2e-3, lr_decay=True, target_kl=1e-5,
                  kl_target=0.01, whiten_rewards=True)
    np.testing.assert_allclose(history["lr"], [2e-3, 1.5e-3, 1e-3, 5e-4])
    assert (history["val/stopped_early"] == 1).all() and (history["val/minibatches"] < 4).all()
    kl, coef = history["objective/kl"], history["kl_coef"]
    for i in range(3):
        assert coef[i + 1] == pytest.approx(losses.adapt_kl_coef(coef[i], kl[i], 0.01, 16))


def test_a_quantity_that_is_not_finite_stops_the_run(lab, tmp_path):
    calls = []

    def rule(words):
        calls.append(words)
        return math.nan if len(calls) > 8 + 16 else 0.0

    with pytest.raises(ValueError, match=r"PM score is not finite in iteration 2"):
        run(lab, tmp_path / "score", Rule(rule), snapshot_every=1)
    assert len(pd.read_csv(tmp_path / "score" / "history.csv")) == 1
    assert torch.isfinite(distribution(tmp_path / "score" / "step-16", PROMPTS[0]["prompt"])).all()
    with pytest.raises(ValueError, match=r"not finite"):
        run(lab, tmp_path / "lr", lr=1e30)
    assert (tmp_path / "lr" / "step-0" / "config.json").is_file()


def test_bad_input_is_named(lab, tmp_path):
    with pytest.raises(ValueError, match="different tokenizers"):
        run(lab, tmp_path, "pm-foreign")
    with pytest.raises(ValueError, match="42 prompts are fewer than the 64 episodes"):
        run(lab, tmp_path, episodes=64)
    with pytest.raises(ValueError, match="prompt 1 has 4 tokens.*48 positions"):
        run(lab, tmp_path, max_new_tokens=45)
    with pytest.raises(ValueError, match="not a preference model"):
        run(lab, tmp_path, "policy")
