"""Engine processes that are killed, hang, fail or send garbage: requests end with an error, and a
new engine takes over."""

import asyncio
import math
import os
import signal
import time
from pathlib import Path

import pytest

from llmsrv.config import EngineConfig
from llmsrv.engine import process
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.engine.crashes import hash_of
from llmsrv.engine.messages import Gauges
from llmsrv.engine.supervisor import Patience
from llmsrv.errors import ApiError
from tests.support import engines
from tests.support.engines import engine
from tests.support.engines import has_exited
from tests.support.engines import in_loop
from tests.support.engines import until
from tests.support.generations import admission_of
from tests.support.generations import ENDLESS
from tests.support.generations import make_submit
from tests.support.generations import output_of

pytestmark = pytest.mark.usefixtures("short_pauses")


@in_loop
async def test_a_killed_engine_ends_its_requests_within_a_second_and_the_next_one_works(
    tiny: Path,
) -> None:
    async with engine(tiny, max_num_sequence=1) as client:
        running = client.submit(make_submit([1, 2], ENDLESS))
        waiting = client.submit(make_submit([3, 4], 5))
        await admission_of(running)
        await anext(running)
        assert client.gauges.running == 1 and client.pid
        pid = client.pid
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(1):
            with pytest.raises(ApiError) as lost:
                await output_of(running)
            with pytest.raises(ApiError) as never_began:
                await admission_of(waiting)
        assert (lost.value.status, lost.value.code) == (500, "engine_restarted")
        assert "SIGKILL" in lost.value.message and not lost.value.headers
        assert (never_began.value.status, never_began.value.code) == (503, "engine_restarted")
        assert never_began.value.headers["Retry-After"] == "1"
        assert never_began.value.headers["x-should-retry"] == "true"
        assert client.state is EngineState.RESTARTING and "SIGKILL" in client.reason
        assert client.gauges == Gauges()
        with pytest.raises(ApiError) as refused:
            client.submit(make_submit([1, 2], 5))
        assert refused.value.status == 503 and "SIGKILL" in refused.value.message
        await client.wait_ready()
        assert client.num_restarts == 1 and client.pid != pid and has_exited(pid, 0)
        assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_an_engine_killed_by_any_signal_is_replaced(number: signal.Signals, tiny: Path) -> None:
    @in_loop
    async def check() -> None:
        async with engine(tiny) as client:
            running = client.submit(make_submit([1, 2], ENDLESS))
            await anext(running)
            assert client.pid
            os.kill(client.pid, number)
            async with asyncio.timeout(1):
                with pytest.raises(ApiError, match=number.name):
                    await output_of(running)
            await client.wait_ready()
            assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]

    check()


@pytest.mark.slow
def test_the_client_runs_on_uvloop_as_well(tiny: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        async with engine(tiny) as client:
            generation = client.submit(make_submit([1, 2], ENDLESS))
            await anext(generation)
            assert client.pid
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(ApiError, match="SIGKILL"):
                await output_of(generation)
            await client.wait_ready()
            assert (await output_of(client.submit(make_submit([1, 2], 3))))[1] == ["length"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.slow
@in_loop
async def test_a_request_in_two_crashes_must_not_be_retried_and_its_hash_is_logged(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "main", engines.main_with_a_fatal_id)
    poison = make_submit([engines.FATAL_ID], 5)
    async with engine(tiny) as client:
        for status, code in ((503, "engine_restarted"), (500, "engine_crashed")):
            with pytest.raises(ApiError) as lost:
                await output_of(client.submit(poison))
            assert (lost.value.status, lost.value.code) == (status, code)
            await client.wait_ready()
        assert lost.value.headers == {"x-should-retry": "false"}
        assert f"request {hash_of(poison)} was in the engine at two crashes" in caplog.text
        assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]


@pytest.mark.slow
@in_loop
async def test_a_hung_engine_is_killed_and_replaced(tiny: Path) -> None:
    async with engine(tiny, Patience(ready_s=0.8)) as client:
        generation = client.submit(make_submit([1, 2], ENDLESS))
        await anext(generation)
        assert client.pid
        pid = client.pid
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(2):
            with pytest.raises(ApiError, match="hung for 0.8 s"):
                await output_of(generation)
        await client.wait_ready()
        assert has_exited(pid, 0)
        assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]


@pytest.mark.slow
@in_loop
async def test_an_idle_engine_raises_its_heartbeat(tiny: Path) -> None:
    async with engine(tiny) as client:
        assert client._process
        heartbeat = client._process._heartbeat
        first = heartbeat.count.value
        await until(lambda: heartbeat.count.value > first)


@pytest.mark.slow
@in_loop
async def test_a_server_that_was_stopped_itself_does_not_blame_the_engine(tiny: Path) -> None:
    """As after Ctrl-Z: time has passed in which neither process could run."""
    async with engine(tiny, Patience(ready_s=1.0)) as client:
        assert client.pid
        os.kill(client.pid, signal.SIGSTOP)
        time.sleep(1.2)  # the loop stands still
        os.kill(client.pid, signal.SIGCONT)
        assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]
        assert client.num_restarts == 0


@pytest.mark.slow
@in_loop
async def test_an_exception_in_a_step_ends_the_engine_with_a_traceback(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "main", engines.main_with_a_fatal_id)
    async with engine(tiny) as client:
        generation = client.submit(make_submit([engines.FATAL_ID], 5))
        with pytest.raises(ApiError, match="exited with code 1"):
            await output_of(generation)
        assert "a fault of the step itself" in capfd.readouterr().err
        await client.wait_ready()
        assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]


@in_loop
async def test_garbage_from_the_engine_ends_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "main", engines.main_that_sends_garbage)
    client = EngineClient(EngineConfig(str(tiny)))
    await client.start()
    await until(lambda: client.state is EngineState.RESTARTING)
    assert "garbage" in client.reason
    await client.stop()
    assert client.pid is None


@pytest.mark.slow
@in_loop
async def test_garbage_to_the_engine_ends_it(tiny: Path) -> None:
    async with engine(tiny) as client:
        generation = client.submit(make_submit([1, 2], ENDLESS))
        await anext(generation)
        assert client._process
        os.write(client._process._send_pipe.fileno(), b"\xff" * 64)
        with pytest.raises(ApiError, match="exited with code 1"):
            await output_of(generation)
        await client.wait_ready()


class EndingProcess:
    """An EngineProcess that has ended as soon as it is started."""

    pid = None
    num_waiting_bytes = 0

    def __init__(self, *arguments: object) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.ended.set_result("the engine exited with code 1")

    async def gone(self) -> None:
        pass


@in_loop
async def test_an_engine_that_keeps_crashing_is_restarted_only_once_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(math.ceil(10 * pause_s) / 10)
        if len(pauses) == 9:
            await asyncio.Event().wait()

    monkeypatch.setattr("llmsrv.engine.client.EngineProcess", EndingProcess)
    monkeypatch.setattr("llmsrv.engine.crashes.FIRST_PAUSE_S", 0.5)
    client = EngineClient(EngineConfig("nowhere"))
    with monkeypatch.context() as patch:
        patch.setattr("llmsrv.engine.client.asyncio.sleep", sleep)
        await client.start()
        while len(pauses) < 9:
            await asyncio.wait([asyncio.ensure_future(client._changed.wait())], timeout=0.01)
    assert pauses == [0.5, 1, 2, 4, 60, 60, 60, 60, 60]
    assert client.state is EngineState.RESTARTING and client.reason.endswith("in 60 s")
    assert 50 < int(client.retry["Retry-After"]) <= 60
    with pytest.raises(ApiError) as refused:
        client.submit(make_submit([1], 1))
    assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) > 50
    await client.stop()


@in_loop
async def test_a_start_that_fails_for_lack_of_processes_is_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_process(*arguments: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("llmsrv.engine.client.EngineProcess", no_process)
    client = EngineClient(EngineConfig("nowhere"))
    await client.start()
    await until(lambda: client.state is EngineState.RESTARTING)
    assert "cannot be started" in client.reason
    await client.stop()
