"""PPO's samples from vLLM: the policy's weights are handed over by a folder, each time that they
have changed."""

from __future__ import annotations

import contextlib
import shutil
import time

import torch

from cai_utils.experiment import resume
from cai_utils.lm import models, vllm_engine, vllm_spec
from cai_utils.rl import networks

# Measured on the miniature (samples in float32, training in bf16): 0.001 with the present weights,
# 0.04 to 0.07 with an output head of one or a few iterations before.
FAR = 0.03


def check(engine, processes):
    """ValueError where PPO cannot sample from `engine` (`PPOConfig.engine`), before long work."""
    if engine is None:
        return
    vllm_engine.check_installed(f"engine={engine!r}")
    if processes > 1:
        raise ValueError(f"engine={engine!r} samples in the one process that trains: start one "
                         "only, or leave `engine` out (vLLM's tensor_parallel_size uses more GPUs)")


def compared(gaps, iteration):
    """Metrics, under trl's names, of the distance (nats) of vLLM's log-probabilities from the
    policy's, (N,), one a token. Prints a line where they are those of other weights or of too
    narrow a dtype."""
    mean, most = gaps.mean().item(), gaps.max().item()
    if not mean <= FAR:
        print(f"ppo {iteration}: vLLM's log-probabilities are {mean:.3f} nats a token from the "
              f"policy's, above {FAR}: it samples from former weights, or needs "
              "engine: vllm;dtype=float32", flush=True)
    return {"sampling/sampling_logp_difference/mean": mean,
            "sampling/sampling_logp_difference/max": most}


@contextlib.contextmanager
def sampling(collector, folder):
    """Inside, `collector` samples from the engine that its config names, if any. folder: for the
    weights; gone at the end."""
    if collector.config.engine is None:
        yield
        return
    inner, collector.sampler = collector.sampler, _Engine(collector, folder)
    try:
        yield
    finally:
        collector.sampler.close()
        collector.sampler = inner


class _Engine:
    """The `generate` of a `Sampler`, by vLLM with the present weights of the collector's policy."""

    def __init__(self, collector, folder):
        self.collector, self.folder = collector, folder
        self.sampler, self.weights, self.seconds = None, None, 0.0

    def generate(self, inputs, **settings):
        """As `Sampler.generate`."""
        # Autocast is for passes of training; vLLM has a dtype of its own.
        with torch.autocast(self.collector.accelerator.device.type, enabled=False):
            if self.weights != self.collector.weights:
                self._hand_over()
            return self.sampler.generate(inputs, **settings)

    def _hand_over(self):
        began, collector = time.perf_counter(), self.collector
        options = vllm_spec.parsed("engine", collector.config.engine.split(";")[1:])
        model = networks.merged(collector.model, collector.adapted)
        dtype = models.dtype_for(options.pop("dtype", collector.dtype), model.device, model.config)
        with resume.whole_folder(self.folder) as temporary:
            model.save_pretrained(temporary, state_dict={
                name: weight.to(dtype) if weight.is_floating_point() else weight
                for name, weight in model.state_dict().items()})
            collector.tokenizer.save_pretrained(temporary)
        if self.sampler is None:
            self.sampler = vllm_engine.VLLMSampler(
                self.folder, collector.tokenizer, dtype, generation_config=model.generation_config,
                **options)
        else:
            self.sampler.reload(self.folder)
        self.weights, self.seconds = collector.weights, time.perf_counter() - began

    def close(self):
        """Frees vLLM's memory, and removes the folder."""
        if self.sampler is not None:
            self.sampler.close()
        shutil.rmtree(self.folder, ignore_errors=True)
