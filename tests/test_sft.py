"""SFT: which tokens are trained on, and that training on them does what it should."""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cai_utils import dialogue, sft
from cai_utils.lm import models, training

TRANSCRIPT = (
    "{% for m in messages %}{{ '\n\n' }}{{ 'Human' if m['role'] == 'user' else 'Assistant' }}"
    "{{ ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<start>' + m['role'] + ' ' + m['content'] + '<eos>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant ' }}{% endif %}"
)
WORDS = "a b c d e f g yes no good bad ok user assistant".split()


def make_tokenizer(template=TRANSCRIPT, bos=True):
    """Words with and without leading space, newlines: every token can be recognised in a test."""
    special = ["<pad>", "<bos>", "<eos>", "<start>"]
    pieces = ["\n\n", "\n", " ", "Human:", "Assistant:", *WORDS, *(" " + w for w in WORDS)]
    vocab = {t: i for i, t in enumerate([*special, "<unk>", *pieces])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        pattern=Regex(r"\n\n|\n| ?\w+:?| "), behavior="isolated"
    )
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", chat_template=template,
    )


def make_model(folder, tokenizer, width=32, layers=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def say(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("bos", [True, False])
def test_trained_tokens_are_those_of_sampling_then_the_response_and_eos(bos):
    tokenizer = make_tokenizer(bos=bos)
    row = {"messages": say("a b", "yes", "c", "good d")}
    data = sft.tokenize([row], tokenizer)
    expected = ["<bos>"] * bos + [
        "\n\n", "Human:", " a", " b", "\n\n", "Assistant:", " yes",
        "\n\n", "Human:", " c", "\n\n", "Assistant:", " good", " d", "<eos>",
    ]
    assert pieces(tokenizer, data["input_ids"][0]) == expected
    labels = data["labels"][0]
    assert pieces(tokenizer, [t for t in labels if t != -100]) == [" good", " d", "<eos>"]
    assert labels.index(next(t for t in labels if t != -100)) == len(labels) - 3
    prompt = dialogue.render(row["messages"][:-1], tokenizer)  # what the sampler tokenizes
    assert data["input_ids"][0][:-3] == tokenizer(prompt)["input_ids"]


def test_a_chat_template_with_its_own_eos_gets_one_eos_and_nothing_after():
    tokenizer = make_tokenizer(CHATML)
    data = sft.tokenize([{"messages": say("a", "good b")}], tokenizer)
    assert pieces(tokenizer, data["input_ids"][0])[-4:] == [" ", "good", " b", "<eos>"]
    trained = pieces(tokenizer, [t for t in data["labels"][0] if t != -100])
    assert trained[-2:] == [" b", "<eos>"] and trained.count("<eos>") == 1
    assert data["input_ids"][0].count(tokenizer.eos_token_id) == 2  # the user turn's and the last
    # the template writes no bos, so that its model reads none
    prompt = tokenizer.apply_chat_template(say("a"), add_generation_prompt=True)["input_ids"]
    assert data["labels"][0][: len(prompt)] == [-100] * len(prompt)
    assert data["input_ids"][0][: len(prompt)] == prompt


def test_pretraining_text_is_trained_on_whole_and_cut_into_pieces():
    tokenizer = make_tokenizer()
    data = sft.tokenize([{"text": "a b c"}], tokenizer)
    assert pieces(tokenizer, data["input_ids"][0]) == ["<bos>", "a", " b", " c", "<eos>"]
    assert data["labels"] == data["input_ids"]
    long = sft.tokenize([{"text": "a " * 20}], tokenizer, max_length=8)
    assert max(map(len, long["input_ids"])) == 8
    joined = [t for row in long["input_ids"] for t in row]
    assert len(joined) >= 21 and joined[-1] == tokenizer.eos_token_id


def test_long_prompt_loses_its_beginning_and_the_response_stays_whole(capsys):
    tokenizer = make_tokenizer()
    rows = [{"messages": say("a " * 30 + "b", "good c")}, {"messages": say("a", "d " * 40)}]
    data = sft.tokenize(rows, tokenizer, max_length=16)
    assert len(data["input_ids"]) == 1 and "1 of 2" in capsys.readouterr().out
    got = pieces(tokenizer, data["input_ids"][0])
    assert len(got) == 16 and got[0] == "<bos>"
    assert got[-6:] == [" b", "\n\n", "Assistant:", " good", " c", "<eos>"]
    assert [t for t in data["labels"][0] if t != -100] == data["input_ids"][0][-3:]


@pytest.mark.parametrize("row, word", [
    ({"messages": say("a")}, "assistant turn"),
    ({"messages": say("a", "  ")}, "not empty"),
    ({"messages": say("a", "b")[1:]}, "no prompt"),
    ({"prompt": "a"}, "needs 'messages' or 'text'"),
    ({"messages": "x"}, "'messages' has to be a list of messages"),
    ({"messages": ["a", "b"]}, "'messages' has to be a list of messages"),
    ({"text": "a", "context": 5}, "'context' has to be a text"),
])
def test_a_bad_row_is_named(row, word):
    with pytest.raises(ValueError, match=f"row 1.*{word}"):
        sft.tokenize([{"text": "a b"}, row], make_tokenizer())


def test_length_buckets_visit_each_row_once_with_little_padding():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 100, (517,), generator=generator).tolist()
    sampler = training.LengthBuckets(lengths, 16, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(517))
    batches = [[lengths[j] for j in order[i : i + 16]] for i in range(0, 512, 16)]
    padded = sum(max(b) * len(b) for b in batches)
    assert padded < 1.1 * sum(map(sum, batches))
    longest = [max(b) for b in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    sampler.set_epoch(1)
    assert list(sampler) != order
    sampler.set_epoch(0)
    assert list(sampler) == order


def rows_with_a_rule(n=192):
    """The answer is decided by the prompt: a -> good, b -> bad."""
    return [{"messages": say(f"{'ab'[i % 2]} {WORDS[2 + i % 5]}", ["good yes", "bad"][i % 2])}
            for i in range(n)]


def test_finetuned_folder_loads_and_answers(tmp_path):
    tokenizer = make_tokenizer()
    base = make_model(tmp_path / "base", tokenizer, width=64)
    rows = rows_with_a_rule() + [{"text": "c d e f g"}] * 8
    metrics = sft.finetune(base, rows, tmp_path / "out", epochs=4, batch_size=8, lr=5e-3)
    assert metrics["steps"] == 100 and metrics["rows"] == 200
    lengths = [len(i) for i in sft.tokenize(rows, tokenizer)["input_ids"]]
    assert metrics["tokens"] == sum(lengths) * 4
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == metrics["steps"]
    model, again = models.load(str(tmp_path / "out"))
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template
    for word, answer in (("a", [" good", " yes", "<eos>"]), ("b", [" bad", "<eos>"])):
        ids = again(dialogue.render(say(f"{word} c"), again), return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                             do_sample=False)[0, ids.shape[1]:]
        assert pieces(again, out.tolist())[: len(answer)] == answer


def test_lora_changes_what_it_names_in_low_rank_and_is_merged(tmp_path):
    tokenizer = make_tokenizer()
    base = make_model(tmp_path / "base", tokenizer)
    metrics = sft.finetune(base, rows_with_a_rule(64), tmp_path / "out", batch_size=8, lr=1e-2,
                           epochs=2, lora={"r": 2, "target_modules": ["q_proj", "down_proj"]})
    assert metrics["log"][-1]["loss"] < metrics["log"][0]["loss"]
    assert not list((tmp_path / "out").glob("adapter*"))
    before, after = (models.load(str(f))[0].state_dict() for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        change = after[name] - before[name]
        if "q_proj" in name or "down_proj" in name:
            assert 0 < torch.linalg.matrix_rank(change, atol=1e-5) <= 2
        else:
            assert change.abs().max() == 0


def test_the_loss_is_the_mean_over_response_tokens_and_the_seed_decides_the_run(tmp_path):
    tokenizer = make_tokenizer()
    base = make_model(tmp_path / "base", tokenizer)
    rows = rows_with_a_rule(24)
    runs = [sft.finetune(base, rows, tmp_path / f"out{i}", batch_size=24, lr=0.0, seed=i // 2)
            for i in range(3)]
    model, _ = models.load(base)
    data = sft.tokenize(rows, tokenizer)
    losses = []
    with torch.no_grad():
        for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            losses += [-logp[t, y].item() for t, y in enumerate(labels[1:]) if y != -100]
    assert runs[0]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert runs[0]["loss_tokens"] == len(losses)
    assert runs[0]["train_loss"] == runs[1]["train_loss"]


def test_a_batch_read_in_parts_is_the_same_training(tmp_path):
    tokenizer = make_tokenizer()
    base = make_model(tmp_path / "base", tokenizer)
    rows = rows_with_a_rule(28)  # answers of two lengths; the last step has 4 of 8 rows
    got = [sft.finetune(base, rows, tmp_path / f"out{parts}", batch_size=8, lr=1e-2, epochs=2,
                        gradient_accumulation=parts) for parts in (1, 4)]
    assert got[0]["steps"] == got[1]["steps"] == 8
    assert got[0]["train_loss"] == pytest.approx(got[1]["train_loss"], rel=1e-4)
    start, whole, parts = (models.load(str(tmp_path / f), dtype="float32")[0].state_dict()
                           for f in ("base", "out1", "out4"))
    for name, value in whole.items():
        assert (value - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(parts[name], value, atol=1e-4, rtol=0)
    record = json.loads((tmp_path / "out4" / "training.json").read_text())
    assert record["gradient_accumulation"] == 4


@pytest.mark.parametrize("parts, message", [
    (3, "batch_size=8 does not divide into 3 equal parts.*multiple of 3"),
    (0, "whole number of at least 1"), (1.5, "gradient_accumulation=1.5"),
])
def test_parts_that_do_not_divide_a_batch_are_named(tmp_path, parts, message):
    base = make_model(tmp_path / "base", make_tokenizer())
    with pytest.raises(ValueError, match=message):
        sft.finetune(base, rows_with_a_rule(16), tmp_path / "out", batch_size=8,
                     gradient_accumulation=parts)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path):
    tokenizer = make_tokenizer()
    base = make_model(tmp_path / "base", tokenizer)
    model, _ = models.load(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("earlier")
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        sft.finetune(str(tmp_path / "broken"), rows_with_a_rule(16), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "earlier"
    assert not (tmp_path / "out.partial").exists()


def test_a_context_before_a_text_is_read_but_not_learned():
    tok = make_tokenizer()
    rows = sft.tokenize([{"context": "a b", "text": " c d"}, {"text": "a b c d"}], tok)
    assert rows["input_ids"][0] == rows["input_ids"][1]
    given = len(tok("a b")["input_ids"])
    assert rows["labels"][0] == [-100] * given + rows["labels"][1][given:]
