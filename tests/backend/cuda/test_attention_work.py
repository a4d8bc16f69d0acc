"""The work lists of attention: every row is computed once, in splits and passes within limits."""

import numpy as np
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.attention_work import MAX_DECODE_ROWS
from llmsrv.backend.cuda.attention_work import AttentionWork
from llmsrv.backend.cuda.attention_work import splits_of_blocks
from llmsrv.backend.cuda.step import array_specs
from llmsrv.backend.cuda.step import block_table_spec
from llmsrv.backend.cuda.step import write_batch
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from tests.support.plans import Piece
from tests.support.plans import batch_of

LIMITS = Limits(max_rows=700, max_logit_rows=40, max_slots=40, num_blocks=400)
WINDOW = 100
PROGRAM = Program(
    (Attention("", "", 0, 1.0), Attention("", "", 1, 1.0, WINDOW), Pool("", "", "mean")),
    {}, 2, 8, 2, 64, 97,
)
TILE_ROWS = 32


def piece(count, start):
    return Piece([0] * count, start, list(range(1, 2 + (start + count) // BLOCK_SIZE)))


pieces = st.builds(piece, st.integers(1, 100), st.integers(0, 6000))


@settings(max_examples=25, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=7), st.booleans(), st.booleans())
def test_every_row_is_computed_once(some, is_decode, is_batch_invariant):
    batch = batch_of(some)
    num_rows = len(batch.ids)
    work, host = planned(batch, num_rows, is_decode, is_batch_invariant)
    tiles = host["tiles"][: work.num_tiles]
    in_tiles = [np.arange(first, first + count) for first, count in tiles]
    for rows in in_tiles:
        assert 1 <= len(rows) <= TILE_ROWS
        assert len(set(batch.sequences[rows])) == 1
    if is_decode or is_batch_invariant:
        assert not in_tiles
    for index in range(2):
        passes = host[f"passes_{index}"][: work.num_passes[index]]
        decode_rows = host[f"decode_rows_{index}"][: passes[-1, 1] if len(passes) else 0]
        computed = np.concatenate([decode_rows[:, 0], *in_tiles])
        np.testing.assert_array_equal(np.sort(computed), np.arange(num_rows))
        check_splits(work, index, passes, decode_rows, host)
    lengths = {sequence: int(np.sum(batch.sequences == sequence)) for sequence in batch.sequences}
    for rows in in_tiles:
        assert lengths[batch.sequences[rows[0]]] > MAX_DECODE_ROWS
    firsts = [batch.sequences.tolist().index(batch.sequences[row]) for row in batch.logit_rows]
    assert host["first_rows"][: len(firsts)].tolist() == firsts


def planned(batch, num_rows, is_decode, is_batch_invariant):
    work = AttentionWork(PROGRAM, LIMITS, TILE_ROWS, is_batch_invariant)
    specs = array_specs(LIMITS) | work.arrays() | {"block_tables": block_table_spec(LIMITS)}
    host = {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
    write_batch(host, batch, num_rows)
    work.plan(batch, host, num_rows, is_decode)
    return work, host


def check_splits(work, index, passes, decode_rows, host):
    """A row's splits follow those of the row before; a pass takes up where the last one ended."""
    next_split = 0
    for row, sequence, position, first_split, num_splits in decode_rows[:, :5].tolist():
        assert first_split == next_split
        next_split += num_splits
        assert (sequence, position) == (host["sequences"][row], host["positions"][row])
        first = max(position + 1 - WINDOW, 0) if work.windows[index] else 0
        num_blocks = position // BLOCK_SIZE + 1 - first // BLOCK_SIZE
        assert num_splits == splits_of_blocks(num_blocks, 128)[-1]
    next_row = next_split = 0
    for first, end, split, end_split in passes.tolist():
        assert (first, split) == (next_row, next_split)
        assert split == decode_rows[first, 3]
        assert 1 <= end_split - split <= work.pass_splits
        next_row, next_split = end, end_split
    assert next_split == decode_rows[:, 4].sum()


def test_a_row_has_a_bounded_number_of_splits_of_at_least_four_blocks():
    splits = splits_of_blocks(10_000, 32)
    assert splits[:13].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert splits[128] == 32
    assert splits[129] == 17
    assert splits.max() == 32
