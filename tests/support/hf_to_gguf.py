"""Writes a tiny Hugging Face model as the GGUF file that llama.cpp's converter would write.

Deliberately shares no code with llmsrv.model: names, permutations and keys are listed again here,
by family, from llama.cpp's conversion/*.py.
"""

import json
import math
import struct
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.gguf_writer import Array
from tests.support.gguf_writer import RawTensor
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf

Config = dict[str, Any]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "smollm3": "smollm3",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
}
PERMUTED = {"llama", "smollm3", "granite"}
SHIFTED = {"gemma2", "gemma3"}  # norms are stored minus 1
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
POST_NORMED = {"gemma2", "gemma3", "olmo2"}  # post_attention_layernorm follows attention
EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
# Keys of single families: GGUF's -> Hugging Face's
FAMILY_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def to_gguf(folder: Path, path: Path, metadata: Mapping[str, object] | None = None) -> Path:
    """Keeps matrices unchanged and converts norms, biases and factors to float32.

    metadata  added to ours or replacing it; a value of None removes the key"""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    tensors: dict[str, Array | RawTensor] = {}
    stacks: dict[str, list[RawTensor]] = {}
    for name, tensor in sorted(read_safetensors(folder / "model.safetensors"), key=_sort_key):
        if ".experts." in name:
            stacks.setdefault(_expert_name(name), []).append(tensor)
        else:
            own = gguf_name(name, architecture)
            tensors[own] = _convert(own, tensor, config, architecture)
    for name, stack in stacks.items():
        (type_, shape, _), data = stack[0], b"".join(data for _, _, data in stack)
        tensors[name] = type_, (len(stack), *shape), data
    entries = {**_metadata(config, architecture), **(metadata or {})}
    entries = {key: value for key, value in entries.items() if value is not None}
    return write_gguf(path, entries, {**tensors, **_rope_tensors(config)})


def read_safetensors(path: Path) -> Iterator[tuple[str, RawTensor]]:
    """Yields name and tensor.  The file is a length, a JSON header, and the data."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, (entry["dtype"], tuple(entry["shape"]), data[start:end])


def _sort_key(item: tuple[str, RawTensor]) -> list[tuple[int, str]]:
    """A sort key that orders experts by number."""
    return [(int(part) if part.isdigit() else -1, part) for part in item[0].split(".")]


def gguf_name(name: str, architecture: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    is_post_norm = rest == "post_attention_layernorm" and architecture in POST_NORMED
    return f"blk.{layer}.{'post_attention_norm' if is_post_norm else NAMES[rest]}.{suffix}"


def _expert_name(name: str) -> str:
    """model.layers.3.mlp.experts.5.up_proj.weight -> blk.3.ffn_up_exps.weight"""
    parts = name.split(".")
    return f"blk.{parts[2]}.{EXPERT_NAMES[parts[-2]]}.weight"


def _convert(
    name: str, tensor: RawTensor, config: Config, architecture: str
) -> Array | RawTensor:
    type_, shape, data = tensor
    assert type_ == "BF16"
    heads = {"attn_q.": "num_attention_heads", "attn_k.": "num_key_value_heads"}
    for part, key in heads.items():
        if part in name and architecture in PERMUTED:
            # Puts the rows of each head in the order 0, half, 1, half + 1, ...
            rows = np.frombuffer(data, "<u2").reshape(config[key], 2, -1, *shape[1:])
            data = rows.swapaxes(1, 2).tobytes()
    if len(shape) > 1:
        return type_, shape, data
    values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    is_norm = name.endswith("norm.weight")
    return values + np.float32(is_norm and architecture in SHIFTED)


# ---- Metadata


def _metadata(config: Config, architecture: str) -> dict[str, object]:
    head_dim = _head_dim(config)
    rope = config["rope_parameters"]
    numbers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }
    numbers |= {own: config[key] for own, key in FAMILY_KEYS.items() if config.get(key)}
    if architecture == "gemma3":
        numbers["attention.sliding_window_pattern"] = [
            type_ == "sliding_attention" for type_ in config["layer_types"]
        ]
    numbers |= _rope_numbers(config)
    return {
        **tiny_vocabulary(config["vocab_size"]),
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in numbers.items()},
    }


def _head_dim(config: Config) -> int:
    default = config["hidden_size"] // config["num_attention_heads"]
    return int(config.get("head_dim") or default)


def _rope_numbers(config: Config) -> dict[str, object]:
    rope = config["rope_parameters"]
    original = rope.get("original_max_position_embeddings")
    match rope.get("rope_type", "default"):
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
        case "yarn":
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": rope["factor"],
                "rope.scaling.original_context_length": original,
            }
        case "longrope":
            scale = config["max_position_embeddings"] / original
            return {
                "rope.scaling.type": "longrope",
                "rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original)),
                "rope.scaling.original_context_length": original,
            }
    return {}


def _rope_tensors(config: Config) -> dict[str, Array | RawTensor]:
    rope = config["rope_parameters"]
    match rope.get("rope_type", "default"):
        case "llama3":
            return {"rope_freqs.weight": _llama3_divisors(rope, _head_dim(config))}
        case "longrope":
            return {
                f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
                for length in ("short", "long")
            }
    return {}


def _llama3_divisors(rope: Config, head_dim: int) -> Array:
    """Source: Llama 3.1's reference code, apply_scaling."""
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (i / head_dim))
        share = min(max((turns - low) / (high - low), 0), 1)
        divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(divisors, np.float32)
