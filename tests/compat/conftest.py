"""A server with the default model, for other projects' clients and test suites."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import RunningServer
from tests.support.server import run_server


@pytest.fixture(scope="session")
def server(smollm2: Path) -> Iterator[RunningServer]:
    # Two names, because a suite asks for a second model.  A small context, so that an answer
    # without an end is cut off soon.
    names = "SmolLM2-135M-Instruct,second"
    with run_server("--served-model-name", names, "--context-window-size", "1024") as running:
        yield running


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips these files unless `-m` selects compat: the suites take seconds to import."""
    return "not compat" in config.getoption("markexpr") or None
