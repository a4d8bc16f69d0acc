"""Starting and stopping an engine process: models that cannot run, hangs, early stops."""

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from llmsrv.config import EngineConfig
from llmsrv.engine import process
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.engine.supervisor import Patience
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from tests.support import engines
from tests.support.engines import engine
from tests.support.engines import has_exited
from tests.support.engines import in_loop
from tests.support.engines import until
from tests.support.generations import ENDLESS
from tests.support.generations import make_submit
from tests.support.generations import output_of
from tests.support.gguf_writer import write_tiny_llama

pytestmark = pytest.mark.usefixtures("short_pauses")


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
async def test_121_an_engine_starts_where_dev_shm_cannot_be_written(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.heap.Arena.__init__", refuse)
    async with engine(tiny) as client:
        assert client.num_restarts == 0


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF\x03\0\0\0",
        *(pytest.param(other, marks=pytest.mark.slow) for other in (None, b"", b"no model at all")),
    ],
)
def test_a_model_that_cannot_run_is_refused_and_not_loaded_again(
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
            client.submit(make_submit([1], 1))
        assert refused.value.status == 503
        assert client.num_restarts == 0
        await client.stop()

    scenario()


@pytest.mark.parametrize(
    ("main", "message", "logged"),
    [
        (engines.main_without_numpy, "numpy is not installed; run: .* -m pip install", ""),
        (engines.main_that_cannot_load, "cannot be loaded: .*a fault", "Traceback"),
    ],
)
def test_an_error_in_the_first_load_is_reported_and_not_retried(
    main: object,
    message: str,
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
        with pytest.raises(StartupError, match=message):
            await client.wait_ready()
        await client.stop()
        assert logged in capfd.readouterr().err

    scenario()


@pytest.mark.slow
@in_loop
async def test_a_model_that_disappears_later_is_loaded_once_it_is_back(tmp_path: Path) -> None:
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


@pytest.mark.slow
@in_loop
async def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", vocab_size=400)
    with pytest.raises(StartupError, match="has 400 tokens"):
        async with engine(tiny, draft_model_path=str(other)):
            pass


@in_loop
async def test_stopping_ends_running_requests_and_may_be_repeated(tiny: Path) -> None:
    async with engine(tiny) as client:
        generation = client.submit(make_submit([1, 2], ENDLESS))
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
