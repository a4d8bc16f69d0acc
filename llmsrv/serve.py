"""A server from its start to its end: port, model, engine process, application, signals.

The port is bound before anything slow, so that a port in use is told at once; clients get 503 with
the reason until the model is loaded.  A first signal lets what runs finish within its grace, a
second one ends it at once; either way each request gets its last word before the process ends.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from typing import Any

from llmsrv import log as logs
from llmsrv.api.gate import is_loopback
from llmsrv.api.gate import read_keys
from llmsrv.config import MODES
from llmsrv.config import Config
from llmsrv.config import EngineConfig
from llmsrv.engine.client import EngineClient
from llmsrv.files.source import resolve_model
from llmsrv.server.listener import bind
from llmsrv.server.server import Server
from llmsrv.server.server import run
from llmsrv.server.settings import ServerSettings
from llmsrv.version import __version__

if TYPE_CHECKING:
    from llmsrv.api.service import Service

log = logging.getLogger("llmsrv")

CTRL_C_GRACE_S = 2.0  # what streams get after the first Ctrl-C; SIGTERM gives --drain-timeout-s
LAST_WORDS_S = 0.5  # what error events get to reach their clients
EXIT_TERMINATED = 128 + signal.SIGTERM


def serve(config: Config) -> int:
    """Serves until a signal; the exit code.  Raises StartupError when it cannot begin."""
    signal.signal(signal.SIGTERM, _exit)  # until the loop has handlers of its own
    listener = logs.set_up(config.log_level)
    try:
        keys = read_keys(config.api_key, config.api_key_file)
        _warn(config, keys)
        sockets = bind(config.host, config.port)
        model_path = resolve_model(
            config.model, config.cache_dir, sys.stderr, config.hf_token
        )
        return run(_serve(config, keys, sockets, model_path))
    finally:
        listener.stop()


async def _serve(
    config: Config, keys: list[str], sockets: list[socket.socket], model_path: Path
) -> int:
    signals = _Signals()
    engine = EngineClient(
        EngineConfig(
            str(model_path),
            config.backend,
            context_window_size=config.context_window_size,
            extend_context=config.extend_context,
            threads=config.threads,
            activation_bits=config.activation_bits,
            cache_dir=str(config.cache_dir),
            log_level=config.log_level,
            **MODES[config.mode],
        )
    )
    await engine.start()
    await asyncio.sleep(0)  # the engine process starts now, beside the imports
    from llmsrv.api.app import build_app
    from llmsrv.api.service import Service
    from llmsrv.api.service import load_text_model
    from llmsrv.api.service import model_names

    service = Service(config, engine, model_names(config))
    server = Server(
        build_app(service, keys),
        sockets,
        ServerSettings(body_limit_bytes=service.body_limit_bytes),
    )
    await server.start()

    async def load() -> None:
        log.info("loading %s", model_path)
        service.text = await asyncio.to_thread(
            load_text_model, model_path, config.chat_template, config.cache_dir
        )
        await engine.wait_ready()
        _tell_ready(service, sockets[0].getsockname(), bool(keys))

    loading = asyncio.create_task(load())
    grace_s = 0.0
    try:
        await _first_of(loading, signals.first)
        if loading.done():
            loading.result()  # StartupError: the model cannot be served
        number = await signals.first
        grace_s = CTRL_C_GRACE_S if number == signal.SIGINT else config.drain_timeout_s
    finally:
        loading.cancel()
        service.is_draining = True
        await _shut_down(server, engine, grace_s, signals)
    return 0


async def _shut_down(
    server: Server, engine: EngineClient, grace_s: float, signals: "_Signals"
) -> None:
    """Lets what runs end within grace_s or until a second signal; the rest ends with an error."""
    draining = asyncio.ensure_future(server.drain(grace_s + LAST_WORDS_S))
    await _first_of(draining, signals.second, timeout_s=grace_s)
    stopping = asyncio.ensure_future(engine.stop())
    # An engine that is still in a step does not hold a hurried user up: it is killed with us.
    hurried_s = LAST_WORDS_S if signals.second.done() else None
    await asyncio.wait({draining, stopping}, timeout=hurried_s)


async def _first_of(*futures: "asyncio.Future[Any]", timeout_s: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


class _Signals:
    """The first and the second SIGINT or SIGTERM, as futures of the signal's number."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[int] = loop.create_future()
        self.second: asyncio.Future[int] = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note, number)

    def _note(self, number: int) -> None:
        if not self.first.done():
            self.first.set_result(number)
        elif not self.second.done():
            self.second.set_result(number)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _warn(config: Config, keys: list[str]) -> None:
    if config.api_key and "LLMSRV_API_KEY" not in os.environ:
        log.warning(
            "--api-key shows in the list of processes; --api-key-file and LLMSRV_API_KEY do not"
        )
    if not keys and not is_loopback(config.host):
        log.warning("anyone who can reach %s can use this server: no API key is set", config.host)


def _tell_ready(service: "Service", address: tuple[object, ...], has_key: bool) -> None:
    """Says where and how the server answers."""
    ready = service.engine.ready
    assert ready is not None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(address[0]), str(address[0]))
    url = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    key = ' -H "Authorization: Bearer $KEY"' if has_key else ""
    path, ask = "/v1/completions", '"prompt": "Once upon a time"'
    if service.text and service.text.template:
        path, ask = "/v1/chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    lines = (
        f"llmsrv {__version__} is ready at {url} with {service.names[0]} on the {ready.backend} "
        f"backend ({ready.backend_reason})\n"
        f"Try: curl {url}{path} -H 'Content-Type: application/json'{key} "
        f"-d '{{\"model\": \"{service.names[0]}\", {ask}}}'"
    )
    try:
        print(lines, flush=True)
    except OSError:  # nobody reads our output; the server serves all the same
        pass
