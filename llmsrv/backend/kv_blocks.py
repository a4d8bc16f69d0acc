"""Plan.read_blocks and Plan.write_blocks for backends that keep the KV cache in host memory.

k, v  [num_blocks, bytes of a block's keys, or values] uint8: views of the two caches
"""

from collections.abc import Sequence

import numpy as np

from llmsrv.backend.arrays import Array


def read_blocks(k: Array, v: Array, blocks: Sequence[int]) -> Array:
    return np.concatenate([k[list(blocks)], v[list(blocks)]], axis=1)


def write_blocks(k: Array, v: Array, blocks: Sequence[int], data: Array) -> None:
    k_bytes = k.shape[1]
    check_blocks(data, len(blocks), k_bytes + v.shape[1])
    k[list(blocks)], v[list(blocks)] = data[:, :k_bytes], data[:, k_bytes:]


def check_blocks(data: Array, num_blocks: int, block_bytes: int) -> None:
    """Raises ValueError if `data` cannot be the bytes of this many blocks."""
    if data.dtype != np.uint8 or data.shape != (num_blocks, block_bytes):
        raise ValueError(
            f"KV blocks must be uint8 of shape {(num_blocks, block_bytes)}, "
            f"got {data.dtype} of shape {data.shape}"
        )
