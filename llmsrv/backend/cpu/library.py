"""The C library of kernels/cpu: its structures and functions for ctypes, and memory it allocates.

Mirrors plan.h and linear_formats.h: change both together.
"""

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Array
from llmsrv.errors import StartupError

GROUP_ROWS = 16  # rows in a group of weights
KV_CHUNK = 256  # positions in a chunk of attention
MAX_HEAD_DIM = 512
PAGE = 4096
HUGE_PAGE_BYTES = 2 << 20

# enum Format
FORMATS = {
    name: number
    for number, name in enumerate(
        "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K".split()
    )
}
FLOATS = ("F32", "F16", "BF16")

# enum Kind
COS_SIN, NORM, QUANTIZE, LINEAR, ROPE, ATTENTION, COMBINE, ACTIVATE, SELECT = range(9)
SOFTCAP, POOL, ROUTE, EXPERTS, SUM_EXPERTS = range(9, 14)

int32, float32, pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class WeightPart(ctypes.Structure):
    _fields_ = [
        ("format", int32),
        ("rows", int32),
        ("columns", int32),
        ("first_column", int32),
        ("bounds", pointer),
        ("groups", pointer),
    ]


class OperationStruct(ctypes.Structure):
    _fields_ = [
        ("kind", int32),
        ("logit_rows_only", int32),
        ("width", int32),
        ("x_stride", int32),
        ("out_stride", int32),
        ("layer", int32),
        ("accumulate", int32),
        ("option", int32),
        ("window", int32),
        ("num_parts", int32),
        ("half_rotary_dim", int32),
        ("norms_across_heads", int32),
        ("one_row_tiles", int32),
        ("num_experts", int32),
        ("num_chosen", int32),
        ("max_choices", int32),
        ("gated", int32),
        ("eps", float32),
        ("scale", float32),
        ("softcap", float32),
        ("magnitude", float32),
        ("x", pointer),
        ("out", pointer),
        ("tiles", pointer),
        ("weight", pointer),
        ("second_weight", pointer),
        ("cos_sin", pointer),
        ("parts", pointer),
        ("choices", pointer),
    ]


class BatchStruct(ctypes.Structure):
    """Batch in plan.h."""

    _fields_ = [
        ("num_rows", int32),
        ("num_logit_rows", int32),
        ("num_sequences", int32),
        ("max_blocks", int32),
        ("positions", pointer),
        ("sequences", pointer),
        ("slot_mapping", pointer),
        ("block_tables", pointer),
        ("is_long", pointer),
        ("logit_rows", pointer),
    ]


class PlanStruct(ctypes.Structure):
    _fields_ = [
        ("num_operations", int32),
        ("num_layers", int32),
        ("num_heads", int32),
        ("num_kv_heads", int32),
        ("head_dim", int32),
        ("padded_dim", int32),
        ("max_rows", int32),
        ("max_split_rows", int32),
        ("max_kv_chunks", int32),
        ("num_threads", int32),
        ("k_cache", pointer),
        ("v_cache", pointer),
        ("partials", pointer),
        ("scratch", pointer),
        ("scratch_floats", ctypes.c_int64),
        ("query_spans", pointer),
        ("heartbeat", pointer),
        ("operations", pointer),
        ("pool", pointer),
        ("batch", BatchStruct),
        ("num_query_spans", int32),
        ("num_kv_chunks", int32),
        ("is_kv_split", int32),
    ]


FUNCTIONS: dict[str, tuple[Any, Sequence[Any]]] = {
    "llmsrv_pack": (None, [int32, int32, pointer, ctypes.c_int64, int32, int32, int32, pointer]),
    "llmsrv_forward": (None, [pointer, pointer]),
    "llmsrv_embed": (None, [pointer, int32]),
    "llmsrv_sample": (None, [pointer, pointer]),
    "llmsrv_sample_scratch_bytes": (ctypes.c_int64, [int32]),
    "llmsrv_kv_head_bytes": (ctypes.c_int64, [int32]),
    "llmsrv_prepare": (int32, []),
    "llmsrv_tile_words": (int32, [int32]),
    "llmsrv_group_bytes": (ctypes.c_int64, [int32, int32]),
    "llmsrv_scratch_floats": (ctypes.c_int64, [int32, int32, int32]),
    "llmsrv_start_threads": (pointer, [int32]),
    "llmsrv_stop_threads": (None, [pointer]),
    "llmsrv_allocate": (pointer, [ctypes.c_int64, int32]),
    "llmsrv_prefault": (None, [pointer, ctypes.c_int64]),
    "llmsrv_free": (None, [pointer, ctypes.c_int64]),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the argument and result types of the library's functions."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Memory:
    """Allocates zeroed arrays at fixed addresses; an array is freed when its last view is gone."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def array(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, wants_huge_pages: bool = False
    ) -> Array:
        """Raises StartupError if the system has too little memory."""
        dtype = np.dtype(dtype)
        size = -(-max(prod(shape) * dtype.itemsize, 1) // PAGE) * PAGE
        address = self._library.llmsrv_allocate(size, wants_huge_pages)
        if not address:
            raise StartupError(f"there is no memory for {size >> 20} MiB; choose a smaller model")
        owner = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(owner, self._library.llmsrv_free, address, size)
        bytes_: Array = np.frombuffer(memoryview(owner), np.uint8)
        return bytes_[: prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def address_of(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def drop_pages(data: Array) -> None:
    """Lets the system drop the pages of a mapped file that hold `data`, and those that read-ahead
    mapped around them; they are read again on the next access.  A no-op for other arrays."""
    base: Any = data
    while isinstance(base, np.ndarray):
        base = base.base
    mapping = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = address_of(data) - address_of(np.frombuffer(mapping, np.uint8))
    end = min(start + data.nbytes + HUGE_PAGE_BYTES, len(mapping)) // mmap.PAGESIZE * mmap.PAGESIZE
    first = -(-max(start - HUGE_PAGE_BYTES, 0) // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > first:
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
