"""Fixtures of the tests of the OpenAI routes."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import run_server


@pytest.fixture(scope="package")
def roomy_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A tiny model with room for tools, on a server with --enable-debug and --strict-fields."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    model = write_tiny_llama(path, context_length=2048)
    with run_server("--model", str(model), "--enable-debug", "--strict-fields") as running:
        yield openai_client(running.url)
