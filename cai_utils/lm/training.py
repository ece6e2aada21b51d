"""What SFT, preference models and the harmfulness score share: batches, trl's arguments, LoRA,
saving."""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PrinterCallback
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import disable_dropout_in_model

from cai_utils.experiment.files import write_json
from cai_utils.experiment.resume import whole_folder
from cai_utils.lm import checkpoints, models
from cai_utils.lm.architectures import check_head, check_rows


class LengthBuckets(Sampler):
    """Row indices in random order, such that each batch holds rows of similar length.

    Rows are shuffled, sorted by length within pools of `pool` batches and cut into batches, which
    are shuffled again, so that the order of training does not follow length (as it does within each
    pool of transformers' LengthGroupedSampler). It depends on `seed` and epoch only, and so is
    the same in every process.
    """

    def __init__(self, lengths, batch_size, seed=0, pool=50):
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.epoch = 0

    def __len__(self):
        return len(self.lengths)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        # The batch that is not full must come last: it gets the end of the shuffled order.
        full = len(order) - len(order) % self.batch_size
        size = self.batch_size * self.pool
        batches = []
        for i in range(0, full, size):
            part = sorted(order[i : min(i + size, full)], key=lambda j: self.lengths[j])
            batches += [part[j : j + self.batch_size] for j in range(0, len(part), self.batch_size)]
        for b in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[b]
        yield from order[full:]


class LengthBatchedTrainer(checkpoints.ResumableTrainer):
    """A mixin for trl's trainers, whatever their loss: batches of similar length, checkpoints, and
    a loss that is not finite stops the run. Nothing is reported to the hub.

    lengths: number of tokens of each row. columns: those that the loss reads; None: trl's.
    """

    lengths = columns = None

    def _get_train_sampler(self, train_dataset=None):
        # The rows of a whole step: how they are divided changes nothing but memory.
        size = (self.args.train_batch_size * self.args.world_size
                * self.args.gradient_accumulation_steps)
        self.sampler = LengthBuckets(self.lengths, size, self.args.seed)
        return self.sampler

    def _set_signature_columns_if_needed(self):
        if self.columns is None:
            super()._set_signature_columns_if_needed()
        else:
            self._signature_columns = list(self.columns)

    @classmethod
    def tokens_of_pass(cls, model, data, rows):
        """Tokens of the passes in which a step reads rows of `data`, where trl's `rows` at a time
        are not the way (`packed.PackedTrainer`); else None."""
        return None

    def training_step(self, *args, **kwargs):
        return self.finite(super().training_step(*args, **kwargs))

    def finite(self, loss):
        """The loss of a step; ValueError unless it is a finite number."""
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}: lower the learning rate ({self.args.learning_rate}); "
                "nothing was saved"
            )
        return loss

    def _send_telemetry(self):
        pass


def load_for_training(spec, head, runs_dir=None, lora=None):
    """(model, tokenizer) to be trained: fp32 weights, since bf16 would lose small AdamW steps,
    unless only a LoRA adapter learns."""
    with suppress_seqcls_warning():  # that a score head is new is what we want
        model, tokenizer = models.load(
            spec, head=head, dtype="auto" if lora else "float32", runs_dir=runs_dir,
            quantize=(lora or {}).get("quantize"),
        )
    return model.train(), tokenizer


def load_score_model(spec, seed, runs_dir=None, lora=None, new_head=False):
    """(model, tokenizer) of a score model to be trained, padded with another token than eos.

    The score head is drawn anew, keyed by `seed`, if the weights have none or with `new_head`.
    ValueError for a tokenizer without eos.
    """
    torch.manual_seed(seed)
    model, tokenizer = load_for_training(spec, "score", runs_dir, lora)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{spec}: the tokenizer has no eos token, where scores are read")
    pad_id = models.pad_apart_from_eos(model, tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    if new_head or not models.has_score_head(model):
        # Small, so that all scores are about 0 at first, whatever the body (N+ details of RLHF).
        torch.nn.init.normal_(model.score.weight, std=1 / (model.score.in_features + 1))
    return model, tokenizer


def training_arguments(config, model, out_dir, *, rows, epochs, batch_size, lr, seed, report_to,
                       schedule, warmup, weight_decay, gradient_checkpointing=False,
                       gradient_accumulation=1, **more):
    """`config` (SFTConfig or RewardConfig), without what saves: `checkpoints.train` does.

    `batch_size` is the number of rows in a step over all processes, each of which reads its part
    in `gradient_accumulation` passes. ValueError where they do not divide it.
    """
    on_cpu = model.device.type == "cpu"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not isinstance(gradient_accumulation, int) or gradient_accumulation < 1:
        raise ValueError(f"gradient_accumulation={gradient_accumulation!r}: give a whole number of "
                         "at least 1")
    parts = processes * gradient_accumulation
    if batch_size % parts:
        raise ValueError(f"batch_size={batch_size} does not divide into {parts} equal parts "
                         f"({processes} processes, gradient_accumulation={gradient_accumulation}): "
                         f"give a multiple of {parts}")
    steps = max(1, math.ceil(rows / batch_size)) * epochs
    return config(
        output_dir=f"{os.fspath(out_dir).rstrip('/')}.partial",
        run_name=Path(out_dir).name,
        num_train_epochs=epochs, per_device_train_batch_size=batch_size // parts,
        gradient_accumulation_steps=gradient_accumulation, learning_rate=lr,
        lr_scheduler_type=schedule, warmup_steps=math.ceil(warmup * steps),
        weight_decay=weight_decay, max_grad_norm=1.0, seed=seed, data_seed=seed,
        bf16=models.bf16_pays(model), use_cpu=on_cpu,
        activation_checkpointing=gradient_checkpointing,
        logging_steps=max(1, round(steps / 50)), logging_nan_inf_filter=False,
        save_strategy="no", report_to=list(report_to) or "none",
        # A GPU's allocator and kernels are faster with few shapes; a CPU would only compute more.
        pad_to_multiple_of=None if on_cpu else 8,
        disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=not on_cpu,
        **more,
    )


def lora_config(lora, task_type, **defaults):
    """A dict of LoraConfig's arguments -> LoraConfig; None or {} (all weights learn) -> None.
    `quantize` is left out: it is for `load_for_training`. ValueError for an argument that
    LoraConfig does not know."""
    if not lora:
        return None
    from peft import LoraConfig

    # A copy, as peft adds to the lists.
    given = copy.deepcopy({name: value for name, value in lora.items() if name != "quantize"})
    try:
        return LoraConfig(task_type=task_type, **{**defaults, **given})
    except TypeError as error:
        raise ValueError(f"lora: {error}; its keys are those of peft.LoraConfig and 'quantize'"
                         ) from error


def keep_lora_dropout(model, args):
    """Turn off the model's own dropout, where trl's `args` say so, before it gets an adapter: trl
    would turn off the adapter's too, and `lora_dropout` would have no effect."""
    if getattr(args, "disable_dropout", False):
        disable_dropout_in_model(model)
        args.disable_dropout = False


def _named(names, endings):
    return any(f".{name}".endswith(f".{ending}") for name in names for ending in endings)


def _targets(peft_config, names):
    """Whether the `target_modules` of a LoraConfig are among the modules of these names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return peft_config.target_modules is not None and any(
        check_target_module_exists(peft_config, name) for name in names)


def _owners(peft_config):
    """The modules whose parameters are the `target_parameters` of a LoraConfig."""
    return [p.rpartition(".")[0] for p in peft_config.target_parameters or ()]


def _needs_own_head(model, peft_config):
    """Whether an adapter changes one use of a table that is both head and token embeddings.
    ValueError as in `untie`."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if peft_config is None or head is None or head.weight is not table.weight:
        return False
    names = [n for n, module in model.named_modules() if module is head or module is table]
    targets = _targets(peft_config, names)
    if peft_config.ensure_weight_tying:
        if targets:
            raise ValueError("lora: adapters of shared factors (ensure_weight_tying) on the "
                             "embeddings cannot be merged: list them in modules_to_save instead of "
                             "target_modules, or leave ensure_weight_tying out")
        return False  # one copy learns, for both uses
    return targets or _named(names, [*(peft_config.modules_to_save or ()), *_owners(peft_config)])


def untie(model, peft_config):
    """Give a causal LM an output head of its own, and say so in its config, where an adapter
    learns that head or the token embeddings and both are one table.

    Such an adapter changes one of the two uses of the table; merged into the table it would change
    both. Other models, and a `peft_config` of None, are left as they are. ValueError for adapters
    on the table whose factors are tied too.
    """
    if _needs_own_head(model, peft_config):
        head, weight = model.get_output_embeddings(), model.get_input_embeddings().weight
        head.weight = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def check_adapter(model, peft_config):
    """ValueError where trl cannot train the adapter: on a causal LM's head. trl reads the head's
    weight itself, without what stands beside it. Call it before `untie`."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if peft_config is None or head is None:
        return
    names = {id(module): name for name, module in model.named_modules()}
    name = names[id(head)]
    for key, found in (("target_modules", _targets(peft_config, [name])),
                       ("target_parameters", _named([name], _owners(peft_config)))):
        if found:
            raise ValueError(f"lora.{key}: an adapter on the output head ({name}) would never be "
                             f"trained, as trl reads the head's weight without it: leave {name} "
                             "out, or list it in modules_to_save, where the whole head learns")
    chosen = peft_config.trainable_token_indices
    if chosen is None:
        return
    shared = head.weight is table.weight and not _needs_own_head(model, peft_config)
    learn = [name, names[id(table)]] if shared else [name]
    # A list is of the token embeddings' rows. peft asks only that a name ends so.
    if any(n.endswith(c) for n in learn for c in
           (chosen if isinstance(chosen, dict) else [names[id(table)]])):
        raise ValueError(f"lora.trainable_token_indices: these rows are also those of the output "
                         f"head ({name}), and trl cannot read a head of which some rows learn: "
                         f"list {name} in modules_to_save beside them, or list the embeddings "
                         "there instead")


def fit(trainer_class, config, model, tokenizer, data, lengths, out_dir, *, spec, runs_dir, lora,
        checkpoint_every, collate=None, peft_config=None, **arguments):
    """Train `model`, that of `spec`, on `data` ({column: one value per row}) -> (trainer, its
    TrainOutput).

    trainer_class: a `LengthBatchedTrainer`; config: its SFTConfig or RewardConfig, set by
    `training_arguments(**arguments)`; lengths: tokens of each row; collate: called with the rows
    of a batch, `pad_id` and the `multiple` of tokens to pad to (None: trl's collator);
    checkpoint_every: as in `checkpoints.train`. `save_trained` removes the checkpoints.
    """
    check_rows(model.config, lengths, "max_length")
    if model.get_output_embeddings() is not None:
        check_head(model)
        check_adapter(model, peft_config)
    models.attend_for_training(model, max(lengths))
    untie(model, peft_config)
    args = training_arguments(config, model, out_dir, rows=len(lengths), max_length=None,
                              **arguments)
    keep_lora_dropout(model, args)
    tokens = None
    if args.n_gpu <= 1:  # several in one process would divide a pass along its first dimension
        tokens = trainer_class.tokens_of_pass(model, data, args.per_device_train_batch_size)
    if tokens:
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
    if collate is not None:
        collate = partial(collate, pad_id=model.config.pad_token_id,
                          multiple=args.pad_to_multiple_of)
    trainer = trainer_class(
        model=model, args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        data_collator=collate, peft_config=peft_config,
    )
    trainer.lengths = lengths
    if tokens:
        trainer.pack(tokens)
    trainer.remove_callback(PrinterCallback)  # it prints every logging step
    settings = {name: value for name, value in arguments.items() if name != "report_to"}
    return trainer, checkpoints.train(trainer, checkpoint_every, partial(
        checkpoints.call_facts, trainer_class, data, spec, runs_dir, lora=lora, **settings))


def merge_adapter(trainer, spec, head, lora, runs_dir=None):
    """Merge the LoRA adapter of the trained model, if it has one, into plain weights; returns the
    model.

    On a quantised base (QLoRA) the sum would be rounded to 4 bits again: there the adapter is put
    on the dense weights of `spec`, loaded anew.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        return model
    if (lora or {}).get("quantize"):
        model = adapter_on_dense_weights(model, spec, head, runs_dir)
    trainer.model = model.merge_and_unload()
    return trainer.model


def adapter_on_dense_weights(model, spec, head, runs_dir=None):
    """A PeftModel -> the same adapter on the weights of `spec`, which are not quantised."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, suppress_seqcls_warning():
        model.save_pretrained(folder)
        base, _ = models.load(spec, head=head, runs_dir=runs_dir)
        base.config.pad_token_id = model.config.pad_token_id
        untie(base, model.peft_config["default"])
        return PeftModel.from_pretrained(base, folder)


def write_record(folder, record):
    """Write `record`, a training's settings and metrics, to <folder>/training.json."""
    # Tables (of an `evaluate`) as lists of rows, numpy's numbers as plain ones.
    plain = lambda x: x.to_dict("records") if hasattr(x, "to_dict") else float(x)  # noqa: E731
    write_json(Path(folder, "training.json"), record, default=plain)


def save_trained(trainer, tokenizer, out_dir, record):
    """Write model, tokenizer and `record` (as training.json) to `out_dir` (`whole_folder`), and
    remove the checkpoints of the training."""
    if trainer.is_world_process_zero():
        with whole_folder(out_dir) as folder:
            trainer.save_model(str(folder))
            tokenizer.save_pretrained(folder)
            (folder / "training_args.bin").unlink(missing_ok=True)
            write_record(folder, record)
    else:  # every process takes part where the weights are sharded
        trainer.save_model(trainer.args.output_dir)
    checkpoints.clear(trainer)
