"""The backends, and which of them an engine runs on: the fastest that can run its programs here."""

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

    load    imports the class; called only when the backend is tried, since the packages that it
            needs may not be installed
    notice  what falling back to it means for the user
    """

    load: Callable[[], type[Backend]]
    notice: str


def _load_cpu() -> type[Backend]:
    from llmsrv.backend.cpu.backend import CPUBackend

    return CPUBackend


def _load_reference() -> type[Backend]:
    from llmsrv.backend.reference.backend import ReferenceBackend

    return ReferenceBackend


# By name, the fastest first: the order in which "auto" tries them.
BACKENDS = {
    "cpu": Entry(_load_cpu, "the CPU computes instead"),
    "reference": Entry(_load_reference, "numpy computes instead, about ten times slower"),
}


def run_on_backend(
    name: str,
    options: Mapping[str, Mapping[str, Any]],
    cache_dir: Path,
    prepare: Callable[[Backend], T],
) -> tuple[Backend, str, T]:
    """Makes the backend called `name` and prepares it; "auto" stands for the fastest that can run.

    options    the options of each backend, by its name (Backend.from_options)
    cache_dir  where compiled kernels are kept
    prepare    chooses sizes and compiles the programs; "auto" may call it for several backends
    Returns the backend, why it was chosen, in a clause for the log, and what `prepare` returned.
    With "auto", a backend that raises CannotRun is skipped with a warning.  Every other error is
    final, as is that of the last backend.
    """
    if name != "auto" and name not in BACKENDS:
        raise StartupError(f"there is no backend '{name}'; choose auto, {' or '.join(BACKENDS)}")
    candidates = list(BACKENDS) if name == "auto" else [name]
    for candidate, following in zip(candidates, [*candidates[1:], None]):
        try:
            backend_class = BACKENDS[candidate].load()
            backend = backend_class.from_options(options.get(candidate, {}), cache_dir)
            prepared = prepare(backend)
        except CannotRun as error:
            if following is None:
                raise
            log.warning("%s; %s", error, BACKENDS[following].notice)
        else:
            why = "the fastest here" if name == "auto" else "asked for"
            return backend, f"{why}: {backend.description}", prepared
    raise AssertionError("the last backend raises or returns")
