"""The routes of models: listing them, loading and unloading them."""

from typing import Any

import msgspec
import orjson

from llmsrv.api.decode import BodyDecoder
from llmsrv.api.decode import Name
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.router import Access
from llmsrv.asgi.router import Router
from llmsrv.registry.models import Model
from llmsrv.registry.models import Models


class ModelRequest(msgspec.Struct):
    """The body of /models/load and /models/unload."""

    model: Name


class ModelRoutes:
    def __init__(self, models: Models) -> None:
        self._models = models
        self._decoder = BodyDecoder(ModelRequest)

    def add_to(self, router: Router) -> None:
        router.add("GET", "/v1/models", self.list)
        router.add("GET", "/v1/models/{id}", self.retrieve)
        router.add("POST", "/models/load", self.load, Access.OPERATOR)
        router.add("POST", "/models/unload", self.unload, Access.OPERATOR)

    async def list(self, request: Request) -> Response:
        data = [_model_object(model, name) for model in self._models for name in model.names]
        return Response(body=orjson.dumps({"object": "list", "data": data}))

    async def retrieve(self, request: Request) -> Response:
        name = request.path_params["id"]
        return _model_response(self._models.get(name), name)

    async def load(self, request: Request) -> Response:
        """Responds once the model is loaded; a no-op if it already is."""
        name = await self._requested_name(request)
        return _model_response(await self._models.load(name), name)

    async def unload(self, request: Request) -> Response:
        """Responds once the model is out of memory; a no-op if it already is."""
        name = await self._requested_name(request)
        return _model_response(await self._models.unload(name), name)

    async def _requested_name(self, request: Request) -> str:
        return (await self._decoder.read(request, self._models)).model


def _model_response(model: Model, name: str) -> Response:
    return Response(body=orjson.dumps(_model_object(model, name)))


def _model_object(model: Model, name: str) -> dict[str, Any]:
    """OpenAI's model object with its state and context length added."""
    ready = model.engine.ready if model.engine else None
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmsrv",
        "state": model.state_name,
        "max_model_len": ready.context_length if ready else None,
    }
