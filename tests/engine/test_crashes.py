"""Restart pauses and suspicious requests after engine crashes."""

from llmsrv.engine.crashes import Crashes
from llmsrv.engine.crashes import hash_of
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit

GREEDY = Sampling(seed=0, temperature=0.0)


def hash(request: int, *prompt: int, deadline_s: float = 9.0) -> str:
    return hash_of(Submit(request, list(prompt), 5, [], GREEDY, deadline_s=deadline_s))


def test_pauses_grow_to_half_a_minute_if_crashes_are_rare() -> None:
    crashes = Crashes()
    pauses = [crashes.record(100.0 * i, 10.0, []) for i in range(8)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_five_crashes_within_a_minute_are_a_loop_and_four_are_not() -> None:
    crashes = Crashes()
    assert [crashes.record(1000 + 14.9 * i, 1.0, []) for i in range(5)] == [0.5, 1, 2, 4, 60]
    assert crashes.record(1000 + 14.9 * 4 + 62, 1.0, []) < 60


def test_a_healthy_engine_resets_the_history() -> None:
    crashes = Crashes()
    for time_s in range(3):
        crashes.record(time_s, 1.0, [hash(1, 7)])
    assert crashes.is_poison(hash(1, 7))
    assert crashes.record(200.0, 61.0, []) == 0.5
    assert not crashes.is_poison(hash(1, 7))


def test_a_request_is_identified_by_its_content() -> None:
    crashes = Crashes()
    crashes.record(1.0, 1.0, [hash(1, 7), hash(2, 7), hash(3, 8)])
    assert not crashes.is_poison(hash(1, 7))  # twice in one crash counts once
    crashes.record(2.0, 1.0, [hash(4, 7, deadline_s=1.0)])
    assert crashes.is_poison(hash(5, 7)) and not crashes.is_poison(hash(3, 8))
    assert hash(1, 7) != hash(1, 8)


def test_hashes_do_not_accumulate() -> None:
    crashes = Crashes()
    for crash in range(30):
        crashes.record(100.0 * crash, 1.0, [hash(1, crash, i) for i in range(500)])
    assert len(crashes._by_hash) <= 10_500
