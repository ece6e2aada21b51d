"""A preference model, a value model and a policy from any causal LM: tiny random ones of four
architectures, with and without bos, tied and untied heads, rotary and learned positions."""

import families
import numpy as np
import pytest
import tiny
import torch
import transformers

from cai_utils import preference, sft
from cai_utils.lm import architectures, kvcache, models, tokens, training
from cai_utils.lm.sampling import Sampler
from cai_utils.rl import dpo, networks, packing

SIZE = dict(vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=0)
BODY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=256)
CONFIGS = {
    "Llama": transformers.LlamaConfig(**SIZE, **BODY, num_key_value_heads=1),
    "Qwen2": transformers.Qwen2Config(**SIZE, **BODY, num_key_value_heads=2,
                                      tie_word_embeddings=True),
    "GPTNeoX": transformers.GPTNeoXConfig(**SIZE, **BODY),
    "GPT2": transformers.GPT2Config(**SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=256),
}
PROMPT = [{"role": "user", "content": "Hi"}]
ROWS = [
    {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": a}],
     "rejected": [{"role": "assistant", "content": b}], "p_chosen": p}
    for a, b, p in (("Hello there.", "Go.", 1.0), ("Hello!", "No", 0.7))
]


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def ids_of(talk, tokenizer):
    ((prompt, answer),) = tokens.encode([talk], tokenizer)
    return prompt + answer


def test_a_preference_model_learns_is_saved_and_reads_its_score_at_eos(folder):
    out = folder.parent / "pm"
    metrics = preference.train(folder, ROWS * 8, out, batch_size=4, epochs=4, lr=1e-2)
    assert metrics["log"][-1]["loss"] < metrics["log"][0]["loss"]
    talks = [PROMPT + r[side] for r in ROWS for side in ("chosen", "rejected")]
    scores = preference.Scorer(out).score(talks)
    assert scores[0] > scores[1] and scores[2] > scores[3]
    model, tokenizer = models.load(out, head="score", dtype="float32", device="cpu")
    for talk, score in zip(talks, scores, strict=True):  # by hand: no batch, no padding
        ids = torch.tensor([ids_of(talk, tokenizer)])
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0, -1]
        assert model.score(hidden).item() - model.config.score_mean == pytest.approx(
            score, abs=1e-4
        )


def test_a_policy_and_a_value_model_for_ppo(folder):
    pm = folder.parent / "pm"
    preference.train(folder, ROWS, pm, batch_size=2)
    for judge, zero in ((pm, False), (type("Judge", (), {"score": lambda self, c: None})(), True)):
        policy, value, *_, tokenizer, _ = networks.load(
            folder, judge, device="cpu", micro_tokens=1024, runs_dir=None, lora=None, seed=0
        )
        talk = PROMPT + ROWS[0]["chosen"]
        ((prompt, answer),) = tokens.encode([talk], tokenizer)
        inputs = packing.pack([packing.Episode(prompt, answer)])
        actor = networks.Actor(networks.ResponseLogprobs(policy, 1.0),
                               networks.ResponseValues(value))
        logp, entropy, values = actor(*inputs, with_entropy=True)
        plain = policy(input_ids=inputs[0]).logits[0].log_softmax(-1)
        expected = [plain[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer)]
        np.testing.assert_allclose(logp.detach(), expected, atol=1e-4)
        assert values.shape == (len(answer),) and (entropy > 0).all()
        assert (values == 0).all() if zero else values.std() > 0
        (logp.sum() + values.sum()).backward()
        assert value.score.weight.grad.abs().sum() > 0
        assert policy.get_input_embeddings().weight.grad.abs().sum() > 0


def test_an_adapter_on_dense_weights_is_the_adapter_merged_in_place(folder):
    """What QLoRA ends with, on a base that is not quantised: then both ways are the same model."""
    from peft import get_peft_model

    base, tokenizer = models.load(folder, head="score", dtype="float32", device="cpu")
    lora = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    config = training.lora_config(lora, "SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, config)
    batch = tokenizer(["a b", "c"], padding=True, return_tensors="pt")
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
        again = training.adapter_on_dense_weights(model, folder, "score").merge_and_unload().float()
        merged = model.merge_and_unload()
        np.testing.assert_allclose(again(**batch).logits, merged(**batch).logits, atol=2e-2)
        fresh, _ = models.load(folder, head="score", dtype="float32", device="cpu")
        assert (again(**batch).logits - fresh(**batch).logits).abs().max() > 0.1


@pytest.mark.parametrize("family, message", [
    ("apertus", "transformers has no score head for a apertus"),
    ("bert", "a BertForSequenceClassification reads no score at a row's last token"),
    ("ctrl", "a CTRLForSequenceClassification reads no score"),
])  # fmt: skip
def test_a_family_without_a_score_head_makes_no_preference_model(tmp_path, family, message):
    families.model_of(family, 259).save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=f"{message}.*preference models of another family"):
        preference.train(tmp_path / "lm", ROWS, tmp_path / "pm")


def test_a_decoder_without_keys_and_values_is_refused_as_promised():
    for family in ("rwkv", "openai-gpt"):
        model = families.model_of(family, 259)
        with pytest.raises(ValueError, match=f"a {family} cannot be sampled here.*no keys and"):
            Sampler(model, tiny.tokenizer())


def test_memory_is_counted_layer_by_layer():
    llama = transformers.AutoModelForCausalLM.from_config(CONFIGS["Llama"])
    assert kvcache.bytes_per_token(llama, llama.config) == 2 * 2 * 1 * 8 * 4
    gemma = families.model_of("gemma4_text", 259)  # its full layers have larger heads
    sizes = [2 * layer.num_key_value_heads * layer.head_dim * 4
             for layer in gemma.config.per_layer_config]
    assert len(set(sizes)) == 2
    assert kvcache.bytes_per_token(gemma, gemma.config) == sum(sizes)


@pytest.mark.parametrize("family, reads, plain", [
    ("llama", True, True), ("opt", True, True), ("gemma2", True, False), ("cohere", True, False),
    ("modernbert-decoder", False, False), ("electra", False, False), ("minicpm3", True, False),
])  # fmt: skip
def test_what_stands_between_states_and_logits(family, reads, plain):
    model = families.model_of(family, 259).train()
    assert architectures.head_of(model) == (reads, plain) and model.training


def test_memory_that_runs_out_is_not_the_heads_fault(monkeypatch):
    model = families.model_of("llama", 259)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model, "forward", full)
    for probe in (architectures.check_head, architectures.head_of,
                  lambda m: networks.can_share_prefix(m.base_model, "cpu")):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            probe(model)
    assert not model.get_output_embeddings()._forward_hooks


def test_a_head_that_trl_would_misread_is_refused_before_training(tmp_path):
    families.model_of("modernbert-decoder", 259).save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    talk = {"messages": [*PROMPT, {"role": "assistant", "content": "Hello"}]}
    for call in (lambda: sft.finetune(tmp_path / "lm", [talk], tmp_path / "out"),
                 lambda: dpo.train(tmp_path / "lm", ROWS, [PROMPT], tmp_path / "out", {})):
        with pytest.raises(ValueError, match="modernbert-decoder cannot be trained here"):
            call()
