"""DPO on AI labels (Rafailov et al. 2023, arXiv 2305.18290), to compare with RL against a PM.

The policy learns from the labelled pairs of `08_ai_feedback` themselves, without a PM and without
sampling. It stands on trl's `DPOTrainer`. The loss is ours: trl's `label_smoothing` is one number
for all pairs, and here each has its own target, the probability `p_chosen` of the feedback model,
as in our PMs (paper, section 4.1). Eq. 7 of the DPO paper then becomes

    -(p log sigmoid(d) + (1 - p) log sigmoid(-d)),  d = beta (log-ratio of chosen - of rejected)

where a log-ratio is log policy(response) - log reference(response). It is conservative DPO
(Mitchell 2023, "A note on DPO with noisy preferences") with 1 - p of the pair for its epsilon.

On several devices, as PPO: `accelerate launch ... -m cai_utils.rl.dpo CONFIG.yaml`.
"""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import trl
from datasets import Dataset
from pydantic.dataclasses import dataclass
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from cai_utils import dialogue
from cai_utils.data.comparisons import check
from cai_utils.experiment import files, launch
from cai_utils.lm import checkpoints as lm_checkpoints
from cai_utils.lm import models, tokens, training
from cai_utils.lm.architectures import check_head, check_rows
from cai_utils.lm.sampling import Sampler
from cai_utils.preference import soft_preference_loss
from cai_utils.rl import checkpoints, distributed
from cai_utils.rl.config import CHECKED, Count, CountOr0, NotNegative, Positive, from_dict


@dataclass(config=CHECKED, frozen=True, kw_only=True)
class DPOConfig:
    """Every hyperparameter of `dpo.train`. Names and defaults as trl's, where it has them."""

    lr: Positive = 1e-6         # of AdamW, falling linearly to 0 (trl: learning_rate)
    beta: Positive = 0.1        # strength of the KL constraint (arXiv 2305.18290, eq. 3)
    epochs: Count = 1           # passes over the pairs
    batch_size: Count = 32      # pairs of one step
    gradient_accumulation: Count = 1  # parts in which a step reads them: memory, not results
    max_length: Count = 1024    # tokens of prompt and response; longer prompts lose their beginning
    lora: dict[str, Any] | None = None  # arguments of peft.LoraConfig; None: all weights learn
    temperature: Positive = 1.0  # of the samples beside a snapshot
    max_new_tokens: Count = 48  # the longest of them
    seed: CountOr0 = 0          # order of the pairs, samples, LoRA's start
    checkpoint_every: NotNegative = 600.0  # seconds; 0: a killed run begins anew


Config = DPOConfig


class SoftDPOTrainer(training.LengthBatchedTrainer, trl.DPOTrainer):
    """trl's DPOTrainer with a target for each pair: the columns prompt_ids, chosen_ids,
    rejected_ids, p_chosen."""

    def _prepare_dataset(self, dataset, *args):
        return dataset  # tokenized already

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "p_chosen"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        p = inputs.pop("p_chosen")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            labels=labels, use_cache=False, fused_lm_head=True)
        new = outputs.log_probs.sum(1).chunk(2)  # 0 where there is no label; chosen come first
        old = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        chosen, rejected = (self.beta * (n - o) for n, o in zip(new, old, strict=True))
        loss = soft_preference_loss(chosen, rejected, p).mean()
        for name, x in (("chosen", chosen), ("rejected", rejected), ("margins", chosen - rejected),
                        ("accuracies", (chosen > rejected).float())):
            mean = self.accelerator.gather(x.detach()).mean().item()
            self._metrics["train"][f"rewards/{name}"].append(mean)
        return (loss, outputs) if return_outputs else loss


class _Collator(DataCollatorForPreference):
    def torch_call(self, examples):
        batch = super().torch_call(examples)
        return batch | {"p_chosen": batch["input_ids"].new_tensor(
            [e["p_chosen"] for e in examples], dtype=float).float()}


class _History(TrainerCallback):
    """Keeps what the trainer logs, under the names of PPO's history where they mean the same."""

    def __init__(self, pairs, batch_size, path, log):
        self.pairs, self.batch_size, self.path, self.log = pairs, batch_size, path, log
        self.rows = []

    def on_train_begin(self, args, state, control, **kwargs):
        for logs in state.log_history:  # of a training that was killed
            self._add(logs, logs["step"], state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._add(logs, state.global_step, state)

    def _add(self, logs, step, state):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        row = {"iteration": step, "episode": min(step * self.batch_size, self.pairs),
               "loss": logs["loss"], "lr": logs["learning_rate"],
               **{k: v for k, v in logs.items() if k.startswith("rewards/")}}
        self.rows.append(row)
        with files.atomic(self.path) as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)
        if self.log is not None:
            self.log(row)


def train(policy_spec, comparisons, prompts, out_dir, config, *, runs_dir=None, log=None):
    """Train a policy with DPO; returns the history, a DataFrame of a row per logged step.

    policy_spec: spec or folder of a causal LM; the reference is a frozen copy of it.
    comparisons: rows (ARCHITECTURE.md, Rows), or the .jsonl file of them; `p_chosen` is the target.
    prompts: rows {"prompt": messages} or lists of messages; the first 8 are sampled at snapshots.
    config: a `DPOConfig`, or a dict of its fields.

    Written as by `ppo.train`: out_dir (the final model, `history.csv`), out_dir/step-0 and
    out_dir/step-<pairs seen>. Columns: iteration (steps), episode (pairs so far), loss (nats), lr,
    rewards/chosen, /rejected, /margins (beta x log-ratio) and /accuracies. A killed call goes on
    from its last checkpoint, in <out_dir>.partial; a finished one begins anew. ValueError for rows
    that are malformed or all too long, or a loss that is not finite.
    """
    config, out_dir = from_dict(DPOConfig, config), Path(out_dir)
    if isinstance(comparisons, str | Path):
        comparisons = files.read_rows(comparisons)
    prompts = [row["prompt"] if isinstance(row, dict) else row for row in prompts][:8]
    here = distributed.process_state()
    model, tokenizer = training.load_for_training(policy_spec, "lm", runs_dir, config.lora)
    data = tokenize(check(comparisons), tokenizer, config.max_length)
    lengths = [len(p) + max(len(c), len(r)) for p, c, r, _ in zip(*data.values(), strict=True)]
    pairs = len(lengths) * config.epochs
    lora = training.lora_config(config.lora, "CAUSAL_LM")
    check_rows(model.config, lengths, "max_length")
    check_head(model)
    training.check_adapter(model, lora)

    def snapshot(model, folder):
        if here.is_main_process:
            model.eval()
            sampled = Sampler(model, tokenizer).generate(
                prompts, temperature=config.temperature, max_new_tokens=config.max_new_tokens,
                seed=config.seed, progress=False)
            rows = [{"messages": dialogue.with_response(prompt, completions[0].text)}
                    for prompt, completions in zip(prompts, sampled, strict=True)]
            checkpoints.save_model(model, tokenizer, folder, rows)
        here.wait_for_everyone()

    if here.is_main_process:
        for stale in out_dir.glob("step-*"):
            shutil.rmtree(stale)
    snapshot(model, out_dir / "step-0")
    models.attend_for_training(model, max(lengths))
    training.untie(model, lora)
    args = training.training_arguments(
        trl.DPOConfig, model, out_dir, rows=len(lengths), epochs=config.epochs,
        batch_size=config.batch_size, lr=config.lr, seed=config.seed, report_to=(),
        schedule="linear", warmup=0.0, weight_decay=0.0, beta=config.beta, max_length=None,
        gradient_accumulation=config.gradient_accumulation)
    training.keep_lora_dropout(model, args)
    history = _History(pairs, config.batch_size, out_dir / "history.csv", log)
    trainer = SoftDPOTrainer(
        model=model.train(), ref_model=None if config.lora else copy.deepcopy(model), args=args,
        train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        data_collator=_Collator(tokenizer.pad_token_id or 0,
                                pad_to_multiple_of=args.pad_to_multiple_of),
        peft_config=lora, callbacks=[history])
    trainer.lengths = lengths
    trainer.remove_callback(PrinterCallback)
    settings = {k: v for k, v in vars(config).items() if k != "checkpoint_every"}
    lm_checkpoints.train(trainer, config.checkpoint_every, partial(
        lm_checkpoints.call_facts, SoftDPOTrainer, data, policy_spec, runs_dir, **settings))
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if config.lora else model
    snapshot(model, out_dir / f"step-{pairs}")
    snapshot(model, out_dir)
    if here.is_main_process:
        files.write_json(out_dir / "training.json", {
            "stage": "dpo", "base": str(policy_spec), "pairs": len(lengths), **settings})
    lm_checkpoints.clear(trainer)
    return pd.DataFrame(history.rows)


def tokenize(rows, tokenizer, max_length):
    """Checked comparisons -> {prompt_ids, chosen_ids, rejected_ids: [[int]], p_chosen: [float]}.

    As for PMs: the tokens of sampling, ended by eos; a pair that is too long loses the beginning of
    its prompt, or is left out (printed count) where a response alone is too long.
    """
    sides = [tokens.encode([r["prompt"] + r[side] for r in rows], tokenizer)
             for side in ("chosen", "rejected")]
    found = []
    for row, (prompt, chosen), (_, rejected) in zip(rows, *sides, strict=True):
        longer = max(chosen, rejected, key=len)
        prompt = tokens.shorten_prompt(prompt, longer, max_length, tokenizer.bos_token_id)
        if prompt is not None:
            found.append((prompt, chosen, rejected, row["p_chosen"]))
    if len(found) < len(rows):
        print(f"dpo: {len(rows) - len(found)} of {len(rows)} pairs exceed {max_length} tokens: "
              "left out")
    if not found:
        raise ValueError(f"no pair to train on: max_length={max_length} is too short for every one")
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "p_chosen")
    return dict(zip(names, map(list, zip(*found, strict=True)), strict=True))


if __name__ == "__main__":
    launch.main("cai_utils.rl.dpo", "train")
