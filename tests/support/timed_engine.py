"""An engine on a fake clock, where the duration of a step follows from its rows."""

import random

import numpy as np

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from tests.support.cores import Engine
from tests.support.fake_plan import FakePlan


class Clock:
    """The current time.  Each step advances it by

    step_s      for the step itself
    row_s       for each row
    position_s  for each earlier position that a row attends to
    noise       a random share on top of that
    """

    def __init__(
        self,
        step_s: float = 0.004,
        row_s: float = 0.0004,
        position_s: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.now_s = 1000.0
        self.step_s = step_s
        self.row_s = row_s
        self.position_s = position_s
        self.noise = noise
        self._rng = random.Random(1)

    def __call__(self) -> float:
        return self.now_s

    def make_plan(self, limits: Limits) -> FakePlan:
        plan = FakePlan(limits)
        forward = plan.forward

        def timed(batch: Batch) -> None:
            forward(batch)
            attention_s = self.position_s * float(batch.positions.sum())
            elapsed_s = self.step_s + self.row_s * len(batch.ids) + attention_s
            self.now_s += elapsed_s * (1 + self.noise * abs(self._rng.gauss(0, 1)))

        plan.forward = timed  # type: ignore[method-assign]
        return plan


def timed_engine(clock: Clock, **options: float) -> Engine:
    sizes = {"max_rows": 512, "max_sequences": 32, "blocks": 1000, "context": 2000, **options}
    return Engine(make_plan=clock.make_plan, clock=clock, **sizes)  # type: ignore[arg-type]


def gaps_of(engine: Engine, clock: Clock, request: int, end: int) -> list[float]:
    """Seconds between the tokens of `request` until the request `end` has finished."""
    times = []
    while (end, 0) not in engine.finished:
        if any(tokens.request == request for tokens in engine.step().tokens):
            times.append(clock.now_s)
    return np.diff(times).tolist()
