"""Maps the positions of every sequence to blocks of the KV cache.

The cache is divided into blocks of BLOCK_SIZE positions.  A sequence takes any free block when it
grows into a new one, so nothing is reserved and nothing is fragmented (Kwon et al. 2023,
section 4).  This module only does the bookkeeping; the keys and values belong to the backend.
Index ranges, half open:

    block         [0, num_blocks)               block 0 is never handed out: padding points at it
    slot          [0, max_num_sequence)         a running sequence's row in block_tables
    position      [0, context_length)           of a token in its sequence
    slot_mapping  [0, num_blocks * BLOCK_SIZE)  block * BLOCK_SIZE + position % BLOCK_SIZE

The content of a full block depends only on its tokens and on all tokens before them.  So a full
block is cached under a hash that is chained from the sequence's first block on (BlockHash).  Every
sequence that starts with the same tokens shares it, even after the first one has ended.  A block is
always in one of three states:

    free      in no block table, and not cached; its content is meaningless
    used      in the block tables of at least one slot; it may be cached as well
    evictable in no block table, but cached: the prefix cache can still find it by its hash.  If no
              block is free, the evictable block that was released first is evicted and reused

Partly matching blocks are useful too.  When a cached block starts with the tokens that follow a
sequence's cached blocks, its leading positions can be copied.  Nearly all prompts end within a
block, or diverge from a cached prefix within one, so this saves up to 15 tokens.  That is why the
last, partial block of a sequence is cached as well when the sequence ends.

Invariant: num_free + num_used == num_total, where num_free includes the evictable blocks.
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


class BlockHash(NamedTuple):
    """Identifies the content of a block: full, or partial if it is the last of its sequence.

    key     hash of all tokens of the sequence up to the end of the block
    tokens  the block's own tokens, int32
    parent  key of the block before it, or the salt for the first block
    """

    key: bytes
    tokens: bytes
    parent: bytes

    @property
    def start(self) -> tuple[bytes, bytes]:
        """Identifies everything before the block and its first token."""
        return self.parent, self.tokens[:ID_BYTES]


class BlockHashes:
    """The block hashes of one sequence, computed as its tokens arrive.

    salt  sequences with different salts share nothing
    """

    # The hash is keyed with a secret, so that a client cannot search for two prompts that collide.
    _secret = secrets.token_bytes(32)

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._hashes: list[BlockHash] = []

    def full(self, num_blocks: int, ids: Callable[[int, int], Sequence[int]]) -> list[BlockHash]:
        """The hashes of the first num_blocks blocks, all full.

        `ids(start, stop)` returns the sequence's tokens at those positions.
        """
        while len(self._hashes) < num_blocks:
            index = len(self._hashes)
            self._hashes.append(self._hash(index, (index + 1) * BLOCK_SIZE, ids))
        return self._hashes[:num_blocks]

    def partial(self, index: int, stop: int, ids: Callable[[int, int], Sequence[int]]) -> BlockHash:
        """The hash of block `index` if the sequence ended at position `stop`."""
        self.full(index, ids)
        return self._hash(index, stop, ids)

    def _hash(self, index: int, stop: int, ids: Callable[[int, int], Sequence[int]]) -> BlockHash:
        tokens = array("i", ids(index * BLOCK_SIZE, stop)).tobytes()
        parent = self._hashes[index - 1].key if index else self._salt
        digest = hashlib.blake2b(parent + tokens, digest_size=16, key=self._secret)
        return BlockHash(digest.digest(), tokens, parent)


class KVCache:
    """The block tables of the running sequences, the free blocks and the prefix cache.

    block_tables  [max_num_sequence, max_blocks] int32: row s holds the blocks of the sequence in
                  slot s in the order of its positions, then zeros
    """

    def __init__(self, num_blocks: int, max_num_sequence: int, context_length: int) -> None:
        self.num_total = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # the lowest is handed out first
        self._ref_counts = [0] * num_blocks  # in how many block tables each block is
        self._num_blocks = [0] * max_num_sequence  # of each slot
        max_blocks = num_blocks_for(context_length)
        self.block_tables = np.zeros((max_num_sequence, max_blocks), np.int32)

        # The prefix cache
        self._block_of: dict[bytes, int] = {}  # by the key of its hash
        self._hash_of: dict[int, BlockHash] = {}
        self._latest: dict[tuple[bytes, bytes], int] = {}  # latest block for BlockHash.start
        self._evictable: dict[int, None] = {}  # in the order of their release

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    def allocate(self, slot: int, num_positions: int) -> bool:
        """Extends the slot's block table to num_positions positions.

        Returns False, and changes nothing, if there are not enough free blocks.
        """
        num_new = num_blocks_for(num_positions) - self._num_blocks[slot]
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            self._append_block(slot, self._pop_free_block())
        return True

    def find_cached_blocks(self, block_hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest cached prefix.  Attach them before the next allocation."""
        blocks = []
        for block_hash in block_hashes:
            block = self._block_of.get(block_hash.key)
            if block is None or self._hash_of[block] != block_hash:
                break
            blocks.append(block)
        return blocks

    def find_partial_block(self, block_hash: BlockHash) -> tuple[int, int]:
        """A cached block that starts with the same tokens, and how many are the same.

        They may be copied from there until the next forward pass.  Returns (0, 0) if there is none.
        """
        block = self._latest.get(block_hash.start)
        if block is None:
            return 0, 0
        same = os.path.commonprefix([self._hash_of[block].tokens, block_hash.tokens])
        return block, len(same) // ID_BYTES

    def num_evictable(self, blocks: Sequence[int]) -> int:
        """How many of these cached blocks count as free now, and would not once attached."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def attach_cached_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """Makes cached blocks the first blocks of an empty slot."""
        assert self._num_blocks[slot] == 0
        for block in blocks:
            self._evictable.pop(block, None)
            self._append_block(slot, block)

    def cache_blocks(self, slot: int, block_hashes: Sequence[BlockHash]) -> None:
        """Caches the slot's first blocks under these hashes; their positions must be computed.

        A partial block must be the last one that the slot will ever hold.
        """
        for index in range(len(block_hashes) - 1, -1, -1):
            block = int(self.block_tables[slot, index])
            if block in self._hash_of:
                return  # and so are all blocks before it
            if block_hashes[index].key not in self._block_of:  # else another block has the content
                self._block_of[block_hashes[index].key] = block
                self._hash_of[block] = block_hashes[index]
                self._latest[block_hashes[index].start] = block

    def free(self, slot: int) -> None:
        """Releases every block of the slot.

        The last block is released first, and so evicted first: the end of one conversation is worth
        less than the beginning that many conversations share.
        """
        num_blocks = self._num_blocks[slot]
        for block in self.block_tables[slot, :num_blocks][::-1].tolist():
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0 and block in self._hash_of:
                self._evictable[block] = None
            elif self._ref_counts[block] == 0:
                self._free.append(block)
        self.block_tables[slot, :num_blocks] = 0
        self._num_blocks[slot] = 0

    def _append_block(self, slot: int, block: int) -> None:
        self._ref_counts[block] += 1
        self.block_tables[slot, self._num_blocks[slot]] = block
        self._num_blocks[slot] += 1

    def _pop_free_block(self) -> int:
        return self._free.pop() if self._free else self._evict()

    def _evict(self) -> int:
        block = next(iter(self._evictable))
        del self._evictable[block]
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash.key]
        if self._latest.get(block_hash.start) == block:
            del self._latest[block_hash.start]
        return block
