"""One side of a training benchmark, started by training.py: training_worker.py SIDE SETTINGS.

Trains; after each iteration of PPO, or each training of a PM, it writes a line to stdout and waits
for one on stdin, so that the two sides can take turns. What it does before its first line, loading
included, is not measured.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch


def report(**facts):
    """Reports how the last turn went and waits for the next."""
    if torch.cuda.is_available():
        facts["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        facts["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("@" + json.dumps(facts), flush=True)
    if not sys.stdin.readline():
        os._exit(0)  # measured enough: the trainers' last steps are not of interest


class Gate:
    """Waits between iterations of PPO, and reports how the last one went."""

    def __init__(self, settings):
        self.episodes, self.began = settings["episodes"], None

    def __call__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        facts = {}
        if self.began is not None:
            facts = {"rate": self.episodes / (time.perf_counter() - self.began)}
        report(**facts)
        self.began = time.perf_counter()


def ppo_ours(s):
    from cai_utils.rl import ppo

    prompts, gate = asked(s), Gate(s)
    rows = [p["messages"] for p in prompts]
    folder = Path(s["folder"])
    config = ppo.PPOConfig(
        lr=1e-5, episodes=s["episodes"], iterations=s["iterations"], minibatch=s["minibatch"],
        ppo_epochs=2, max_new_tokens=s["new_tokens"], print_every=0, snapshot_every=0,
        checkpoint_every=0,
    )  # fmt: skip
    ppo.train(folder / "policy", folder / "pm", rows, folder / "ours", config, log=gate)


def ppo_peer(s):
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
    prompts, gate = asked(s), Gate(s)
    folder = Path(s["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", trust_remote_code=False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # trl takes padding for the end
        other = next(i for i in (0, 1, 2) if i != tokenizer.eos_token_id)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    # The attention that ours takes, too: the faster one at this size.
    small = sum(f.stat().st_size for f in (folder / "policy").glob("*.safetensors")) < 120e6
    how = {"attn_implementation": "eager" if small and not torch.cuda.is_available() else "sdpa",
           "dtype": torch.float32, "trust_remote_code": False}

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
        report_to="none", save_strategy="no", bf16=s["peer_bf16"], gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    PPOTrainer(
        args=settings, processing_class=tokenizer, model=policy(), ref_model=policy(),
        reward_model=judge(), value_model=judge(), train_dataset=rows,
        eval_dataset=rows.select(range(2)), callbacks=[Turns()],
    ).train()


def asked(s):
    return json.loads((Path(s["folder"]) / "prompts.json").read_text(encoding="utf-8"))


def trainings(s, train):
    """One training after the other, each with another seed: train(rows, seed) -> rows/s, log."""
    rows = json.loads((Path(s["folder"]) / "rows.json").read_text(encoding="utf-8"))
    facts, seed = {}, 0
    while True:
        report(**facts)
        rate, log = train(rows, seed)
        losses = {row["step"]: row["loss"] for row in log if "loss" in row}
        facts, seed = {"rate": rate, "losses": losses}, seed + 1


def shared(s):
    """What both sides' trainings have in common, as `preference.train` and `sft.finetune` name
    it."""
    return {"epochs": 1, "batch_size": s["batch"], "lr": s["lr"], "max_length": s["longest"],
            "schedule": "linear", "warmup": 0.0, "gradient_accumulation": s["parts"]}  # fmt: skip


def pm_ours(s):
    from cai_utils import preference

    def train(rows, seed):
        folder = Path(s["folder"])
        made = preference.train(folder / "base", rows, folder / "ours", seed=seed, centre=False,
                                **shared(s))  # fmt: skip
        return made["pairs_per_second"], made["log"]

    trainings(s, train)


def sft_ours(s):
    from cai_utils import sft

    def train(rows, seed):
        folder = Path(s["folder"])
        made = sft.finetune(folder / "base", rows, folder / "ours", seed=seed, **shared(s))
        return made["rows"] * made["tokens_per_second"] / made["tokens"], made["log"]

    trainings(s, train)


def trl_settings(s, seed):
    """Of trl: its defaults, but for what both sides share, and what is measured."""
    return {
        "output_dir": str(Path(s["folder"]) / "trl"), "per_device_train_batch_size": s["batch"],
        "num_train_epochs": 1, "learning_rate": s["lr"], "max_length": s["longest"],
        "report_to": "none", "save_strategy": "no", "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True, "logging_steps": s["log_every"], "seed": seed, **s["peer"],
    }  # fmt: skip


def trained(trainer):
    trainer._send_telemetry = lambda: None
    result = trainer.train()
    return result.metrics["train_runtime"], trainer.state.log_history


def pm_peer(s):
    """trl's RewardTrainer with its defaults."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    base = Path(s["folder"]) / "base"
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)

    def train(rows, seed):
        kept = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows]
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, trust_remote_code=False)
        torch.nn.init.normal_(model.score.weight, std=1 / (model.config.hidden_size + 1))  # as ours
        trainer = RewardTrainer(model=model, args=RewardConfig(**trl_settings(s, seed)),
                                processing_class=tokenizer,
                                train_dataset=Dataset.from_list(kept))  # fmt: skip
        seconds, log = trained(trainer)
        return len(trainer.train_dataset) / seconds, log

    trainings(s, train)


def sft_peer(s):
    """trl's SFTTrainer in its fastest setting (training.SFT_PEER), loss on the completions; in fp32
    or bf16, whichever was faster before the first measured turn."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base, seconds = Path(s["folder"]) / "base", {}
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)

    def run(rows, seed, bf16):
        kept = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32,
                                                     trust_remote_code=False)  # fmt: skip
        settings = SFTConfig(**trl_settings(s, seed), bf16=bf16)
        return trained(SFTTrainer(model=model, args=settings, processing_class=tokenizer,
                                  train_dataset=Dataset.from_list(kept)))  # fmt: skip

    def train(rows, seed):
        for bf16 in (False, True, False) if not seconds else ():  # the first is slower than it is
            seconds[bf16] = run(rows[: 2 * s["batch"]], seed, bf16)[0]
        took, log = run(rows, seed, min(seconds, key=seconds.get))
        return len(rows) / took, log

    trainings(s, train)


if __name__ == "__main__":
    if sys.platform == "linux":  # a stopped one would not see that what started it has ended
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    sides = {"ppo_ours": ppo_ours, "ppo_peer": ppo_peer, "pm_ours": pm_ours, "pm_peer": pm_peer,
             "sft_ours": sft_ours, "sft_peer": sft_peer}  # fmt: skip
    sides[sys.argv[1]](json.loads(sys.argv[2]))
