"""The application under other ASGI servers than ours: lifespan, root_path, logging, disconnects."""

import asyncio
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmsrv.api.gate import Gate
from llmsrv.app import App
from llmsrv.app import build
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.router import Router
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.config import Config
from llmsrv.http_app import Application
from llmsrv.runtime import Runtime
from tests.support.application import Answer
from tests.support.application import StartupFailed
from tests.support.application import ask
from tests.support.application import lifespan
from tests.support.engines import has_exited
from tests.support.engines import in_loop
from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import ROOT
from tests.support.server import child_pids

JSON = {"content-type": "application/json"}
LONG = b'{"model": "tiny", "prompt": "a", "max_tokens": 16000, "ignore_eos": true, "stream": true}'


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = write_tiny_llama(tmp_path_factory.mktemp("m") / "tiny.gguf", context_length=16384)
    return Config(model=[str(path)], backend="reference")


def engine_pids() -> list[int]:
    """The engine processes of this process: the children that multiprocessing has spawned."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in child_pids(os.getpid())}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


async def complete(app: App, body: bytes) -> Answer:
    return await ask(app, "POST", "/v1/completions", JSON, body)


def make_app(config: Config) -> App:
    app = build(config)
    assert isinstance(app, App)
    return app


@in_loop
async def test_lifespan_starts_the_models_and_stops_their_engines(config: Config) -> None:
    app = make_app(config)
    async with lifespan(app):
        assert (await ask(app, "GET", "/health", {})).status == 200
        answer = await complete(app, b'{"model": "tiny", "prompt": "a", "max_tokens": 2}')
        assert answer.status == 200 and answer.is_whole
        (pid,) = engine_pids()
    assert has_exited(pid, 5.0)


@in_loop
async def test_a_server_without_lifespan_can_serve_before_the_models_are_loaded(
    config: Config,
) -> None:
    runtime = Runtime(config)
    app = await runtime.start()
    answer = await ask(app, "GET", "/health", {})
    assert answer.status == 503 and b"model_not_ready" in answer.body
    await runtime.ready()
    assert (await ask(app, "GET", "/health", {})).status == 200
    await runtime.stop()


@in_loop
async def test_a_model_that_cannot_be_found_fails_the_startup_with_its_name() -> None:
    with pytest.raises(StartupFailed, match="no file './none.gguf'"):
        async with lifespan(build(Config(model=["./none.gguf"]))):
            pass


@in_loop
async def test_a_model_that_the_engine_refuses_fails_the_startup(tmp_path: Path) -> None:
    foreign = {"general.architecture": "foreign"}
    path = write_tiny_llama(tmp_path / "foreign.gguf", metadata=foreign)
    with pytest.raises(StartupFailed, match="foreign"):
        async with lifespan(build(Config(model=[str(path)]))):
            pass
    assert engine_pids() == []


def test_the_engines_can_start_before_slow_packages_are_imported() -> None:
    script = (
        "import sys, llmsrv.app, llmsrv.serve\n"
        "slow = {'tokenizers', 'jinja2', 'prometheus_client', 'llmsrv.http_app'}\n"
        "assert not slow & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


ROOT_PATHS = [
    # root_path, path, raw_path, status
    ("", "/v1/models", b"/v1/models", 200),
    ("/", "/v1/models", b"/v1/models", 200),
    ("/llm", "/llm/v1/models", b"/llm/v1/models", 200),
    ("/llm/", "/llm/v1/models", b"/llm/v1/models", 200),
    ("/llm", "/llm/v1/models", None, 200),
    ("/llm", "/llm/v1/models", b"/v1/models", 200),
    ("/llm", "/v1/models", b"/v1/models", 200),
    ("/llm", "/v1/models/tiny", b"/v1/models/tiny", 200),
    ("/a b", "/a b/v1/models", b"/a%20b/v1/models", 200),
    ("/a b", "/a b/v1/models", b"/a b/v1/models", 200),
    ("/llm", "/llm", b"/llm", 404),
    ("/llm", "/llm/llm/v1/models", b"/llm/llm/v1/models", 404),
    ("/v", "/v1/models", b"/v1/models", 200),
    ("", "/v1/models/t\u00e9", None, 404),
]


@in_loop
async def test_the_routes_are_below_root_path(config: Config) -> None:
    app = make_app(config)
    async with lifespan(app):
        for root_path, path, raw_path, status in ROOT_PATHS:
            answer = await ask(app, "GET", path, {}, root_path=root_path, raw_path=raw_path)
            assert answer.status == status, (root_path, path, raw_path)


async def is_idle(app: App) -> bool:
    metrics = (await ask(app, "GET", "/metrics", {})).body.decode()
    return 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in metrics


@in_loop
async def test_a_client_that_leaves_is_no_error_and_frees_the_engine(config: Config) -> None:
    app = make_app(config)
    async with lifespan(app):
        # ask() would swallow ClientDisconnected, which must not reach the host.
        answer = await ask_strictly(app, LONG)
        assert answer.status == 200 and not answer.is_whole
        while not await is_idle(app):
            await asyncio.sleep(0.01)


async def ask_strictly(app: App, body: bytes) -> Answer:
    failures: list[BaseException] = []

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as error:
            failures.append(error)

    answer = await ask(
        checked, "POST", "/v1/completions", JSON, body, lambda sent: b"data:" in sent
    )
    assert not failures
    return answer


@pytest.mark.parametrize("drain_timeout_s, is_whole", [(20, True), (0, False)])
@in_loop
async def test_shutdown_lets_requests_finish_within_the_drain_timeout(
    config: Config, drain_timeout_s: int, is_whole: bool
) -> None:
    app = make_app(dataclasses.replace(config, drain_timeout_s=drain_timeout_s))
    body = LONG.replace(b"16000", b"500" if is_whole else b"16000")
    async with lifespan(app):
        running = asyncio.create_task(complete(app, body))
        while await is_idle(app):
            await asyncio.sleep(0.01)
    answer = await running
    assert answer.is_whole is is_whole
    assert (b"server_shutting_down" in answer.body) is not is_whole


@in_loop
async def test_logging_is_set_up_and_torn_down_only_if_the_host_has_none(config: Config) -> None:
    logger = logging.getLogger("llmsrv")
    app = make_app(config)
    async with lifespan(app):
        assert not logger.handlers  # pytest has handlers at the root
    logger.propagate = False
    async with lifespan(app):
        assert len(logger.handlers) == 1 and logger.level == logging.INFO
    assert (logger.handlers, logger.propagate, logger.level) == ([], True, logging.NOTSET)


@in_loop
async def test_a_request_before_the_startup_says_what_is_missing(config: Config) -> None:
    with pytest.raises(RuntimeError, match="must support lifespan"):
        await ask(make_app(config), "GET", "/health", {})


@in_loop
async def test_a_websocket_is_refused(config: Config) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await make_app(config)({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close"}]


def test_a_request_that_memory_does_not_suffice_for_is_told_to_come_again() -> None:
    async def handler(request: Request) -> Response:
        raise MemoryError

    router = Router()
    router.add("POST", "/", handler)
    app = Application(Gate(None, ["*"], []), router)
    answer = asyncio.run(ask(app, "POST", "/", {"host": "localhost"}))
    assert answer.status == 503 and answer.headers["retry-after"] == "1"
