"""Real engine processes under seeded chaos: random kills, cancels and crowds of requests.

Each test is a slice of a campaign: the marker `campaign` runs it at full length.
"""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable
from collections.abc import Coroutine
from collections.abc import Iterable
from pathlib import Path

import pytest

from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.engine.generation import Generation
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.scheduler import NUM_RECENT_OUTPUTS
from llmsrv.errors import ApiError
from tests.support.engines import engine
from tests.support.engines import gauges_at_rest
from tests.support.gguf_writer import write_tiny_llama

GREEDY = Sampling(seed=0, temperature=0.0)
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


def lengths(slow: int, campaign: int) -> pytest.MarkDecorator:
    """The parameter `length`, for a slice of the campaign and for the full campaign."""
    return pytest.mark.parametrize(
        "length",
        [
            pytest.param(slow, marks=pytest.mark.slow),
            pytest.param(campaign, marks=pytest.mark.campaign),
        ],
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context_length=4096)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "LOOP_PAUSE_S"):
        monkeypatch.setattr(f"llmsrv.engine.crashes.{name}", 0.02)


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 600))


def submit_of(prompt: list[int], max_tokens: int, **fields: object) -> Submit:
    return Submit(0, prompt, max_tokens, [], GREEDY, **fields)  # type: ignore[arg-type]


async def ids_of(generation: Generation) -> list[int]:
    """The output of a request with one choice, which must finish."""
    ids: list[int] = []
    async with generation:
        async for event in generation:
            if isinstance(event, Finished):
                assert event.reason == "length"
            else:
                ids += event.ids
    return ids


def open_files(pid: int | None) -> int:
    directory = Path(f"/proc/{pid}/fd")
    return len(list(directory.iterdir())) if directory.exists() else 0


def resident_kb(pid: int | None) -> int:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return 0  # not Linux
    return int(status.read_text().partition("VmRSS:")[2].split()[0])


# ---- Kills


@lengths(slow=4, campaign=50)
def test_nothing_is_lost_silently_whenever_the_engine_is_killed(tiny: Path, length: int) -> None:
    run(kill_often(tiny, length, random.Random(length)))


async def kill_often(tiny: Path, num_kills: int, rng: random.Random) -> None:
    async with engine(tiny) as client:
        expected = await ids_of(client.submit(submit_of([1, 2, 3], 20)))
        num_files = open_files(os.getpid())
        for number in range(num_kills):
            num_restarts = client.num_restarts
            await kill_once(client, number, rng)
            if rng.random() < 0.2:
                num_restarts += await kill_while_loading(client, rng)
            await client.wait_ready()
            assert client.num_restarts == num_restarts + 1
            assert await ids_of(client.submit(submit_of([1, 2, 3], 20))) == expected
        assert open_files(os.getpid()) <= num_files
        assert len(asyncio.all_tasks()) <= 3  # this one, its timeout's, and the supervision


async def kill_once(client: EngineClient, number: int, rng: random.Random) -> None:
    """Kills the engine at a random moment.  Every request that has not finished then fails within a
    second."""
    submits = [
        submit_of([number, i] * rng.choice((1, 20, 1500)), rng.randrange(1, 2000))
        for i in range(rng.choice((0, 1, 5, 40)))
    ]
    requests = [asyncio.ensure_future(ids_of(client.submit(submit))) for submit in submits]
    await asyncio.sleep(rng.choice((0.0, 0.001, 0.02, 0.1, 0.3)))
    assert client.pid
    os.kill(client.pid, rng.choice(SIGNALS))
    async with asyncio.timeout(1):
        ends = await asyncio.gather(*requests, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            assert isinstance(end, ApiError), end
            assert (end.status, end.code) in {(500, "engine_restarted"), (503, "engine_restarted")}
    while client.state is EngineState.READY:
        await asyncio.sleep(0.001)


async def kill_while_loading(client: EngineClient, rng: random.Random) -> int:
    """Returns the number of kills: 0 if the model was already loaded."""
    dead = client.pid
    while client.pid in (None, dead):
        await asyncio.sleep(0.001)
    await asyncio.sleep(rng.choice((0.0, 0.05, 0.2)))
    if client.pid is None or client.state is EngineState.READY:
        return 0
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(ApiError):
        client.submit(submit_of([1], 1))
    return 1


# ---- Cancels


@lengths(slow=400, campaign=10_000)
def test_a_request_cancelled_at_any_moment_leaves_nothing_behind(tiny: Path, length: int) -> None:
    run(cancel_often(tiny, length, random.Random(length)))


async def cancel_often(tiny: Path, num_cancels: int, rng: random.Random) -> None:
    sizes = {"max_num_sequence": 8, "max_total_seq_length": 2048, "context_window_size": 512}
    async with engine(tiny, speculative_mode="ngram", **sizes) as client:
        await in_crowds(cancel_one(client, rng) for _ in range(50))
        await gauges_at_rest(client)
        files = open_files(os.getpid()) + open_files(client.pid)
        before_kb = resident_kb(client.pid)
        await in_crowds(cancel_one(client, rng) for _ in range(num_cancels))
        await gauges_at_rest(client)
        assert not client.has_requests and client.num_restarts == 0
        assert open_files(os.getpid()) + open_files(client.pid) <= files
        assert resident_kb(client.pid) - before_kb < 8192
        assert len(asyncio.all_tasks()) <= 3


async def cancel_one(client: EngineClient, rng: random.Random) -> None:
    prompt = [rng.randrange(3)] * rng.choice((1, 17, 100, 300))
    submit = submit_of(prompt, 200, n=rng.choice((1, 1, 4)), priority=rng.randrange(3))
    generation = client.submit(submit)
    for _ in range(rng.choice((0, 0, 1, 5, 30))):
        if rng.random() < 0.1:
            generation.abort(rng.randrange(4))
        await asyncio.wait({asyncio.ensure_future(anext(generation, None))}, timeout=5)
    if rng.random() < 0.5:
        waiting = asyncio.ensure_future(anext(generation, None))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    generation.abort()


async def in_crowds(requests: Iterable[Awaitable[None]], size: int = 24) -> None:
    """Awaits all of them, `size` at a time."""
    places = asyncio.Semaphore(size)

    async def one(request: Awaitable[None]) -> None:
        async with places:
            await request

    await asyncio.gather(*(one(request) for request in requests))


# ---- Canaries


@lengths(slow=200, campaign=2000)
def test_no_answer_contains_a_token_of_another(tiny: Path, length: int) -> None:
    run(ask_in_a_crowd(tiny, length, random.Random(length)))


async def ask_in_a_crowd(tiny: Path, num_requests: int, rng: random.Random) -> None:
    """With shared prefixes, preemption, drafts and cancels, each request gets the same tokens as
    alone."""
    prefixes = [[prefix] * rng.choice((20, 33, 64)) for prefix in range(5)]
    prompts = [prefix + [rng.randrange(100), i] for prefix in prefixes for i in range(8)]
    async with engine(tiny) as client:
        alone = [await ids_of(client.submit(submit_of(prompt, 40))) for prompt in prompts]
    sizes = {"max_num_sequence": 16, "max_total_seq_length": 640, "context_window_size": 256}
    async with engine(tiny, speculative_mode="ngram", **sizes) as client:

        async def ask(index: int) -> None:
            generation = client.submit(submit_of(prompts[index], 40, tenant=b"%d" % (index % 3)))
            if rng.random() < 0.25:
                first = await anext(generation)
                assert first.ids == alone[index][: len(first.ids)]  # type: ignore[union-attr]
                generation.abort()
            else:
                assert await ids_of(generation) == alone[index]

        # After short outputs, more sequences are admitted than the cache can hold in the end.
        short = (ids_of(client.submit(submit_of([i], 2))) for i in range(NUM_RECENT_OUTPUTS))
        await asyncio.gather(*short)
        await asyncio.gather(*(ask(rng.randrange(len(prompts))) for _ in range(num_requests)))
        await gauges_at_rest(client)
        assert client.gauges.num_preemptions > 0 and client.gauges.num_prefix_hits > 0
        assert client.gauges.num_accepted_tokens > 0
