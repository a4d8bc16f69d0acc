"""An engine that answers each request at once, as the script of a test determines."""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field

from llmsrv.engine.client import EngineState
from llmsrv.engine.generation import Generation
from llmsrv.engine.client import Queued
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Ready
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens

Script = Callable[[Generation], None]


@dataclass
class ScriptedEngine:
    """Replaces an EngineClient.  submits: all so far; aborted: request and choice of each abort."""

    script: Script
    state = EngineState.READY
    ready = Ready("llama", "none", "", 270, 512, 4, 64, 16, 0.0)
    num_free_seats = 4
    submits: list[Submit] = field(default_factory=list)
    aborted: list[tuple[int, int | None]] = field(default_factory=list)

    def queued(self) -> dict[bytes, Queued]:
        return {}

    def submit(self, submit: Submit) -> Generation:
        self.submits.append(submit)
        generation = Generation(submit, lambda *what: self.aborted.append(what))
        self.script(generation)
        return generation


def tokens(generation: Generation, choice: int, *ids: int) -> None:
    generation.push(Tokens(generation.request, choice, list(ids), [], []))


def finish(generation: Generation, choice: int, reason: str = "length") -> None:
    generation.push(Finished(generation.request, choice, reason, 0, 0, 0, 0, 0, 0))
