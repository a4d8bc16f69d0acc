"""A tiny model, its tokenizer, and a check for the texts that a grammar accepts."""

from pathlib import Path

import pytest

from llmsrv.files.open import open_model
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import write_tiny_llama
from tests.support.grammars import Texts


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(open_model(model))


@pytest.fixture(scope="session")
def texts(model: Path, tokenizer: Tokenizer) -> Texts:
    return Texts(model, tokenizer)
