"""A model while it is loaded: how text becomes ids and back, and the engine that computes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llmsrv.config import Config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import EngineState
from llmsrv.engine.client import Queued
from llmsrv.engine.client import RETRY
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.files.open import open_model
from llmsrv.registry.counters import Counters
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.defaults import chat_template
from llmsrv.text.defaults import sampling_defaults
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from llmsrv.text.worker import GrammarWorker
from llmsrv.version import __version__

UNITS = "requests", "tokens of prompts"  # of Queued


@dataclass(frozen=True)
class TextModel:
    """The half of the model that the server process needs: how text becomes ids and back.

    sampling_defaults   parameters that hold where a request does not say, by their names in it
    grammars            checks what requests want their answers to follow
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: dict[str, float]
    grammars: GrammarWorker


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
    grammars = GrammarWorker(path, cache_dir)
    return TextModel(tokenizer, template, sampling_defaults(model), grammars)


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read --chat-template {path}: {error}") from None


@dataclass(frozen=True)
class Service:
    """One loaded model, from its load to its unload.  Who has it keeps it: after the unload, what
    is handed to its engine is refused."""

    config: Config
    names: list[str]
    engine: EngineClient
    text: TextModel
    counters: Counters

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give other tokens: with our version, model or backend."""
        ready = self.engine.ready
        parts = (__version__, self.names[0], ready and ready.backend)
        return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

    def unavailable(self) -> ApiError | None:
        """Why a request would not be served now, or None."""
        if self.engine.state is EngineState.READY:
            return None
        reason = f"The model is not ready: {self.engine.reason}."
        return ApiError(503, reason, code="model_not_ready", headers=self.engine.retry)

    def overloaded(self, tenant: bytes) -> ApiError | None:
        """Decided before any work on a request, so that refusing many costs little.

        A full queue takes no request of a tenant that has its equal share of it already."""
        queued = self.engine.queued()
        num_sharing = len(queued.keys() | {tenant})
        own = queued.get(tenant, Queued(0, 0))
        limits = Queued(self.config.max_queue, self.config.max_queue_tokens)
        totals = Queued(*map(sum, zip(*queued.values()))) if queued else own
        for limit, total, mine, unit in zip(limits, totals, own, UNITS, strict=True):
            if total >= limit and mine * num_sharing >= limit:
                return _full(f"{limit} {unit}", num_sharing)
        return None


def _full(waiting: str, num_sharing: int) -> ApiError:
    message = f"The server is overloaded: {waiting} are waiting. Please try again later."
    if num_sharing == 1:
        return ApiError(503, message, code="server_is_overloaded", headers=RETRY)
    message = f"Rate limit reached: this key has its share of the queue. {message}"
    return ApiError(429, message, code="rate_limit_exceeded", headers=RETRY)
