"""Servers that the route tests share: with the default model, and with a tiny random one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import run_server

KEY = "sk-test-0123456789"


@pytest.fixture(scope="session")
def server(smollm2: Path) -> Iterator[RunningServer]:
    """The default model, started like in the README's first command."""
    with run_server() as running:
        yield running


@pytest.fixture(scope="session")
def reference_client(smollm2: Path) -> Iterator[OpenAI]:
    """The default model on the reference backend."""
    with run_server("--backend", "reference") as running:
        yield openai_client(running.url)


@pytest.fixture(scope="session")
def client(server: RunningServer) -> OpenAI:
    return openai_client(server.url)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path) -> Iterator[RunningServer]:
    """A small random model, with a key and an alias: fast, but its output is noise."""
    names = ["--served-model-name", "tiny,org/tiny"]
    environment = {"LLMSRV_API_KEY": KEY}
    with run_server("--model", str(tiny_model), *names, environment=environment) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_client(tiny_server: RunningServer) -> OpenAI:
    return openai_client(tiny_server.url, KEY)


@pytest.fixture(scope="session")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server without a key.  Its context is long enough for requests that are still running when
    a test needs them, and tests may kill its engine."""
    path = tmp_path_factory.mktemp("open") / "tiny.gguf"
    write_tiny_llama(path, context_length=16384)
    with run_server("--model", str(path)) as running:
        yield running
