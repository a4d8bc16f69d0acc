"""Learns from engine crashes how long to wait before a restart, and which requests cause crashes.

Times are seconds of one clock.
"""

import hashlib
from collections import Counter
from collections import deque
from collections.abc import Iterable

import msgspec

from llmsrv.engine.messages import Submit

FIRST_PAUSE_S = 0.5  # doubled with each crash
LONGEST_PAUSE_S = 30.0
HEALTHY_S = 60.0  # an engine that was ready this long resets everything
# LOOP_CRASHES within LOOP_S are a crash loop: whatever causes it needs more time to go away.
LOOP_CRASHES = 5
LOOP_S = 60.0
LOOP_PAUSE_S = 60.0
# A request that was in the engine at this many crashes probably causes them.
POISON_CRASHES = 2
MAX_HASHES = 10_000


class Crashes:
    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=LOOP_CRASHES)
        self._next_pause_s = FIRST_PAUSE_S
        self._by_hash: Counter[str] = Counter()

    def record(self, now_s: float, ready_for_s: float, hashes: Iterable[str]) -> float:
        """Records a crash; returns the pause in seconds before the next start.

        ready_for_s  how long the engine had been ready
        hashes       of the requests that were in the engine
        """
        if ready_for_s > HEALTHY_S:
            self._next_pause_s = FIRST_PAUSE_S
        if ready_for_s > HEALTHY_S or len(self._by_hash) > MAX_HASHES:
            self._by_hash.clear()
        self._by_hash.update(set(hashes))
        self._times_s.append(now_s)
        pause_s = self._next_pause_s
        self._next_pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return LOOP_PAUSE_S if self._is_loop(now_s) else pause_s

    def is_poison(self, hash: str) -> bool:
        return self._by_hash[hash] >= POISON_CRASHES

    def _is_loop(self, now_s: float) -> bool:
        return len(self._times_s) == LOOP_CRASHES and now_s - self._times_s[0] < LOOP_S


def hash_of(submit: Submit) -> str:
    """A hash that is equal for equal requests, and reveals nothing of their content."""
    bare = msgspec.structs.replace(submit, request=0, deadline_s=0.0)
    return hashlib.blake2b(msgspec.msgpack.encode(bare), digest_size=8).hexdigest()
