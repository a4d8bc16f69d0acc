"""From the chunks of a step to the arrays that a backend takes."""

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Array
from llmsrv.backend.base import Batch
from llmsrv.engine.kv_cache import num_blocks_for
from llmsrv.engine.scheduler import Chunk


def build_batch(chunks: list[Chunk], block_tables: Array) -> Batch:
    """The rows of the chunks, in their order; the last num_logit_rows of each chunk are logit rows.

    block_tables  [max_num_sequence, max_blocks] int32, of every slot, as KVCache has them
    """
    ids: list[int] = []
    for sequence, num_tokens, draft in chunks:
        ids += sequence.ids(sequence.num_computed, sequence.num_computed + num_tokens)
        ids += draft
    counts = np.array([chunk.num_rows for chunk in chunks])  # [S]
    firsts = np.array([chunk.sequence.num_computed for chunk in chunks])  # [S]
    slots = np.array([chunk.sequence.slot for chunk in chunks])  # [S]
    wanted = np.array([chunk.num_logit_rows for chunk in chunks])  # [S], the last rows of each
    ends = counts.cumsum()  # [S]

    sequences = np.arange(len(chunks), dtype=np.int32).repeat(counts)  # [T]
    positions = np.arange(len(ids)) + (firsts + counts - ends).repeat(counts)  # [T]
    tables = block_tables[slots, : num_blocks_for(int((firsts + counts).max()))]
    blocks = tables[sequences, positions // BLOCK_SIZE].astype(np.int64)  # [T]
    return Batch(
        ids=np.array(ids, np.int32),
        positions=positions.astype(np.int32),
        sequences=sequences,
        slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=tables,
        is_long=np.array([chunk.sequence.is_long for chunk in chunks]),
        logit_rows=np.flatnonzero(
            np.arange(len(ids)) >= (ends - wanted).repeat(counts)
        ).astype(np.int32),
    )
