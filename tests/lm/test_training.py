"""Adapters: on tables that input and output share, and their dropout."""

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
)

from cai_utils import preference, sft
from cai_utils.lm import models, training
from cai_utils.rl import checkpoints, dpo, networks, ppo

SIZE = dict(vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=0)
BODY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=256)
TIED = {
    "llama": (LlamaConfig(**SIZE, **BODY, tie_word_embeddings=True), "embed_tokens"),
    "gpt2": (GPT2Config(**SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=256), "wte"),
    "gemma2": (Gemma2Config(**SIZE, **BODY, head_dim=8, num_key_value_heads=1), "embed_tokens"),
}
PROMPT = [{"role": "user", "content": "Hi"}]
SFT_ROWS = [{"messages": [*PROMPT, {"role": "assistant", "content": a}]} for a in ("Yes", "go on")]
PAIRS = [{"prompt": PROMPT, "chosen": [{"role": "assistant", "content": a}],
          "rejected": [{"role": "assistant", "content": b}], "p_chosen": p}
         for a, b, p in (("Hello there.", "Go.", 1.0), ("Hello!", "No", 0.7))]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


class Longer:
    def score(self, conversations):
        return np.array([len(c[-1]["content"]) for c in conversations], float)


def save(folder, kind="llama", **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TIED[kind][0])
    if more:
        model.resize_token_embeddings(**more)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(method, folder, out, lora):
    if method == "sft":
        return sft.finetune(folder, SFT_ROWS, out, lora=lora, lr=0.1, epochs=3, batch_size=1)
    shared = dict(lora=lora, lr=0.1)
    if method == "dpo":
        config = dict(shared, epochs=3, batch_size=2, max_new_tokens=2)
        return dpo.train(folder, PAIRS, [PROMPT], out, config)
    config = dict(shared, iterations=2, episodes=2, minibatch=2, max_new_tokens=3, print_every=0)
    return ppo.train(folder, Longer(), [PROMPT] * 2, out, config)


@pytest.fixture
def trained(monkeypatch):
    """The logits of the model with its adapter, as it was trained and (PPO) sampled."""
    seen, merge, merged = [], training.merge_adapter, ppo.networks.merged

    def before_merging(trainer, *args):
        seen.append(logits(trainer.accelerator.unwrap_model(trainer.model)))
        return merge(trainer, *args)

    def before_saving(model, adapted):
        seen.append(logits(model))
        return merged(model, adapted)

    monkeypatch.setattr(training, "merge_adapter", before_merging)
    monkeypatch.setattr(ppo.networks, "merged", before_saving)
    return seen


@pytest.mark.parametrize("method, kind, lora", [
    ("sft", "llama", {"target_modules": ["TABLE"]}),
    ("sft", "llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    ("sft", "gpt2", {"target_modules": "all-linear", "modules_to_save": ["TABLE"]}),
    ("sft", "gemma2", {"target_modules": ["TABLE", "q_proj"]}),
    ("sft", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
                      "trainable_token_indices": [70, 71]}),
    ("ppo", "llama", {"target_modules": ["TABLE", "lm_head"]}),
    ("ppo", "llama", {"target_modules": ["lm_head"]}),
    ("ppo", "gpt2", {"target_parameters": ["lm_head.weight"], "target_modules": []}),
    ("ppo", "gpt2", {"target_modules": ".*(wte|lm_head)"}),
    ("ppo", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["TABLE", "lm_head"],
                      "ensure_weight_tying": True}),
    ("ppo", "gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
])  # fmt: skip
def test_a_saved_policy_is_the_one_that_learned(trained, tmp_path, method, kind, lora):
    lora = {"r": 2, "lora_alpha": 64, **lora}
    for name in ("target_modules", "modules_to_save"):
        if isinstance(lora.get(name), list):
            lora[name] = [n.replace("TABLE", TIED[kind][1]) for n in lora[name]]
    train(method, save(tmp_path / "lm", kind), tmp_path / "out", lora)
    first, _ = models.load(tmp_path / "lm", dtype="float32", device="cpu")
    again, _ = models.load(tmp_path / "out", dtype="float32", device="cpu")
    assert first.config.tie_word_embeddings
    assert again.config.tie_word_embeddings == lora.get("ensure_weight_tying", False)
    assert (logits(again) - logits(first)).abs().max() > 0.1  # it learned
    np.testing.assert_allclose(logits(again), trained[-1], atol=1e-4)


def test_a_policy_of_dpo_is_the_one_that_learned(monkeypatch, tmp_path):
    seen, save_model = [], checkpoints.save_model
    monkeypatch.setattr(checkpoints, "save_model", lambda model, *rest: (
        seen.append(logits(model)), save_model(model, *rest)))
    lora = {"r": 2, "lora_alpha": 64, "target_modules": ["embed_tokens"]}
    train("dpo", save(tmp_path / "lm"), tmp_path / "out", lora)
    again, _ = models.load(tmp_path / "out", dtype="float32", device="cpu")
    assert not again.config.tie_word_embeddings
    np.testing.assert_allclose(logits(again), seen[-1], atol=1e-4)
    # The adapter learned one use of the table only.
    table, head = (t.weight for t in (again.get_input_embeddings(), again.get_output_embeddings()))
    first, _ = models.load(tmp_path / "lm", dtype="float32", device="cpu")
    assert torch.equal(head, first.get_output_embeddings().weight) and not torch.equal(table, head)


def test_a_table_that_no_adapter_changes_stays_shared(trained, tmp_path):
    lora = {"r": 2, "target_modules": "all-linear"}  # peft leaves the head out
    train("sft", save(tmp_path / "lm", new_num_tokens=300), tmp_path / "out", lora)
    again, _ = models.load(tmp_path / "out", dtype="float32", device="cpu")
    assert again.config.tie_word_embeddings and again.config.vocab_size == 300
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    np.testing.assert_allclose(logits(again), trained[-1], atol=1e-4)


def test_an_adapter_on_a_resized_table(trained, tmp_path):
    lora = {"r": 2, "target_modules": ["embed_tokens"]}
    train("sft", save(tmp_path / "lm", new_num_tokens=300), tmp_path / "out", lora)
    again, _ = models.load(tmp_path / "out", dtype="float32", device="cpu")
    np.testing.assert_allclose(logits(again), trained[-1], atol=1e-4)


def test_a_preference_model_with_an_adapter_on_its_table(trained, tmp_path):
    lora = {"r": 2, "target_modules": ["embed_tokens"]}
    preference.train(save(tmp_path / "lm"), PAIRS, tmp_path / "pm", lora=lora, lr=0.1, batch_size=2)
    again, _ = models.load(tmp_path / "pm", head="score", dtype="float32", device="cpu")
    np.testing.assert_allclose(logits(again), trained[-1], atol=1e-4)


def test_qlora_puts_its_adapter_on_dense_weights_of_an_untied_model(tmp_path):
    from peft import get_peft_model

    base, _ = models.load(save(tmp_path / "lm"), dtype="float32", device="cpu")
    config = training.lora_config({"r": 2, "target_modules": ["lm_head", "embed_tokens"],
                                   "init_lora_weights": False}, "CAUSAL_LM")
    training.untie(base, config)
    model = get_peft_model(base, config)
    want = logits(model)
    again = training.adapter_on_dense_weights(model, tmp_path / "lm", "lm").merge_and_unload()
    np.testing.assert_allclose(logits(again.float()), want, atol=1e-4)


@pytest.mark.parametrize("method", ["preference", "dpo"])
def test_lora_dropout_has_an_effect(tmp_path, method):
    folder, weights = save(tmp_path / "lm"), []
    for p in (0.0, 0.0, 0.6):
        lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": p}
        out = tmp_path / str(len(weights))
        if method == "dpo":
            train("dpo", folder, out, lora)
            model = models.load(out, dtype="float32", device="cpu")[0]
        else:
            preference.train(folder, PAIRS, out, lora=lora, lr=0.1, epochs=3, batch_size=2)
            model = models.load(out, head="score", dtype="float32", device="cpu")[0]
        weights.append(model.model.layers[0].self_attn.v_proj.weight)
    assert torch.equal(weights[0], weights[1])
    assert (weights[0] - weights[2]).abs().max() > 1e-3


def test_the_models_own_dropout_stays_off_beside_that_of_an_adapter():
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.5, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    args = type("Args", (), {"disable_dropout": True})()
    training.keep_lora_dropout(model, args)
    assert not args.disable_dropout
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    lora = {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    with pytest.raises(ValueError, match="ensure_weight_tying.*modules_to_save"):
        train("sft", save(tmp_path / "lm"), tmp_path / "out", lora)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("kind, lora, message", [
    ("llama", {"target_modules": ["lm_head"]}, "target_modules: an adapter on the output head"),
    ("gpt2", {"target_modules": ".*(c_attn|lm_head)"}, "target_modules.*would never be trained"),
    ("gpt2", {"target_modules": [], "target_parameters": ["lm_head.weight"]}, "target_param"),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
     "trainable_token_indices: .*output head.*list lm_head in modules_to_save"),
    ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5]}},
     "trainable_token_indices"),
])  # fmt: skip
def test_an_adapter_on_a_head_that_trl_reads_itself_is_refused(
        tmp_path, method, kind, lora, message):
    with pytest.raises(ValueError, match=f"^lora.{message}"):
        train(method, save(tmp_path / "lm", kind), tmp_path / "out", {"r": 2, **lora})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method, tied", [("ppo", True), ("sft", False)])
def test_rows_of_the_embeddings_that_learn(trained, tmp_path, method, tied):
    folder = save(tmp_path / "lm")
    if not tied:
        model, tokenizer = models.load(folder, dtype="float32", device="cpu")
        training.untie(model, training.lora_config({"target_modules": ["lm_head"]}, "CAUSAL_LM"))
        model.save_pretrained(folder)
    lora = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [70, 71]}
    train(method, folder, tmp_path / "out", lora)
    again, _ = models.load(tmp_path / "out", dtype="float32", device="cpu")
    assert again.config.tie_word_embeddings == tied
    np.testing.assert_allclose(logits(again), trained[-1], atol=1e-4)


def test_beside_an_adapter_on_the_policys_head_the_score_learns_alone(tmp_path):
    policy, value, _, _, adapted = networks.load(
        save(tmp_path / "lm"), Longer(), device="cpu", micro_tokens=100, runs_dir=None,
        lora={"r": 2, "target_modules": ["lm_head"]}, seed=0)
    learn = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (policy, value)]
    assert {n.split(".")[0] for n in learn[0]} == {"lm_head"}
    assert learn[1] == {"score.modules_to_save.default.weight"} and len(adapted) == 2
    with pytest.raises(ValueError, match="'typo'"):
        networks.load(tmp_path / "lm", Longer(), device="cpu", micro_tokens=100, runs_dir=None,
                      lora={"r": 2, "target_modules": ["typo"]}, seed=0)


def test_the_users_lists_are_left_as_they_are():
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    training.lora_config(lora, "SEQ_CLS").modules_to_save.append("score")
    assert lora["modules_to_save"] == ["lm_head"]
