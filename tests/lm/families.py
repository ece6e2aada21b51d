"""A tiny random model of each causal-LM family that transformers has, for the sweep in
`test_families.py`."""

import re

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CONTEXT = 64
# Under these names, or those that a config's `attribute_map` has for them.
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=24, max_position_embeddings=CONTEXT)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
# Other numbers of a config that are large: the first pattern that its name matches.
SMALLER = [
    ("token_id|qk_head_dim|seed|positions|floor|time_step", None), ("window|chunk_size", 5),
    ("(?<!index_)(top_?k$)|per_tok", 2), ("index_topk", 16), ("^(n|topk)_group$", 1),
    ("(expert|ffn|intermediate).*(size|dim)|dff", 24), ("expert", 4), ("heads", 4),
    ("layers|blocks", 2), ("vocab", 64),
    ("rank|dim|size|state|extent|width|length|channel|centroids", 8),
]
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CONV = {"layer_types": ["conv", "full_attention"]}
BLOCKS = {"layers_block_type": ["linear_attention", "hybrid"]}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
          "layer_types": ["sliding_attention", "full_attention"] * 2}
COMPASS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# What these rules do not know; ... takes a name out.
MORE = {
    "bailing_hybrid": HYBRID,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": COMPASS}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"keep_window_size": CONTEXT},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon": {"head_dim": ...},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "gemma3n_text": SHARED, "gemma4_text": SHARED, "gemma4_unified_text": SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "granitemoehybrid": HYBRID,
    "hrm_text": {"num_layers_per_stack": ...},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID, "lfm2": CONV, "lfm2_moe": CONV, "lfm3": CONV,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"num_hidden_layers": ..., "n_groups": 2,
                   "layers_block_type": ["linear_attention", "full_attention"]},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen3_5_moe_text": HYBRID, "qwen3_5_text": HYBRID, "qwen3_next": HYBRID,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": ...},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3,
              "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": BLOCKS,
}


def _arguments(config, cls):
    found = {}
    for name, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 2:
            continue
        new = next((new for pattern, new in SMALLER if re.search(pattern, name)), None)
        if new is not None and new < value:
            found[name] = new
    known = set(vars(config)) | set(dir(cls))
    for name, value in SIZE.items():
        name = cls.attribute_map.get(name, name)
        if name in known:
            found[name] = value
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if hasattr(config, "is_decoder"):
        found["is_decoder"] = True
    return found | MORE.get(cls.model_type, {})


def config_of(family, vocab_size):
    """A tiny config of a family; nested ones (of the text part of a model that also sees) too."""
    cls = CONFIG_MAPPING[family]
    plain = cls()
    found = _arguments(plain, cls)
    for name in getattr(cls, "sub_configs", {}):
        part = getattr(plain, name, None)
        if part is not None:
            found[name] = _arguments(part, type(part)) | {"vocab_size": vocab_size} | SPECIAL
    found |= {"vocab_size": vocab_size, **SPECIAL, **MORE.get(family, {})}
    return cls(**{name: value for name, value in found.items() if value is not ...})


def model_of(family, vocab_size, attention="eager"):
    """A model of `config_of` in eval mode. Its weights are random and large, so that a token, a
    position or a mask that is wrong shows in the logits; biases and norms are not those of the
    start."""
    config = config_of(family, vocab_size)
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    assert count < 1e6, f"{family}: {count} parameters; make it smaller"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return randomize(model)


def randomize(model, seed=0):
    """Fills a model's weights anew, and returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(0.3 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    return model
