"""Models in the shapes of real ones, with random weights made on the spot, as programs.

A program is built by the model layer, as for a model from a file.  All weights of a model are
slices of one pool of random values, since a file of 16 GB would take a minute to make; the slices
overlap, and no speed depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.program import Program
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.model.config import LayerConfig
from llmsrv.model.config import ModelConfig
from llmsrv.model.decoder import build_program
from llmsrv.model.families.llama import LLAMA
from llmsrv.model.rope import Rope
from llmsrv.model.tensors import Tensors

POOL_VALUES = 1 << 26
WEIGHT_SIZE = 0.02  # standard deviation, so that values neither explode nor vanish
# llama.cpp's choice where the columns of a matrix are no multiple of the 256 of a block.
TYPES_OF_NARROW_MATRICES = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool  # the output weights are the embedding
    context_length: int = 16384

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


# Source: the models' config.json.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, True),
        Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
        Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, False),
        # For trying the benchmarks where a kernel is emulated.
        Shape("tiny", 2, 256, 512, 4, 2, 64, 1024, True),
    )
}


def make_program(shape: Shape, type: str) -> Program:
    """type: of the matrices, as in Tensor; norms are F32."""
    tensors: Any = Tensors(RandomFile(shape, type), lambda: None)  # type: ignore[arg-type]
    return build_program(_config(shape), LLAMA, tensors)


def _config(shape: Shape) -> ModelConfig:
    pairs = np.arange(0, shape.head_dim, 2) / shape.head_dim
    rope = Rope((500000.0**-pairs).astype(np.float32))
    return ModelConfig(
        architecture="llama",
        context_length=shape.context_length,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        norm_eps=1e-5,
        layers=(LayerConfig(window=None, rope=rope),) * shape.num_layers,
        long_from=None,
        rope_is_interleaved=True,
        experts=None,
        attention_scale=shape.head_dim**-0.5,
        attention_softcap=None,
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
        logit_softcap=None,
        is_tied=shape.is_tied,
    )


class Info(NamedTuple):
    """As in a model file: where a tensor is."""

    name: str
    type: str
    shape: tuple[int, ...]


class RandomFile:
    """What Tensors reads, without a file."""

    path = Path("random weights")

    def __init__(self, shape: Shape, type: str) -> None:
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q, kv = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
        layer = {
            "attn_norm": (hidden,),
            "attn_q": (q, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, q),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        sizes: dict[str, tuple[int, ...]] = {"token_embd": (shape.vocab_size, hidden)}
        for index in range(shape.num_layers):
            sizes |= {f"blk.{index}.{name}": size for name, size in layer.items()}
        sizes |= {"output_norm": (hidden,), "output": (shape.vocab_size, hidden)}
        self.tensors: Mapping[str, Info] = {
            f"{name}.weight": Info(f"{name}.weight", type_of(type, size), size)
            for name, size in sizes.items()
        }

    def data(self, info: Info) -> Array:
        """The tensor's bytes, from a place in the pool that depends on its name."""
        if len(info.shape) == 1:
            return np.ones(info.shape, np.float32).view(np.uint8)
        block = GGML_TYPES[info.type]
        num_bytes = prod(info.shape) // block.block_values * block.block_bytes
        pool = _pool(info.type)
        if num_bytes >= len(pool):
            return np.resize(pool, num_bytes)
        free_blocks = (len(pool) - num_bytes) // block.block_bytes
        start = sum(info.name.encode()) * 4097 % free_blocks * block.block_bytes
        return pool[start : start + num_bytes]


def type_of(type: str, size: tuple[int, ...]) -> str:
    """The type of a tensor of this size in a model whose matrices are of `type`."""
    if len(size) == 1:
        return "F32"
    return TYPES_OF_NARROW_MATRICES.get(type, type) if size[1] % 256 else type


@cache
def _pool(type: str) -> Array:
    return random_tensor("pool", type, (POOL_VALUES,), size=WEIGHT_SIZE).data
