"""Which block of the KV cache holds which positions of which sequence.

The cache is cut into blocks of BLOCK_SIZE positions, and a sequence takes blocks as it grows, any
that are free, so nothing is reserved and nothing is fragmented (Kwon et al. 2023, section 4).  The
keys and values themselves are the backend's; here are only numbers.  Index ranges, half open:

    position      [0, context_length)           of a token in its sequence
    block         [0, num_blocks)               block 0 is never handed out: padding points at it
    slot          [0, max_num_sequence)         a running sequence's row of block_tables
    slot_mapping  [0, num_blocks * BLOCK_SIZE)  block * BLOCK_SIZE + position % BLOCK_SIZE

Always: num_free + num_used == num_total.
"""

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE


def num_blocks_for(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


class KVCache:
    """The block tables of the running sequences and the list of free blocks.

    block_tables  [max_num_sequence, max_blocks] int32: the blocks of the sequence in each slot in
                  the order of its positions; 0 beyond the last
    """

    def __init__(self, num_blocks: int, max_num_sequence: int, context_length: int) -> None:
        self.num_total = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # the lowest is handed out first
        self._num_blocks = [0] * max_num_sequence  # of each slot
        max_blocks = num_blocks_for(context_length)
        self.block_tables = np.zeros((max_num_sequence, max_blocks), np.int32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return sum(self._num_blocks)

    def grow(self, slot: int, num_positions: int) -> bool:
        """Gives the slot blocks for so many positions; False, and nothing changes, when too few are
        free."""
        num_held = self._num_blocks[slot]
        num_needed = max(num_held, num_blocks_for(num_positions))
        if num_needed - num_held > len(self._free):
            return False
        for index in range(num_held, num_needed):
            self.block_tables[slot, index] = self._free.pop()
        self._num_blocks[slot] = num_needed
        return True

    def release(self, slot: int) -> None:
        """Takes every block of the slot back."""
        num_held = self._num_blocks[slot]
        self._free.extend(self.block_tables[slot, :num_held][::-1].tolist())
        self.block_tables[slot, :num_held] = 0
        self._num_blocks[slot] = 0
