"""The sequences that wait for a place, in the order in which they get it.

Start-time fair queueing (Goyal, Vin & Cheng 1996) over the tokens that a sequence is expected to
cost.  The queue has a virtual time: the start of what was admitted last.  A sequence starts at that
time, or where the one before it of the same tenant and priority is expected to end, whichever is
later; the least start goes first.  So each flow alone is first come first served, and of flows that
wait together each gets as many tokens as any other, however many requests it sends.

A priority moves the start by PRIORITY_TOKENS a level.  Virtual time goes on with each admission, so
whatever waits is the least at some time: that is the ageing, and nothing starves.

A sequence's place is its rank, which it keeps for its whole life.
"""

import itertools
from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from llmsrv.engine.sequence import Sequence

# So much work may overtake a sequence for each level of priority between: about a minute's.
PRIORITY_TOKENS = 100_000
# Clients ask for more tokens than they get, often for all that the context has.
EXPECTED_OUTPUT_TOKENS = 256

by_rank = attrgetter("rank")


class FairQueue:
    def __init__(self) -> None:
        self._waiting: list[Sequence] = []  # by rank
        self._virtual_time = 0
        self._ends: dict[tuple[bytes, int], int] = {}  # by flow, where they are in the future
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def head(self) -> Sequence | None:
        return self._waiting[0] if self._waiting else None

    def add(self, sequence: Sequence) -> None:
        """A new sequence, which gets its rank here."""
        submit = sequence.submit
        flow = submit.tenant, submit.priority
        start = self._ends.get(flow, self._virtual_time)
        cost = min(sequence.max_tokens, EXPECTED_OUTPUT_TOKENS)
        if sequence.leader is None:
            cost += len(submit.prompt_ids)  # which the other choices share
        self._ends[flow] = start + cost
        sequence.rank = start + submit.priority * PRIORITY_TOKENS, next(self._arrivals)
        insort(self._waiting, sequence, key=by_rank)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that was taken before."""
        insort(self._waiting, sequence, key=by_rank)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def take(self, sequence: Sequence) -> None:
        """Takes out what is admitted; time goes on to the start of the head."""
        is_head = sequence is self.head
        self._waiting.remove(sequence)
        if not is_head:
            return
        start = sequence.rank[0] - sequence.submit.priority * PRIORITY_TOKENS
        if start > self._virtual_time:
            self._virtual_time = start
            self._ends = {flow: end for flow, end in self._ends.items() if end > start}
