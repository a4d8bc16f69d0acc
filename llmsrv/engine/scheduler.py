"""Decides which rows the next step computes: continuous batching in the order of rank.

Every sequence in decode gets one row before anything else, so a long prompt never stops the running
streams.  Decode gets further rows for drafts if there are no prompts (speculation.py).  The rest of
the step goes to prompts in chunks: first to running sequences, then to sequences that are admitted
from the queue, as long as there are slots, blocks and rows.  A step that carries both streams and
prompts may last up to max_step_s, judging by what earlier steps cost (_prefill_work): that is short
enough for a reader, and long enough for prompts to be computed nearly as fast as alone.  Half of
the work for prompts goes to short prompts that arrived after a long one, so a short question does
not wait until someone else's document is computed.

Preemption: if a sequence in decode needs a block and none is free, the running sequence with the
last rank is preempted.  Its blocks are freed and it returns to the queue.  When it is admitted
again, its prompt and its output so far are computed again.  To keep that rare, a sequence is
admitted only if it and all that run may still produce as much output as the longest of the latest
outputs, or as much as is left of their own limits (_num_growth_blocks).

Every sequence finishes.  A sequence is never preempted before one of a later rank, sequences are
admitted from the head of the queue only, and the KV cache holds at least one sequence of full
length; so the sequence of the first rank always makes progress.  (A short prompt may overtake the
head, but only while a prompt more than twice as long is being computed, which also makes progress
meanwhile; so overtaking ends.)

An admitted sequence starts with what the KV cache holds of its beginning (kv_cache.py): blocks that
it shares, and one partial block that is copied.  Its last token is always computed, because its
logits are wanted.

Knows nothing of token ids, sampling or messages.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass
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

# Of a step without streams.  Requests that arrive or end wait for the end of the current step.
MAX_PREFILL_STEP_S = 1.0
# If decode alone takes nearly max_step_s or longer, prompts may still slow it down by this much.
MIN_PREFILL_SLOWDOWN = 0.5
# Prompts always get this many rows.  Four rows with one stream would more than double the duration
# of a step where rows are expensive (AVX2).  Two rows alone would not lead to larger steps.
MIN_PREFILL_ROWS_WITH_DECODE, MIN_PREFILL_ROWS_ALONE = 2, 4
# Attention to this many earlier positions costs about as much as the rest of a prompt row (SmolLM2
# on a CPU: 1000 with AMX, 3000 with AVX-512).  Without it, steps near the end of long prompts are
# far too long.  If it is too small, the first steps of a prompt after a long one are.
POSITIONS_PER_ROW_COST = 2000
# Outputs may become as long as the longest of this many latest ones.  Until that many have ended,
# this length is assumed.
NUM_RECENT_OUTPUTS, INITIAL_OUTPUT_TOKENS = 32, 8192
# How many waiting sequences are considered for overtaking a long prompt.
MAX_OVERTAKE_CANDIDATES = 8


def work_of(num_rows: int, num_computed: int) -> int:
    """The cost of the next rows of a sequence, in decode rows, which are assumed to cost the same.

    num_computed  earlier positions that each row attends to
    """
    return num_rows + (num_rows - 1) * num_computed // POSITIONS_PER_ROW_COST


class Chunk(NamedTuple):
    """The next num_tokens uncomputed tokens of a sequence, and a draft after its last token."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)

    @property
    def work(self) -> int:
        return work_of(self.num_tokens, self.sequence.num_computed) + len(self.draft)

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


@dataclass
class PrefillBudget:
    """What a step has left for prompts.

    work              as in work_of
    spare_logit_rows  in addition to one per sequence
    """

    rows: int
    work: float
    spare_logit_rows: int

    @property
    def is_used_up(self) -> bool:
        return self.rows < 1 or self.work < 1

    def take(self, sequence: Sequence, max_work: float) -> Chunk:
        """As much of the prompt as takes at most max_work >= 1; at least one row."""
        row_cost = 1 + sequence.num_computed / POSITIONS_PER_ROW_COST
        num_rows = min(self.rows, sequence.num_uncomputed, 1 + (max_work - 1) / row_cost)
        if sequence.wants_prompt_logprobs:
            num_rows = min(num_rows, 1 + self.spare_logit_rows)
        chunk = Chunk(sequence, int(num_rows))
        self.rows -= chunk.num_rows
        self.work -= chunk.work
        self.spare_logit_rows -= max(0, chunk.num_logit_rows - 1)
        return chunk


class Scheduler:
    def __init__(
        self,
        kv_cache: KVCache,
        max_num_sequence: int,
        max_rows: int,
        costs: StepCosts,
        speculation: Speculation,
        max_step_s: float,
        num_spare_logit_rows: int = 0,
    ) -> None:
        """max_step_s            of a step that computes both streams and prompts
        num_spare_logit_rows  logit rows of a step in addition to one per sequence
        """
        # With fewer rows than sequences, decode could take all rows of every step.
        assert max_rows >= max_num_sequence
        self._kv_cache = kv_cache
        self._max_rows = max_rows
        self._max_step_s = max_step_s
        self._num_spare_logit_rows = num_spare_logit_rows
        self._costs = costs
        self._speculation = speculation
        self.recent_outputs = deque([INITIAL_OUTPUT_TOKENS], maxlen=NUM_RECENT_OUTPUTS)
        self._free_slots = list(range(max_num_sequence - 1, -1, -1))
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # by rank
        self.admitted: list[Sequence] = []  # by the last schedule()
        self.copies: list[tuple[int, int]] = []  # (source, target) blocks, before the step
        self.num_preemptions = 0
        self.num_recomputed = 0  # tokens that were computed again after preemptions
        self.num_prefix_queries = 0  # tokens looked up at admission
        self.num_prefix_hits = 0  # tokens found

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence in any state, and frees its slot and blocks."""
        if sequence.output_ids:
            self.recent_outputs.append(len(sequence.output_ids))
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._free_blocks(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.move_to(State.ENDED)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most one per sequence, with blocks allocated.

        Empty only if no sequence has tokens to compute.
        """
        self.admitted, self.copies = [], []
        chunks = self._with_drafts(self._schedule_decode())
        num_rows = sum(chunk.num_rows for chunk in chunks)
        spare = self._num_spare_logit_rows - sum(len(chunk.draft) for chunk in chunks)
        work = self._prefill_work(len(chunks), num_rows)
        budget = PrefillBudget(self._max_rows - num_rows, work, spare)
        short_prompts = [] if budget.is_used_up else self._short_prompts()
        short_work = budget.work / 2
        for sequence in short_prompts:
            if short_work >= 1 and budget.rows:
                chunks.append(budget.take(sequence, short_work))
                short_work -= chunks[-1].work
        for sequence in self.running:
            is_waiting = sequence.num_uncomputed > 1 and sequence not in short_prompts
            if is_waiting and not budget.is_used_up:
                chunks.append(budget.take(sequence, budget.work))
        while not budget.is_used_up and (head := self.waiting.head) and self._admit(head):
            chunks.append(budget.take(head, budget.work))
        return chunks

    def mark_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Marks the sequence's next num_tokens tokens as computed, and caches blocks they fill."""
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

    def _prefill_work(self, num_streams: int, num_rows: int) -> float:
        """Work that the step may have for prompts, in addition to num_rows rows for its streams."""
        limit_s, min_rows = MAX_PREFILL_STEP_S, MIN_PREFILL_ROWS_ALONE
        if num_streams:
            decode_s = self._costs.of(num_rows)
            limit_s = max(self._max_step_s, decode_s * (1 + MIN_PREFILL_SLOWDOWN))
            min_rows = MIN_PREFILL_ROWS_WITH_DECODE
        first = next((each for each in self.running if each.num_uncomputed > 1), None)
        min_work = work_of(min_rows, first.num_computed if first else 0)
        return max(min_work, self._costs.rows_within(limit_s) - num_rows)

    def _has_prompts(self) -> bool:
        """Whether this step can compute rows of a prompt."""
        is_running = any(each.num_uncomputed > 1 for each in self.running)
        return is_running or bool(self.waiting and self._free_slots)

    def _schedule_decode(self) -> list[Chunk]:
        """By rank.  A preemption removes sequences from the end of the list during the loop."""
        chunks = []
        for sequence in self.running:
            if sequence.num_uncomputed == 1 and self._allocate_or_preempt(sequence):
                chunks.append(Chunk(sequence, 1))
        return chunks

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """Adds drafts to the decode chunks, unless others will soon need the blocks.

        Prompts use the rows better than drafts, which may be rejected.
        """
        budget = min(self._num_spare_logit_rows, self._max_rows - len(chunks))
        if budget <= 0 or self._has_prompts():
            return chunks
        if self._kv_cache.num_free < 2 * len(chunks) + num_blocks_for(budget):
            return chunks
        drafts = self._speculation.draft([chunk.sequence for chunk in chunks], budget)
        with_drafts = []
        for chunk, draft in zip(chunks, drafts, strict=True):
            self._kv_cache.allocate(chunk.sequence.slot, chunk.sequence.num_tokens + len(draft))
            with_drafts.append(Chunk(*chunk[:2], tuple(draft)))
        return with_drafts

    def _short_prompts(self) -> list[Sequence]:
        """Prompts with less than half as many tokens left as the first prompt, shortest first.

        Admits one such prompt from the queue, if there is one.
        """
        prompts = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        if not prompts:
            return []
        num_candidates = MAX_OVERTAKE_CANDIDATES if self._free_slots else 0
        waiting = list(islice(self.waiting, num_candidates))
        priority = min(sequence.submit.priority for sequence in prompts[:1] + waiting[:1])
        max_left = prompts[0].num_uncomputed / 2

        def is_short(sequence: Sequence, num_left: int) -> bool:
            return sequence.submit.priority <= priority and num_left < max_left

        for sequence in waiting:
            num_left = sequence.num_tokens - BLOCK_SIZE * len(self._find_cached_blocks(sequence))
            if is_short(sequence, num_left) and self._admit(sequence):
                prompts.append(sequence)
                break
        short = [sequence for sequence in prompts if is_short(sequence, sequence.num_uncomputed)]
        return sorted(short, key=lambda sequence: sequence.num_uncomputed)

    def _allocate_or_preempt(self, sequence: Sequence) -> bool:
        """Allocates the block for the sequence's next token, preempting others if necessary.

        Returns False if the sequence itself had to be preempted.
        """
        while not self._kv_cache.allocate(sequence.slot, sequence.num_tokens):
            if self._preempt_last() is sequence:
                return False
        return True

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        sequence.num_discarded = sequence.num_computed
        self._free_blocks(sequence)
        sequence.move_to(State.WAITING)
        self.waiting.put_back(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        return sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Moves a waiting sequence to running, if there is room for it and for all that run."""
        if sequence.awaits_leader or not self._free_slots:
            return False
        cached = self._find_cached_blocks(sequence)
        # Keep the blocks that running sequences will need.  Otherwise one would be preempted soon,
        # and its tokens would be computed again.
        num_needed = num_blocks_for(sequence.num_tokens) - len(cached)
        num_needed += self._num_growth_blocks([*self.running, sequence])
        if num_needed + self._kv_cache.num_evictable(cached) > self._kv_cache.num_free:
            return False
        self.waiting.pop(sequence)
        source, num_copied = self._find_partial_block(sequence, len(cached))
        sequence.move_to(State.RUNNING)
        sequence.slot = self._free_slots.pop()
        self._kv_cache.attach_cached_blocks(sequence.slot, cached)
        self._kv_cache.allocate(sequence.slot, sequence.num_tokens)
        if num_copied:
            target = int(self._kv_cache.block_tables[sequence.slot, len(cached)])
            self.copies.append((source, target))
        sequence.num_computed = sequence.num_cached = len(cached) * BLOCK_SIZE + num_copied
        self.num_prefix_queries += sequence.num_tokens
        self.num_prefix_hits += sequence.num_cached
        self.num_recomputed += max(0, sequence.num_discarded - sequence.num_cached)
        insort(self.running, sequence, key=by_rank)
        self.admitted.append(sequence)
        return True

    def _num_growth_blocks(self, sequences: list[Sequence]) -> int:
        """Blocks to keep free for the further output of these sequences."""
        num_expected = max(BLOCK_SIZE, *self.recent_outputs)
        num_blocks = 0
        for sequence in sequences:
            num_left = sequence.max_tokens - len(sequence.output_ids)
            if not sequence.num_preemptions:  # else it would be preempted again and again
                num_left = min(num_left, num_expected)
            num_tokens = sequence.num_tokens
            num_blocks += num_blocks_for(num_tokens + num_left) - num_blocks_for(num_tokens)
        return num_blocks

    def _find_cached_blocks(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence can start with."""
        if sequence.wants_prompt_logprobs:
            return []
        num_full = (sequence.num_tokens - 1) // BLOCK_SIZE
        block_hashes = sequence.block_hashes.full(num_full, sequence.ids)
        return self._kv_cache.find_cached_blocks(block_hashes)

    def _find_partial_block(self, sequence: Sequence, num_cached_blocks: int) -> tuple[int, int]:
        """A block to copy from, and how many of its leading tokens follow the cached blocks.

        The sequence's last token is never copied.
        """
        start = num_cached_blocks * BLOCK_SIZE
        stop = min(start + BLOCK_SIZE, sequence.num_tokens - 1)
        if stop == start or sequence.wants_prompt_logprobs:
            return 0, 0
        leader, shared = sequence.leader, min(stop, len(sequence.submit.prompt_ids))
        if leader is not None and leader.state is State.RUNNING and shared > start:
            return int(self._kv_cache.block_tables[leader.slot, num_cached_blocks]), shared - start
        block_hash = sequence.block_hashes.partial(num_cached_blocks, stop, sequence.ids)
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
