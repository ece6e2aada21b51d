"""One side of a PPO benchmark, started by training.py: ppo_worker.py ours|peer SETTINGS.

Trains; after each iteration it writes a line to stdout and waits for one on stdin, so that the two
sides' iterations can take turns. The first one, with all that is loaded before it, is not measured.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch


class Gate:
    """Waits between iterations, and says how the last one went."""

    def __init__(self, settings):
        self.episodes, self.began = settings["episodes"], None

    def __call__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        said = {}
        if self.began is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**20
            said = {"episodes": self.episodes, "seconds": now - self.began, "peak_mb": peak}
        print("@" + json.dumps(said), flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # measured enough: what the trainers do at their end is not of interest
        self.began = time.perf_counter()


def ours(s, prompts, gate):
    from cai_utils import ppo

    rows = [p["messages"] for p in prompts]
    folder = Path(s["folder"])
    ppo.train(
        folder / "policy", folder / "pm", rows, folder / "ours", lr=1e-5, episodes=s["episodes"],
        iterations=s["iterations"], minibatch=s["minibatch"], ppo_epochs=2,
        max_new_tokens=s["new_tokens"], print_every=0, snapshot_every=0, checkpoint_every=0,
        bf16=False, log=gate,
    )  # fmt: skip


def peer(s, prompts, gate):
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    assert trl.__version__.startswith("1.12"), trl.__version__
    folder = Path(s["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # trl takes padding for the end
        other = next(i for i in (0, 1, 2) if i != tokenizer.eos_token_id)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    # The attention that ours takes, too: the faster one at this size.
    small = sum(f.stat().st_size for f in (folder / "policy").glob("*.safetensors")) < 120e6
    how = {"attn_implementation": "eager" if small and not torch.cuda.is_available() else "sdpa",
           "dtype": torch.float32}

    def judge():
        net = AutoModelForSequenceClassification.from_pretrained(folder / "pm", num_labels=1, **how)
        net.config.pad_token_id = tokenizer.pad_token_id
        return net

    def policy():
        return AutoModelForCausalLM.from_pretrained(folder / "policy", **how)

    class Turns(TrainerCallback):
        on_step_end = lambda self, *a, **k: gate()  # noqa: E731

    rows = Dataset.from_dict({"input_ids": [p["ids"] for p in prompts]})
    settings = PPOConfig(
        # trl cuts this batch into the minibatches; with accumulation it would skip updates.
        output_dir=str(folder / "trl"), per_device_train_batch_size=s["episodes"],
        gradient_accumulation_steps=1,
        num_mini_batches=s["episodes"] // s["minibatch"],
        local_rollout_forward_batch_size=s["episodes"],
        total_episodes=s["episodes"] * s["iterations"], num_ppo_epochs=2,
        response_length=s["new_tokens"], stop_token="eos", temperature=1.0,
        missing_eos_penalty=1.0, kl_coef=0.05, learning_rate=1e-5, num_sample_generations=0,
        report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    PPOTrainer(
        args=settings, processing_class=tokenizer, model=policy(), ref_model=policy(),
        reward_model=judge(), value_model=judge(), train_dataset=rows,
        eval_dataset=rows.select(range(2)), callbacks=[Turns()],
    ).train()


if __name__ == "__main__":
    side, settings = sys.argv[1], json.loads(sys.argv[2])
    asked = json.loads((Path(settings["folder"]) / "prompts.json").read_text(encoding="utf-8"))
    {"ours": ours, "peer": peer}[side](settings, asked, Gate(settings))
