"""The part of cupyx that the CUDA backend uses: pinned numpy arrays."""

from typing import Any

import numpy as np
import numpy.typing as npt
from cupy.cuda import alloc_pinned_memory

__all__ = ["empty_pinned", "zeros_pinned"]


def empty_pinned(shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=alloc_pinned_memory(size))


def zeros_pinned(shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> Any:
    array = empty_pinned(shape, dtype)
    array.fill(0)
    return array
