"""Which block of the KV cache holds which positions of which sequence.

The cache is cut into blocks of BLOCK_SIZE positions, and a sequence takes blocks as it grows, any
that are free, so nothing is reserved and nothing is fragmented (Kwon et al. 2023, section 4).  The
keys and values themselves are the backend's; here are only numbers.  Index ranges, half open:

    block     [0, num_blocks)                block 0 is never handed out: padding points at it
    slot      [0, max_num_sequence)          a running sequence's line in block_tables
    position  [0, context_length)            of a token in its sequence
    line      [0, num_blocks * BLOCK_SIZE)   block * BLOCK_SIZE + position % BLOCK_SIZE

A full block is a function of the tokens in it and of all before them, so it is remembered by what
it stands for (a Page: a hash chained from the sequence's first block on) and shared by every
sequence that begins with those tokens, while they run and after.  A block is at any time

    free       nobody's; its content means nothing
    held       in the tables of one slot or more
    remembered held by nobody, but known: taken up again by its page, or, when no block is free,
               forgotten and handed out, the one that was let go longest ago first

Always: num_free + num_used == num_total, where num_free counts the remembered ones too.
"""

import hashlib
import secrets
from array import array
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE


def num_blocks_for(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


class Page(NamedTuple):
    """What a full block stands for: the hash of all tokens up to its end, and its own tokens."""

    key: bytes
    tokens: bytes


class Pages:
    """The pages of one sequence, made as its tokens come.

    salt  sequences of different salts share nothing
    """

    # A client that knew the key could look for two prompts of one hash; so nobody does.
    _secret = secrets.token_bytes(32)

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._pages: list[Page] = []

    def upto(self, num_pages: int, ids: Callable[[int, int], Sequence[int]]) -> list[Page]:
        """The first pages; `ids(start, stop)` are the sequence's tokens at those positions."""
        while len(self._pages) < num_pages:
            start = len(self._pages) * BLOCK_SIZE
            tokens = array("i", ids(start, start + BLOCK_SIZE)).tobytes()
            before = self._pages[-1].key if self._pages else self._salt
            digest = hashlib.blake2b(before + tokens, digest_size=16, key=self._secret)
            self._pages.append(Page(digest.digest(), tokens))
        return self._pages[:num_pages]


class KVCache:
    """The block tables of the running sequences, the free blocks, and the remembered ones.

    block_tables  [max_num_sequence, max_blocks] int32: the blocks of the sequence in each slot in
                  the order of its positions; 0 beyond the last
    """

    def __init__(self, num_blocks: int, max_num_sequence: int, context_length: int) -> None:
        self.num_total = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # the lowest is handed out first
        self._num_holders = [0] * num_blocks
        self._num_blocks = [0] * max_num_sequence  # of each slot
        max_blocks = num_blocks_for(context_length)
        self.block_tables = np.zeros((max_num_sequence, max_blocks), np.int32)

        self._block_of: dict[bytes, int] = {}  # by the key of its page
        self._page_of: dict[int, Page] = {}
        self._remembered: dict[int, None] = {}  # held by nobody; let go longest ago first

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._remembered)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    def grow(self, slot: int, num_positions: int) -> bool:
        """Gives the slot blocks for so many positions; False, and nothing changes, when too few are
        free."""
        num_held = self._num_blocks[slot]
        num_new = num_blocks_for(num_positions) - num_held
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            self._hold(slot, self._take_free())
        return True

    def find(self, pages: Sequence[Page]) -> list[int]:
        """The blocks of the longest run of pages that is known; they may be adopted at once."""
        blocks = []
        for page in pages:
            block = self._block_of.get(page.key)
            if block is None or self._page_of[block] != page:
                break
            blocks.append(block)
        return blocks

    def num_taken_by(self, blocks: Sequence[int]) -> int:
        """How many fewer blocks would be free if these were adopted."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def adopt(self, slot: int, blocks: Sequence[int]) -> None:
        """Gives an empty slot known blocks as its first ones."""
        assert self._num_blocks[slot] == 0
        for block in blocks:
            self._remembered.pop(block, None)
            self._hold(slot, block)

    def remember(self, slot: int, pages: Sequence[Page]) -> None:
        """Makes known what the slot's first blocks stand for, once they are computed."""
        for index in range(len(pages) - 1, -1, -1):
            block = int(self.block_tables[slot, index])
            if block in self._page_of:
                return  # and so are all before it
            if pages[index].key not in self._block_of:  # else another block has that content
                self._block_of[pages[index].key] = block
                self._page_of[block] = pages[index]

    def release(self, slot: int) -> None:
        """Lets every block of the slot go, the last first: an ending is worth less than what all
        conversations begin with."""
        num_held = self._num_blocks[slot]
        for block in self.block_tables[slot, :num_held][::-1].tolist():
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0 and block in self._page_of:
                self._remembered[block] = None
            elif self._num_holders[block] == 0:
                self._free.append(block)
        self.block_tables[slot, :num_held] = 0
        self._num_blocks[slot] = 0

    def _hold(self, slot: int, block: int) -> None:
        self._num_holders[block] += 1
        self.block_tables[slot, self._num_blocks[slot]] = block
        self._num_blocks[slot] += 1

    def _take_free(self) -> int:
        if self._free:
            return self._free.pop()
        block = next(iter(self._remembered))
        del self._remembered[block]
        del self._block_of[self._page_of.pop(block).key]
        return block
