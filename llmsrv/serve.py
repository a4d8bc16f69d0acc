"""`python llmsrv.py`: the application on our own HTTP server, with its port and its signals.

The port is bound before anything slow, so that a port in use is reported at once.  Clients get 503
with the reason until the models are loaded.  On the first signal, running requests get a grace
period to finish; a second signal ends them at once.  Either way each request gets its final event
before the process exits.  SIGHUP reloads the file of API keys; without one it is as SIGTERM.
"""

import asyncio
import logging
import os
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING
from typing import Any

from llmsrv import log as logs
from llmsrv.api.gate import is_loopback
from llmsrv.config import Config
from llmsrv.runtime import Runtime
from llmsrv.server.listener import bind
from llmsrv.server.server import Server
from llmsrv.server.server import run
from llmsrv.server.settings import ServerSettings
from llmsrv.version import __version__

if TYPE_CHECKING:
    from llmsrv.registry.service import Service

log = logging.getLogger("llmsrv")

CTRL_C_GRACE_S = 2.0  # for running requests after the first Ctrl-C; SIGTERM: --drain-timeout-s
LAST_WORDS_S = 0.5  # for error events to reach their clients
EXIT_TERMINATED = 128 + signal.SIGTERM


def serve(config: Config) -> int:
    """Serves until a signal and returns the exit code; StartupError if it cannot start."""
    signal.signal(signal.SIGTERM, _exit)  # until the event loop has its own handlers
    logs.guard_output()
    logs.set_up(config.log_level)
    _warn_about_keys(config)
    sockets = bind(config.host, config.port)
    runtime = Runtime(config, config.host)
    return run(_serve(runtime, sockets))


async def _serve(runtime: Runtime, sockets: list[socket.socket]) -> int:
    config = runtime.config
    signals = _Signals(signal.SIGINT, signal.SIGTERM)
    if config.api_key_file:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, runtime.reload_keys)
    elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signals.watch(signal.SIGHUP)  # the terminal is gone
    app = await runtime.start(lambda: vars(server.counters))
    settings = ServerSettings(body_limit_bytes=runtime.models.body_limit_bytes)
    server = Server(app, sockets, settings, app.error_headers)
    await server.start()
    loading = asyncio.create_task(runtime.ready())
    grace_s = 0.0
    try:
        await _first_of(loading, signals.first)
        if loading.done():
            loading.result()  # StartupError: a model cannot be served
            print(_ready_message(runtime, sockets[0].getsockname()))
        number = await signals.first
        grace_s = CTRL_C_GRACE_S if number == signal.SIGINT else config.drain_timeout_s
    finally:
        loading.cancel()
        await _shut_down(server, runtime, grace_s, signals)
    return 0


async def _shut_down(
    server: Server, runtime: Runtime, grace_s: float, signals: "_Signals"
) -> None:
    """Lets requests finish within grace_s or until a second signal; the rest end with an error."""
    runtime.refuse_requests()
    draining = asyncio.ensure_future(server.drain(grace_s + LAST_WORDS_S))
    await _first_of(draining, signals.second, timeout_s=grace_s)
    stopping = asyncio.ensure_future(runtime.stop())
    # After a second signal, do not wait for an engine's current step: it is killed with us.
    timeout_s = LAST_WORDS_S if signals.second.done() else None
    await asyncio.wait({draining, stopping}, timeout=timeout_s)


async def _first_of(*futures: "asyncio.Future[Any]", timeout_s: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


class _Signals:
    """The first and the second signal to stop, as futures of the signal's number."""

    def __init__(self, *numbers: int) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[int] = loop.create_future()
        self.second: asyncio.Future[int] = loop.create_future()
        for number in numbers:
            self.watch(number)

    def watch(self, number: int) -> None:
        asyncio.get_running_loop().add_signal_handler(number, self._note, number)

    def _note(self, number: int) -> None:
        if not self.first.done():
            self.first.set_result(number)
        elif not self.second.done():
            self.second.set_result(number)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_TERMINATED)


# ---- Messages to the operator


def _warn_about_keys(config: Config) -> None:
    if config.api_key and "LLMSRV_API_KEY" not in os.environ:
        log.warning(
            "--api-key is visible in the process list; --api-key-file and LLMSRV_API_KEY are not"
        )
    if not (config.api_key or config.api_key_file) and not is_loopback(config.host):
        log.warning(
            "no API key is set: anyone who can reach %s can use this server", config.host
        )


def _ready_message(runtime: Runtime, address: tuple[object, ...]) -> str:
    """The server's URL and models, and a first request to try."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(address[0]), str(address[0]))
    url = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    key = ' -H "Authorization: Bearer $KEY"' if runtime.gate.has_keys else ""
    path, field = "/v1/completions", '"prompt": "Once upon a time"'
    services = [model.service for model in runtime.models if model.service]
    if services[0].text.template:
        path, field = "/v1/chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    return (
        f"llmsrv {__version__} is ready at {url} with {' and '.join(map(_description, services))}\n"
        f"Try: curl {url}{path} -H 'Content-Type: application/json'{key} "
        f"-d '{{\"model\": \"{services[0].names[0]}\", {field}, \"max_tokens\": 64}}'"
    )


def _description(service: "Service") -> str:
    ready = service.engine.ready
    assert ready is not None
    return f"{service.names[0]} on the {ready.backend} backend ({ready.backend_reason})"
