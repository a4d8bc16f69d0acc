"""Tiny models made and answered by transformers (tests/data/golden/tiny), turned into GGUF files as
the usual converter does, through the loader and the reference backend."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.reference import ReferenceBackend
from llmsrv.backend.sampling import SamplingParameters
from llmsrv.model.load import load_model
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf
from tests.support.plans import Run
from tests.support.plans import generate

TINY = Path(__file__).parents[1] / "data/golden/tiny"
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def safetensors(path):
    """name, type, shape and bytes of every tensor: a length, a JSON header, the data."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, entry["dtype"], entry["shape"], data[8 + length + start : 8 + length + end]


def gguf_name(name):
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem = name.removesuffix(".weight").removeprefix("model.")
    if not stem.startswith("layers."):
        return NAMES[stem] + ".weight"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(shape, data, num_heads):
    """Rows of each head in the order (0, half, 1, half + 1, ...)."""
    rows = np.frombuffer(data, np.uint16).reshape(num_heads, 2, -1, shape[1])
    return rows.swapaxes(1, 2).tobytes()


def llama3_divisors(config):
    """Source: Llama 3.1's reference code, apply_scaling."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, dim, 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (i / dim))
        share = min(max((turns - low) / (high - low), 0), 1)
        divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.float32(divisors)


def to_gguf(folder, path):
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    metadata = {
        **tiny_vocabulary(config["vocab_size"]),
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": rope["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
    }
    tensors = {}
    for name, type_, shape, data in safetensors(folder / "model.safetensors"):
        if "q_proj" in name:
            data = interleaved(shape, data, config["num_attention_heads"])
        if "k_proj" in name:
            data = interleaved(shape, data, config["num_key_value_heads"])
        tensors[gguf_name(name)] = type_, shape, data
    if rope["rope_type"] == "linear":
        metadata["llama.rope.scaling.type"] = "linear"
        metadata["llama.rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(config)
    return write_gguf(path, metadata, tensors)


@pytest.mark.parametrize("name", ["llama", "llama-linear", "llama3-rope"])
def test_tokens_and_log_probabilities_are_those_of_transformers(name, tmp_path):
    program = load_model(to_gguf(TINY / name, tmp_path / "tiny.gguf"), lambda: None).program
    limits = Limits(max_rows=512, max_logit_rows=8, max_slots=8, num_blocks=128)
    plan = ReferenceBackend().compile(program, limits, lambda: None)
    cases = json.loads((TINY / name / "golden.json").read_text())["cases"]
    parameters = SamplingParameters(temperature=0, num_logprobs=11)
    runs = [Run(case["prompt_ids"], len(case["greedy_ids"]), parameters) for case in cases]
    generate(plan, runs, chunk=16)
    for run, case in zip(runs, cases):
        assert run.ids == case["greedy_ids"]
        for ours, theirs in zip(run.alternatives, map(dict, case["top10_logprobs"])):
            assert {id: ours.get(id) for id in theirs} == pytest.approx(theirs, abs=1e-3)
