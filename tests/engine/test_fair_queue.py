"""The order of admission: priorities, fair shares, deadlines."""

import pytest

from llmsrv.engine.messages import Sampling
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.timed_engine import Clock
from tests.support.timed_engine import timed_engine


def admission_order(engine: Engine) -> list[int]:
    engine.run()
    engine.assert_idle()
    return engine.admitted


def test_lower_priorities_go_first_and_equal_ones_in_order_of_arrival() -> None:
    engine = Engine(max_sequences=1)
    for request, priority in enumerate([5, 0, 0, -1, 5, 0, -7]):
        engine.submit(request, healthy_prompt(4, request), priority=priority)
    assert admission_order(engine) == [6, 3, 1, 2, 5, 0, 4]


def test_a_request_of_low_priority_does_not_starve_among_urgent_ones() -> None:
    engine = Engine(max_sequences=1, blocks=1000, context=2000, max_rows=512)
    engine.submit(0, healthy_prompt(4, steps=2), priority=1, max_tokens=2)
    for request in range(1, 400):
        engine.submit(request, [request % 40] * 1000, max_tokens=1)
        while request not in engine.admitted and not {0} & set(engine.admitted):
            engine.step()
        if 0 in engine.admitted:
            return
    raise AssertionError("it starves")


def test_tenants_take_turns_however_many_requests_they_have() -> None:
    engine = Engine(max_sequences=1)
    for request in range(6):
        engine.submit(request, healthy_prompt(4, request), tenant=b"many")
    for request in (10, 11):
        engine.submit(request, healthy_prompt(4, request), tenant=b"few")
    assert admission_order(engine) == [0, 10, 1, 11, 2, 3, 4, 5]


def test_tenants_share_tokens_and_not_requests() -> None:
    engine = Engine(max_sequences=1, blocks=100, context=500, max_rows=512)
    for request in range(3):
        engine.submit(request, healthy_prompt(395, request, steps=5), max_tokens=5, tenant=b"long")
    for request in range(10, 20):
        engine.submit(request, healthy_prompt(95, request, steps=5), max_tokens=5, tenant=b"short")
    admitted = admission_order(engine)
    assert admitted[:6] == [0, 10, 11, 12, 13, 1]  # 400 tokens for each tenant


def test_an_idle_tenant_earns_no_credit() -> None:
    engine = Engine(max_sequences=1)
    for request in range(20):
        engine.submit(request, healthy_prompt(4, request), tenant=b"busy")
        engine.run()
    for request in range(20, 24):
        engine.submit(request, healthy_prompt(4, request), tenant=b"busy")
    for request in range(30, 34):
        engine.submit(request, healthy_prompt(4, request), tenant=b"new")
    assert admission_order(engine)[20:] == [30, 20, 31, 21, 32, 22, 33, 23]


def test_urgent_requests_keep_their_blocks_and_others_are_preempted() -> None:
    engine = Engine(max_sequences=3, blocks=6, context=64)
    for request, priority in enumerate([1, 1, 0]):
        prompt = healthy_prompt(14, 50 * request, steps=45)
        engine.submit(request, prompt, max_tokens=45, priority=priority)
    ended = []
    while engine.core.has_work:
        ended += [finished.request for finished in engine.step().finished]
    assert ended == [2, 0, 1] and engine.gauges.num_preemptions >= 1
    engine.assert_idle()


@pytest.mark.parametrize("num_steps", [0, 2, 40])
def test_a_request_that_misses_its_deadline_fails_and_frees_everything(num_steps: int) -> None:
    clock = Clock()
    engine = timed_engine(clock, max_sequences=1, max_rows=16)
    deadline_s = clock.now_s + 10
    healthy = engine.submit(1, healthy_prompt(30, steps=60), max_tokens=60)
    late = healthy_prompt(100, 3, steps=1000)
    engine.submit(2, late, max_tokens=1000, n=2, deadline_s=deadline_s, priority=-1)
    engine.submit(3, healthy_prompt(5, 8), deadline_s=deadline_s + 1000)
    for _ in range(num_steps):
        engine.step()
    clock.now_s = deadline_s - 0.001
    engine.step()
    assert not engine.failed
    clock.now_s = deadline_s
    engine.step()
    assert engine.failed[2].status == 504 and engine.failed[2].code == "request_timeout"
    engine.run()
    assert engine.finished[3, 0].reason == engine.finished[healthy.request, 0].reason == "length"
    engine.assert_idle()


def test_the_deadline_of_an_ended_request_does_nothing() -> None:
    clock = Clock()
    engine = timed_engine(clock)
    engine.submit(1, healthy_prompt(5), deadline_s=clock.now_s + 100, sampling=GREEDY)
    engine.run()
    clock.now_s += 200
    engine.submit(2, healthy_prompt(6), sampling=Sampling(seed=7))
    engine.run()
    assert not engine.failed and (1, 0) in engine.finished
