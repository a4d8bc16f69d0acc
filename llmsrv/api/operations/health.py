"""The routes that report on the server: health, readiness, liveness, version and metrics."""

import orjson

from llmsrv.api.operations.metrics import CONTENT_TYPE
from llmsrv.api.operations.metrics import Metrics
from llmsrv.api.operations.traffic import Traffic
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.router import Access
from llmsrv.asgi.router import Router
from llmsrv.registry.models import Models
from llmsrv.version import __version__

_OK = Response(body=b'{"status":"ok"}')
_VERSION = Response(body=orjson.dumps({"version": __version__}))


class HealthRoutes:
    def __init__(self, models: Models, traffic: Traffic) -> None:
        self._models = models
        self._metrics = Metrics(models, traffic)

    def add_to(self, router: Router) -> None:
        router.add("GET", "/health", self.health, Access.OPEN)
        router.add("GET", "/ready", self.health, Access.OPEN)
        router.add("GET", "/live", self.live, Access.OPEN)
        router.add("GET", "/version", self.version)
        router.add("GET", "/metrics", self.metrics)

    async def health(self, request: Request) -> Response:
        """200 only if a request would be served now."""
        if error := self._models.unavailable():
            raise error
        return _OK

    async def live(self, request: Request) -> Response:
        """200 while the event loop runs."""
        return _OK

    async def version(self, request: Request) -> Response:
        return _VERSION

    async def metrics(self, request: Request) -> Response:
        return Response(body=self._metrics.text(), content_type=CONTENT_TYPE)
