"""PPO against the last trl that has it (1.12.0), preference models and SFT against trl's trainers.

Every function returns rows: {"results": [...], "growth": [...], "memory": [...], "losses": [...]}.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import sampling
import torch

from cai_utils import dialogue
from cai_utils.data import comparisons, load
from cai_utils.experiment.files import repo_root
from cai_utils.lm import models
from cai_utils.miniature import datasets

TRL = "trl==1.12.0"


def trl_folder():
    """The peer's trl, beside that of the environment: it shares torch and transformers, so that
    nothing but PPO differs. FileNotFoundError where it cannot be installed."""
    folder = Path(repo_root()) / ".venv" / "peers" / TRL.replace("==", "-")
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                   str(folder), TRL]  # fmt: skip
        if subprocess.run(command).returncode:
            raise FileNotFoundError(f"{TRL}, the peer, could not be installed")
    return folder


def pair(kind, settings, rounds, peer_path=()):
    """Both sides in turn -> (what `measure` finds, {"ours", "peer"} peak memory in MB, and the
    reports of each side's turns, the first not measured)."""
    workers = {}
    try:
        # Loaded one after the other, so that neither is slowed by the other's start.
        for side, path in (("ours", [repo_root()]), ("peer", peer_path)):
            workers[side] = measure.Worker("training_worker.py", f"{kind}_{side}", settings, path)
        steps = [lambda seed, worker=worker: worker.step()["rate"] for worker in workers.values()]
        found = measure.rates_side_by_side(*steps, rounds)
        turns = {name: worker.turns for name, worker in workers.items()}
        memory = {name: reports[-1]["peak_mb"] for name, reports in turns.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return found, memory, turns


def ppo(spec, **sizes):
    """One iteration: sampling, scoring, evaluation, updates. Same weights, prompts, episodes and
    epochs on both sides, fp32 weights, the policy as it has been trained, ends of text included.
    Passes are in bf16 where that is the faster way for a side."""
    size = spec.rpartition("/")[2] if spec.startswith("miniature/") else "smollm2"

    def bench(rounds, quick):
        with tempfile.TemporaryDirectory() as folder:
            settings = {**prepare(spec, Path(folder), quick), **sizes}
            if quick:
                settings |= {"episodes": 4, "minibatch": 2, "new_tokens": 6}
            settings["iterations"] = rounds + 3  # the first, a warm one, and a last, not reached
            found, memory, _ = pair("ppo", settings, rounds, [trl_folder()])
            where = dict(machine=settings.pop("machine"), commit=measure.commit())
            out = {"results": [{"name": f"ppo_{size}", "unit": "episodes/s", **found, **where}],
                   "memory": [{"name": f"ppo_{size}", "unit": "MB", **memory, **where}],
                   "growth": []}  # fmt: skip
            points = [(32, 48), (64, 48), (256, 48), (128, 16), (128, 96)] if size == "xs" else []
            for episodes, new in [(2, 4)] if quick and points else points:
                more = {"episodes": episodes, "new_tokens": new, "iterations": 4 if quick else 6}
                grown, *_ = pair("ppo", {**settings, **more}, more["iterations"] - 3,
                                 [trl_folder()])
                del grown["ratio_low"], grown["ratio_high"]
                out["growth"].append({
                    "name": f"ppo_{size}", "batch": episodes, "prompt_tokens": 16,
                    "new_tokens": new, "unit": "episodes/s", **grown, **where})
            return out

    return bench


def prepare(spec, folder, quick):
    """A policy, a PM and prompts of 16 tokens in `folder`, for both sides."""
    runs_dir = Path(repo_root()) / "runs" / "miniature"
    policy, tokenizer = models.load(spec, dtype="float32", device="cpu", runs_dir=runs_dir)
    pm, _ = models.load(spec, head="score", dtype="float32", device="cpu", runs_dir=runs_dir)
    torch.manual_seed(0)
    torch.nn.init.normal_(pm.score.weight, std=1 / (pm.config.get_text_config().hidden_size + 1))
    for name, model in (("policy", policy), ("pm", pm)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = []
    frame = [{"role": "user", "content": ""}]  # a chat template comes on top of the 16 tokens
    frame = len(tokenizer(dialogue.render(frame, tokenizer))["input_ids"])
    enough = 16 if frame < 16 else frame + 16
    for i in range(32 if quick else 512):
        subject = sampling.SUBJECTS[i % len(sampling.SUBJECTS)]
        words = f"Number {i}: tell me about {subject}, please, ".split() * 4
        for end in range(1, len(words)):  # as near to 16 tokens as words and template allow
            messages = [{"role": "user", "content": " ".join(words[:end])}]
            ids = tokenizer(dialogue.render(messages, tokenizer))["input_ids"]
            if len(ids) >= enough:
                break
        prompts.append({"messages": messages, "ids": ids})
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Ours takes bf16 where it pays; the peer gains by it where products outweigh casts.
    return {"folder": str(folder), "machine": measure.machine(policy.to(device)),
            "peer_bf16": models.bf16_pays(policy)}


def trained(kind, name, spec, make_rows, unit, *, rows, batch, longest, lr, parts=1, peer=(),
            most_rounds=5):
    """Rows/s of training alone (no loading) on `rows` rows, and both sides' loss by step, the mean
    over the turns: each side has another order of the rows. kind: "pm" or "sft"; parts: passes in
    which ours reads a batch; peer: settings of trl's config other than its defaults."""

    def bench(rounds, quick):
        rounds, count, size = min(rounds, most_rounds), rows, batch
        if quick:
            count, size = 4, 2
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            model, tokenizer = models.load("miniature/xs" if quick else spec, dtype="float32")
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
            (Path(folder) / "rows.json").write_text(
                json.dumps(make_rows(count, tokenizer, longest)), encoding="utf-8")
            where = {"machine": measure.machine(model), "commit": measure.commit()}
            del model
            settings = {"folder": folder, "batch": size, "longest": longest, "lr": lr,
                        "parts": min(parts, size), "peer": dict(peer),
                        "log_every": max(1, round(-(-count // size) / 50))}  # fmt: skip
            found, memory, turns = pair(kind, settings, rounds)
        row = {"name": name, **where}
        out = {"results": [{**row, "unit": unit, **found}],
               "memory": [{**row, "unit": "MB", **memory}], "losses": []}  # fmt: skip
        means = {side: {step: sum(turn["losses"][step] for turn in reports) / len(reports)
                        for step in reports[0]["losses"]}
                 for side, reports in turns.items()}  # fmt: skip
        assert [*means["ours"]] == [*means["peer"]], "logged at other steps"
        for step, loss in means["ours"].items():
            out["losses"].append({**row, "step": step, "turns": rounds + 1, "ours": loss,
                                  "peer": means["peer"][step], "unit": "nats"})  # fmt: skip
        return out

    return bench


def real_comparisons(count, tokenizer, longest):
    """Rows of hh-rlhf, ragged as they are, without malformed ones and those longer than `longest`
    tokens, which ours would cut and trl would leave out."""
    rows = load.load_comparisons("hh-rlhf/harmless-base/test", limit=6 * count, seed=0)

    def fits(row):
        texts = (dialogue.render(row["prompt"] + row[side], tokenizer, False)
                 for side in ("chosen", "rejected"))
        return all(len(tokenizer(text)["input_ids"]) < longest for text in texts)

    return [r for r in comparisons.check(rows, on_bad="skip") if fits(r)][:count]


def real_conversations(count, tokenizer, longest):
    """The chosen conversations of these rows, for SFT."""
    rows = real_comparisons(count, tokenizer, longest)
    return [{"messages": row["prompt"] + row["chosen"]} for row in rows]


def world_comparisons(count, tokenizer, longest):
    """Of the miniature, half of them about each axis, as a PM of both learns from."""
    made = [datasets.human_comparisons(random.Random(1), -(-count // 2), "train", axis)
            for axis in ("helpful", "harmless")]  # fmt: skip
    return [row for pair in zip(*made, strict=True) for row in pair][:count]


def world_conversations(count, tokenizer, longest):
    return datasets.demonstrations(random.Random(1), count)


# trl's SFTTrainer as it was fastest of all that its documentation offers on a CPU. Packing, which
# it offers with FlashAttention alone, ran with SDPA, and was slower (see README.md).
SFT_PEER = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
MINIATURE = {"batch": 16, "longest": 256, "lr": 5e-4}
REAL = {"batch": 8, "longest": 512, "lr": 1e-4, "rows": 48, "parts": 8}


BENCHES = {
    "ppo_xs": ppo("miniature/xs", episodes=128, minibatch=32, new_tokens=48),
    "ppo_s": ppo("miniature/s", episodes=128, minibatch=32, new_tokens=48),
    "ppo_m": ppo("miniature/m", episodes=128, minibatch=32, new_tokens=48),
    "ppo_smollm2": ppo(sampling.SMOLLM2, episodes=16, minibatch=8, new_tokens=48),
    "pm_s": trained("pm", "pm_s", "miniature/s", world_comparisons, "comparisons/s", rows=1600,
                    **MINIATURE, most_rounds=3),
    "pm_m": trained("pm", "pm_m", "miniature/m", world_comparisons, "comparisons/s", rows=320,
                    **MINIATURE, most_rounds=3),
    "pm_smollm2": trained("pm", "pm_smollm2", sampling.SMOLLM2, real_comparisons, "comparisons/s",
                          **REAL),
    "sft_s": trained("sft", "sft_s", "miniature/s", world_conversations, "rows/s", rows=3200,
                     **{**MINIATURE, "batch": 32}, peer=SFT_PEER, most_rounds=3),
    "sft_smollm2": trained("sft", "sft_smollm2", sampling.SMOLLM2, real_conversations, "rows/s",
                           **REAL, peer=SFT_PEER),
}  # fmt: skip
