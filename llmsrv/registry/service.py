"""A loaded model: its text half, which turns text into ids and back, and its engine."""

import hashlib
import logging
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
from llmsrv.text.defaults import read_chat_template
from llmsrv.text.defaults import sampling_defaults
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from llmsrv.text.worker import GrammarWorker
from llmsrv.version import __version__

log = logging.getLogger("llmsrv")

UNITS = "requests", "tokens of prompts"  # of the fields of Queued


@dataclass(frozen=True)
class TextModel:
    """The half of a model that the server process needs to turn text into ids and back.

    template            chat template, or None for a model without one
    sampling_defaults   sampling parameters for requests that do not set them, by request field
    grammars            checks the grammars of requests before the engine gets them
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: dict[str, float]
    grammars: GrammarWorker


def load_text_model(path: Path, template_file: str | None, cache_dir: Path) -> TextModel:
    """Loads a model's tokenizer, chat template and sampling defaults.

    template_file  a chat template to use instead of the model's own
    Raises StartupError (ModelError), which names the file, if one of them cannot be used.
    """
    model = open_model(path)
    tokenizer = load_tokenizer(model, cache_dir)
    source: str | None
    if template_file is not None:
        source, origin = _read_template(template_file), template_file
    else:
        source, origin = read_chat_template(model), str(path)
    template = None if source is None else ChatTemplate(source, tokenizer, origin)
    if template is not None:
        log.info("chat template of %s: %s", path, template.facts.describe())
    grammars = GrammarWorker(path, cache_dir)
    return TextModel(tokenizer, template, sampling_defaults(model), grammars)


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")  # a BOM is no part of the template
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read --chat-template {path}: {error}") from None


@dataclass(frozen=True)
class Service:
    """One loaded model, from its load to its unload.  A request may keep it for longer: after the
    unload its engine refuses new work."""

    config: Config
    names: list[str]
    engine: EngineClient
    text: TextModel
    counters: Counters

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint.  It changes with the version, the model and the backend,
        since the same seed may then give other tokens."""
        ready = self.engine.ready
        parts = (__version__, self.names[0], ready and ready.backend)
        return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

    def unavailable(self) -> ApiError | None:
        """The error that a request would get now, or None if it would be served."""
        if self.engine.state is EngineState.READY:
            return None
        reason = f"The model is not ready: {self.engine.reason}."
        return ApiError(503, reason, code="model_not_ready", headers=self.engine.retry)

    def overloaded(self, tenant: bytes) -> ApiError | None:
        """The error for a request that the queue has no room for, or None.

        A full queue refuses tenants that already have their equal share of it.  This is decided
        before any work on a request, so that refusing many is cheap.  Requests that the engine is
        about to take, because it has seats free, do not count as waiting.
        """
        queued = self.engine.queued()
        num_sharing = len(queued.keys() | {tenant})
        own = queued.get(tenant, Queued(0, 0))
        max_requests = self.config.max_queue + self.engine.num_free_seats
        limits = Queued(max_requests, self.config.max_queue_tokens)
        totals = Queued(*map(sum, zip(*queued.values()))) if queued else own
        for limit, total, mine, unit in zip(limits, totals, own, UNITS, strict=True):
            if total >= limit and mine * num_sharing >= limit:
                return _queue_full(f"{limit} {unit}", num_sharing)
        return None


def _queue_full(waiting: str, num_sharing: int) -> ApiError:
    message = f"The server is overloaded: {waiting} are waiting. Please try again later."
    if num_sharing == 1:
        return ApiError(503, message, code="server_is_overloaded", headers=RETRY)
    message = f"Rate limit reached: this key has its share of the queue. {message}"
    return ApiError(429, message, code="rate_limit_exceeded", headers=RETRY)
