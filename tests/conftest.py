"""Fixtures and settings that the tests of all packages share."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings

from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.files.source import resolve_model
from tests.support.gemma3 import fetch_gemma3

pytest_plugins = ["tests.support.servers", "tests.support.cuda"]

# As the engine process does, before numpy is loaded: on two cores that other processes use too, two
# BLAS threads are several times slower than one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests start about a hundred processes.  All but the first find compiled bytecode, as a user's do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Keep the bytecode of the tests, with their rewritten asserts, for the next run.
sys.dont_write_bytecode = False

# A shell that runs the tests in the background ignores Ctrl-C, and all that we start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Collecting the tests makes hardly any garbage.
gc.disable()

# The same examples in every run; tests marked `campaign` search for new ones.
settings.register_profile(
    "repeated",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeated")


def pytest_collection_finish() -> None:
    """Objects made by the collection live to the end, so the garbage collector skips them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, fetched into the user's cache on first use, as the server does."""
    return resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M base as GGUF.  It has 253 MB, so only tests marked slow use it."""
    return fetch_gemma3(default_cache_dir() / "models", sys.stderr)
