"""Each causal-LM family that transformers has, as a tiny random model, against plain passes of one
row: cache, choices, shared prefixes, packing, preference models. About a minute on one core."""

import re

import numpy as np
import pytest
import torch
from families import FAMILIES, model_of, randomize
from test_sampling import TOKENIZER
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
)
from trl.trainer.utils import add_fused_lm_head

from cai_utils import preference
from cai_utils.lm import architectures, kvcache
from cai_utils.lm.sampling import Sampler
from cai_utils.rl import networks, packing

NOT_BUILT = {
    "dots3_note": "its vision part has one size; dots3_note_text is its language model",
    "gemma3n": "needs the package timm; gemma3n_text is its language model",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "an encoder and a decoder of sounds", "musicgen_melody": "as musicgen",
}
LAYERS, PADDED, PAD_ID = "layers of other kinds", "takes no positions", "positions from its pad id"
NO_CACHE, MASKED = "keeps no keys and values", "is not a causal language model"
REFUSED = {
    **dict.fromkeys((
        "axk2", "bailing_hybrid", "bamba", "deepseek_v32", "deepseek_v4", "dots3_note_text",
        "falcon_h1", "falcon_mamba", "glm_moe_dsa", "granitemoehybrid", "hy_v4", "inkling2_text",
        "inkling_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "llama4",
        "llama4_text", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5",
        "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp",
        "qwen4_exp_text", "recurrent_gemma", "zamba", "zamba2", "zaya"), LAYERS),
    **dict.fromkeys((
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart",
        "moss_transcribe_diarize", "mvp", "pegasus", "plbart", "prophetnet", "roformer", "trocr",
        "whisper"), PADDED),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm",
                     "xlm-roberta", "xlm-roberta-xl", "xmod"), PAD_ID),
    **dict.fromkeys(("gemma4_unified_assistant", "openai-gpt", "reformer", "rwkv", "xlnet",
                     "xlstm"), NO_CACHE),
    "blt": "bytes in patches", "git": "captions", "xlm": MASKED,
}
# Their heads transform the hidden states, or take them from elsewhere: sampled, not trained.
NOT_TRAINED = {"bert", "big_bird", "electra", "ernie", "megatron-bert", "mllama",
               "modernbert-decoder", "rembert", "roc_bert"}
SAMPLED = [family for family in FAMILIES if family not in NOT_BUILT and family not in REFUSED]
# Ragged, with a prefix that most share, longer than the windows of attention.
PROMPTS = ["the cat sat on a mat. " + x for x in ("a", "bc", "the end.", "")] + ["b", "nothing"]
IDS = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
CHOICES = [" (A)", " (B)", " (A"]


def logprobs_of(model, ids, continuation):
    """Those of each token of a continuation, by one pass over one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + continuation]), use_cache=False).logits[0]
    logs = logits.float().log_softmax(-1)[len(ids) - 1 : -1]
    return logs.gather(1, torch.tensor(continuation)[:, None])[:, 0], logs.max(-1).values


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Whatever may be shared is shared, however short."""
    monkeypatch.setattr(kvcache, "_SHARE_FROM", 0)
    monkeypatch.setattr(kvcache, "_SHARE_PART", 0)
    response_states = networks.response_states
    monkeypatch.setattr(
        networks, "response_states", lambda base, ids, at, positions=None, share_prefix=True,
        least_work=0: response_states(base, ids, at, positions, share_prefix, least_work))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_sweep_covers_what_transformers_has():
    assert set(NOT_BUILT) | set(REFUSED) <= set(FAMILIES) and NOT_TRAINED <= set(SAMPLED)
    assert len(FAMILIES) >= 189 and len(SAMPLED) >= 117 and len(NOT_BUILT) <= 5


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_misread_is_refused(family):
    model = model_of(family, len(TOKENIZER))
    name = r".*\ba " + re.escape(model.config.model_type)
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED[family]}.*give a decoder such as"):
        Sampler(model, TOKENIZER)


@pytest.mark.parametrize("family", SAMPLED)
def test_a_family_is_read_as_by_plain_passes(family):
    model = model_of(family, len(TOKENIZER))
    for share in (True, False):
        sampler = Sampler(model, TOKENIZER, share_prefixes=share)
        got = sampler.generate(PROMPTS, temperature=0, max_new_tokens=6)
        for ids, (completion,) in zip(IDS, got, strict=True):
            want, best = logprobs_of(model, ids, completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, want, atol=1e-4)
            np.testing.assert_allclose(want, best, atol=1e-4)  # greedy
        got = sampler.choice_logprobs(PROMPTS, CHOICES)
        for ids, row in zip(IDS, got, strict=True):
            want = [logprobs_of(model, ids, TOKENIZER(c)["input_ids"])[0].sum() for c in CHOICES]
            np.testing.assert_allclose(row, torch.stack(want).log_softmax(0), atol=1e-4)
    check_networks(model)
    check_trainer(family, model)
    if type(model.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        model.config.num_labels = 1
        score = AutoModelForSequenceClassification.from_config(
            model.config, attn_implementation="eager")
        if hasattr(score, "score"):  # the others are refused by `models.load`
            check_scores(randomize(score.eval()))


def episodes():
    return [packing.Episode(ids, [5, 6, 7 + k, 2]) for k, ids in enumerate(IDS)]


def batches(*models):
    """A batch of a row for each episode, and one of several in a row where all models allow it."""
    packs = all(networks.can_pack(model.base_model, "cpu") for model in models)
    return [packing.pack(episodes(), counts=c) for c in ([1] * 6, [2, 2, 2])[: 1 + packs]]


def check_networks(model):
    net = networks.ResponseLogprobs(model, temperature=1.0)
    want = torch.cat([logprobs_of(model, e.prompt_ids, e.response_ids)[0] for e in episodes()])
    for batch in batches(model):
        with torch.no_grad():
            np.testing.assert_allclose(net(*batch)[0], want, atol=1e-4)


def check_trainer(family, model):
    """trl's log-probabilities, from the head's weight, are the model's own, or it is refused."""
    if family in NOT_TRAINED:
        with pytest.raises(ValueError, match="cannot be trained here"):
            architectures.check_head(model)
        return
    architectures.check_head(model)
    ids, start = torch.tensor([IDS[0]]), len(IDS[0]) // 2
    want, _ = logprobs_of(model, IDS[0][:start], IDS[0][start:])
    add_fused_lm_head(model)
    with torch.no_grad():
        got = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0, start - 1 :]
    np.testing.assert_allclose(got, want, atol=1e-4)


def check_scores(model):
    rows = [e.prompt_ids + e.response_ids for e in episodes()]
    scorer = preference.Scorer(model, TOKENIZER, batch_tokens=100)
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([row]), use_cache=False).logits.item() for row in rows]
        np.testing.assert_allclose(scorer.score_ids(rows), want, atol=1e-4)
        want = torch.cat([model.score(model.base_model(
            input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0, -5:-1])
            for row in rows])[:, 0]
        for ids, at, _, positions in batches(model):
            got = networks.ResponseValues(model)(ids, at, positions)
            np.testing.assert_allclose(got, want, atol=1e-4)
