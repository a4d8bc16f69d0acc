"""The llama family: Llama 1 to 3, Mistral, SmolLM 1 and 2, and whoever else is shaped like them.

Source: Touvron et al. 2023, section 2.2; names of the tensors: the GGUF specification.
"""

import numpy as np

from llmsrv.backend.base import Array
from llmsrv.backend.base import Attention
from llmsrv.backend.base import Embed
from llmsrv.backend.base import GatedActivation
from llmsrv.backend.base import Linear
from llmsrv.backend.base import Norm
from llmsrv.backend.base import Operation
from llmsrv.backend.base import Program
from llmsrv.backend.base import RopeAndStore
from llmsrv.backend.base import SelectLogitRows
from llmsrv.model.config import ModelConfig
from llmsrv.model.tensors import Tensors


def llama(config: ModelConfig, tensors: Tensors) -> Program:
    """The program of a llama; ModelError where a tensor is missing or not as config says."""
    hidden, eps = config.hidden_size, config.norm_eps
    embedding = tensors.take("token_embd.weight", config.vocab_size, hidden)
    frequencies = rope_frequencies(config, tensors)
    operations: list[Operation] = [Embed("hidden", embedding)]
    for layer in range(config.num_layers):
        operations += _layer(config, tensors, layer, frequencies)
    output_norm = tensors.take("output_norm.weight", hidden)
    head = tensors.maybe_take("output.weight", config.vocab_size, hidden) or embedding
    operations += [
        SelectLogitRows("last", "hidden"),
        Norm("last_normed", "last", output_norm, eps),
        Linear("logits", "last_normed", (head,)),
    ]
    qkv_heads = config.num_heads + 2 * config.num_kv_heads
    return Program(
        operations=tuple(operations),
        buffers={
            "hidden": hidden,
            "normed": hidden,
            "qkv": qkv_heads * config.head_dim,
            "attended": config.num_heads * config.head_dim,
            "gate_up": 2 * config.intermediate_size,
            "activated": config.intermediate_size,
            "last": hidden,
            "last_normed": hidden,
            "logits": config.vocab_size,
        },
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


def _layer(
    config: ModelConfig, tensors: Tensors, layer: int, frequencies: Array
) -> list[Operation]:
    name = f"blk.{layer}."
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    qkv = tensors.linear({name + "attn_q": q, name + "attn_k": kv, name + "attn_v": kv}, hidden)
    attention_out = tensors.linear({name + "attn_output": hidden}, q)
    gate_up = tensors.linear({name + "ffn_gate": inner, name + "ffn_up": inner}, hidden)
    down = tensors.linear({name + "ffn_down": hidden}, inner)
    attention_norm = tensors.take(name + "attn_norm.weight", hidden)
    ffn_norm = tensors.take(name + "ffn_norm.weight", hidden)

    # GGUF files of this family have the rows of q and k permuted for interleaved rope.
    return [
        Norm("normed", "hidden", attention_norm, config.norm_eps),
        Linear("qkv", "normed", *qkv),
        RopeAndStore("qkv", layer, frequencies, interleaved=True),
        Attention("attended", "qkv", layer, config.head_dim**-0.5),
        Linear("hidden", "attended", *attention_out, accumulate=True),
        Norm("normed", "hidden", ffn_norm, config.norm_eps),
        Linear("gate_up", "normed", *gate_up),
        GatedActivation("activated", "gate_up"),
        Linear("hidden", "activated", *down, accumulate=True),
    ]


def rope_frequencies(config: ModelConfig, tensors: Tensors) -> Array:
    """[rotary_dim / 2] float32 radians a position; rope_freqs holds Llama 3's divisors of them."""
    exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
    frequencies = config.rope_theta**-exponents / config.rope_factor
    divisors = tensors.maybe_values("rope_freqs.weight", config.rotary_dim // 2)
    return (frequencies if divisors is None else frequencies / divisors).astype(np.float32)
