"""Builds the arrays of a backend's Batch from the rows of a step."""

from typing import NamedTuple

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.engine.kv_cache import num_blocks_for
from llmsrv.engine.sequence import Sequence


class Rows(NamedTuple):
    """Consecutive rows of one sequence.

    first           position of the first row
    ids             token ids, one per row
    num_logit_rows  how many of the last rows are logit rows
    """

    sequence: Sequence
    first: int
    ids: list[int]
    num_logit_rows: int


def build_batch(rows: list[Rows], block_tables: Array) -> Batch:
    """The rows of several sequences as one batch, in the same order.

    block_tables  [max_num_sequence, max_blocks] int32, the block tables of all slots (KVCache)
    """
    # Lists, not arrays: a decode step has few rows, and numpy calls are slow with a cold cache.
    ids: list[int] = []
    positions: list[int] = []
    sequences: list[int] = []
    slot_mapping: list[int] = []
    logit_rows: list[int] = []
    for number, (sequence, first, new_ids, num_logit_rows) in enumerate(rows):
        end = first + len(new_ids)
        ids += new_ids
        positions += range(first, end)
        sequences += [number] * len(new_ids)
        slot_mapping += _slot_mapping(block_tables[sequence.slot], first, end)
        logit_rows += range(len(ids) - num_logit_rows, len(ids))
    slots = [each.sequence.slot for each in rows]
    return Batch(
        ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        sequences=np.array(sequences, np.int32),
        slot_mapping=np.array(slot_mapping, np.int64),
        block_tables=block_tables[slots, : num_blocks_for(max(positions) + 1)],
        is_long=np.array([each.sequence.is_long for each in rows]),
        logit_rows=np.array(logit_rows, np.int32),
    )


def _slot_mapping(block_table: Array, first: int, end: int) -> list[int]:
    """Where the keys and values of the positions [first, end) of a sequence are stored."""
    blocks: list[int] = block_table[first // BLOCK_SIZE : num_blocks_for(end)].tolist()
    mapping = [block * BLOCK_SIZE + offset for block in blocks for offset in range(BLOCK_SIZE)]
    return mapping[first % BLOCK_SIZE :][: end - first]
