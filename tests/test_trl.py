"""The project's rows in trl's own trainers, as they are: no column dropped, renamed or mapped."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from cai_utils import constitution, dialogue, feedback, sft
from cai_utils.data import load
from cai_utils.experiment import files
from cai_utils.lm.sampling import Sampler


@pytest.fixture(scope="module")
def tokenizer():
    out = tiny.tokenizer()
    out.chat_template = dialogue.TEMPLATE
    return out


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory, tokenizer):
    """Human ones, as the loader reads hh-rlhf, and AI labels; written and read back as in a run."""
    folder = tmp_path_factory.mktemp("harmless-base")
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Steal?\n\nAssistant:"
    (folder / "train.jsonl").write_text(
        json.dumps({"chosen": start + " I won't.", "rejected": start + " Sure."}) + "\n")
    human = load.load_comparisons(folder / "train.jsonl", "train")
    pair = {"id": "p", "prompt": [{"role": "user", "content": "Lie?"}],
            "responses": ["No, and here is why.", "Yes."]}
    ai = feedback.label(Sampler(tiny.llama(context=2048), tokenizer), [pair],
                        constitution.load("default"), seed=0)
    files.write_rows(folder / "rows.jsonl", human + ai)
    rows = files.read_rows(folder / "rows.jsonl")
    assert [r["source"] for r in rows] == ["human", "ai"] and rows[1]["p_chosen"] < 1
    return rows


def settings(config, folder, **more):
    return config(output_dir=str(folder), max_steps=1, per_device_train_batch_size=2,
                  report_to="none", use_cpu=True, bf16=False, save_strategy="no",
                  disable_tqdm=True, learning_rate=1e-2, **more)


def train(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    assert trainer.state.global_step == 1 and torch.isfinite(torch.tensor(loss)) and loss > 0
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_comparisons_in_dpo(tmp_path, tokenizer, comparisons):
    trainer = DPOTrainer(tiny.llama(sharp=1.0), tiny.llama(sharp=1.0),
                         args=settings(DPOConfig, tmp_path),
                         train_dataset=Dataset.from_list(comparisons), processing_class=tokenizer)
    train(trainer)


def test_comparisons_in_the_reward_trainer(tmp_path, tokenizer, comparisons):
    config = tiny.llama().config
    config.num_labels = 1
    trainer = RewardTrainer(LlamaForSequenceClassification(config),
                            args=settings(RewardConfig, tmp_path),
                            train_dataset=Dataset.from_list(comparisons),
                            processing_class=tokenizer)
    train(trainer)


def test_sft_rows_of_sl_cai_in_sft(tmp_path, tokenizer):
    prompt = [{"role": "user", "content": "Lie?"}]
    chain = {"prompt": prompt, "responses": ["Yes.", "Perhaps not.", "No."], "critiques": ["", ""],
             "principles": ["a", "b"]}
    rows = sft.sl_cai_rows([chain], [{"prompt": prompt, "response": "Hm."}], 2)
    files.write_rows(tmp_path / "sft.jsonl", rows)
    rows = files.read_rows(tmp_path / "sft.jsonl")
    assert len(rows) == 3
    trainer = SFTTrainer(tiny.llama(sharp=1.0), args=settings(SFTConfig, tmp_path / "out"),
                         train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    seen = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert "\n\nHuman: Lie?\n\nAssistant: Perhaps not.</s>" in seen  # it learns to end
    train(trainer)
