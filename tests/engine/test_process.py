"""Real engine processes over a tiny model: what they answer, and what becomes of everybody when
they are killed, stopped, starved or fed garbage."""

import asyncio
import ctypes
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from llmsrv.config import EngineConfig
from llmsrv.engine import process
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.engine.client import Generation
from llmsrv.engine.crashes import hash_of
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import FromEngine
from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import Ready
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Stop
from llmsrv.engine.messages import Submit
from llmsrv.engine.queues import Receiver
from llmsrv.engine.queues import Sender
from llmsrv.engine.supervisor import Patience
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from tests.support import engines
from tests.support.engines import SharedEngine
from tests.support.engines import engine
from tests.support.engines import gauges_at_rest
from tests.support.engines import has_exited
from tests.support.engines import in_loop
from tests.support.engines import until
from tests.support.gguf_writer import write_tiny_llama

GREEDY = Sampling(seed=0, temperature=0.0)
ENDLESS = 10_000  # tokens: many seconds of work
ROOT = Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context_length=16384)


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[SharedEngine]:
    running = SharedEngine(tiny)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the starts of an engine."""
    monkeypatch.setattr("llmsrv.engine.crashes.FIRST_PAUSE_S", 0.05)


def asked(
    prompt_ids: list[int], max_tokens: int, sampling: Sampling = GREEDY, n: int = 1
) -> Submit:
    return Submit(0, prompt_ids, max_tokens, [], sampling, n)


async def output_of(generation: Generation) -> tuple[list[list[int]], list[str]]:
    """Every choice's ids and finish reason."""
    ids: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    async with generation:
        async for event in generation:
            assert event.choice not in reasons
            if isinstance(event, Finished):
                reasons[event.choice] = event.reason
            else:
                ids.setdefault(event.choice, []).extend(event.ids)
    order = sorted(reasons)
    return [ids[choice] for choice in order], [reasons[choice] for choice in order]


@in_loop
async def test_requests_are_answered_with_the_same_tokens_alone_and_together(
    shared: SharedEngine,
) -> None:
    prompts = [[5 + i, 100, 7 * i + 1] * (1 + i % 5) for i in range(12)]
    client = shared.client
    alone = [await output_of(client.submit(asked(p, 20))) for p in prompts]
    together = await asyncio.gather(*(output_of(client.submit(asked(p, 20))) for p in prompts))
    assert alone == together
    assert all(len(ids[0]) == 20 and reasons == ["length"] for ids, reasons in alone)


@pytest.mark.slow
@in_loop
async def test_a_draft_model_and_look_up_give_the_same_tokens_in_fewer_steps(tiny: Path) -> None:
    async with engine(tiny) as client:
        alone = await output_of(client.submit(asked([1, 2], 100)))
    for draft in ({"speculative_mode": "ngram"}, {"draft_model_path": str(tiny)}):
        async with engine(tiny, spec_draft_length=4, **draft) as client:
            assert await output_of(client.submit(asked([1, 2], 100))) == alone
            assert client.gauges.num_accepted_tokens > 0


@pytest.mark.slow
@in_loop
async def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", vocab_size=400)
    with pytest.raises(StartupError, match="has 400 tokens"):
        async with engine(tiny, draft_model_path=str(other)):
            pass


@pytest.mark.slow
@in_loop
async def test_a_seed_gives_its_choices_again(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=2) as client:
        sampling = Sampling(seed=77, num_logprobs=2)
        first = await output_of(client.submit(asked([1, 2], 12, sampling, n=3)))
        assert await output_of(client.submit(asked([1, 2], 12, sampling, n=3))) == first
        assert len(set(map(tuple, first[0]))) == 3
        await gauges_at_rest(client)


@pytest.mark.slow
def test_the_client_runs_on_uvloop_as_well(tiny: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        async with engine(tiny) as client:
            generation = client.submit(asked([1, 2], ENDLESS))
            await anext(generation)
            assert client.pid
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(ApiError, match="SIGKILL"):
                await output_of(generation)
            await client.wait_ready()
            assert (await output_of(client.submit(asked([1, 2], 3))))[1] == ["length"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario(), 30))


@in_loop
async def test_a_killed_engine_ends_its_requests_within_a_second_and_the_next_one_works(
    tiny: Path,
) -> None:
    async with engine(tiny, max_num_sequence=1) as client:
        running = client.submit(asked([1, 2], ENDLESS))
        waiting = client.submit(asked([3, 4], 5))
        await running.admitted()
        await anext(running)
        assert client.gauges.running == 1 and client.pid
        pid = client.pid
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(1):
            with pytest.raises(ApiError) as lost:
                await output_of(running)
            with pytest.raises(ApiError) as never_began:
                await waiting.admitted()
        assert (lost.value.status, lost.value.code) == (500, "engine_restarted")
        assert "SIGKILL" in lost.value.message and not lost.value.headers
        assert (never_began.value.status, never_began.value.code) == (503, "engine_restarted")
        assert never_began.value.headers["Retry-After"] == "1"
        assert never_began.value.headers["x-should-retry"] == "true"
        assert client.state is EngineState.RESTARTING and "SIGKILL" in client.reason
        assert client.gauges == Gauges()
        with pytest.raises(ApiError) as refused:
            client.submit(asked([1, 2], 5))
        assert refused.value.status == 503 and "SIGKILL" in refused.value.message
        await client.wait_ready()
        assert client.num_restarts == 1 and client.pid != pid and has_exited(pid, 0)
        assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_an_engine_may_end_by_any_signal(number: signal.Signals, tiny: Path) -> None:
    @in_loop
    async def check() -> None:
        async with engine(tiny) as client:
            running = client.submit(asked([1, 2], ENDLESS))
            await anext(running)
            assert client.pid
            os.kill(client.pid, number)
            async with asyncio.timeout(1):
                with pytest.raises(ApiError, match=number.name):
                    await output_of(running)
            await client.wait_ready()
            assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]

    check()


@pytest.mark.slow
@in_loop
async def test_a_request_in_two_crashes_is_told_not_to_come_again_and_its_hash_is_logged(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "main", engines.main_with_a_fatal_id)
    poison = asked([engines.FATAL_ID], 5)
    async with engine(tiny) as client:
        for status, code in ((503, "engine_restarted"), (500, "engine_crashed")):
            with pytest.raises(ApiError) as lost:
                await output_of(client.submit(poison))
            assert (lost.value.status, lost.value.code) == (status, code)
            await client.wait_ready()
        assert lost.value.headers == {"x-should-retry": "false"}
        assert f"request {hash_of(poison)} was in the engine at two crashes" in caplog.text
        assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]


@in_loop
async def test_a_request_that_misses_its_deadline_fails_and_need_not_come_again(
    shared: SharedEngine,
) -> None:
    client = shared.client
    late = msgspec.structs.replace(asked([1, 2], ENDLESS), deadline_s=time.monotonic() + 0.05)
    with pytest.raises(ApiError) as error:
        await output_of(client.submit(late))
    assert (error.value.status, error.value.code) == (504, "request_timeout")
    assert error.value.headers == {"x-should-retry": "false"}


@in_loop
async def test_what_waits_is_counted_in_requests_and_tokens_by_tenant(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=1) as client:
        async with client.submit(asked([1, 2], ENDLESS)) as running:
            await running.admitted()
            assert client.queued() == {}
            waiting = [client.submit(asked([1] * length, 5)) for length in (10, 20)]
            client.submit(msgspec.structs.replace(asked([1, 2, 3], 5), tenant=b"other"))
            assert client.queued() == {b"": (2, 30), b"other": (1, 3)}
            waiting[0].abort()
            assert client.queued() == {b"": (1, 20), b"other": (1, 3)}


@pytest.mark.slow
@in_loop
async def test_a_stopped_engine_is_noticed_killed_and_replaced(tiny: Path) -> None:
    async with engine(tiny, Patience(ready_s=0.8)) as client:
        generation = client.submit(asked([1, 2], ENDLESS))
        await anext(generation)
        assert client.pid
        pid = client.pid
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(2):
            with pytest.raises(ApiError, match="hung for 0.8 s"):
                await output_of(generation)
        await client.wait_ready()
        assert has_exited(pid, 0)
        assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]


@pytest.mark.slow
@in_loop
async def test_an_idle_engine_shows_that_it_lives(tiny: Path) -> None:
    async with engine(tiny) as client:
        assert client._process
        heartbeat = client._process._heartbeat
        first = heartbeat.value
        await until(lambda: heartbeat.value > first)


@pytest.mark.slow
@in_loop
async def test_a_server_that_was_stopped_itself_does_not_blame_the_engine(tiny: Path) -> None:
    """As after Ctrl-Z: neither had a chance to get on, and much time has passed."""
    async with engine(tiny, Patience(ready_s=1.0)) as client:
        assert client.pid
        os.kill(client.pid, signal.SIGSTOP)
        time.sleep(1.2)  # the loop stands still
        os.kill(client.pid, signal.SIGCONT)
        assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]
        assert client.num_restarts == 0


@pytest.mark.slow
@in_loop
async def test_an_exception_of_the_step_itself_ends_the_engine_with_a_traceback(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "main", engines.main_with_a_fatal_id)
    async with engine(tiny) as client:
        generation = client.submit(asked([engines.FATAL_ID], 5))
        with pytest.raises(ApiError, match="exited with code 1"):
            await output_of(generation)
        assert "a fault of the step itself" in capfd.readouterr().err
        await client.wait_ready()
        assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]


@pytest.mark.slow
@in_loop
async def test_an_engine_that_hangs_while_loading_is_killed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "main", engines.main_that_hangs)
    client = EngineClient(EngineConfig(str(tiny), backend="reference"), Patience(loading_s=2.0))
    await client.start()
    await until(lambda: client.state is EngineState.RESTARTING)
    assert "hung for 2 s" in client.reason
    monkeypatch.setattr(process, "main", engines.PROCESS_MAIN)
    await client.wait_ready()
    await client.stop()


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
        generation = client.submit(asked([1, 2], ENDLESS))
        await anext(generation)
        assert client._process
        os.write(client._process._send_pipe.fileno(), b"\xff" * 64)
        with pytest.raises(ApiError, match="exited with code 1"):
            await output_of(generation)
        await client.wait_ready()


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF\x03\0\0\0",
        *(pytest.param(other, marks=pytest.mark.slow) for other in (None, b"", b"no model at all")),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_for_good(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)

    @in_loop
    async def scenario() -> None:
        client = EngineClient(EngineConfig(str(path)))
        await client.start()
        with pytest.raises(StartupError, match="broken.gguf"):
            await client.wait_ready()
        assert client.state is EngineState.REFUSED
        with pytest.raises(ApiError) as refused:
            client.submit(asked([1], 1))
        assert refused.value.status == 503
        assert client.num_restarts == 0
        await client.stop()

    scenario()


@pytest.mark.parametrize(
    ("main", "told", "logged"),
    [
        (engines.main_without_numpy, "numpy is not installed; run: .* -m pip install", ""),
        (engines.main_that_cannot_load, "cannot be loaded: .*a fault", "Traceback"),
    ],
)
def test_a_fault_while_loading_for_the_first_time_is_told_and_not_repeated(
    main: object,
    told: str,
    logged: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    @in_loop
    async def scenario() -> None:
        monkeypatch.setattr(process, "main", main)
        client = EngineClient(EngineConfig(str(tiny)))
        await client.start()
        with pytest.raises(StartupError, match=told):
            await client.wait_ready()
        await client.stop()
        assert logged in capfd.readouterr().err

    scenario()


@pytest.mark.slow
@in_loop
async def test_a_model_that_disappears_later_is_asked_for_again(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    async with engine(path) as client:
        path.rename(tmp_path / "away")
        assert client.pid
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: "could not load the model" in client.reason)
        assert client.state is EngineState.RESTARTING and "tiny" not in client.reason
        (tmp_path / "away").rename(path)
        await client.wait_ready()
        assert client.num_restarts >= 2


@in_loop
async def test_an_abort_at_any_moment_brings_the_gauges_back_to_zero(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=1, prefill_chunk_size=4) as client:
        for moment in ("waiting", "prefill", "decode"):
            first = client.submit(asked([1, 2], ENDLESS))
            await anext(first)
            aborted = first
            if moment == "waiting":
                aborted = client.submit(asked([1, 2], ENDLESS))
                await until(lambda: client.gauges.waiting == 1)
            elif moment == "prefill":
                first.abort()
                aborted = client.submit(asked([1, 2] * 1000, ENDLESS))
                await aborted.admitted()
            aborted.abort()
            aborted.abort()
            assert [event async for event in aborted] == []
            first.abort()
            await gauges_at_rest(client)
            assert client._generations == {}
            assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]


@in_loop
async def test_one_choice_can_be_aborted_and_finishes_with_abort(shared: SharedEngine) -> None:
    client = shared.client
    reasons = {}
    async with client.submit(asked([1, 2], 200, Sampling(seed=3), n=2)) as generation:
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
        async with client.submit(asked([1, 2], ENDLESS)) as generation:
            await anext(generation)
            raise ConnectionError


@in_loop
async def test_a_consumer_that_takes_nothing_delays_nobody_and_loses_nothing(
    shared: SharedEngine,
) -> None:
    client = shared.client
    slow = client.submit(asked([1, 2], 200))
    assert (await output_of(client.submit(asked([3, 4], 200))))[1] == ["length"]
    await until(lambda: slow.has_ended)
    ids, reasons = await output_of(slow)
    assert len(ids[0]) == 200 and reasons == ["length"]


@in_loop
async def test_a_failure_reaches_whoever_waits_for_the_admission(shared: SharedEngine) -> None:
    client = shared.client
    with pytest.raises(ApiError) as error:
        await client.submit(asked([1] * 20_000, 5)).admitted()
    assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
    assert client._generations == {}


@in_loop
async def test_waiting_for_the_admission_can_be_given_up_and_taken_up_again(tiny: Path) -> None:
    async with engine(tiny, max_num_sequence=1) as client:
        first = client.submit(asked([1, 2], ENDLESS))
        second = client.submit(asked([1, 2], 5))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await second.admitted()
        first.abort()
        await second.admitted()
        assert (await output_of(second))[1] == ["length"]


@in_loop
async def test_stopping_ends_what_runs_and_is_safe_twice(tiny: Path) -> None:
    async with engine(tiny) as client:
        generation = client.submit(asked([1, 2], ENDLESS))
        await anext(generation)
        await client.stop()
        assert client.state is EngineState.STOPPED and client.pid is None
        with pytest.raises(ApiError) as error:
            await output_of(generation)
        assert error.value.code == "server_shutting_down"
        with pytest.raises(StartupError):
            await client.wait_ready()


@in_loop
async def test_stopping_while_the_model_loads_does_not_wait_for_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "main", engines.main_that_hangs)
    client = EngineClient(EngineConfig(str(tiny)))
    await client.start()
    await until(lambda: client.pid is not None)
    pid = client.pid
    async with asyncio.timeout(1):
        await client.stop()
    assert pid and has_exited(pid, 0)


@in_loop
async def test_stopping_before_the_start_has_happened(tiny: Path) -> None:
    client = EngineClient(EngineConfig(str(tiny)))
    await client.stop()
    await client.stop()
    assert client.state is EngineState.STOPPED


@needs_proc
@in_loop
async def test_an_engine_leaves_signals_to_the_server_and_is_the_first_to_go_when_memory_is_short(
    shared: SharedEngine,
) -> None:
    client = shared.client
    assert client.pid
    os.kill(client.pid, signal.SIGINT)
    os.kill(client.pid, signal.SIGTERM)
    assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]
    assert client.num_restarts == 0
    assert Path(f"/proc/{client.pid}/oom_score_adj").read_text() == "500\n"


@needs_proc
@in_loop
async def test_every_thread_of_an_engine_gives_its_core_to_a_server_that_wakes_up(
    shared: SharedEngine,
) -> None:
    server_sched = Path("/proc/self/sched")
    release = tuple(map(int, platform.release().split(".")[:2]))
    if release < (6, 12) or not server_sched.exists():
        pytest.skip(f"Linux {release} lets no thread choose its time slice, or does not show it")
    assert shared.client.pid
    server_ns = _slice_ns(server_sched)
    threads = list(Path(f"/proc/{shared.client.pid}/task").iterdir())
    assert threads
    for thread in threads:
        assert _slice_ns(thread / "sched") > server_ns


@needs_proc
@in_loop
async def test_an_engine_holds_no_socket_and_the_server_none_of_its_pipe_ends(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        async with engine(tiny) as client:
            mine, its = _open_files("self"), _open_files(str(client.pid))
            assert not [name for name in its if name.startswith("socket:")]
            assert client._process
            for pipe in (client._process._send_pipe, client._process._receive_pipe):
                name = os.readlink(f"/proc/self/fd/{pipe.fileno()}")
                assert mine.count(name) == 1 and its.count(name) == 1
                assert not os.get_inheritable(pipe.fileno())
    assert name not in _open_files("self")


def _open_files(pid: str) -> list[str]:
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except FileNotFoundError:
            pass  # the directory's own
    return names


# Like the real launchers it imports inside its main, since the child runs the rest of it as well.
SCRIPT = """
async def main():
    client = EngineClient(EngineConfig(sys.argv[1], backend="reference"))
    await client.start()
    if sys.argv[2] == "loading":
        await asyncio.sleep(0)
    else:
        await client.wait_ready()
    print(json.dumps([client.pid, sorted(sys.modules)]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await client.stop()

if __name__ == "__main__":
    import asyncio, json, sys
    from llmsrv.config import EngineConfig
    from llmsrv.engine.client import EngineClient
    asyncio.run(main())
"""


def start_script(model: Path, moment: str, directory: Path) -> "subprocess.Popen[str]":
    """A small server of its own, with hooks in `directory` for it and its children."""
    script = directory / "server.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(model), moment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{directory}:{ROOT}"},
    )


@pytest.mark.parametrize("moment", [pytest.param("loading", marks=pytest.mark.slow), "ready"])
def test_an_engine_is_gone_within_two_seconds_of_its_server(
    moment: str, tiny: Path, tmp_path: Path
) -> None:
    with start_script(tiny, moment, tmp_path) as server:
        assert server.stdout
        pid, _ = json.loads(server.stdout.readline())
        server.kill()
        assert has_exited(pid, 2)


@pytest.mark.slow
def test_neither_process_loads_what_belongs_to_the_other(tiny: Path, tmp_path: Path) -> None:
    """Each process writes its modules down as it ends; the engine's are those of a whole life."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, json, os, sys\n"
        f"path = f'{tmp_path}/{{os.getpid()}}.json'\n"
        "atexit.register(lambda: json.dump(sorted(sys.modules), open(path, 'w')))\n"
    )
    with start_script(tiny, "ready", tmp_path) as server:
        assert server.stdout
        pid, in_server = json.loads(server.stdout.readline())
        server.communicate()
    in_engine = json.loads((tmp_path / f"{pid}.json").read_text())
    assert "numpy" in in_engine and "llmsrv.engine.core" in in_engine
    assert not {"asyncio", "h11", "uvloop", "llmsrv.asgi", "llmsrv.server"} & set(in_engine)
    assert "numpy" not in in_server and "llmsrv.engine.core" not in in_server


class EngineThread:
    """The engine's loop in a thread, the test as its server."""

    def __init__(self, model: Path) -> None:
        receive_fd, self.send_fd = os.pipe()
        self.receive_fd, send_fd = os.pipe()
        self.sender = Sender(self.send_fd, 1)
        self.receiver: Receiver[FromEngine] = Receiver(self.receive_fd, 1, FromEngine)
        self.heartbeat = ctypes.c_ulonglong()
        config = EngineConfig(str(model), backend="reference")
        self.thread = threading.Thread(
            target=process._run, args=(config, receive_fd, send_fd, 1, self.heartbeat)
        )
        self.thread.start()
        self._ends = [receive_fd, send_fd]

    def receive_until(self, type: type[FromEngine]) -> list[FromEngine]:
        messages: list[FromEngine] = []
        while not any(isinstance(message, type) for message in messages):
            messages += self.receiver.receive()
        return messages

    def close(self) -> None:
        self.sender.send(Stop())
        while self.sender.num_waiting_bytes or self.thread.is_alive():
            self.sender.flush()
            try:
                self.receiver.receive()
            except EOFError:
                pass
        for fd in (*self._ends, self.send_fd, self.receive_fd):
            os.close(fd)


@pytest.fixture
def engine_thread(tiny: Path) -> Iterator[EngineThread]:
    thread = EngineThread(tiny)
    yield thread
    thread.close()


@pytest.mark.slow
def test_an_engine_that_is_not_read_stops_making_steps_but_still_reads(
    engine_thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large Submit while the engine is blocked with output: nobody deadlocks."""
    is_blocked = threading.Event()
    wait = process._Waiter.__call__

    def noting(self: process._Waiter, timeout_s: float, for_writing: bool) -> None:
        if for_writing:
            is_blocked.set()
        wait(self, timeout_s, for_writing)

    monkeypatch.setattr(process._Waiter, "__call__", noting)
    monkeypatch.setattr(process, "MAX_UNREAD_BYTES", 150_000)
    engine_thread.receive_until(Ready)
    sampling = Sampling(seed=1, num_logprobs=200)
    for request in range(4):
        engine_thread.sender.send(Submit(request, [1, 2], 30, [], sampling, n=8))
    assert is_blocked.wait(10)
    beats = engine_thread.heartbeat.value
    engine_thread.sender.send(Submit(9, [1] * 300_000, 5, [], GREEDY))
    while engine_thread.sender.num_waiting_bytes:  # the engine reads, or this never ends
        engine_thread.sender.flush()
    assert engine_thread.heartbeat.value > beats

    steps: list[Step] = []
    while sum(len(step.finished) for step in steps) < 32:
        steps += [step for step in engine_thread.receiver.receive() if isinstance(step, Step)]
    assert [failed.request for step in steps for failed in step.failed] == [9]
    assert sum(len(step.tokens) for step in steps) == 960


@in_loop
async def test_a_client_that_cannot_write_refuses_new_requests_and_recovers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsrv.engine.client.MAX_UNSENT_BYTES", 1 << 20)
    async with engine(tiny) as client:
        assert client.pid
        os.kill(client.pid, signal.SIGSTOP)
        generations = [client.submit(asked([1] * 100_000, 5)) for _ in range(12)]
        with pytest.raises(ApiError) as error:
            client.submit(asked([1, 2], 5))
        assert (error.value.status, error.value.code) == (503, "server_is_overloaded")
        assert error.value.headers["Retry-After"] == "1"
        os.kill(client.pid, signal.SIGCONT)
        for generation in generations:
            with pytest.raises(ApiError, match="maximum context length"):
                await generation.admitted()
        assert (await output_of(client.submit(asked([1, 2], 5))))[1] == ["length"]


class EndingProcess:
    """Stands for an EngineProcess that has ended as soon as it is started."""

    pid = None
    num_waiting_bytes = 0

    def __init__(self, *arguments: object) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.ended.set_result("the engine exited with code 1")

    async def gone(self) -> None:
        pass


@in_loop
async def test_an_engine_that_crashes_again_and_again_is_let_alone_for_a_minute(
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
        client.submit(asked([1], 1))
    assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) > 50
    await client.stop()


@in_loop
async def test_a_system_without_processes_left_is_tried_again(
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


def _slice_ns(shown: Path) -> int:
    return int(shown.read_text().partition("se.slice")[2].split()[1])
