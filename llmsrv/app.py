"""The ASGI application for any server: `uvicorn --factory llmsrv.app:build`.

Its lifespan starts and stops the engines, so one process of the ASGI server serves one set of
models.  It translates between other ASGI servers and the HTTP application: it removes root_path,
and ends the requests of clients that are gone without an error.  Our own server does without:
serve.py gives it the HTTP application, and serves before the models are loaded.

Module-level imports are kept light: the engines start before the routes are imported.
"""

import asyncio
import logging
import os
from typing import TYPE_CHECKING
from urllib.parse import quote

from llmsrv import log as logs
from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.asgi.types import StreamBroken
from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.options import config_from_environment
from llmsrv.runtime import Runtime

if TYPE_CHECKING:
    from llmsrv.http_app import HttpApp

log = logging.getLogger("llmsrv")


def build(config: Config | None = None) -> ASGIApp:
    """The application, which starts when the ASGI server sends lifespan.startup.

    Without a config, the options come from the LLMSRV_ variables; those about the HTTP server, such
    as LLMSRV_PORT, have no effect.  Raises StartupError for a variable that cannot be used.
    """
    return App(config_from_environment(os.environ) if config is None else config)


class App:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._http_app: "HttpApp | None" = None  # from startup to shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self._http_app is None:
                raise RuntimeError("llmsrv has not started: the ASGI server must support lifespan")
            try:
                await self._http_app(_without_root_path(scope), receive, send)
            except (ClientDisconnected, StreamBroken):
                pass  # servers would log them as bugs; that the body is incomplete is enough
        elif scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
        else:
            await receive()
            await send({"type": "websocket.close"})

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        tear_down_log = None if logs.is_set_up() else logs.set_up(self._config.log_level)
        try:
            await receive()  # lifespan.startup
            try:
                runtime = await self._start_ready()
            except Exception as error:
                if not isinstance(error, StartupError):
                    log.exception("startup failed")
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            try:
                await send({"type": "lifespan.startup.complete"})
                await receive()  # lifespan.shutdown
                await runtime.drain(self._config.drain_timeout_s)
            finally:
                self._http_app = None
                await runtime.stop()
            await send({"type": "lifespan.shutdown.complete"})
        finally:
            if tear_down_log is not None:
                tear_down_log()

    async def _start_ready(self) -> Runtime:
        """Returns once the first models are served."""
        # In a thread, since it may have to download a model.
        runtime = await asyncio.to_thread(Runtime, self._config)
        try:
            self._http_app = await runtime.start()
            await runtime.ready()
        except BaseException:
            self._http_app = None
            await runtime.stop()
            raise
        return runtime


def _without_root_path(scope: Scope) -> Scope:
    """The scope with the paths below root_path, which is where the application is mounted.

    By the ASGI specification path begins with root_path, but not all servers follow it.  In
    raw_path the prefix may be percent-encoded or not.
    """
    root = scope.get("root_path", "").rstrip("/")
    if not root:
        return scope
    path, raw_path = scope["path"], scope.get("raw_path")
    if f"{path}/".startswith(f"{root}/"):
        path = path[len(root) :] or "/"
    for prefix in (root.encode(), quote(root).encode()):
        if raw_path and (raw_path + b"/").startswith(prefix + b"/"):
            raw_path = raw_path[len(prefix) :] or b"/"
            break
    return {**scope, "path": path, "raw_path": raw_path}
