"""A chat template whose format of tool calls is not known is reported when the model is loaded."""

import asyncio
import logging
from pathlib import Path

import pytest

from llmsrv.config import Config
from llmsrv.registry.models import Model
from tests.support.gguf_writer import CHATML
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_tiny_llama


@pytest.mark.parametrize(
    ("template", "config", "is_reported"),
    [
        (CHATML + "{{ tools }}<|call|>NAME<|with|>", Config(), True),
        (CHATML + "{{ tools }}<|call|>NAME<|with|>", Config(tool_call_parser="llama3"), False),
        (CHATML + "{{ tools }}<tool_call>", Config(), False),
        (CHATML, Config(), False),
    ],
)
def test_an_unknown_format_of_tool_calls_is_reported(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    template: str,
    config: Config,
    is_reported: bool,
) -> None:
    metadata = tiny_vocabulary() | {"tokenizer.chat_template": template}
    path = write_tiny_llama(tmp_path / "tiny.gguf", metadata=metadata)
    with caplog.at_level(logging.WARNING):
        asyncio.run(Model(["tiny"], path).read_text(config))
    assert ("--tool-call-parser" in caplog.text) == is_reported
