"""Training on several devices: stages as commands for `accelerate launch`, and from a notebook.

    accelerate launch --config_file params/accelerate/ddp.yaml -m cai_utils.rl.ppo CONFIG.yaml

CONFIG.yaml holds the arguments of `ppo.train` (`preference.train`, `sft.finetune`), a trainer's
hyperparameters below `config:`. An argument that is the name of a .jsonl file stands for the rows
in it. `wandb_project` sends an RL run's metrics to W&B.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import parse_flag_from_env

from cai_utils.experiment import locks, yaml12
from cai_utils.experiment.files import read_rows, write_rows
from cai_utils.experiment.kinds import fitted
from cai_utils.experiment.params import read_params

WORKER = "CAI_WORKER"  # environment variable of the processes that `run` starts


def main(module, function, arguments=None):
    """Call `module.function` with the arguments in the YAML file that the command line names.
    SystemExit, one line, for a file or arguments that do not fit."""
    if os.environ.get(WORKER):
        locks.join()
        locks.end_with_input()
    if not torch.cuda.is_available():
        _shard_over_cpus()
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        sys.exit(f"usage: accelerate launch -m {module} CONFIG.yaml (the arguments of {function})")
    if not Path(arguments[0]).is_file():
        sys.exit(f"error: {arguments[0]}: no such file; give a YAML file of {function}'s arguments")
    try:
        config = read_params(arguments[0])
    except ValueError as error:
        sys.exit(f"error: {error}")
    project = config.pop("wandb_project", None)
    stage = getattr(importlib.import_module(module), function)
    known = inspect.signature(stage).parameters
    unknown = sorted(set(config) - set(known))
    missing = [k for k, p in known.items() if p.default is p.empty and k not in config]
    if unknown or missing:
        sys.exit(f"error: {arguments[0]}: " + "; ".join(
            [f"unknown argument {k}" for k in unknown] + [f"{k} is missing" for k in missing])
            + f"; it takes the arguments of {module}.{function}")
    try:
        config = fitted(config, {k: None if p.default is p.empty else p.default
                                 for k, p in known.items()}, where=f"{arguments[0]}: ")
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, value in config.items():
        if isinstance(value, str) and value.endswith(".jsonl"):
            config[name] = read_rows(value)
    # One W&B run, not one a process.
    if project and "log" in known and os.environ.get("RANK", "0") == "0":
        import wandb

        config["log"] = wandb.init(project=project, config=dict(config, prompts=None)).log
    try:
        stage(**config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _shard_over_cpus():
    """Lets processes without a GPU shard what a launch config says (FSDP, DeepSpeed): accelerate
    knows CPU processes only as those that exchange gradients."""
    if not any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))):
        return
    plain = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, deepspeed_plugin=None, **more):
        plain(self, *arguments, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **more)
        plugin = fsdp_plugin or deepspeed_plugin
        if self.distributed_type != DistributedType.MULTI_CPU or plugin is None:
            return
        self.distributed_type = DistributedType.FSDP if fsdp_plugin else DistributedType.DEEPSPEED
        PartialState._shared_state["distributed_type"] = self.distributed_type
        if deepspeed_plugin or self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        if fsdp_plugin:
            self.fsdp_plugin = fsdp_plugin
        else:  # it has a precision of its own
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins, self._mixed_precision = deepspeed_plugin, "no"

    AcceleratorState.__init__ = init


def run(stage, *arguments, num_processes=1, accelerate_config=None, **more):
    """`stage(*arguments, **more)` in this process, or in `num_processes` that `accelerate launch`
    starts (GPUs where there are, else CPU processes), in the precision of the config's `bf16`
    unless `accelerate_config` is given.

    stage: an RL trainer's `train`, `preference.train` or `sft.finetune`. accelerate_config: a file
    of params/accelerate/. Returns what the stage returns in one process; from several, the history
    of RL or the training.json of its folder. RuntimeError with the last lines when they fail.
    """
    if num_processes == 1:
        return stage(*arguments, **more)
    bound = dict(inspect.signature(stage).bind(*arguments, **more).arguments)
    log, out_dir = bound.pop("log", None), Path(bound["out_dir"])
    with tempfile.TemporaryDirectory() as folder:
        for name, value in bound.items():
            if isinstance(value, list | tuple) and value and isinstance(value[0], dict | list):
                rows = [r if isinstance(r, dict) else {"prompt": r} for r in value]
                bound[name] = str(Path(folder) / f"{name}.jsonl")
                write_rows(bound[name], rows)
            elif isinstance(value, Path):
                bound[name] = str(value)
            elif dataclasses.is_dataclass(value):
                bound[name] = dataclasses.asdict(value)
        config = Path(folder) / "config.yaml"
        # Through JSON: YAML has no numpy numbers and no tuples.
        plain = json.loads(json.dumps(bound, default=_plain))
        config.write_text(yaml12.dump(plain), encoding="utf-8")
        bf16 = bound.get("config", {}).get("bf16", "auto")
        if bf16 == "auto":
            bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        call = [*command(num_processes, accelerate_config, "bf16" if bf16 else "no"),
                stage.__module__, str(config)]
        # A worker ends when its input does: with the process that started it, however that ends.
        with (open(Path(folder) / "errors", "w+", encoding="utf-8", errors="replace") as errors,
              subprocess.Popen(call, env=environment() | {WORKER: "1"}, stdin=subprocess.PIPE,
                               stderr=errors) as started):
            started.wait()
            errors.seek(0)
            lines = errors.read().splitlines()
    # What follows is the launcher's: a long trace of its own, and a summary without the reason.
    end = next((i for i, line in enumerate(lines, 1) if "failed (exitcode" in line), len(lines))
    if started.returncode:
        raise RuntimeError(f"{stage.__module__} failed in {num_processes} processes:\n"
                           + "\n".join(lines[:end][-15:]))
    if (out_dir / "history.csv").is_file():
        import pandas as pd

        history = pd.read_csv(out_dir / "history.csv")
        for row in history.to_dict("records") if log is not None else ():
            log(row)
        return history
    return json.loads((out_dir / "training.json").read_text(encoding="utf-8"))


def _plain(x):
    if hasattr(x, "tolist"):
        return x.tolist()
    raise ValueError(f"{x!r} cannot be handed to other processes: give a folder or a file, or "
                     "num_processes=1")


def command(num_processes, accelerate_config=None, precision="no"):
    """The command line up to the module's name, without a GPU for CPU processes (gloo)."""
    plain = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", precision,
             "--dynamo_backend", "no"]
    config = ["--config_file", str(accelerate_config)] if accelerate_config else plain
    if accelerate_config and not torch.cuda.is_available():  # the files are for GPUs
        config += ["--mixed_precision", precision]
    return [sys.executable, "-m", "accelerate.commands.launch", *config,
            "--num_processes", str(num_processes), "--main_process_port", "0", "-m"]


def environment():
    """accelerate starts CPU processes by itself through MPI only; this needs none."""
    return dict(os.environ) | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
