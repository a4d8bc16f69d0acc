"""Runs the cases on a backend and on the reference backend, and compares what both computed."""

import gc
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.selftest.cases import Case
from llmsrv.selftest.cases import LIMITS


@dataclass(frozen=True)
class Outcome:
    """What was found for one row of the report.

    error      the largest absolute error of its cases, over the largest absolute value
    max_error  what is allowed
    failure    an exception, in its own words; empty: none
    """

    name: str
    num_cases: int
    error: float
    max_error: float
    failure: str = ""

    @property
    def is_right(self) -> bool:
        return not self.failure and self.error <= self.max_error  # false if it is NaN


def check_kernels(backend: Backend, cases: Iterable[Case]) -> Iterator[Outcome]:
    """One outcome for each kernel, whose cases are adjacent."""
    outcome: Outcome | None = None
    for case in cases:
        found = _check(backend, case)
        if outcome is not None and outcome.name != found.name:
            gc.collect()  # plans refer to themselves, and hold memory of the device
            yield outcome
            outcome = None
        outcome = _joined(outcome, found)
    if outcome is not None:
        yield outcome


def _joined(first: Outcome | None, second: Outcome) -> Outcome:
    if first is None:
        return second
    return Outcome(
        second.name,
        first.num_cases + second.num_cases,
        float(np.maximum(first.error, second.error)),  # NaN if one is
        min(first.max_error, second.max_error),
        first.failure or second.failure,
    )


def _check(backend: Backend, case: Case) -> Outcome:
    try:
        error = _error(backend, case)
    except Exception as failure:  # a kernel that cannot run leaves the others to be checked
        message = f"{type(failure).__name__}: {failure}"
        return Outcome(case.kernel, 1, np.nan, case.max_error, message)
    return Outcome(case.kernel, 1, error, case.max_error)


def _error(backend: Backend, case: Case) -> float:
    ours = backend.compile(case.program, LIMITS, _no_tick)
    reference = ReferenceBackend().compile(case.program, LIMITS, _no_tick)
    errors = []
    for batch in case.steps:
        ours.forward(batch)
        reference.forward(batch)
        errors += [_difference(ours, reference, name) for name in case.outputs]
    return float(np.max(errors))


def _difference(plan: Plan, reference: Plan, name: str) -> float:
    ours, wanted = plan.read(name), reference.read(name)
    return _largest(ours - wanted) / max(_largest(wanted), 1e-30)


def _largest(values: Array) -> float:
    return float(np.abs(values).max())


def _no_tick() -> None:
    pass
