"""The routes that say what is served and how it is: models and their
loading, health, version, metrics."""

from typing import Any

import msgspec
import orjson

from llmsrv.api import decode
from llmsrv.api.openai.schema import Name
from llmsrv.api.operations.metrics import CONTENT_TYPE
from llmsrv.api.operations.metrics import Metrics
from llmsrv.api.operations.traffic import Traffic
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.router import Router
from llmsrv.registry.models import Model
from llmsrv.registry.models import Models
from llmsrv.version import __version__

_OK = Response(body=b'{"status":"ok"}')
_VERSION = Response(body=orjson.dumps({"version": __version__}))


class ModelRequest(msgspec.Struct):
    """The body of /models/load and /models/unload."""

    model: Name


class Operations:
    def __init__(self, models: Models, traffic: Traffic) -> None:
        self._models = models
        self._metrics = Metrics(models, traffic)
        self._decoder = msgspec.json.Decoder(ModelRequest)

    def add_to(self, router: Router) -> None:
        router.add("GET", "/v1/models", self.models)
        router.add("GET", "/v1/models/{id}", self.model)
        router.add("POST", "/models/load", self.load)
        router.add("POST", "/models/unload", self.unload)
        router.add("GET", "/health", self.health)
        router.add("GET", "/ready", self.health)
        router.add("GET", "/live", self.live)
        router.add("GET", "/version", self.version)
        router.add("GET", "/metrics", self.metrics)

    async def models(self, request: Request) -> Response:
        data = [_shown(model, name) for model in self._models for name in model.names]
        return Response(body=orjson.dumps({"object": "list", "data": data}))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        return _told(self._models.get(name), name)

    async def load(self, request: Request) -> Response:
        """Answers when the model is loaded, also where it was already."""
        name = await self._asked(request)
        return _told(await self._models.load(name), name)

    async def unload(self, request: Request) -> Response:
        """Answers when the model is out of memory, also where it was already."""
        name = await self._asked(request)
        return _told(await self._models.unload(name), name)

    async def _asked(self, request: Request) -> str:
        asked = await decode.read(request, self._decoder, self._models)
        return asked.model

    async def health(self, request: Request) -> Response:
        """200 only when a request would be served now."""
        if error := self._models.unavailable():
            raise error
        return _OK

    async def live(self, request: Request) -> Response:
        """200 while the loop turns."""
        return _OK

    async def version(self, request: Request) -> Response:
        return _VERSION

    async def metrics(self, request: Request) -> Response:
        return Response(body=self._metrics.text(), content_type=CONTENT_TYPE)


def _told(model: Model, name: str) -> Response:
    return Response(body=orjson.dumps(_shown(model, name)))


def _shown(model: Model, name: str) -> dict[str, Any]:
    ready = model.engine.ready if model.engine else None
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmsrv",
        "state": model.state_name,
        "max_model_len": ready.context_length if ready else None,
    }
