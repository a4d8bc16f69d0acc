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

Of a block that begins as a sequence goes on the beginning can be copied: nearly all prompts end, or
leave a known one, within a block, and so up to 15 tokens more need not be computed.  That is why
what a sequence leaves in its last block is remembered, too.

Always: num_free + num_used == num_total, where num_free counts the remembered ones too.
"""

import hashlib
import os.path
import secrets
from array import array
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE


ID_BYTES = array("i").itemsize


def num_blocks_for(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


class Page(NamedTuple):
    """What a block stands for, which is full unless nobody goes on with it.

    key     a hash of all tokens up to its end
    tokens  its own, int32
    before  the key of the page before it, or the salt
    """

    key: bytes
    tokens: bytes
    before: bytes

    @property
    def beginning(self) -> tuple[bytes, bytes]:
        """All that comes before, and the first token."""
        return self.before, self.tokens[:ID_BYTES]


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
            index = len(self._pages)
            self._pages.append(self._page(index, (index + 1) * BLOCK_SIZE, ids))
        return self._pages[:num_pages]

    def part(self, index: int, stop: int, ids: Callable[[int, int], Sequence[int]]) -> Page:
        """The page behind the first `index` ones, which ends at the position `stop`."""
        self.upto(index, ids)
        return self._page(index, stop, ids)

    def _page(self, index: int, stop: int, ids: Callable[[int, int], Sequence[int]]) -> Page:
        tokens = array("i", ids(index * BLOCK_SIZE, stop)).tobytes()
        before = self._pages[index - 1].key if index else self._salt
        digest = hashlib.blake2b(before + tokens, digest_size=16, key=self._secret)
        return Page(digest.digest(), tokens, before)


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
        self._latest: dict[tuple[bytes, bytes], int] = {}  # by the beginning of its page
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

    def find_beginning(self, page: Page) -> tuple[int, int]:
        """A block that begins as the page does, and how many tokens are the same; they may be
        copied from there until the next forward pass.  (0, 0): there is none."""
        block = self._latest.get(page.beginning)
        if block is None:
            return 0, 0
        same = os.path.commonprefix([self._page_of[block].tokens, page.tokens])
        return block, len(same) // ID_BYTES

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
        """Makes known what the slot's first blocks stand for, once they are computed; a page that
        is not full is the last that the slot will hold."""
        for index in range(len(pages) - 1, -1, -1):
            block = int(self.block_tables[slot, index])
            if block in self._page_of:
                return  # and so are all before it
            if pages[index].key not in self._block_of:  # else another block has that content
                self._block_of[pages[index].key] = block
                self._page_of[block] = pages[index]
                self._latest[pages[index].beginning] = block

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
        page = self._page_of.pop(block)
        del self._block_of[page.key]
        if self._latest.get(page.beginning) == block:
            del self._latest[page.beginning]
        return block
