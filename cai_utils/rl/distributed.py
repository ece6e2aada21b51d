"""PPO on several devices: accelerate's state, and sharded weights gathered for sampling."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from cai_utils.lm import checkpoints, models


def process_state():
    """accelerate's state of this process. CPU processes that a launcher started are taken for
    single ones unless a flag says so."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()
    return PartialState(cpu=launched or parse_flag_from_env("ACCELERATE_USE_CPU"))


def keeping_state(work, *arguments):
    """`work(*arguments)`, which trains another model: its trainer sets accelerate's global state
    anew, and ours is restored afterwards."""
    kept = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState)]
    try:
        return work(*arguments)
    finally:
        for state, ours in kept:
            state._shared_state.clear()
            state._shared_state.update(ours)


def make_accelerator(model, bf16):
    """An Accelerator in the precision asked for, unless a launcher's config says another.

    accelerate's state from an earlier stage in this process is dropped, as it holds that stage's
    precision and sharding. ValueError for a launch config with fp16 or accumulated gradients.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    process_state()
    if bf16 == "auto":
        on_cpu = model.device.type == "cpu"
        bf16 = models.bf16_pays(model, models.BF16_ABOVE if on_cpu else models.EAGER_BELOW)
    options = {"mixed_precision": "bf16"} if bf16 else {}
    launched = PartialState().num_processes > 1
    accelerator = Accelerator(
        **({} if launched else options),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.gradient_accumulation_steps != 1 or accelerator.mixed_precision == "fp16":
        raise ValueError("PPO accumulates gradients by `micro_tokens` and scales no losses: set "
                         "gradient_accumulation_steps to 1 and mixed_precision to bf16 or no")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # DeepSpeed asks for it; our batches do not come from a loader
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    return accelerator


def copy_weights(networks, whole, adapted):
    """Copies the present weights of a sharded policy into its whole copy, in every process."""
    # peft's modules stand in the plain model too, under its own names.
    copies = {name.removeprefix("base_model.model.") if adapted else name: weight
              for name, weight in (adapted[0] if adapted else whole).named_parameters()}
    with torch.no_grad():
        for name, weight in checkpoints.whole_weights(networks, "policy.model."):
            if name in copies:
                copies[name].copy_(weight)
