"""What the routes share: the served model, its engine, and whether it would answer now."""

import hashlib
import os
import re
import time
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from llmsrv.api.metrics import Counters
from llmsrv.config import Config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.files.hub import PREFIX
from llmsrv.files.open import open_model
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.defaults import chat_template
from llmsrv.text.defaults import sampling_defaults
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from llmsrv.version import __version__

RETRY = {"Retry-After": "1", "x-should-retry": "true"}


@dataclass(frozen=True)
class TextModel:
    """The half of the model that the server process needs: how text becomes ids and back.

    sampling_defaults   parameters that hold where a request does not say, by their names in it
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: dict[str, float]


def load_text_model(path: Path, template_file: str | None, cache_dir: Path) -> TextModel:
    """Tokenizer, chat template (else the one in `template_file`) and defaults of a model.

    Raises StartupError (ModelError) naming the file when one of them cannot be used.
    """
    model = open_model(path)
    tokenizer = load_tokenizer(model, cache_dir)
    source: str | None
    if template_file is not None:
        source, origin = _read_template(template_file), template_file
    else:
        source, origin = chat_template(model), str(path)
    template = None if source is None else ChatTemplate(source, tokenizer, origin)
    return TextModel(tokenizer, template, sampling_defaults(model))


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read --chat-template {path}: {error}") from None


def model_names(config: Config) -> list[str]:
    """The ids that clients use, the first one canonical: names, never paths."""
    return config.served_model_name or [name_of(config.model)]


def name_of(model: str) -> str:
    """The last part of a path or of a name on the hub, without what only files have: "tiny" for
    models/tiny.gguf, hf:org/tiny and hf:org/repository:tiny-00001-of-00002.gguf."""
    if model.startswith(PREFIX):
        last = re.split("[/:]", model)[-1]
    else:
        last = os.path.basename(os.path.abspath(model))
    return re.sub(r"(-00001-of-\d{5})?\.gguf$", "", last)


@dataclass
class Service:
    """One served model.  `text` is None until its tokenizer is loaded."""

    config: Config
    engine: EngineClient
    names: list[str]
    text: TextModel | None = None
    is_draining: bool = False
    counters: Counters = field(default_factory=Counters)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def body_limit_bytes(self) -> int:
        return self.config.body_limit_mb * 2**20

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give other tokens: with our version, model or backend."""
        ready = self.engine.ready
        parts = (__version__, self.names[0], ready and ready.backend)
        return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

    def unavailable(self) -> ApiError | None:
        """Why a request would not be served now, or None."""
        if self.is_draining:
            reason, code = "The server is shutting down.", "server_shutting_down"
        elif self.engine.state is not EngineState.READY:
            reason, code = f"The model is not ready: {self.engine.reason}.", "model_not_ready"
        elif self.text is None:
            reason, code = "The model is not ready: loading the tokenizer.", "model_not_ready"
        else:
            return None
        return ApiError(503, reason, code=code, headers=RETRY)

    def text_model(self, name: str) -> TextModel:
        """The model that a request names; ApiError 404 for another, 503 while it cannot serve."""
        if name not in self.names:
            raise unknown_model(name)
        if error := self.unavailable() or self._overloaded():
            raise error
        assert self.text is not None
        return self.text

    def _overloaded(self) -> ApiError | None:
        """Decided before any work on a request, so that refusing many costs little."""
        if self.engine.num_queued < self.config.max_queue:
            return None
        message = (
            f"The server is overloaded: {self.config.max_queue} requests are waiting. "
            "Please try again later."
        )
        return ApiError(503, message, code="server_is_overloaded", headers=RETRY)


def unknown_model(name: str) -> ApiError:
    return ApiError(
        404,
        f"The model `{name}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )
