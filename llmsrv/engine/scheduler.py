"""Which rows the next step computes: continuous batching, in the order of the sequences' ranks.

Sequences in decode take one row each, before anything else, so a long prompt never stops the
running streams, and further rows for drafts (speculation.py); what is left goes to prompts, in
chunks; then sequences are admitted from the queue while slots, blocks and rows last.  A step has
max_rows at most, and so many that its streams stay smooth, by what steps have cost so far
(_num_prefill_rows).  Half of the rows for prompts go to short ones that came after a long one: a
question of a line need not wait until somebody else's document is read.

When a sequence in decode needs a block and none is free, the running sequence of the last rank is
preempted: its blocks are freed, it goes back to the queue, and when it is admitted again its prompt
and its output so far are computed again.  Nothing of an earlier rank is ever preempted before it,
the queue is admitted from its head only, and the KV cache holds at least one sequence of full
length: so the first of all always goes on, and every sequence ends.  (A prompt may pass the head
only while one more than twice as long is computed, which goes on meanwhile: not for ever.)

A sequence is admitted with what is known already of its beginning (kv_cache.py): blocks that it
shares, and one that it gets a copy of.  Its last token is always computed, since its logits are
wanted.

Knows nothing of tokens, sampling or messages.
"""

from bisect import insort
from itertools import islice
from typing import NamedTuple

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.engine.batch import Rows
from llmsrv.engine.fair_queue import by_rank
from llmsrv.engine.fair_queue import FairQueue
from llmsrv.engine.kv_cache import KVCache
from llmsrv.engine.kv_cache import num_blocks_for
from llmsrv.engine.sequence import NO_SLOT
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.sequence import State
from llmsrv.engine.speculation import Speculation
from llmsrv.engine.step_costs import StepCosts

# Whoever comes or leaves waits until a step has ended.
MAX_STEP_S = 1.0
# A step with streams takes so much longer for prompts, as a share of what it takes without.
MAX_PREFILL_SLOWDOWN = 1.0
# A prompt of which more is to be computed is beside so many steps that streams would feel it: half
# as long again on average, so that few take three times as long where others use the cores, too.
LONG_PROMPT_TOKENS = 512
MAX_LONG_PREFILL_SLOWDOWN = 0.5
# Beside prompts drafts make a step so much longer at most: streams feel the prompts as it is.
MAX_DRAFT_SLOWDOWN = 0.25
# Where more prompts wait than streams run, each stream gives way to several, but up to here only.
SMOOTH_STEP_S = 0.04
# Where even decode alone takes that long, prompts get less of it.
MIN_PREFILL_SLOWDOWN = 0.5
# So that prompts get on in any case, beside streams and alone.  Four rows beside one stream make a
# step more than twice as long where rows are dear (AVX2); alone two would not lead to larger steps.
MIN_PREFILL_ROWS_WITH_DECODE, MIN_PREFILL_ROWS_ALONE = 2, 4
# So many positions before a row of a prompt cost about what the row itself does: SmolLM2 on a CPU;
# 300 or 2000 would do as well.  Without it the ends of long prompts make steps far too long.
POSITIONS_PER_ROW_COST = 1000
# So many that wait may overtake the first of them, beside a long prompt.
MAX_OVERTAKERS = 8


class Chunk(NamedTuple):
    """The next num_tokens uncomputed tokens of a sequence, and a draft behind the last of all."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)

    @property
    def work(self) -> int:
        """What it costs, in rows of decode, which are taken to be all the same."""
        num_pairs = (self.num_tokens - 1) * self.sequence.num_computed
        return self.num_rows + num_pairs // POSITIONS_PER_ROW_COST

    @property
    def num_logit_rows(self) -> int:
        if self.sequence.wants_prompt_logprobs:
            return self.num_rows
        is_complete = self.num_tokens == self.sequence.num_uncomputed
        return is_complete + len(self.draft)

    @property
    def rows(self) -> Rows:
        first = self.sequence.num_computed
        ids = self.sequence.ids(first, first + self.num_tokens) + list(self.draft)
        return Rows(self.sequence, first, ids, self.num_logit_rows)


class Scheduler:
    def __init__(
        self,
        kv_cache: KVCache,
        max_num_sequence: int,
        max_rows: int,
        costs: StepCosts,
        speculation: Speculation,
        num_spare_logit_rows: int = 0,
    ) -> None:
        """num_spare_logit_rows: of a step, beside one for each sequence."""
        # Fewer rows than sequences could give decode all of them, and prefill none for ever.
        assert max_rows >= max_num_sequence
        self._kv_cache = kv_cache
        self._max_rows = max_rows
        self._num_spare_logit_rows = num_spare_logit_rows
        self._costs = costs
        self._speculation = speculation
        self._free_slots = list(range(max_num_sequence - 1, -1, -1))
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # by rank
        self.admitted: list[Sequence] = []  # by the last schedule()
        self.copies: list[tuple[int, int]] = []  # blocks, from and to, in order, before the step
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens that were looked up at admission
        self.num_prefix_hits = 0  # and found

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is; its slot and blocks are free at once."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._free_blocks(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.move_to(State.ENDED)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most one a sequence; blocks for all of them are held.

        Empty only when there is no sequence at all.
        """
        self.admitted, self.copies = [], []
        chunks = self._with_drafts(self._schedule_decode())
        budget = self._num_prefill_rows(len(chunks), sum(chunk.num_rows for chunk in chunks))
        spare = self._num_spare_logit_rows - sum(len(chunk.draft) for chunk in chunks)

        def prefill(sequence: Sequence, most: int) -> int:
            nonlocal budget, spare
            most = min(most, 1 + spare) if sequence.wants_prompt_logprobs else most
            chunk = Chunk(sequence, min(most, sequence.num_uncomputed))
            chunks.append(chunk)
            budget -= chunk.num_rows
            spare -= max(0, chunk.num_logit_rows - 1)
            return chunk.num_rows

        short_prompts, left = self._short_prompts() if budget > 1 else [], budget // 2
        for sequence in short_prompts:
            if left:
                left -= prefill(sequence, left)
        for sequence in self.running:
            if budget and sequence.num_uncomputed > 1 and sequence not in short_prompts:
                prefill(sequence, budget)
        while budget and (head := self.waiting.head) and self._admit(head):
            prefill(head, budget)
        return chunks

    def mark_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Notes that the sequence's next num_tokens tokens are in the KV cache, and caches the
        blocks that they fill."""
        num_blocks = sequence.num_cacheable // BLOCK_SIZE
        sequence.num_computed += num_tokens
        if sequence.num_cacheable // BLOCK_SIZE > num_blocks:
            self._cache_full_blocks(sequence)

    def cache_last_block(self, sequence: Sequence) -> None:
        """Caches the block that the last token fills, if that was computed before it was known."""
        if sequence.num_computed == sequence.num_tokens and not sequence.num_tokens % BLOCK_SIZE:
            self._cache_full_blocks(sequence)

    def can_grow_all(self) -> bool:
        """Whether every running sequence can get one more token without a preemption."""
        num_blocks = sum(sequence.num_tokens % BLOCK_SIZE == 0 for sequence in self.running)
        return num_blocks <= self._kv_cache.num_free

    def _cache_full_blocks(self, sequence: Sequence) -> None:
        num_blocks = sequence.num_cacheable // BLOCK_SIZE
        block_hashes = sequence.block_hashes.full(num_blocks, sequence.ids)
        self._kv_cache.cache_blocks(sequence.slot, block_hashes)

    def _num_prefill_rows(self, num_streams: int, num_rows: int) -> int:
        """How many rows the step may have beside these, which are those of the streams."""
        limit_s, least = MAX_STEP_S, float(MIN_PREFILL_ROWS_ALONE)
        first = next((s for s in self.running if s.num_uncomputed > 1), self.waiting.head)
        position = first.num_computed if first else 0

        def rows_within(step_s: float) -> float:
            row_cost = 1 + position / POSITIONS_PER_ROW_COST
            return (self._costs.rows_within(step_s) - num_rows) / row_cost

        if num_streams:
            decode_s = self._costs.of(num_rows)
            num_prompts = self._num_prompts()
            is_long = first is not None and first.num_tokens - first.num_cached > LONG_PROMPT_TOKENS
            share = MAX_LONG_PREFILL_SLOWDOWN if is_long else MAX_PREFILL_SLOWDOWN
            prompts_s = decode_s * share * max(1.0, num_prompts / num_streams)
            prompts_s = min(prompts_s, SMOOTH_STEP_S - decode_s)
            limit_s = decode_s + max(prompts_s, decode_s * MIN_PREFILL_SLOWDOWN)
            # Farther on the first row has to read so much of the cache that others are cheap.
            far = MIN_PREFILL_ROWS_WITH_DECODE * position // POSITIONS_PER_ROW_COST
            least = max(MIN_PREFILL_ROWS_WITH_DECODE, min(far, rows_within(SMOOTH_STEP_S)))
        return int(min(self._max_rows - num_rows, max(rows_within(limit_s), least)))

    def _num_prompts(self) -> int:
        return sum(each.num_uncomputed > 1 for each in self.running) + len(self.waiting)

    def _schedule_decode(self) -> list[Chunk]:
        """By rank; a preemption takes sequences from the end of the list that is walked."""
        chunks = []
        for sequence in self.running:
            if sequence.num_uncomputed == 1 and self._allocate_or_preempt(sequence):
                chunks.append(Chunk(sequence, 1))
        return chunks

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of decode with drafts, as far as there is room that nobody else needs soon."""
        most = min(self._num_spare_logit_rows, self._max_rows - len(chunks))
        if chunks and self._num_prompts():
            longest_s = self._costs.of(len(chunks)) * (1 + MAX_DRAFT_SLOWDOWN)
            most = int(min(most, self._costs.rows_within(longest_s) - len(chunks)))
        if most <= 0 or self._kv_cache.num_free < 2 * len(chunks) + num_blocks_for(most):
            return chunks
        drafts = self._speculation.draft([chunk.sequence for chunk in chunks], most)
        with_drafts = []
        for chunk, draft in zip(chunks, drafts, strict=True):
            self._kv_cache.allocate(chunk.sequence.slot, chunk.sequence.num_tokens + len(draft))
            with_drafts.append(Chunk(*chunk[:2], tuple(draft)))
        return with_drafts

    def _short_prompts(self) -> list[Sequence]:
        """The prompts of which less than half as much is left as of the first one, the shortest
        first; of the queue one is admitted that is one of them."""
        prompts = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        if not prompts:
            return []
        waiting = list(islice(self.waiting, MAX_OVERTAKERS if self._free_slots else 0))
        priority = min(sequence.submit.priority for sequence in prompts[:1] + waiting[:1])
        most_left = prompts[0].num_uncomputed / 2

        def is_short(sequence: Sequence, num_left: int) -> bool:
            return sequence.submit.priority <= priority and num_left < most_left

        for sequence in waiting:
            num_left = sequence.num_tokens - BLOCK_SIZE * len(self._find_cached_blocks(sequence))
            if is_short(sequence, num_left) and self._admit(sequence):
                prompts.append(sequence)
                break
        short = [sequence for sequence in prompts if is_short(sequence, sequence.num_uncomputed)]
        return sorted(short, key=lambda sequence: sequence.num_uncomputed)

    def _allocate_or_preempt(self, sequence: Sequence) -> bool:
        """Gets the block for the sequence's next token; False when it had to give way itself."""
        while not self._kv_cache.allocate(sequence.slot, sequence.num_tokens):
            if self._preempt_last() is sequence:
                return False
        return True

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        self._free_blocks(sequence)
        sequence.move_to(State.WAITING)
        self.waiting.put_back(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        return sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Moves a sequence of the queue to running, when it and all that run have room to go on."""
        if sequence.awaits_leader or not self._free_slots:
            return False
        known = self._find_cached_blocks(sequence)
        # A block to grow into for each that runs already: admitting into the last free blocks
        # would only lead to a preemption, and to computing the same prompt again.
        needed = num_blocks_for(sequence.num_tokens) - len(known) + len(self.running)
        if needed + self._kv_cache.num_evictable(known) > self._kv_cache.num_free:
            return False
        self.waiting.take(sequence)
        source, num_copied = self._find_partial_block(sequence, len(known))
        sequence.move_to(State.RUNNING)
        sequence.slot = self._free_slots.pop()
        self._kv_cache.attach_cached_blocks(sequence.slot, known)
        self._kv_cache.allocate(sequence.slot, sequence.num_tokens)
        if num_copied:
            target = int(self._kv_cache.block_tables[sequence.slot, len(known)])
            self.copies.append((source, target))
        sequence.num_computed = sequence.num_cached = len(known) * BLOCK_SIZE + num_copied
        self.num_prefix_queries += sequence.num_tokens
        self.num_prefix_hits += sequence.num_cached
        insort(self.running, sequence, key=by_rank)
        self.admitted.append(sequence)
        return True

    def _find_cached_blocks(self, sequence: Sequence) -> list[int]:
        """The known blocks that it may begin with."""
        if sequence.wants_prompt_logprobs:
            return []
        num_full = (sequence.num_tokens - 1) // BLOCK_SIZE
        block_hashes = sequence.block_hashes.full(num_full, sequence.ids)
        return self._kv_cache.find_cached_blocks(block_hashes)

    def _find_partial_block(self, sequence: Sequence, num_known: int) -> tuple[int, int]:
        """A block that begins with what comes behind the sequence's known blocks, and how many
        tokens of it, without the last of all."""
        start = num_known * BLOCK_SIZE
        stop = min(start + BLOCK_SIZE, sequence.num_tokens - 1)
        if stop == start or sequence.wants_prompt_logprobs:
            return 0, 0
        leader, shared = sequence.leader, min(stop, len(sequence.submit.prompt_ids))
        if leader is not None and leader.state is State.RUNNING and shared > start:
            return int(self._kv_cache.block_tables[leader.slot, num_known]), shared - start
        block_hash = sequence.block_hashes.partial(num_known, stop, sequence.ids)
        return self._kv_cache.find_partial_block(block_hash)

    def _free_blocks(self, sequence: Sequence) -> None:
        num_full, num_left = divmod(sequence.num_cacheable, BLOCK_SIZE)
        if num_left:
            hashes = sequence.block_hashes
            partial = hashes.partial(num_full, sequence.num_cacheable, sequence.ids)
            full = hashes.full(num_full, sequence.ids)
            self._kv_cache.cache_blocks(sequence.slot, [*full, partial])
        self._kv_cache.free(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = NO_SLOT
        sequence.num_computed = 0
