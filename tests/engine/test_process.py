"""The engine process as the system sees it: signals, threads, files, modules, and its end."""

import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmsrv.config import EngineConfig
from llmsrv.engine import process
from llmsrv.engine.messages import FromEngine
from llmsrv.engine.messages import Ready
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Stop
from llmsrv.engine.messages import Submit
from llmsrv.engine.queues import Receiver
from llmsrv.engine.queues import Sender
from tests.support.engines import SharedEngine
from tests.support.engines import engine
from tests.support.engines import has_exited
from tests.support.engines import in_loop
from tests.support.generations import GREEDY
from tests.support.generations import make_submit
from tests.support.generations import output_of

ROOT = Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


@needs_proc
@in_loop
async def test_an_engine_ignores_the_server_s_signals_and_is_killed_first_when_memory_is_short(
    shared: SharedEngine,
) -> None:
    client = shared.client
    assert client.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(client.pid, number)
    assert (await output_of(client.submit(make_submit([1, 2], 5))))[1] == ["length"]
    assert client.num_restarts == 0
    assert Path(f"/proc/{client.pid}/oom_score_adj").read_text() == "500\n"


@needs_proc
@in_loop
async def test_every_thread_of_an_engine_yields_its_core_to_a_server_that_wakes_up(
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


def _slice_ns(sched: Path) -> int:
    return int(sched.read_text().partition("se.slice")[2].split()[1])


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
            pass  # the descriptor of this listing itself
    return names


# Imports inside its main, as real launchers do: the child process runs the rest of the script too.
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
    """Starts a small server; it and its children load hooks from `directory`."""
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
def test_an_engine_ends_within_two_seconds_of_its_server(
    moment: str, tiny: Path, tmp_path: Path
) -> None:
    with start_script(tiny, moment, tmp_path) as server:
        assert server.stdout
        pid, _ = json.loads(server.stdout.readline())
        server.kill()
        assert has_exited(pid, 2)


@pytest.mark.slow
def test_server_and_engine_each_load_only_their_own_modules(tiny: Path, tmp_path: Path) -> None:
    """Each process writes its modules down as it exits, so the engine's cover its whole life."""
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
    """Runs the engine's loop in a thread; the test is its server."""

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
def test_an_engine_whose_output_is_not_read_pauses_but_still_reads(
    engine_thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large Submit while the engine is blocked on its output must not deadlock."""
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
