"""All backends, and the choice of the one that an engine runs on: the fastest that can."""

import logging
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import TypeVar

from llmsrv.backend.base import Backend
from llmsrv.backend.base import CannotRun
from llmsrv.errors import StartupError

log = logging.getLogger("llmsrv.backend")

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A backend that can be chosen.

    load    imports its class; called only when the backend is tried, since the packages that it
            needs may not be installed
    notice  what falling back to this backend means, for the log
    """

    load: Callable[[], type[Backend]]
    notice: str


def _load_cuda() -> type[Backend]:
    from llmsrv.backend.cuda.driver import query_driver

    query_driver()  # most machines have no driver, and need not import the rest
    from llmsrv.backend.cuda.backend import CUDABackend

    return CUDABackend


def _load_cpu() -> type[Backend]:
    from llmsrv.backend.cpu.backend import CPUBackend

    return CPUBackend


def _load_reference() -> type[Backend]:
    from llmsrv.backend.reference.backend import ReferenceBackend

    return ReferenceBackend


# By name, the fastest first: the order in which "auto" tries them.
BACKENDS = {
    "cuda": Entry(_load_cuda, "the GPU computes instead"),
    "cpu": Entry(_load_cpu, "the CPU computes instead"),
    "reference": Entry(_load_reference, "numpy computes instead, about ten times slower"),
}


def run_on_backend(
    name: str,
    options: Mapping[str, Mapping[str, Any]],
    cache_dir: Path,
    prepare: Callable[[Backend], T],
) -> tuple[Backend, str, T]:
    """Makes the backend called `name` and calls `prepare` with it.

    name       "auto" tries all backends, the fastest first, until one can run
    options    backend -> its own options (Backend.from_options)
    cache_dir  where compiled kernels are cached
    prepare    chooses sizes and compiles the programs
    Returns the backend, the reason for it as a clause for the log, and the result of `prepare`.

    "auto" skips a backend that raises CannotRun, in from_options or in `prepare`, and logs why: as
    a warning, unless most machines are like this one.  Any other error is final, and so is
    CannotRun from the last backend.
    """
    if name != "auto" and name not in BACKENDS:
        *others, last = BACKENDS
        names = f"auto, {', '.join(others)} or {last}"
        raise StartupError(f"there is no backend '{name}'; choose {names}")
    candidates = list(BACKENDS) if name == "auto" else [name]
    for candidate, following in zip(candidates, [*candidates[1:], None]):
        try:
            backend_class = BACKENDS[candidate].load()
            backend = backend_class.from_options(options.get(candidate, {}), cache_dir)
            prepared = prepare(backend)
        except CannotRun as error:
            if following is None:
                raise
            level = logging.INFO if error.is_ordinary else logging.WARNING
            log.log(level, "%s; %s", error, BACKENDS[following].notice)
        else:
            why = "the fastest here" if name == "auto" else "as requested"
            return backend, f"{why}: {backend.description}", prepared
    raise AssertionError("the last backend raises or returns")
