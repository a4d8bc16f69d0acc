"""A Plan without a model: the next token is a function of all tokens before it.

Its KV cache holds token ids, which it reads back through the block tables.  So a wrong block, a
wrong position, or a block that two sequences share by mistake shows as a wrong token.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.kv_blocks import check_blocks
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingTable

VOCAB_SIZE = 50
NAN_ID = 49  # a sequence that ends with this id has no usable logits


def next_id(ids: Sequence[int], seed: int, choice: int, position: int) -> int:
    """The id that the fake samples after `ids`; greedy if seed is 0.

    Most outputs repeat their last five tokens; about one id in 1000 is NAN_ID.
    """
    draw = (seed, choice, position) if seed else ()
    number = zlib.crc32(repr((list(ids), draw)).encode())
    if number % 997 == 0:
        return NAN_ID
    return (ids[-5] if len(ids) >= 5 and number % 8 else number) % NAN_ID


class FakePlan(Plan):
    """Checks every batch against the contract in backend/base.py, and counts the forwards."""

    def __init__(self, limits: Limits) -> None:
        self.sampling = SamplingTable(limits.max_slots, VOCAB_SIZE)
        self.kv_layout = "fake: token ids"
        self.num_forwards = 0
        self._limits = limits
        self._cache = np.full(limits.num_blocks * BLOCK_SIZE, -1, np.int32)
        self._logit_ids: list[list[int]] = []  # for each logit row, its sequence up to that row

    def forward(self, batch: Batch) -> None:
        self.num_forwards += 1
        assert 0 < len(batch.ids) <= self._limits.max_rows
        assert len(batch.logit_rows) <= self._limits.max_logit_rows
        _check_types(batch)
        assert (np.diff(batch.sequences) >= 0).all() and (np.diff(batch.logit_rows) > 0).all()
        for row, sequence in enumerate(batch.sequences.tolist()):
            position = int(batch.positions[row])
            if row and batch.sequences[row - 1] == sequence:
                assert position == batch.positions[row - 1] + 1
            block = int(batch.block_tables[sequence, position // BLOCK_SIZE])
            assert 0 < block < self._limits.num_blocks
            assert batch.slot_mapping[row] == block * BLOCK_SIZE + position % BLOCK_SIZE
        self._cache[batch.slot_mapping] = batch.ids
        self._logit_ids = [self._ids_up_to(batch, row) for row in batch.logit_rows.tolist()]

    def read(self, name: str) -> Array:
        raise KeyError(f"a fake plan has no buffer {name}")

    def read_blocks(self, blocks: Sequence[int]) -> Array:
        return self._cache.reshape(-1, BLOCK_SIZE)[list(blocks)].view(np.uint8)

    def write_blocks(self, blocks: Sequence[int], data: Array) -> None:
        check_blocks(data, len(blocks), BLOCK_SIZE * 4)
        self._cache.reshape(-1, BLOCK_SIZE)[list(blocks)] = data.view(np.int32)

    def copy_block(self, source: int, target: int) -> None:
        assert 0 < source < self._limits.num_blocks and 0 < target < self._limits.num_blocks
        cache = self._cache.reshape(-1, BLOCK_SIZE)
        cache[target] = cache[source]

    def _ids_up_to(self, batch: Batch, row: int) -> list[int]:
        places = np.arange(batch.positions[row] + 1)
        blocks = batch.block_tables[batch.sequences[row], places // BLOCK_SIZE].astype(np.int64)
        ids: list[int] = self._cache[blocks * BLOCK_SIZE + places % BLOCK_SIZE].tolist()
        return ids

    def sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> Samples:
        assert len(slots) == len(output_positions) == len(self._logit_ids)
        targets = np.full(len(slots), -1) if targets is None else targets
        drafts = np.full(len(slots), -1) if drafts is None else drafts
        drawn = targets < 0
        self._check_drafts(slots[drawn], drafts[drawn], np.flatnonzero(drawn))
        ids = np.full(len(slots), FAILED, np.int32)
        logprobs = np.full(len(slots), np.nan, np.float32)
        ranks = np.zeros(len(slots), np.int32)
        alternatives = []
        for row, (slot, known) in enumerate(zip(slots.tolist(), self._logit_ids, strict=True)):
            parameters = self.sampling.parameters[slot]
            if targets[row] >= 0:
                ids[row] = targets[row]
            elif known[-1] != NAN_ID:
                seed = int(parameters["seed"]) if parameters["temperature"] else 0
                choice, position = int(parameters["choice"]), int(output_positions[row])
                ids[row] = next_id(known, seed, choice, position)
            k = int(parameters["num_logprobs"])
            if k >= 0:
                logprobs[row], ranks[row] = -0.5, 1
            others = np.arange(max(k, 0), dtype=np.int32)
            alternatives.append((others, -1.0 - others.astype(np.float32)))
        return Samples(ids, logprobs, ranks, alternatives)

    def _check_drafts(self, slots: Array, drafts: Array, rows: Array) -> None:
        """Each slot's first row follows a sampled token, its other rows follow the drafts."""
        is_first = np.ones(len(slots), np.bool_)
        is_first[1:] = slots[1:] != slots[:-1]
        assert len(set(slots[is_first].tolist())) == is_first.sum()
        assert ((drafts < 0) == is_first).all()
        stands_on = np.array([self._logit_ids[row][-1] for row in rows.tolist()])
        assert (drafts[~is_first] == stands_on[~is_first]).all()


def _check_types(batch: Batch) -> None:
    for array in (batch.ids, batch.positions, batch.sequences, batch.block_tables):
        assert array.dtype == np.int32
    assert batch.logit_rows.dtype == np.int32 and batch.slot_mapping.dtype == np.int64
    assert (batch.ids >= 0).all()
