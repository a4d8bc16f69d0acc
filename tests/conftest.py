"""What tests of every package share."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings

from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.files.source import resolve_model
from tests.support.gemma3 import fetch_gemma3

pytest_plugins = ["tests.support.servers"]

# As the engine process does, before numpy is loaded: two threads of BLAS on two cores that others
# use too are several times slower than one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The hundred processes that tests start find the bytecode of the first, as those of users do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Nor is this process to compile all tests, their asserts rewritten, in every run.
sys.dont_write_bytecode = False

# Until all tests are collected hardly anything becomes garbage.
gc.disable()

# The same examples in every run; the campaigns search for others.
settings.register_profile(
    "repeated",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeated")


def pytest_collection_finish() -> None:
    """What collecting has made stays to the end, and no search for garbage need look at it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, fetched into the user's cache on first use as the server does."""
    return resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M base as GGUF; 253 MB, so only for tests marked slow."""
    return fetch_gemma3(default_cache_dir() / "models", sys.stderr)
