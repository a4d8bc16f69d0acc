"""The engine as the API sees it: takes requests, and yields their tokens.

EngineClient keeps one engine process running.  It restarts the process, after growing pauses, if it
dies or hangs, and gives up only if the first start reports that the model cannot be run.  Each
request is a Generation and ends exactly once: it finishes, fails, is aborted, or is lost with the
engine.  No request is submitted twice; whether to retry is the caller's decision.

Runs in the server's event loop, and is not thread-safe.  Start it from the main thread: on Linux
the engine is killed when the thread that started it ends.
"""

import asyncio
import enum
import itertools
import logging
import math
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from llmsrv.config import EngineConfig
from llmsrv.engine.crashes import Crashes
from llmsrv.engine.generation import Generation
from llmsrv.engine.generation import NO_RETRY
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Failed
from llmsrv.engine.messages import FromEngine
from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import Ready
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Submit
from llmsrv.engine.supervisor import EngineProcess
from llmsrv.engine.supervisor import Patience
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError

log = logging.getLogger("llmsrv.engine")

# With more than this waiting for the pipe, the engine has not read for a long time.
MAX_UNSENT_BYTES = 8 << 20
RETRY = {"Retry-After": "1", "x-should-retry": "true"}
RESTART = "; it is started again"
MAX_RETRY_AFTER_S = 60  # clients do not wait much longer


class EngineState(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    REFUSED = "refused"  # permanent: the model cannot be run
    STOPPED = "stopped"


class Queued(NamedTuple):
    requests: int
    tokens: int  # prompt tokens of these requests


class EngineClient:
    """state         of the engine; `reason` explains it, as a clause
    ready         the engine's latest Ready message; None before the first one
    gauges        of the last step; zeros while no engine runs
    num_restarts  how often the engine was restarted
    """

    def __init__(
        self,
        config: EngineConfig,
        patience: Patience = Patience(),
        on_step: Callable[[Step, int], None] = lambda step, num_prompt_tokens: None,
        model_version: Callable[[], object] = lambda: None,
        on_replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """on_step is called after each step has been handed to its requests, with the step and the
        number of prompt tokens of the requests that were admitted in it.

        model_version changes when the model's files do; None while they are missing.  An engine
        that has run is not started again with other files, since the rest of the server knows only
        the old ones.  Instead on_replaced is called, and the state is REFUSED.
        """
        self._config = config
        self._patience = patience
        self._on_step = on_step
        self._model_version = model_version
        self._on_replaced = on_replaced
        self.state = EngineState.LOADING
        self.reason = "the model is being loaded"
        self.ready: Ready | None = None
        self.gauges = Gauges()
        self.num_restarts = 0
        self._changed = asyncio.Event()  # replaced when the state changes or requests end
        self._requests = itertools.count(1)
        self._generations: dict[int, Generation] = {}  # by request number, not ended
        self._queued: dict[bytes, Queued] = {}  # of these, what is not admitted, by tenant
        self._supervision: asyncio.Task[None] | None = None
        self._crashes = Crashes()
        self._restart_s = 0.0  # when to start the next engine, monotonic

        # State of the current engine process
        self._process: EngineProcess | None = None
        self._ready_s: float | None = None  # when it became ready, monotonic
        self._refusal: str | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def queued(self) -> Mapping[bytes, Queued]:
        """Requests that are not admitted yet, by tenant."""
        return self._queued

    @property
    def num_free_seats(self) -> int:
        """Sequences that could run in addition to those of the last step."""
        most = self.ready.max_num_sequence if self.ready else 0
        return max(0, most - self.gauges.running)

    @property
    def retry(self) -> dict[str, str]:
        """Headers of a response that asks to retry when the engine may be ready."""
        left_s = math.ceil(self._restart_s - time.monotonic())
        return RETRY | {"Retry-After": str(min(max(1, left_s), MAX_RETRY_AFTER_S))}

    @property
    def has_requests(self) -> bool:
        return bool(self._generations)

    async def start(self) -> None:
        """Starts and supervises the engine.  Returns before the model is loaded."""
        assert self._supervision is None
        self._supervision = asyncio.create_task(self._supervise())

    async def wait_ready(self, is_patient: bool = True) -> None:
        """Returns when the engine takes requests.

        Raises StartupError if it never will and, unless is_patient, if it must be restarted.
        """
        while self.state is EngineState.LOADING or (
            is_patient and self.state is EngineState.RESTARTING
        ):
            await self._changed.wait()
        if self.state is EngineState.RESTARTING:
            raise StartupError(self.reason.partition(RESTART)[0])
        if self.state is not EngineState.READY:
            raise StartupError(self.reason)

    async def idle(self) -> None:
        """Returns when every request has ended."""
        while self._generations:
            await self._changed.wait()

    def submit(self, submit: Submit) -> Generation:
        """Assigns a request its number and sends it to the engine.

        Raises ApiError 503 if it cannot be served now.
        """
        if self.state is not EngineState.READY or self._process is None:
            message = f"The model is not ready: {self.reason}."
            raise ApiError(503, message, code="model_not_ready", headers=self.retry)
        if self._process.num_waiting_bytes > MAX_UNSENT_BYTES:
            message = "The server is overloaded. Please try again later."
            raise ApiError(503, message, code="server_is_overloaded", headers=RETRY)
        submit = msgspec.structs.replace(submit, request=next(self._requests))
        self._process.send(submit)
        generation = self._generations[submit.request] = Generation(submit, self._abort)
        self._count_queued(generation, 1)
        return generation

    async def stop(
        self, reason: str = "the server is shutting down", code: str = "server_shutting_down"
    ) -> None:
        """Stops the engine and ends all requests.  May be called any time and repeatedly."""
        self._set_state(EngineState.STOPPED, reason)
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait([self._supervision])
        self._lose_all(code)
        if self._process is not None:
            await self._process.stop()
            self._process = None

    async def _supervise(self) -> None:
        """Keeps an engine running, unless the first one refuses the model or it is replaced."""
        version = self._model_version()
        for generation in itertools.count(1):
            await self._run_one(generation)
            if self.state is EngineState.REFUSED:
                return
            await asyncio.sleep(self._restart_s - time.monotonic())
            if self.ready is not None and self._model_version() not in (None, version):
                self._set_state(EngineState.REFUSED, "its files were replaced")
                self._on_replaced()
                return
            self.num_restarts += 1

    async def _run_one(self, generation: int) -> None:
        """Runs one engine process until it ends, then ends its requests."""
        self._ready_s = self._refusal = None
        try:
            engine = EngineProcess(self._config, generation, self._receive, self._patience)
        except OSError as error:
            self._note_crash(f"the engine cannot be started ({error})")
            return
        self._process = engine
        ended = await asyncio.shield(engine.ended)
        if self._refusal and self.ready is None:
            self._set_state(EngineState.REFUSED, self._refusal)
        else:
            self._note_crash(ended)
        self._lose_all("engine_restarted")
        await engine.gone()
        self._process = None

    def _note_crash(self, ended: str) -> None:
        now_s = time.monotonic()
        ready_for_s = now_s - self._ready_s if self._ready_s else 0.0
        hashes = [generation.hash for generation in self._generations.values()]
        pause_s = self._crashes.record(now_s, ready_for_s, hashes)
        self._restart_s = now_s + pause_s
        log.error("%s; restarting in %g s", self._refusal or ended, pause_s)
        # Clients see the reason, so it must not be the refusal, which names the file.
        reason = "the engine could not load the model" if self._refusal else ended
        self._set_state(EngineState.RESTARTING, f"{reason}{RESTART} in {pause_s:g} s")

    def _receive(self, message: FromEngine) -> None:
        if self.state is EngineState.STOPPED:
            return
        if isinstance(message, Step):
            self._dispatch(message)
        elif isinstance(message, Ready):
            self.ready = message
            self._ready_s = time.monotonic()
            self._set_state(EngineState.READY, "ready")
        else:
            self._refusal = message.message

    def _dispatch(self, step: Step) -> None:
        """Hands a step's results to their requests; unknown ones were just aborted."""
        generations = self._generations
        num_prompt_tokens = 0
        for admitted in step.admitted:
            if generation := generations.get(admitted.request):
                if not generation.is_admitted:
                    num_prompt_tokens += generation.num_prompt_tokens
                    self._count_queued(generation, -1)
                generation.admit(admitted.num_cached_tokens)
        for tokens in step.tokens:
            if generation := generations.get(tokens.request):
                generation.push(tokens)
        for finished in step.finished:
            if generation := generations.get(finished.request):
                generation.push(finished)
                if generation.has_ended:
                    self._remove(finished.request)
        for failed in step.failed:
            if failed.request in generations:
                self._remove(failed.request).end(_error_of(failed))
        self.gauges = step.gauges
        self._on_step(step, num_prompt_tokens)
        if not generations:
            self._note_change()

    def _abort(self, request: int, choice: int | None) -> None:
        if choice is None:
            self._remove(request).end(None)
            self._note_change()
        if self._process is not None:
            self._process.send(Abort(request, choice))

    def _remove(self, request: int) -> Generation:
        generation = self._generations.pop(request)
        if not generation.is_admitted:
            self._count_queued(generation, -1)
        return generation

    def _count_queued(self, generation: Generation, change: int) -> None:
        requests, tokens = self._queued.pop(generation.tenant, (0, 0))
        if requests + change:
            tokens += change * generation.num_prompt_tokens
            self._queued[generation.tenant] = Queued(requests + change, tokens)

    def _lose_all(self, code: str) -> None:
        """Ends all unfinished requests, with the reason of the current state."""
        generations, self._generations, self._queued = self._generations, {}, {}
        for generation in generations.values():
            is_poison = self._crashes.is_poison(generation.hash)
            if is_poison:
                log.error("request %s was in the engine at two crashes", generation.hash)
            generation.lose(self.reason, code, is_poison, self.retry)
        self.gauges = Gauges()
        self._note_change()

    def _set_state(self, state: EngineState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._note_change()

    def _note_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _error_of(failed: Failed) -> ApiError:
    headers = NO_RETRY if failed.status == 504 else None  # a retry would take as long again
    return ApiError(
        failed.status, failed.message, param=failed.param, code=failed.code, headers=headers
    )
