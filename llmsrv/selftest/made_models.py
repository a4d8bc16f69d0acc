"""Llamas of any size with random weights, as programs, built by the model layer without a file.

The weights of a model are slices of one pool of random values, since weights of 16 GB would take a
minute to make.  The slices of a large model overlap; no speed depends on that.
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

MAX_POOL_VALUES = 1 << 26
ROPE_THETA = 500000.0
# llama.cpp's choice where the columns of a matrix are no multiple of the 256 of a block.
TYPES_OF_NARROW_MATRICES = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama.

    is_tied      the output weights are the embedding
    weight_size  the magnitude of a weight
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool
    context_length: int = 16384
    weight_size: float = 0.02

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def make_program(shape: Shape, type: str, is_empty: bool = False) -> Program:
    """type: of the matrices, as in Tensor; norms are F32.  If empty, weights are 0 and take no
    memory until they are read."""
    file: Any = RandomFile(shape, type, is_empty)
    return build_program(_config(shape), LLAMA, Tensors(file, lambda: None))


def _config(shape: Shape) -> ModelConfig:
    pairs = np.arange(0, shape.head_dim, 2) / shape.head_dim
    rope = Rope((ROPE_THETA**-pairs).astype(np.float32))
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
    """What a model file says of a tensor."""

    name: str
    type: str
    shape: tuple[int, ...]


class RandomFile:
    """What Tensors reads from a model file."""

    path = Path("random weights")

    def __init__(self, shape: Shape, type: str, is_empty: bool) -> None:
        self._is_empty = is_empty
        self._weight_size = shape.weight_size
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q, kv = (heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads))
        layer: dict[str, tuple[int, ...]] = {
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
            f"{name}.weight": Info(f"{name}.weight", _type_of(type, size), size)
            for name, size in sizes.items()
        }
        largest = max(map(prod, sizes.values()))
        # A power of two is a multiple of every block.
        self._pool_values = min(1 << (2 * largest).bit_length(), MAX_POOL_VALUES)

    def data(self, info: Info) -> Array:
        """The tensor's bytes, from a place in the pool that depends on its name."""
        if len(info.shape) == 1:
            return np.ones(info.shape, np.float32).view(np.uint8)
        block = GGML_TYPES[info.type]
        num_bytes = prod(info.shape) // block.block_values * block.block_bytes
        if self._is_empty:
            return np.zeros(num_bytes, np.uint8)
        pool = _pool(info.type, self._pool_values, self._weight_size)
        if num_bytes >= len(pool):
            return np.resize(pool, num_bytes)
        free_blocks = (len(pool) - num_bytes) // block.block_bytes
        place = int.from_bytes(info.name.encode()) % free_blocks
        return pool[place * block.block_bytes :][:num_bytes]


def _type_of(type: str, size: tuple[int, ...]) -> str:
    """The type of a tensor of this size in a model whose matrices are of `type`."""
    if len(size) == 1:
        return "F32"
    return TYPES_OF_NARROW_MATRICES.get(type, type) if size[1] % 256 else type


@cache
def _pool(type: str, num_values: int, weight_size: float) -> Array:
    return random_tensor("pool", type, (num_values,), size=weight_size).data
