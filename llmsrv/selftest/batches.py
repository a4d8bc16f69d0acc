"""Batches for programs that run without an engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one sequence.

    ids         of the rows
    start       position of the first
    blocks      of the sequence's KV cache, from position 0
    logit_rows  how many rows at the end are logit rows
    is_long     as in Batch
    """

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    logit_rows: int = 1
    is_long: bool = False


def prompt(num_rows: int, logit_rows: int = 1) -> list[Piece]:
    """One sequence from its start; row r has the id r."""
    return [Piece(range(num_rows), 0, range(1, 2 + num_rows // BLOCK_SIZE), logit_rows)]


def batch_of(pieces: Sequence[Piece]) -> Batch:
    lengths = [len(piece.ids) for piece in pieces]
    positions = np.concatenate([piece.start + np.arange(len(piece.ids)) for piece in pieces])
    sequences = np.repeat(np.arange(len(pieces)), lengths)
    tables = np.zeros((len(pieces), max(len(piece.blocks) for piece in pieces)), np.int32)
    for table, piece in zip(tables, pieces):
        table[: len(piece.blocks)] = piece.blocks
    slots = tables[sequences, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
    ends = np.cumsum(lengths)
    logit_rows = [np.arange(end - piece.logit_rows, end) for end, piece in zip(ends, pieces)]
    return Batch(
        ids=np.concatenate([np.asarray(piece.ids, np.int32) for piece in pieces]),
        positions=positions.astype(np.int32),
        sequences=sequences.astype(np.int32),
        slot_mapping=slots + positions % BLOCK_SIZE,
        block_tables=tables,
        is_long=np.array([piece.is_long for piece in pieces]),
        logit_rows=np.concatenate(logit_rows).astype(np.int32),
    )
