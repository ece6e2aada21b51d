"""Specs are found, loaded on the right terms, and refused with one clear message."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from cai_utils import preference, sft
from cai_utils.lm import models, training
from cai_utils.lm.sampling import Sampler
from cai_utils.rl.config import PPOConfig


def save(folder, dtype=torch.float32, **special):
    words = {w: i for i, w in enumerate(["<u>", "<e>", "a", "b"])}
    inner = Tokenizer(tokenizer_models.WordLevel(words, "<u>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "m", eos_token="<e>")
    return tmp_path / "m"


def test_a_local_folder_as_language_model(folder, monkeypatch):
    model, tokenizer = models.load(folder)
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert tokenizer.pad_token == "<e>" and tokenizer.padding_side == "left"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 1
    if not torch.cuda.is_available():
        assert (model.device.type, model.dtype) == ("cpu", torch.float32)
        assert model.config._attn_implementation == "eager"
    assert models.load(folder, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    for hardware, small, expected in ((True, 0, torch.bfloat16), (False, 0, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=hardware: has)
        monkeypatch.setattr(models, "EAGER_BELOW", small)
        assert models.load(folder, device="cpu")[0].dtype == expected
    again, _ = models.load(str(folder), dtype=torch.float64, device="cpu")
    assert again.dtype == torch.float64 and again.device.type == "cpu"


@pytest.mark.parametrize("cpu, amx, faster", [
    ("Intel Xeon", True, True), ("Intel Xeon", False, False), ("AMD EPYC", False, True)])
def test_bf16_is_decided_by_the_kind_of_cpu_alone(folder, monkeypatch, cpu, amx, faster):
    model, _ = models.load(folder, device="cpu")
    kind = {"cpu_name": cpu, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # A clock would make it hang on the load.
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("it was measured"))
    assert models.bf16_pays(model, above=0) == faster and not models.bf16_pays(model)
    assert ("bf16" in models.hardware()) == faster  # part of a checkpoint's key
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not models.bf16_pays(model, above=0)


def test_bf16_weights_become_the_dtype_asked_for(tmp_path):
    save(tmp_path / "m", torch.bfloat16, eos_token="<e>")
    model, _ = models.load(tmp_path / "m", dtype="float32", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_pad_token_without_any_special_token(tmp_path):
    save(tmp_path / "m")
    assert models.load(tmp_path / "m")[1].pad_token == "<u>"


def test_a_pad_token_without_an_embedding_is_not_used(tmp_path):
    # added to the tokenizer, as many recipes do, and to no embedding
    save(tmp_path / "m", eos_token="<e>", bos_token="<u>", pad_token="<pad>")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "m").pad_token_id == 4
    model, tokenizer = models.load(tmp_path / "m")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    scorer, tokenizer = models.load(tmp_path / "m", head="score")
    tokenizer.pad_token = "<pad>"
    assert models.pad_apart_from_eos(scorer, tokenizer) == 0
    # rows of different lengths are padded in training; what is saved can be loaded
    ask, say = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b a b"}]
    rows = [{"messages": ask + say}, {"messages": ask + [{**say[0], "content": "b"}]}]
    sft.finetune(tmp_path / "m", rows, tmp_path / "lm", batch_size=2)
    pair = {"prompt": ask, "chosen": say, "rejected": rows[1]["messages"][1:], "p_chosen": 1.0,
            "source": "ai", "axis": "harmless", "principle": None}
    preference.train(tmp_path / "lm", [pair] * 2, tmp_path / "pm", batch_size=2)
    scores = preference.Scorer(tmp_path / "pm").score([ask + say, rows[1]["messages"]])
    alone = preference.Scorer(tmp_path / "pm").score([rows[1]["messages"]])
    assert scores[1] == pytest.approx(alone[0], abs=1e-5)


def test_a_score_head_sits_on_the_same_body(folder):
    lm, _ = models.load(folder, dtype="float32")
    scorer, tokenizer = models.load(folder, head="score", dtype="float32")
    assert scorer.config.num_labels == 1 and not scorer.training
    assert torch.equal(scorer.model.embed_tokens.weight, lm.model.embed_tokens.weight)
    batch = tokenizer(["a b a", "b"], padding=True, return_tensors="pt").to(scorer.device)
    with torch.no_grad():
        scores = scorer(**batch).logits
        alone = scorer(**tokenizer(["b"], return_tensors="pt").to(scorer.device)).logits
    assert scores.shape == (2, 1)
    torch.testing.assert_close(scores[1:], alone)  # read at the last real token
    scorer.save_pretrained(folder.parent / "pm")
    tokenizer.save_pretrained(folder.parent / "pm")
    again, _ = models.load(folder.parent / "pm", head="score", dtype="float32")
    assert torch.equal(again.score.weight, scorer.score.weight)


def test_miniatures_come_from_the_run_folder_else_from_the_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(FileNotFoundError, match="00_miniature"):
        models.resolve("miniature/s")
    save(tmp_path / "shipped" / "s")
    runs = tmp_path / "runs" / "miniature"
    assert models.resolve("miniature/s") == tmp_path / "shipped" / "s"
    assert models.resolve("miniature/s", runs) == tmp_path / "shipped" / "s"
    save(runs / "models" / "pretrained" / "s")
    assert models.resolve("miniature/s", runs) == runs / "models" / "pretrained" / "s"
    assert models.resolve("miniature/s") == tmp_path / "shipped" / "s"
    assert models.load("miniature/s", runs_dir=runs)[0].config.hidden_size == 8


def test_a_gguf_file_and_the_one_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="0 GGUF files"):
        models.resolve("gguf:some-weights")
    (package / "w.gguf").touch()
    assert models.resolve("gguf:some-weights") == package / "w.gguf"
    assert models.resolve(f"gguf:{package / 'w.gguf'}") == package / "w.gguf"
    assert models.resolve(package / "w.gguf") == package / "w.gguf"
    assert "some_weights" not in sys.modules


def test_a_hub_id_passes_through():
    assert models.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_a_revision_stands_in_the_spec_or_beside_it(folder, monkeypatch):
    spec = "EleutherAI/pythia-1.4b@step143000"
    assert models.resolve(spec) == spec
    assert models.source(spec) == ("EleutherAI/pythia-1.4b", {"revision": "step143000"})
    assert models.source("org/name", revision="v1") == ("org/name", {"revision": "v1"})
    assert models.source("org/name") == ("org/name", {})
    assert models.source(folder) == (folder, {})
    with pytest.raises(ValueError, match="names a revision"):
        models.source(spec, revision="main")
    with pytest.raises(ValueError, match="this one is local"):
        models.source(folder, revision="main")
    asked = []

    def refuse(where, **options):
        asked.append((where, options))
        raise OSError("offline")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    for call in (lambda: models.load(spec), lambda: models.load_tokenizer(spec)):
        with pytest.raises(FileNotFoundError, match="offline"):
            call()
    options = {"revision": "step143000", "trust_remote_code": False}
    assert asked == [("EleutherAI/pythia-1.4b", options)] * 2


def test_what_was_sampled_of_another_revision_is_not_taken_up(folder, monkeypatch):
    loaded = models.load(folder)
    monkeypatch.setattr(models, "load", lambda spec, **options: loaded)
    made = [Sampler.from_spec("org/name", revision=r).source for r in ("v1", "v1", "v2", None)]
    assert made[0] == made[1] and made[0] != made[2] and made[0] != made[3]


@pytest.mark.parametrize("options, message", [
    ({"dtype": "float3"}, "dtype='float3'"),
    ({"dtype": "int8"}, "dtype='int8'"),
    ({"quantize": "2bit"}, "'4bit', '8bit' or null"),
    ({"quantize": "4bit", "device": "cpu"}, "needs CUDA .device is cpu. .*bitsandbytes"),
])  # fmt: skip
def test_a_dtype_or_quantization_that_cannot_be_is_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        models.load(folder, **options)


def test_qlora_is_asked_for_in_the_parameters_of_lora(folder, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"], "quantize": "4bit"}
    assert training.lora_config(lora, "CAUSAL_LM").r == 2
    with pytest.raises(ValueError, match="lora: .*rank.*peft.LoraConfig"):
        training.lora_config({"rank": 2}, "CAUSAL_LM")
    if not torch.cuda.is_available():
        rows = [{"messages": [{"role": "user", "content": "a"},
                              {"role": "assistant", "content": "b"}]}]
        with pytest.raises(ValueError, match="quantize='4bit' needs CUDA"):
            sft.finetune(folder, rows, tmp_path / "out", lora=lora)
    with pytest.raises(ValueError, match="PPO"):
        PPOConfig.from_dict({"lr": 1e-3, "lora": lora})


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("miniature/xxl", ValueError, "xs, s, m, l"),
        ("gguf:no-such-package", FileNotFoundError, "pip install no-such-package"),
        ("runs/miniature/models/nothing/s", FileNotFoundError, "no such model folder"),
        ("./nothing", FileNotFoundError, "no such model folder"),
    ],
)
def test_specs_that_lead_nowhere_are_named(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        models.resolve(spec)
    assert str(caught.value).startswith(spec)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        models.resolve(tmp_path)


def test_a_model_that_is_not_causal_and_an_unknown_head(folder, tmp_path):
    with pytest.raises(ValueError, match="head='value'"):
        models.load(folder, head="value")
    config = BertConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    for name, make in (("bert", BertForMaskedLM(config).save_pretrained),
                       ("t5", T5Config().save_pretrained)):  # fmt: skip
        other = tmp_path / name
        save(other)
        make(other)
        with pytest.raises(ValueError, match=f"{name} is not a causal language model"):
            models.load(other)


def test_weights_that_git_lfs_has_not_fetched_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors: a Git LFS pointer.*git lfs pull"):
        models.load(tmp_path)


CANARY = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); 1 / 0"


@pytest.mark.parametrize("known", [False, True], ids=["code of its own", "known, with code"])
def test_code_that_a_folder_brings_does_not_run(tmp_path, capsys, monkeypatch, known):
    folder = tmp_path / "m"
    save(folder, eos_token="<e>")
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((folder / name).read_text())
        auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own",
                "AutoModelForSequenceClassification": "own.Own"}
        found["auto_map"] = auto if name == "config.json" else {"AutoTokenizer": ["own.Own", None]}
        if not known:
            found["model_type"] = "own"
        (folder / name).write_text(json.dumps(found))
    (folder / "own.py").write_text(CANARY)
    calls = (models.load, lambda spec: models.load(spec, head="score"), preference.Scorer,
             models.parameters, models.load_tokenizer)
    for call in calls[:2] + calls[3:] if known else calls[:-1]:
        if known:  # as before, by the classes of transformers
            call(folder)
        else:
            with pytest.raises(ValueError, match=f"^{folder}: .*auto_map.*CAI_TRUST_REMOTE_CODE"):
                call(folder)
    assert not list(tmp_path.rglob("ran"))
    if known:
        assert f"{folder}: the code in its folder" in capsys.readouterr().out
        return
    monkeypatch.setenv("CAI_TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    with pytest.raises(ZeroDivisionError):  # allowed: the canary sings
        models.load(folder)
    monkeypatch.setenv("CAI_TRUST_REMOTE_CODE", "yes")
    with pytest.raises(ValueError, match="CAI_TRUST_REMOTE_CODE='yes': it is 1 or 0"):
        models.load(folder)


def test_every_loading_call_says_whether_code_may_run():
    silent = []
    for folder in ("cai_utils", "scripts", "benchmarks"):
        for path in (Path(__file__).parents[2] / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if re.fullmatch(r"(Auto\w+|pipeline)(\.from_\w+)?", name):
                    told = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    if not {"trust_remote_code", None} & set(told):
                        silent.append(f"{path.name}: {name}")
    assert not silent
