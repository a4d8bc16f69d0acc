"""llmsrv.api.generation.tools: how the model may call tools."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmsrv.api.generation.conversation import ToolChoice
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.tools import tool_use
from llmsrv.files.gguf import open_gguf
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf
from tests.support.template_shapes import SHAPES


@pytest.mark.parametrize(
    ("shape", "choice", "at_most_one"),
    [
        ("llama3.1", ToolChoice(must_call=True), True),
        ("llama3.1", ToolChoice(), True),
        ("qwen2.5", ToolChoice(), False),
        ("gpt-oss", ToolChoice(must_call=True), True),
        ("qwen2.5", ToolChoice(must_call=True), False),
        ("qwen2.5", ToolChoice(must_call=True, at_most_one=True), True),
        ("gemma2", ToolChoice(must_call=True), False),
        (None, ToolChoice(must_call=True), False),
    ],
)
def test_one_call_is_made_where_the_template_takes_no_more_in_a_message(
    tmp_path: Path, shape: str | None, choice: ToolChoice, at_most_one: bool
) -> None:
    tokenizer = load_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", tiny_vocabulary())))
    template = None if shape is None else ChatTemplate(SHAPES[shape].source, tokenizer)
    config = SimpleNamespace(tool_call_parser="auto")
    service: Any = SimpleNamespace(text=SimpleNamespace(template=template), config=config)
    use = tool_use(service, [ToolDefinition("f")], choice)
    assert use is not None and use.at_most_one is at_most_one
