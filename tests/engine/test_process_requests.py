"""Requests to a real engine process: answers, deadlines, aborts and slow consumers."""

import asyncio
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Sampling
from llmsrv.errors import ApiError
from tests.support.engines import SharedEngine
from tests.support.engines import engine
from tests.support.engines import gauges_at_rest
from tests.support.engines import in_loop
from tests.support.engines import until
from tests.support.generations import admission_of
from tests.support.generations import ENDLESS
from tests.support.generations import make_submit
from tests.support.generations import output_of


@in_loop
async def test_requests_are_answered_with_the_same_tokens_alone_and_together(
    shared: SharedEngine,
) -> None:
    prompts = [[5 + i, 100, 7 * i + 1] * (1 + i % 5) for i in range(12)]
    client = shared.client
    submits = [make_submit(prompt, 20) for prompt in prompts]
    alone = [await output_of(client.submit(submit)) for submit in submits]
    together = await asyncio.gather(*(output_of(client.submit(submit)) for submit in submits))
    assert alone == together
    assert all(len(ids[0]) == 20 and reasons == ["length"] for ids, reasons in alone)


@pytest.mark.slow
@in_loop
async def test_drafts_of_a_model_or_of_prompt_lookup_change_no_token(tiny: Path) -> None:
    async with engine(tiny) as client:
        alone = await output_of(client.submit(make_submit([1, 2], 100)))
    for draft in ({"speculative_mode": "ngram"}, {"draft_model_path": str(tiny)}):
        async with engine(tiny, spec_draft_length=4, **draft) as client:
            assert await output_of(client.submit(make_submit([1, 2], 100))) == alone
            assert client.gauges.num_accepted_tokens > 0


@pytest.mark.slow
@in_loop
async def test_a_seed_reproduces_its_choices(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=2) as client:
        sampling = Sampling(seed=77, num_logprobs=2)
        first = await output_of(client.submit(make_submit([1, 2], 12, sampling, n=3)))
        assert await output_of(client.submit(make_submit([1, 2], 12, sampling, n=3))) == first
        assert len(set(map(tuple, first[0]))) == 3
        await gauges_at_rest(client)


@in_loop
async def test_a_request_that_misses_its_deadline_fails_and_should_not_be_retried(
    shared: SharedEngine,
) -> None:
    client = shared.client
    late = msgspec.structs.replace(make_submit([1, 2], ENDLESS), deadline_s=time.monotonic() + 0.05)
    with pytest.raises(ApiError) as error:
        await output_of(client.submit(late))
    assert (error.value.status, error.value.code) == (504, "request_timeout")
    assert error.value.headers == {"x-should-retry": "false"}


@in_loop
async def test_waiting_requests_and_their_tokens_are_counted_by_tenant(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=1) as client:
        async with client.submit(make_submit([1, 2], ENDLESS)) as running:
            await admission_of(running)
            assert client.queued() == {}
            waiting = [client.submit(make_submit([1] * length, 5)) for length in (10, 20)]
            client.submit(msgspec.structs.replace(make_submit([1, 2, 3], 5), tenant=b"other"))
            assert client.queued() == {b"": (2, 30), b"other": (1, 3)}
            waiting[0].abort()
            assert client.queued() == {b"": (1, 20), b"other": (1, 3)}


@in_loop
async def test_an_abort_at_any_moment_returns_the_gauges_to_zero(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=1, prefill_chunk_size=4) as client:
        for moment in ("waiting", "prefill", "decode"):
            first = client.submit(make_submit([1, 2], ENDLESS))
            await anext(first)
            aborted = first
            if moment == "waiting":
                aborted = client.submit(make_submit([1, 2], ENDLESS))
                await until(lambda: client.gauges.waiting == 1)
            elif moment == "prefill":
                first.abort()
                aborted = client.submit(make_submit([1, 2] * 1000, ENDLESS))
                await admission_of(aborted)
            aborted.abort()
            aborted.abort()
            assert [event async for event in aborted] == []
            first.abort()
            await gauges_at_rest(client)
            assert client._generations == {}
            assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]


@in_loop
async def test_one_choice_can_be_aborted_and_finishes_with_abort(shared: SharedEngine) -> None:
    client = shared.client
    reasons = {}
    async with client.submit(make_submit([1, 2], 200, Sampling(seed=3), n=2)) as generation:
        async for event in generation:
            if isinstance(event, Finished):
                reasons[event.choice] = event.reason
            elif event.choice == 1:
                generation.abort(1)
    assert reasons == {0: "length", 1: "abort"}


@in_loop
async def test_leaving_the_block_aborts_the_request(shared: SharedEngine) -> None:
    client = shared.client
    with pytest.raises(ConnectionError):
        async with client.submit(make_submit([1, 2], ENDLESS)) as generation:
            await anext(generation)
            raise ConnectionError


@in_loop
async def test_a_slow_consumer_delays_no_other_request_and_loses_no_token(
    shared: SharedEngine,
) -> None:
    client = shared.client
    slow = client.submit(make_submit([1, 2], 200))
    assert (await output_of(client.submit(make_submit([3, 4], 200))))[1] == ["length"]
    await until(lambda: slow.has_ended)
    ids, reasons = await output_of(slow)
    assert len(ids[0]) == 200 and reasons == ["length"]


@in_loop
async def test_a_failure_is_raised_while_waiting_for_admission(shared: SharedEngine) -> None:
    client = shared.client
    with pytest.raises(ApiError) as error:
        await admission_of(client.submit(make_submit([1] * 20_000, 5)))
    assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
    assert client._generations == {}


@in_loop
async def test_waiting_for_admission_can_be_cancelled_and_resumed(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=1) as client:
        first = client.submit(make_submit([1, 2], ENDLESS))
        second = client.submit(make_submit([1, 2], 5))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await admission_of(second)
        first.abort()
        await admission_of(second)
        assert (await output_of(second))[1] == ["length"]


@in_loop
async def test_a_client_that_cannot_write_refuses_new_requests_and_recovers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsrv.engine.client.MAX_UNSENT_BYTES", 1 << 20)
    async with engine(tiny) as client:
        assert client.pid
        os.kill(client.pid, signal.SIGSTOP)
        generations = [client.submit(make_submit([1] * 100_000, 5)) for _ in range(12)]
        with pytest.raises(ApiError) as error:
            client.submit(make_submit([1, 2], 5))
        assert (error.value.status, error.value.code) == (503, "server_is_overloaded")
        assert error.value.headers["Retry-After"] == "1"
        os.kill(client.pid, signal.SIGCONT)
        for generation in generations:
            with pytest.raises(ApiError, match="maximum context length"):
                await admission_of(generation)
        assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]
