"""The default model, as clients of other makers meet it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import RunningServer
from tests.support.server import run_server


@pytest.fixture(scope="session")
def server(smollm2: Path) -> Iterator[RunningServer]:
    # Two names, since suites ask for a second model; a model that does not find an end finds one.
    names = "SmolLM2-135M-Instruct,second"
    with run_server("--served-model-name", names, "--context-window-size", "1024") as running:
        yield running


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Suites of others take seconds to import: only where they are to run."""
    return "not compat" in config.getoption("markexpr") or None
