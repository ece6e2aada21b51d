"""PPO against the last trl that has it (1.12.0), preference models against trl's RewardTrainer.

Every function returns rows: {"results": [...], "growth": [...], "memory": [...], "losses": [...]}.
"""

import json
import os
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

TRL = "trl==1.12.0"


class Worker:
    """One side's training loop in a process of its own, held between two turns: `step` lets it do
    one more and returns its rate. The other side's waits meanwhile, without using a core."""

    def __init__(self, side, settings, path):
        script = Path(__file__).with_name("training_worker.py")
        self.turns = []  # the worker's report of each
        self.process = subprocess.Popen(
            [sys.executable, script, side, json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("@"):  # the libraries print, too
                return json.loads(line[1:])
        raise RuntimeError(f"{self.process.args[2]} ended with {self.process.wait()}")

    def step(self, seed):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._read())
        return self.turns[-1]["rate"]

    def close(self):
        self.process.stdin.close()  # what it reads next is the end
        self.process.stdout.close()
        self.process.wait()


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
        workers["ours"] = Worker(f"{kind}_ours", settings, [repo_root()])
        workers["peer"] = Worker(f"{kind}_peer", settings, peer_path)
        found = measure.rates_side_by_side(workers["ours"].step, workers["peer"].step, rounds)
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


def pm_smollm2(rounds, quick):
    """hh-rlhf comparisons/s of training alone (no loading), and both sides' loss by step, the mean
    over the turns: each has another order of the rows."""
    count, batch, longest = (4, 2, 512) if quick else (48, 8, 512)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        spec = "miniature/xs" if quick else sampling.SMOLLM2
        model, tokenizer = models.load(spec, dtype="float32")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        rows = real_comparisons(count, tokenizer, longest)
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        where = {"machine": measure.machine(model), "commit": measure.commit()}
        del model
        settings = {"folder": folder, "batch": batch, "longest": longest}
        found, memory, turns = pair("pm", settings, rounds)
    curves = {name: [sum(at) / len(at) for at in zip(*(turn["losses"] for turn in reports),
                                                     strict=True)]
              for name, reports in turns.items()}  # fmt: skip
    row = {"name": "pm_smollm2", **where}
    steps = enumerate(zip(curves["ours"], curves["peer"], strict=True), 1)
    return {"results": [{**row, "unit": "comparisons/s", **found}],
            "memory": [{**row, "unit": "MB", **memory}],
            "losses": [{**row, "step": step, "turns": rounds + 1, "ours": ours, "peer": peer,
                        "unit": "nats"} for step, (ours, peer) in steps]}  # fmt: skip


def real_comparisons(count, tokenizer, longest):
    """Rows of hh-rlhf, ragged as they are, without malformed ones and those longer than `longest`
    tokens, which ours would cut and trl would leave out."""
    rows = load.load_comparisons("hh-rlhf/harmless-base/test", limit=6 * count, seed=0)

    def fits(row):
        texts = (dialogue.render(row["prompt"] + row[side], tokenizer, False)
                 for side in ("chosen", "rejected"))
        return all(len(tokenizer(text)["input_ids"]) < longest for text in texts)

    return [r for r in comparisons.check(rows, on_bad="skip") if fits(r)][:count]


BENCHES = {
    "ppo_xs": ppo("miniature/xs", episodes=128, minibatch=32, new_tokens=48),
    "ppo_s": ppo("miniature/s", episodes=128, minibatch=32, new_tokens=48),
    "ppo_m": ppo("miniature/m", episodes=128, minibatch=32, new_tokens=48),
    "ppo_smollm2": ppo(sampling.SMOLLM2, episodes=16, minibatch=8, new_tokens=48),
    "pm_smollm2": pm_smollm2,
}
