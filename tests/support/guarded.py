"""A pytest plugin: places a page that faults right after every buffer of the CPU kernels.

Loaded by cpu/test_guarded.py as `-p tests.support.guarded`.
"""

from typing import Any

from llmsrv.backend import source
from llmsrv.backend.cpu import backend
from llmsrv.backend.cpu import library as cpu_library
from tests.support.arena import Arena


def pytest_collection() -> None:
    arena = Arena()

    def load(texts: dict[str, bytes], flags: tuple[str, ...], *others: Any) -> Any:
        library = cpu_library.declare(source.load_library(texts, flags, *others))
        return arena.library({name: getattr(library, name) for name in cpu_library.FUNCTIONS})

    setattr(backend, "load_library", load)
    arena.install()
