"""Chooses what computes: the fastest backend that can run the program here."""

import logging
from collections.abc import Callable
from collections.abc import Iterator

from llmsrv.backend.base import Backend
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.base import Program
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.errors import StartupError

log = logging.getLogger("llmsrv.backend")


def choose_backend(name: str, options: CPUOptions) -> Iterator[Callable[[], tuple[Backend, str]]]:
    """What to try, in this order, for a name of config.BACKENDS: each call makes a backend and says
    why it was chosen, in a clause, or raises StartupError."""
    if name not in ("auto", "cpu", "reference"):
        raise StartupError(f"there is no backend '{name}'; choose auto, cpu or reference")
    if name in ("auto", "cpu"):
        yield lambda: _cpu(options, "asked for" if name == "cpu" else "the fastest here")
    if name in ("auto", "reference"):
        yield lambda: (ReferenceBackend(), "asked for" if name == "reference" else "none faster")


def lay_out(
    name: str,
    options: CPUOptions,
    program: Program,
    limits: Limits,
    tick: Callable[[], None],
) -> tuple[Plan, str, str]:
    """A plan, the name of its backend and why that one, in a clause.

    With "auto" what cannot run gives way to the next, with a warning; the last one's StartupError
    is the caller's.
    """
    candidates = list(choose_backend(name, options))
    for i, make in enumerate(candidates):
        try:
            backend, reason = make()
            return backend.compile(program, limits, tick), backend.name, reason
        except StartupError as error:
            if i == len(candidates) - 1:
                raise
            log.warning("%s; numpy computes instead, some ten times slower", error)
    raise AssertionError("there is always a candidate")


def _cpu(options: CPUOptions, reason: str) -> tuple[Backend, str]:
    backend = CPUBackend(options)
    threads = f"{backend.num_threads} thread" + "s" * (backend.num_threads > 1)
    bits = f"{backend.activation_bits}-bit activations"
    return backend, f"{reason}: {backend.tier.name}, {threads}, {bits}"
