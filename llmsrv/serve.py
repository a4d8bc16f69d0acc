"""A server from its start to its end: port, models, engine processes, application, signals.

The port is bound before anything slow, so that a port in use is told at once; clients get 503 with
the reason until the models are loaded.  A first signal lets what runs finish within its grace, a
second one ends it at once; either way each request gets its last word before the process ends.
SIGHUP has the file of API keys read again.
"""

import asyncio
import functools
import gc
import logging
import os
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING
from typing import Any

from llmsrv import log as logs
from llmsrv.api.gate import Gate
from llmsrv.api.gate import is_loopback
from llmsrv.api.gate import read_keys
from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.registry.find_models import find_models
from llmsrv.registry.models import Models
from llmsrv.server.listener import bind
from llmsrv.server.server import Server
from llmsrv.server.server import run
from llmsrv.server.settings import ServerSettings
from llmsrv.version import __version__

if TYPE_CHECKING:
    from llmsrv.registry.service import Service

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
        models = Models(config, find_models(config))
        return run(_serve(models, Gate(config.host, config.allowed_hosts, keys), sockets))
    finally:
        listener.stop()


async def _serve(models: Models, gate: Gate, sockets: list[socket.socket]) -> int:
    signals = _Signals()
    if models.config.api_key_file:  # else a hang-up of the terminal ends us, as it does others
        reload = functools.partial(_reload_keys, gate, models.config)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    await models.start()
    await asyncio.sleep(0)  # the engine processes start now, beside the imports
    from llmsrv.app import build_app

    app = build_app(models, gate, lambda: vars(server.counters))
    settings = ServerSettings(body_limit_bytes=models.body_limit_bytes)
    server = Server(app, sockets, settings)
    await server.start()
    loading = asyncio.create_task(models.wait_started())
    grace_s = 0.0
    try:
        await _first_of(loading, signals.first)
        if loading.done():
            loading.result()  # StartupError: a model cannot be served
            _tell_ready(models, sockets[0].getsockname(), gate.has_keys)
            gc.freeze()  # a collection of all that was loaded would hold streams up by 20 ms
        number = await signals.first
        grace_s = CTRL_C_GRACE_S if number == signal.SIGINT else models.config.drain_timeout_s
    finally:
        loading.cancel()
        models.is_draining = True
        await _shut_down(server, models, grace_s, signals)
    return 0


async def _shut_down(
    server: Server, models: Models, grace_s: float, signals: "_Signals"
) -> None:
    """Lets what runs end within grace_s or until a second signal; the rest ends with an error."""
    draining = asyncio.ensure_future(server.drain(grace_s + LAST_WORDS_S))
    await _first_of(draining, signals.second, timeout_s=grace_s)
    stopping = asyncio.ensure_future(models.stop())
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


def _reload_keys(gate: Gate, config: Config) -> None:
    try:
        keys = read_keys(config.api_key, config.api_key_file)
    except StartupError as error:
        log.error("the API keys stay as they were: %s", error)
    else:
        gate.replace_keys(keys)
        log.info("%d API keys are taken from now on", len(keys))


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _warn(config: Config, keys: list[str]) -> None:
    if config.api_key and "LLMSRV_API_KEY" not in os.environ:
        log.warning(
            "--api-key shows in the list of processes; --api-key-file and LLMSRV_API_KEY do not"
        )
    if not keys and not is_loopback(config.host):
        log.warning("anyone who can reach %s can use this server: no API key is set", config.host)


def _tell_ready(models: Models, address: tuple[object, ...], has_key: bool) -> None:
    """Says where, with what and how the server answers."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(address[0]), str(address[0]))
    url = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    key = ' -H "Authorization: Bearer $KEY"' if has_key else ""
    path, ask = "/v1/completions", '"prompt": "Once upon a time"'
    services = [model.service for model in models if model.service]
    if services[0].text.template:
        path, ask = "/v1/chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    lines = (
        f"llmsrv {__version__} is ready at {url} with {' and '.join(map(_told, services))}\n"
        f"Try: curl {url}{path} -H 'Content-Type: application/json'{key} "
        f"-d '{{\"model\": \"{services[0].names[0]}\", {ask}}}'"
    )
    try:
        print(lines, flush=True)
    except OSError:  # nobody reads our output; the server serves all the same
        pass


def _told(service: "Service") -> str:
    ready = service.engine.ready
    assert ready is not None
    return f"{service.names[0]} on the {ready.backend} backend ({ready.backend_reason})"
