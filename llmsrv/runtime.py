"""A server from start to stop, whatever HTTP server runs its application: models, engines, keys.

The host of the application (serve.py for our own server, the lifespan in app.py for any other)
makes a Runtime and then calls start (through App), ready, drain and stop, in this order.  It knows
nothing of sockets and signals.
"""

import asyncio
import gc
import logging
from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmsrv.api.gate import Gate
from llmsrv.api.gate import read_keys
from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.registry.find_models import find_models
from llmsrv.registry.models import Models

if TYPE_CHECKING:
    from llmsrv.http_app import HttpApp

log = logging.getLogger("llmsrv")


class Runtime:
    def __init__(self, config: Config, host: str | None = None) -> None:
        """Reads the API keys and finds the models; this may take as long as a download.

        host  the address that the HTTP server listens on, None if the host program decides that
        Raises StartupError if a key or a model cannot be used.
        """
        self.config = config
        keys = read_keys(config.api_key, config.api_key_file)
        self.gate = Gate(host, config.allowed_hosts, keys)
        self.models = Models(config, find_models(config))

    async def start(self, connections: Callable[[], Mapping[str, int]] = dict) -> "HttpApp":
        """Starts the engines, and returns the application before they are ready.

        The application answers 503 until then.  Call it in the main thread, or in one that lives as
        long as the process: on Linux an engine is killed when the thread that started it ends.

        connections  the HTTP server's counters for /metrics, as in Traffic
        """
        await self.models.start()
        await asyncio.sleep(0)  # the engine processes start now, alongside the slow imports
        from llmsrv.http_app import build_http_app

        return build_http_app(self.models, self.gate, connections)

    async def ready(self) -> None:
        """Returns once the first models are served; StartupError if one of them cannot be."""
        await self.models.wait_started()
        gc.freeze()  # or each full collection would scan all loaded objects, and stall for 20 ms

    def reload_keys(self) -> None:
        """Reads the key file again; the keys stay as they are if it cannot be used."""
        try:
            keys = read_keys(self.config.api_key, self.config.api_key_file)
        except StartupError as error:
            log.error("keeping the current API keys: %s", error)
        else:
            self.gate.replace_keys(keys)
            log.info("API keys reloaded: %d", len(keys))

    def refuse_requests(self) -> None:
        """From now on new requests get 503, and running ones go on."""
        self.models.is_draining = True

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, and returns when the running ones have ended or after grace_s."""
        self.refuse_requests()
        try:
            await asyncio.wait_for(self.models.idle(), grace_s)
        except TimeoutError:
            pass

    async def stop(self) -> None:
        """Stops the engines; requests that still run end with an error.  Safe at any time."""
        await self.models.stop()
