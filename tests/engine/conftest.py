"""Engine processes over a tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engines import SharedEngine
from tests.support.gguf_writer import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file that loads in milliseconds."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context_length=16384)


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[SharedEngine]:
    """An engine that the tests of a module share."""
    running = SharedEngine(tiny)
    yield running
    running.close()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the pauses before an engine is started again."""
    monkeypatch.setattr("llmsrv.engine.crashes.FIRST_PAUSE_S", 0.05)
