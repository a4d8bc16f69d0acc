"""The models of this server: found by a request's `model`, loaded and unloaded while it runs.

Each loaded model has an engine process of its own.  Loads and unloads take turns, so that never
more than --max-loaded-models are in memory; requests need no turn.  A model that is unloaded takes
no new request, and gives those that run the grace that a shutdown gives them.

The top imports little: the first engines start beside the import of tokenizers and templates.
"""

import asyncio
import enum
import glob
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmsrv.config import Config
from llmsrv.config import EngineConfig
from llmsrv.config import engine_config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import RETRY
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.files.hub import PREFIX
from llmsrv.files.source import resolve_model
from llmsrv.registry.counters import Counters

if TYPE_CHECKING:
    from llmsrv.registry.service import Service
    from llmsrv.registry.service import TextModel

log = logging.getLogger("llmsrv")


class ModelState(enum.Enum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


class Model:
    """One model, loaded or not.

    names        ids that clients use, the first one canonical
    path         its file or folder
    draft_path   that of the small model that guesses for it
    service      what answers requests, while it is LOADED
    last_used_s  when a request asked for it last, monotonic
    """

    def __init__(self, names: list[str], path: Path, draft_path: Path | None = None) -> None:
        self.names = names
        self.path = path
        self.draft_path = draft_path
        self.created = int(time.time())
        self.counters = Counters()
        self.last_used_s = 0.0
        self._num_restarts = 0  # of the engines of earlier loads

        # Of one load
        self.state = ModelState.UNLOADED
        self.service: "Service | None" = None
        self.engine: EngineClient | None = None
        self._text: "TextModel | None" = None

    @property
    def weight_bytes(self) -> int:
        """What its weights take in memory, about: they are kept as the files have them."""
        return _file_bytes(self.path) + (_file_bytes(self.draft_path) if self.draft_path else 0)

    @property
    def num_restarts(self) -> int:
        return self._num_restarts + (self.engine.num_restarts if self.engine else 0)

    @property
    def is_busy(self) -> bool:
        return self.engine is not None and self.engine.has_requests

    @property
    def state_name(self) -> str:
        """As /v1/models tells it: a loaded model is "ready", or its engine "restarting"."""
        if self.state is ModelState.LOADED and self.engine is not None:
            return self.engine.state.value
        return self.state.value

    def unavailable(self) -> ApiError | None:
        """Why a request would not be served now, or None."""
        if self.service is not None:
            return self.service.unavailable()
        if self.state is ModelState.LOADING:
            reason = "The model is not ready: it is being loaded."
            return ApiError(503, reason, code="model_not_ready", headers=RETRY)
        return ApiError(
            503,
            f"The model `{self.names[0]}` is not loaded; POST /models/load loads it.",
            param="model",
            code="model_not_loaded",
            headers={"x-should-retry": "false"},
        )

    async def read_text(self, config: Config) -> None:
        """The tokenizer and what else the file says about text; StartupError for a bad file."""
        from llmsrv.registry.service import load_text_model

        log.info("loading %s", self.path)
        self.state = ModelState.LOADING
        self._text = await asyncio.to_thread(
            load_text_model, self.path, config.chat_template, config.cache_dir
        )

    async def start_engine(self, config: EngineConfig) -> None:
        """Returns before the engine is ready."""
        self.state = ModelState.LOADING
        self.engine = EngineClient(config, on_step=self.counters.note_step)
        await self.engine.start()

    async def wait_loaded(self, config: Config, is_patient: bool) -> None:
        """After the two before; StartupError when the engine refuses the model or, unless
        is_patient, ends before it is ready."""
        from llmsrv.registry.service import Service

        assert self.engine is not None and self._text is not None
        await self.engine.wait_ready(is_patient)
        self.service = Service(config, self.names, self.engine, self._text, self.counters)
        self.state = ModelState.LOADED
        self.last_used_s = time.monotonic()

    async def unload(self, grace_s: float = 0.0) -> None:
        """Takes no new request from now on; what runs gets grace_s, and then ends with an error."""
        self.state, self.service = ModelState.UNLOADING, None
        if self.engine is not None:
            try:
                await asyncio.wait_for(self.engine.idle(), grace_s)
            except TimeoutError:
                pass
            await self.engine.stop("the model is unloaded", "model_unloaded")
            self._num_restarts += self.engine.num_restarts
        await self.close_text()
        self.state, self.engine, self._text = ModelState.UNLOADED, None, None

    async def close_text(self) -> None:
        """Ends the process that checks grammars, if there is one."""
        if self._text is not None:
            await self._text.grammars.close()


class Models:
    def __init__(self, config: Config, models: list[Model]) -> None:
        self.config = config
        self.is_draining = False
        self.num_unknown_fields = 0  # of requests, ignored
        self._models = models
        self._by_name = {name: model for model in models for name in model.names}
        self._max_loaded = min(config.max_loaded_models or len(models), len(models))
        self._first = models[: self._max_loaded]
        self._is_starting = True  # until the first ones are loaded
        self._turn = asyncio.Lock()  # of loads and unloads

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    @property
    def body_limit_bytes(self) -> int:
        return self.config.body_limit_mb * 2**20

    # ---- Requests

    def find(self, name: str, tenant: bytes) -> "Service":
        """What serves the model that a request names; ApiError 404 for one that is not known, 503
        or 429 while it cannot serve or has too much to do."""
        model = self._models[0] if self.config.any_model_name else self.get(name)
        if error := self._draining() or model.unavailable():
            raise error
        assert model.service is not None
        if error := model.service.overloaded(tenant):
            raise error
        model.last_used_s = time.monotonic()
        return model.service

    def get(self, name: str) -> Model:
        """ApiError 404 for a name that is not known."""
        if name not in self._by_name:
            raise ApiError(
                404,
                f"The model `{name}` does not exist or you do not have access to it.",
                param="model",
                code="model_not_found",
            )
        return self._by_name[name]

    def unavailable(self) -> ApiError | None:
        """Why no request would be served now, or None.  When the server starts all its models have
        to be there; later one that fails must not take the others from its clients."""
        if error := self._draining():
            return error
        models = self._first if self._is_starting else self._models
        errors = [model.unavailable() for model in models]
        return next(filter(None, errors), None) if self._is_starting or all(errors) else None

    def _draining(self) -> ApiError | None:
        if not self.is_draining:
            return None
        reason = "The server is shutting down."
        return ApiError(503, reason, code="server_shutting_down", headers=RETRY)

    # ---- The server's start and end

    async def start(self) -> None:
        """Starts the first engines; returns before they are ready."""
        for model in self._first:
            await model.start_engine(self._engine_config(model))

    async def wait_started(self) -> None:
        """Returns when the first models are served; StartupError when one of them cannot be."""
        async with self._turn:
            await asyncio.gather(*(self._finish_start(model) for model in self._first))
        self._is_starting = False

    async def _finish_start(self, model: Model) -> None:
        await model.read_text(self.config)
        await model.wait_loaded(self.config, is_patient=True)

    async def stop(self) -> None:
        """Ends all engines and what still runs."""
        self.is_draining = True
        engines = [model.engine for model in self._models if model.engine is not None]
        await asyncio.gather(*(engine.stop() for engine in engines))
        for model in self._models:
            await model.close_text()

    # ---- What its operator asks for

    async def load(self, name: str) -> Model:
        """Loads a model; where that is one too many, the least recently used one is unloaded.

        ApiError 500 model_refused when it cannot be loaded, which changes nothing.
        """
        model = self.get(name)
        async with self._turn:
            if model.state is not ModelState.LOADED:
                await self._load(model)
        return model

    async def unload(self, name: str) -> Model:
        """Unloads a model; ApiErrors end what it has not finished within --drain-timeout-s."""
        model = self.get(name)
        async with self._turn:
            if model.state is ModelState.LOADED:
                await model.unload(self.config.drain_timeout_s)
        return model

    def _engine_config(self, model: Model) -> EngineConfig:
        """With its part of the memory, where the largest that may be loaded beside it are."""
        sizes = [other.weight_bytes for other in self._models if other is not model]
        beside = sum(sorted(sizes, reverse=True)[: self._max_loaded - 1])
        paths = model.path, model.draft_path
        return engine_config(self.config, *paths, self._max_loaded, beside)

    async def _load(self, model: Model) -> None:
        unloaded = None
        try:
            await model.read_text(self.config)
            unloaded = await self._make_room()
            if error := self._draining():
                raise error
            await model.start_engine(self._engine_config(model))
            await model.wait_loaded(self.config, is_patient=False)
        except BaseException as error:
            await model.unload()
            if unloaded is not None and not self.is_draining:
                await self._load(unloaded)
            if not isinstance(error, StartupError):
                raise
            log.error("%s", error)
            raise self._draining() or _refused(model, error) from None

    async def _make_room(self) -> Model | None:
        """Unloads a model where one more would be too many, and returns it."""
        loaded = [model for model in self._models if model.state is ModelState.LOADED]
        if len(loaded) < self._max_loaded:
            return None
        model = min(loaded, key=lambda model: (model.is_busy, model.last_used_s))
        await model.unload(self.config.drain_timeout_s)
        return model


def find_models(config: Config) -> list[Model]:
    """The models of the options, each with its file, fetched where need be.

    Raises StartupError when there is none or one is not there, two have the same name, or an option
    that fits one model only comes with several.
    """
    if not config.model:
        raise StartupError("--model names no model")
    single = config.served_model_name or config.chat_template or config.any_model_name
    if single and len(config.model) > 1:
        raise StartupError(
            "--served-model-name, --chat-template and --any-model-name are for one model, and "
            f"there are {len(config.model)}; several are named by --model NAME=PATH"
        )
    models = [_find_model(config, text) for text in config.model]
    names = [name for model in models for name in model.names]
    for name in names:
        if names.count(name) > 1:
            raise StartupError(f"two models are called {name!r}; name them by --model NAME=PATH")
    return models


def _find_model(config: Config, text: str) -> Model:
    name, equals, source = text.partition("=")
    if not equals or os.path.exists(text):
        name, source = name_of(text), text
    path = resolve_model(source, config.cache_dir, sys.stderr, config.hf_token)
    return Model(config.served_model_name or [name], path, _find_draft(config))


def _find_draft(config: Config) -> Path | None:
    wanted = int(config.speculative_mode == "small_draft")
    if len(config.additional_models) != wanted:
        raise StartupError(
            f"--speculative-mode {config.speculative_mode} takes {wanted} of --additional-models, "
            f"not {len(config.additional_models)}"
        )
    if not wanted:
        return None
    source = config.additional_models[0]
    return resolve_model(source, config.cache_dir, sys.stderr, config.hf_token)


def name_of(model: str) -> str:
    """The last part of a path or of a name on the hub, without what only files have: "tiny" for
    models/tiny.gguf, hf:org/tiny and hf:org/repository:tiny-00001-of-00002.gguf."""
    if model.startswith(PREFIX):
        last = re.split("[/:]", model)[-1]
    else:
        last = os.path.basename(os.path.abspath(model))
    return re.sub(r"(-00001-of-\d{5})?\.gguf$", "", last)


def _file_bytes(path: Path) -> int:
    """Of a model's file, of all its parts, or of the weights in its folder."""
    if path.is_dir():
        files = path.glob("*.safetensors")
    else:
        files = path.parent.glob(glob.escape(path.name).replace("-00001-of-", "-*-of-"))
    return sum(file.stat().st_size for file in files)


def _refused(model: Model, error: StartupError) -> ApiError:
    """Clients know models by their names, so theirs stands where the error names the file."""
    reason = str(error).replace(str(model.path), model.names[0])
    return ApiError(
        500,
        f"The model `{model.names[0]}` cannot be loaded: {reason}",
        param="model",
        code="model_refused",
        headers={"x-should-retry": "false"},
    )
