"""The same chain twice, sample to PPO: every file of it has the same bytes."""

import random

import numpy as np
import tiny
import torch

from cai_utils import constitution, feedback, preference
from cai_utils.experiment.files import write_rows
from cai_utils.lm import responses
from cai_utils.lm.sampling import Sampler
from cai_utils.rl import ppo

PROMPTS = [{"id": str(i), "kind": "redteam", "split": "train",
            "prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(8)]
FIELDS = dict(lr=1e-3, iterations=2, episodes=8, minibatch=4, max_new_tokens=6, print_every=0)


def chain(base, out, start, law="default", **sampling):
    """Stages of the paper on the model in `base`, from whatever state the global generators have:
    {file: its bytes}, durations left out."""
    random.seed(start)
    np.random.seed(start)
    torch.manual_seed(start)
    sampler = Sampler.from_spec(base, device="cpu", **sampling)
    samples = responses.sample(sampler, PROMPTS, model="base", size="xs", n=2, seed=5,
                               max_new_tokens=8)
    write_rows(out / "samples.jsonl", samples)
    labels = feedback.label(sampler, feedback.response_pairs(samples), constitution.load(law),
                            cot=True, seed=5, max_new_tokens=8)
    write_rows(out / "labels.jsonl", labels)
    preference.train(base, labels, out / "pm", batch_size=4, seed=5)
    history = ppo.train(base, out / "pm", PROMPTS, out / "policy", {**FIELDS, "seed": 5})
    timed = [c for c in history if c.startswith("time/") or c in ("eps", "tokens_per_second")]
    history.drop(columns=timed).to_csv(out / "history.csv", index=False)
    files = ("samples.jsonl", "labels.jsonl", "pm/model.safetensors", "policy/model.safetensors",
             "policy/samples.jsonl", "history.csv")
    return {file: (out / file).read_bytes() for file in files}


def test_the_same_chain_twice_is_the_same_bytes(tmp_path):
    torch.set_num_threads(1)
    for part in (tiny.llama(context=4096, sharp=8.0), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    one, two = (chain(tmp_path / "base", tmp_path / str(start), start) for start in (1, 2))
    assert [file for file in one if one[file] != two[file]] == []
    assert one["pm/model.safetensors"] != (tmp_path / "base/model.safetensors").read_bytes()
    assert one["policy/model.safetensors"] != (tmp_path / "base/model.safetensors").read_bytes()
