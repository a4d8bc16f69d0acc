"""The waiting sequences in the order in which they are admitted.

This is start-time fair queueing (Goyal, Vin & Cheng 1996).  The cost of a sequence is the number of
tokens that it is expected to need.  The queue has a virtual time: the start of the last sequence
that was admitted.  Sequences of the same tenant and priority form a flow.  A sequence starts at the
virtual time or at the expected end of the previous sequence of its flow, whichever is later.  The
sequence with the smallest start goes first.  So a flow on its own is served first come, first
served, and flows that wait together get equal numbers of tokens, however many requests they send.

Each level of priority moves the start by PRIORITY_TOKENS.  Virtual time advances with admissions,
so every waiting sequence has the smallest start eventually.  This is the ageing: nothing starves.

A sequence's rank is its place in this order, and never changes.
"""

import itertools
from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from llmsrv.engine.sequence import Sequence

# Work that may overtake a sequence for each level of priority in between: about a minute's.
PRIORITY_TOKENS = 100_000
# Clients ask for more tokens than they get, often for the whole context.
EXPECTED_OUTPUT_TOKENS = 256

by_rank = attrgetter("rank")


class FairQueue:
    def __init__(self) -> None:
        self._waiting: list[Sequence] = []  # by rank
        self._virtual_time = 0
        self._ends: dict[tuple[bytes, int], int] = {}  # by flow, if later than the virtual time
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def head(self) -> Sequence | None:
        return self._waiting[0] if self._waiting else None

    def add(self, sequence: Sequence) -> None:
        """Adds a new sequence and sets its rank."""
        submit = sequence.submit
        flow = submit.tenant, submit.priority
        start = self._ends.get(flow, self._virtual_time)
        cost = min(sequence.max_tokens, EXPECTED_OUTPUT_TOKENS)
        if sequence.leader is None:
            cost += len(submit.prompt_ids)  # shared with the other choices
        self._ends[flow] = start + cost
        sequence.rank = start + submit.priority * PRIORITY_TOKENS, next(self._arrivals)
        insort(self._waiting, sequence, key=by_rank)

    def put_back(self, sequence: Sequence) -> None:
        """Adds a preempted sequence again."""
        insort(self._waiting, sequence, key=by_rank)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def pop(self, sequence: Sequence) -> None:
        """Removes a sequence to admit it.  Virtual time advances if it was the head."""
        is_head = sequence is self.head
        self._waiting.remove(sequence)
        if not is_head:
            return
        start = sequence.rank[0] - sequence.submit.priority * PRIORITY_TOKENS
        if start > self._virtual_time:
            self._virtual_time = start
            self._ends = {flow: end for flow, end in self._ends.items() if end > start}
