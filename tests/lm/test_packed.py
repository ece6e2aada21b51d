"""Training in packed passes is training on plain rows: loss, gradient, and the model at its end."""

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from cai_utils import preference, sft
from cai_utils.lm import models, packed, training

SIZE = dict(vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=0)
BODY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=256)
KINDS = {
    "llama": LlamaConfig(**SIZE, **BODY, tie_word_embeddings=True),
    "gpt2": GPT2Config(**SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=256, resid_pdrop=0,
                       embd_pdrop=0, attn_pdrop=0),
    "gpt_neox": GPTNeoXConfig(**SIZE, **BODY),
    "qwen2": Qwen2Config(**SIZE, **BODY, num_key_value_heads=1),
    "gemma2": Gemma2Config(**SIZE, **BODY, head_dim=8, num_key_value_heads=1),
}
ASKS = [[{"role": "user", "content": "Hi" * n}] for n in (1, 2, 5)]
SAID = ["x" * (i % 7 + 1) + "yz"[i % 2] for i in range(12)]
TALKS = [{"messages": [*ASKS[i % 3], {"role": "assistant", "content": said}]}
         for i, said in enumerate(SAID)] + [{"context": "so", "text": " it goes"}]
PAIRS = [{"prompt": ASKS[i % 3], "chosen": [{"role": "assistant", "content": "y" * (i % 5 + 1)}],
          "rejected": [{"role": "assistant", "content": "n"}], "p_chosen": 0.6 + i % 4 / 10,
          "weight": 1 + i % 2} for i in range(13)]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def save(kind):
        out = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(KINDS[kind]).save_pretrained(out)
        tiny.tokenizer().save_pretrained(out)
        return out

    return save


def read_by(folder, head):
    """The logits, or scores, that a saved model gives."""
    torch.manual_seed(0)  # of a head that is new
    model, _ = models.load(folder, head, dtype="float32", device="cpu")
    with torch.no_grad():
        states = model.base_model(input_ids=IDS).last_hidden_state
        return (model.score if head == "score" else model.get_output_embeddings())(states)


@pytest.mark.parametrize("kind, lora", [*((kind, None) for kind in KINDS), ("llama", LORA)])
@pytest.mark.parametrize("stage", ["sft", "pm"])
def test_the_trained_model_is_that_of_plain_rows(folder, tmp_path, monkeypatch, stage, kind, lora):
    train, rows, head = {"sft": (sft.finetune, TALKS, "lm"),
                         "pm": (preference.train, PAIRS, "score")}[stage]
    base, used, results = folder(kind), [], []
    read = packed._read_places
    monkeypatch.setattr(packed, "_read_places", lambda model: used.append(kind) or read(model))
    for allowed in (packed.allowed, lambda *_: False):
        monkeypatch.setattr(packed, "allowed", allowed)
        out = tmp_path / str(len(results))
        made = train(base, rows, out, lr=3e-3, epochs=2, batch_size=4, lora=lora)
        results.append((made, read_by(out, head)))
    # gemma2 caps its logits, which no score model has
    assert used == ([] if (stage, kind) == ("sft", "gemma2") else [kind])
    (got, found), (want, plain) = results
    assert got["steps"] == want["steps"] == 8
    # Not the weights: Adam moves some that have no gradient (biases of keys) by its rounding.
    moved = (plain - read_by(base, head)).abs().max()
    assert moved > 0.02 and (found - plain).abs().max() < 2e-3 * moved
    assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-4)
    for ours, theirs in zip(got["log"], want["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"step", "epoch"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=2e-3), name


def test_few_rows_at_a_time_are_few_tokens(folder):
    model, tokenizer = models.load(folder("llama"), dtype="float32", device="cpu")
    data = sft.tokenize(TALKS, tokenizer)
    longest = max(map(len, data["input_ids"]))
    assert [sft._Trainer.tokens_of_pass(model, data, n) for n in (1, 3, 10**6)] == [
        longest, 3 * longest, packed.PASS_TOKENS["cpu"]]


def test_mixtures_of_experts_and_sharded_weights_are_trained_as_trl_does(folder, monkeypatch):
    moe = Qwen2MoeConfig(**SIZE, **BODY, num_experts=4, moe_intermediate_size=8,
                         shared_expert_intermediate_size=8, num_experts_per_tok=2)
    assert not packed.allowed(AutoModelForCausalLM.from_config(moe), 20)
    model, _ = models.load(folder("llama"), dtype="float32", device="cpu")
    assert packed.allowed(model, 20)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not packed.allowed(model, 20)


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_several_gpus_of_one_process_get_plain_rows(folder, tmp_path, monkeypatch, gpus):
    asked = []

    def arguments(*given, _plain=training.training_arguments, **more):
        made = _plain(*given, **more)
        made._n_gpu = gpus
        return made

    def stop(*_, **__):
        raise KeyboardInterrupt

    trainer = preference.PreferenceTrainer
    monkeypatch.setattr(trainer, "tokens_of_pass", lambda *_: asked.append(gpus))
    monkeypatch.setattr(trainer, "__init__", stop)
    monkeypatch.setattr(training, "training_arguments", arguments)
    with pytest.raises(KeyboardInterrupt):
        preference.train(folder("llama"), PAIRS, tmp_path, batch_size=4)
    assert asked == [gpus] * (gpus < 2)


@pytest.mark.parametrize("learns", [(True, True, True), (True, False, False)])
def test_the_loss_of_tokens_in_parts(learns, monkeypatch):
    monkeypatch.setattr(packed, "LOGITS", 3 * 50)  # three tokens at a time
    torch.manual_seed(0)
    inputs = [torch.randn(n, requires_grad=r) for n, r in
              zip(((7, 8), (50, 8), (50,)), learns, strict=True)]
    targets = torch.randint(50, (7,))
    logits = torch.nn.functional.linear(*inputs)
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 5
    loss, (entropy, right) = packed._TokenLoss.apply(
        *inputs, targets, torch.tensor(0.2), torch.float32)
    torch.testing.assert_close(loss, want)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum())
    assert right == (logits.argmax(-1) == targets).sum()
    learned = [x for x, learn in zip(inputs, learns, strict=True) if learn]
    for ours, theirs in zip(torch.autograd.grad(3 * loss, learned),
                            torch.autograd.grad(3 * want, learned), strict=True):
        torch.testing.assert_close(ours, theirs)
