"""Engine processes for tests: real ones behind a client, and ones with a misbehaving main."""

import asyncio
import functools
import os
import select
import sys
import time
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmsrv.config import EngineConfig
from llmsrv.engine import process
from llmsrv.engine.client import EngineClient
from llmsrv.engine.heartbeat import Heartbeat
from llmsrv.engine.messages import Gauges
from llmsrv.engine.supervisor import Patience

PROCESS_MAIN = process.main  # tests replace it


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test for at most 30 s, in the loop of `shared` if there is one."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        shared: SharedEngine | None = fixtures.get("shared")
        asyncio_run = shared.runner.run if shared else asyncio.run
        asyncio_run(asyncio.wait_for(test(**fixtures), 30))
        if shared:
            asyncio_run(gauges_at_rest(shared.client))

    return run


@asynccontextmanager
async def engine(
    model: Path, patience: Patience = Patience(), **config: Any
) -> AsyncIterator[EngineClient]:
    """A client whose engine is ready.  Stops it and checks that its process is gone."""
    client = EngineClient(EngineConfig(str(model), backend="reference", **config), patience)
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        pid = client.pid
        await client.stop()
        assert client.gauges == Gauges()
        assert pid is None or has_exited(pid, 0)


class SharedEngine:
    """A client whose engine is ready, with its event loop.  Tests must leave it idle."""

    def __init__(self, model: Path) -> None:
        self.runner = asyncio.Runner()
        self._engine = engine(model)
        self.client = self.runner.run(self._engine.__aenter__())  # type: ignore[arg-type]

    def close(self) -> None:
        with self.runner:
            self.runner.run(self._engine.__aexit__(None, None, None))  # type: ignore[arg-type]


async def gauges_at_rest(client: EngineClient) -> None:
    """Returns when no sequence runs or waits, and no block is used."""
    await until(lambda: client.gauges.total_blocks > 0 and _is_at_rest(client.gauges))


def _is_at_rest(gauges: Gauges) -> bool:
    return gauges.running == gauges.waiting == gauges.used_blocks == 0


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def has_exited(pid: int, timeout_s: float) -> bool:
    """Whether the process, which need not be a child, exits within the time."""
    if not hasattr(os, "pidfd_open"):  # macOS: init reaps orphans at once
        return _is_unknown(pid, time.monotonic() + timeout_s)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def _is_unknown(pid: int, deadline_s: float) -> bool:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > deadline_s:
            return False


# ---- Mains of the engine process, found by name in the spawned process.

FATAL_ID = 66  # a prompt that starts with it ends the engine


def main_with_a_fatal_id(*arguments: Any) -> None:
    from llmsrv.engine.core import EngineCore

    submit = EngineCore.submit

    def guarded(self: EngineCore, message: Any) -> None:
        if message.prompt_ids[0] == FATAL_ID:
            raise RuntimeError("a fault of the step itself")
        submit(self, message)

    EngineCore.submit = guarded  # type: ignore[method-assign,assignment]
    PROCESS_MAIN(*arguments)


def main_without_numpy(*arguments: Any) -> None:
    sys.modules["numpy"] = None  # type: ignore[assignment]
    PROCESS_MAIN(*arguments)


def main_that_cannot_load(*arguments: Any) -> None:
    import llmsrv.model.load

    def load_model(path: Path, tick: object) -> None:
        raise KeyError("a fault while loading")

    llmsrv.model.load.load_model = load_model  # type: ignore[assignment]
    PROCESS_MAIN(*arguments)


def main_that_hangs(*arguments: Any) -> None:
    time.sleep(3600)


def main_that_sends_garbage(
    config: EngineConfig,
    receive: Connection,
    send: Connection,
    generation: int,
    heartbeat: Heartbeat,
) -> None:
    os.write(send.fileno(), b"\xff" * 64)
    time.sleep(3600)
