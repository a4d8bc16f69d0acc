"""The routes that say what is served and how it is: models, health, version, metrics."""

from typing import Any

import orjson

from llmsrv.api.metrics import CONTENT_TYPE
from llmsrv.api.metrics import Metrics
from llmsrv.api.service import Service
from llmsrv.api.service import unknown_model
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.router import Router
from llmsrv.version import __version__

_OK = Response(body=b'{"status":"ok"}')
_VERSION = Response(body=orjson.dumps({"version": __version__}))


class Operations:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._metrics = Metrics(service)

    def add_to(self, router: Router) -> None:
        router.add("GET", "/v1/models", self.models)
        router.add("GET", "/v1/models/{id}", self.model)
        router.add("GET", "/health", self.health)
        router.add("GET", "/ready", self.health)
        router.add("GET", "/live", self.live)
        router.add("GET", "/version", self.version)
        router.add("GET", "/metrics", self.metrics)

    async def models(self, request: Request) -> Response:
        data = [self._model(name) for name in self._service.names]
        return Response(body=orjson.dumps({"object": "list", "data": data}))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if name not in self._service.names:
            raise unknown_model(name)
        return Response(body=orjson.dumps(self._model(name)))

    async def health(self, request: Request) -> Response:
        """200 only when a request would be served now."""
        if error := self._service.unavailable():
            raise error
        return _OK

    async def live(self, request: Request) -> Response:
        """200 while the loop turns."""
        return _OK

    async def version(self, request: Request) -> Response:
        return _VERSION

    async def metrics(self, request: Request) -> Response:
        return Response(body=self._metrics.text(), content_type=CONTENT_TYPE)

    def _model(self, name: str) -> dict[str, Any]:
        ready = self._service.engine.ready
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "llmsrv",
            "max_model_len": ready.context_length if ready else None,
        }
