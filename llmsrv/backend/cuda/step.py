"""A step on the device: the arrays of its batch, and the rows that pad it to the size of a graph.

A padded row computes garbage that no one reads.  It has id 0 and position 0, belongs to a sequence
after the last with a block table of zeros, and is stored in block 0, which is never allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.staging import Spec

MAX_GRAPH_ROWS = 256  # beyond, launches take a small part of a step's time


@dataclass(frozen=True)
class Step:
    """What launchers need to know.

    device          the arrays of the step by name (array_specs), which never move
    num_rows        with padded rows, num_logit_rows too
    is_decode       all rows are logit rows, and few: a captured graph may run the step, so what is
                    launched must depend on num_rows alone
    """

    device: Mapping[str, Any]
    num_rows: int
    num_logit_rows: int
    is_decode: bool


def padded(num_rows: int) -> int:
    """The number of rows that a decode step is padded to."""
    if num_rows <= 8:
        return 1 << (num_rows - 1).bit_length()
    unit = 8 if num_rows <= 32 else 16 if num_rows <= 64 else 32
    return -(-num_rows // unit) * unit


def graph_sizes(limits: Limits) -> list[int]:
    """The padded sizes of all decode steps within the limits."""
    most = min(limits.max_rows, limits.max_logit_rows, MAX_GRAPH_ROWS)
    return sorted({padded(num_rows) for num_rows in range(1, most + 1)})


def row_capacity(limits: Limits) -> int:
    """The rows of a buffer: the largest step, or the largest padded one."""
    return max(limits.max_rows, *graph_sizes(limits))


def logit_row_capacity(limits: Limits) -> int:
    return max(limits.max_logit_rows, *graph_sizes(limits))


def array_specs(limits: Limits) -> dict[str, Spec]:
    """The arrays of a step; R rows are logit rows, and S sequences end with the padded rows' own.

    sizes         [1] int32: max_blocks, the width of block_tables in this step
    ids, positions, sequences    [rows] int32, see Batch
    slot_mapping  [rows] int64
    is_long       [S] int32
    logit_rows    [R] int32
    """
    rows = (row_capacity(limits),)
    return {
        "sizes": ((1,), np.int32),
        "ids": (rows, np.int32),
        "positions": (rows, np.int32),
        "sequences": (rows, np.int32),
        "slot_mapping": (rows, np.int64),
        "is_long": ((limits.max_slots + 1,), np.int32),
        "logit_rows": ((logit_row_capacity(limits),), np.int32),
    }


def block_table_spec(limits: Limits) -> Spec:
    """block_tables [S * max_blocks] int32: sequence s begins at s * max_blocks."""
    return ((limits.max_slots + 1) * limits.num_blocks,), np.int32


def write_batch(host: Mapping[str, Any], batch: Batch, num_rows: int) -> int:
    """Writes the batch and its padded rows to the host arrays.

    num_rows  with padded rows
    Returns the number of elements of block_tables that are in use.
    """
    count, num_logit_rows = len(batch.ids), len(batch.logit_rows)
    num_sequences, max_blocks = batch.block_tables.shape
    host["sizes"][0] = max_blocks
    for name in ("ids", "positions", "sequences", "slot_mapping"):
        host[name][:count] = getattr(batch, name)
    host["is_long"][:num_sequences] = batch.is_long
    host["logit_rows"][:num_logit_rows] = batch.logit_rows
    tables = host["block_tables"][: (num_sequences + 1) * max_blocks]
    tables[: num_sequences * max_blocks] = batch.block_tables.reshape(-1)
    if num_rows > count:
        rows = np.arange(count, num_rows)
        host["ids"][count:num_rows] = 0
        host["positions"][count:num_rows] = 0
        host["sequences"][count:num_rows] = num_sequences
        host["slot_mapping"][count:num_rows] = rows % BLOCK_SIZE
        host["logit_rows"][count:num_rows] = rows
        host["is_long"][num_sequences] = 0
        tables[num_sequences * max_blocks :] = 0
    return len(tables)
