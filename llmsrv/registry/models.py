"""The models of this server: looked up by a request's `model`, loaded and unloaded while it runs.

Each loaded model has its own engine process.  Loads and unloads take turns, so that at most
--max-loaded-models are in memory at any time; requests do not wait for a turn.  A model that is
being unloaded takes no new requests, and its running ones get the same grace as at shutdown.

Module-level imports are kept light: the first engines start while tokenizers and templates are
still being imported.
"""

import asyncio
import enum
import functools
import logging
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmsrv.config import Config
from llmsrv.config import EngineConfig
from llmsrv.config import engine_config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.engine.client import RETRY
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.registry.counters import Counters
from llmsrv.registry.model_files import total_bytes
from llmsrv.registry.model_files import version_of

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

    names        the ids that clients use, the canonical one first
    path         the model's file or folder
    draft_path   the file or folder of its draft model
    service      answers requests while the model is LOADED
    last_used_s  time of the last request for it, monotonic
    on_replaced  called when its engine must be started again and its files are not the same
    """

    def __init__(self, names: list[str], path: Path, draft_path: Path | None = None) -> None:
        self.names = names
        self.path = path
        self.draft_path = draft_path
        self.created = int(time.time())
        self.counters = Counters()
        self.last_used_s = 0.0
        self.on_replaced: Callable[[], None] = lambda: None
        self._num_restarts = 0  # of engines from earlier loads

        # Set anew by each load
        self.state = ModelState.UNLOADED
        self.service: "Service | None" = None
        self.engine: EngineClient | None = None
        self._text: "TextModel | None" = None
        self.refusal = ""  # why its replaced files could not be loaded

    @property
    def weight_bytes(self) -> int:
        """Approximate size of the weights in memory: they are kept as they are stored in the
        files."""
        return sum(map(total_bytes, self._paths))

    @property
    def _paths(self) -> list[Path]:
        return [self.path, self.draft_path] if self.draft_path else [self.path]

    @property
    def num_restarts(self) -> int:
        return self._num_restarts + (self.engine.num_restarts if self.engine else 0)

    @property
    def is_busy(self) -> bool:
        return self.engine is not None and self.engine.has_requests

    @property
    def state_name(self) -> str:
        """The state in /v1/models: a loaded model is "ready", or "restarting" with its engine."""
        if self.state is ModelState.LOADED and self.engine is not None:
            return self.engine.state.value
        return self.state.value

    def unavailable(self) -> ApiError | None:
        """The error that a request would get now, or None if it would be served."""
        if self.service is not None:
            return self.service.unavailable()
        if self.state is ModelState.LOADING:
            reason, headers = "it is being loaded", RETRY
            if self.engine is not None and self.engine.state is EngineState.RESTARTING:
                reason, headers = self.engine.reason, self.engine.retry
            message = f"The model is not ready: {reason}."
            return ApiError(503, message, code="model_not_ready", headers=headers)
        reason = self.refusal or f"The model `{self.names[0]}` is not loaded"
        return ApiError(
            503,
            f"{reason}; POST /models/load loads it.",
            param="model",
            code="model_not_loaded",
            headers={"x-should-retry": "false"},
        )

    async def read_text(self, config: Config) -> None:
        """Loads the tokenizer and the rest of the model's text half; StartupError for a bad
        file."""
        from llmsrv.registry.service import load_text_model

        log.info("loading %s", self.path)
        self.state, self.refusal = ModelState.LOADING, ""
        self._text = await asyncio.to_thread(
            load_text_model, self.path, config.chat_template, config.cache_dir
        )
        template = self._text.template
        if config.tool_call_parser == "auto" and template and template.has_unknown_tool_calls:
            log.warning(
                "%s: the chat template shows no format of tool calls that is known; calls are "
                "expected as JSON, unless --tool-call-parser names another format",
                self.path,
            )

    async def start_engine(self, config: EngineConfig) -> None:
        """Returns before the engine is ready."""
        self.state = ModelState.LOADING
        self.engine = EngineClient(
            config,
            on_step=self.counters.note_step,
            model_version=lambda: version_of(self._paths),
            on_replaced=self.on_replaced,
        )
        await self.engine.start()

    async def wait_loaded(self, config: Config, is_patient: bool) -> None:
        """Finishes a load; call it after read_text and start_engine.

        Raises StartupError when the engine refuses the model.  Unless is_patient, it also raises
        when the engine process ends before it is ready.
        """
        from llmsrv.registry.service import Service

        assert self.engine is not None and self._text is not None
        await self.engine.wait_ready(is_patient)
        self.service = Service(config, self.names, self.engine, self._text, self.counters)
        self.state = ModelState.LOADED
        self.last_used_s = time.monotonic()

    async def unload(self, grace_s: float = 0.0) -> None:
        """Stops taking requests; running ones get grace_s to finish and then end with an error."""
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
        """Stops the grammar worker process, if it was started."""
        if self._text is not None:
            await self._text.grammars.close()


class Models:
    def __init__(self, config: Config, models: list[Model]) -> None:
        self.config = config
        self.is_draining = False
        self.num_unknown_fields = 0  # ignored request fields, in total
        self._models = models
        self._by_name = {name: model for model in models for name in model.names}
        self._max_loaded = min(config.max_loaded_models or len(models), len(models))
        self._first = models[: self._max_loaded]
        self._is_starting = True  # until the first models are loaded
        self._turn = asyncio.Lock()  # held by each load and unload
        self._reloads: set[asyncio.Task[None]] = set()
        for model in models:
            model.on_replaced = functools.partial(self._reload_later, model)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    @property
    def body_limit_bytes(self) -> int:
        return self.config.body_limit_mb * 2**20

    @property
    def default_name(self) -> str | None:
        """The model for requests that name none; None if they must name one."""
        return self._models[0].names[0] if self.config.any_model_name else None

    # ---- Requests

    def find(self, name: str, tenant: bytes) -> "Service":
        """The service of the model that a request names.

        Raises ApiError 404 for an unknown model, 503 while the model cannot serve, and 503 or 429
        while it is overloaded.
        """
        model = self.get(name)
        if error := self._refusal(model, tenant):
            raise error
        assert model.service is not None
        model.last_used_s = time.monotonic()
        return model.service

    def check_before_body(self, tenant: bytes) -> None:
        """Raises the error that find() will raise, if the model's name makes no difference.

        A client that sends `Expect: 100-continue` then need not send its body.
        """
        error = self._draining()
        if len(self._models) == 1:
            error = self._refusal(self._models[0], tenant)
        if error:
            raise error

    def _refusal(self, model: Model, tenant: bytes) -> ApiError | None:
        if error := self._draining() or model.unavailable():
            return error
        assert model.service is not None
        if error := model.service.overloaded(tenant):
            model.counters.admission_rejections += 1
        return error

    def get(self, name: str) -> Model:
        """The model with that name; ApiError 404 if there is none.  --any-model-name: the only
        model."""
        if self.config.any_model_name:
            return self._models[0]
        if name not in self._by_name:
            raise ApiError(
                404,
                f"The model `{name}` does not exist or you do not have access to it.",
                param="model",
                code="model_not_found",
            )
        return self._by_name[name]

    def unavailable(self) -> ApiError | None:
        """The reason why the server is not ready, or None.

        At startup every first model must be loaded.  Later one served model is enough: a model
        that fails must not make the others unavailable.
        """
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

    # ---- Startup and shutdown

    async def start(self) -> None:
        """Starts the first engines; returns before they are ready."""
        for model in self._first:
            await model.start_engine(self._engine_config(model))

    async def wait_started(self) -> None:
        """Returns once the first models are served; StartupError if one of them cannot be."""
        async with self._turn:
            await asyncio.gather(*(self._finish_start(model) for model in self._first))
        self._is_starting = False

    async def _finish_start(self, model: Model) -> None:
        await model.read_text(self.config)
        await model.wait_loaded(self.config, is_patient=True)

    async def idle(self) -> None:
        """Returns once no engine has a request."""
        engines = [model.engine for model in self._models if model.engine is not None]
        await asyncio.gather(*(engine.idle() for engine in engines))

    async def stop(self) -> None:
        """Stops all engines; requests that still run end with an error."""
        self.is_draining = True
        for reload in self._reloads:
            reload.cancel()
        if self._reloads:
            await asyncio.wait(self._reloads)
        engines = [model.engine for model in self._models if model.engine is not None]
        await asyncio.gather(*(engine.stop() for engine in engines))
        for model in self._models:
            await model.close_text()

    # ---- The operator's requests

    async def load(self, name: str) -> Model:
        """Loads a model, unloading the least recently used one first if the limit is reached.

        Raises ApiError 500 model_refused if it cannot be loaded; the loaded models are then the
        same as before.
        """
        model = self.get(name)
        async with self._turn:
            if model.state is not ModelState.LOADED:
                await self._load(model)
        return model

    async def unload(self, name: str) -> Model:
        """Unloads a model; requests that outlast --drain-timeout-s end with an ApiError."""
        model = self.get(name)
        async with self._turn:
            if model.state is ModelState.LOADED:
                await model.unload(self.config.drain_timeout_s)
        return model

    def _engine_config(self, model: Model) -> EngineConfig:
        """The engine's options, with memory set aside for the largest models that may be loaded at
        the same time."""
        sizes = [other.weight_bytes for other in self._models if other is not model]
        others_bytes = sum(sorted(sizes, reverse=True)[: self._max_loaded - 1])
        paths = model.path, model.draft_path
        return engine_config(self.config, *paths, self._max_loaded, others_bytes)

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
            raise self._draining() or _load_error(model, error) from None

    def _reload_later(self, model: Model) -> None:
        task = asyncio.create_task(self._reload(model))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self, model: Model) -> None:
        """Loads a model whose files were replaced.  If that fails, it is unloaded."""
        async with self._turn:
            engine = model.engine
            if engine is not None and engine.state is EngineState.REFUSED:
                log.warning("the files of %s were replaced; loading them", model.path)
                await model.unload()
                try:
                    await self._load(model)
                except ApiError as error:  # which _load has logged
                    model.refusal = error.message

    async def _make_room(self) -> Model | None:
        """Unloads a model if the limit is reached, and returns it."""
        loaded = [model for model in self._models if model.state is ModelState.LOADED]
        if len(loaded) < self._max_loaded:
            return None
        model = min(loaded, key=lambda model: (model.is_busy, model.last_used_s))
        await model.unload(self.config.drain_timeout_s)
        return model


def _load_error(model: Model, error: StartupError) -> ApiError:
    """The client's error; it names the model where the StartupError names the file."""
    reason = str(error).replace(str(model.path), model.names[0])
    return ApiError(
        500,
        f"The model `{model.names[0]}` cannot be loaded: {reason}",
        param="model",
        code="model_refused",
        headers={"x-should-retry": "false"},
    )
