"""llmsrv.api.generation.grammar: schemas of tools ask for less until their grammar compiles."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.grammar import answer_grammar
from llmsrv.api.generation.tools import ToolUse
from llmsrv.errors import ApiError
from llmsrv.files.open import open_model
from llmsrv.text.tokenizer import load_tokenizer
from llmsrv.text.tool_calls.formats import FORMATS
from llmsrv.text.worker import GrammarWorker
from tests.support.gguf_writer import write_tiny_llama


def source_of(
    tmp_path: Path, parameters: dict[str, Any], format: str = "qwen3_coder", **choice: Any
) -> str:
    """The grammar for a tool with these parameters; ApiError if it is refused."""
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    is_strict = choice.pop("is_strict", False)
    tool = ToolDefinition("f", parameters=parameters, is_strict=is_strict)
    tools = ToolUse(FORMATS[format], {"f": tool}, **choice)

    async def ask() -> str:
        grammars = GrammarWorker(path, tmp_path)
        text = SimpleNamespace(tokenizer=load_tokenizer(open_model(path)), grammars=grammars)
        service: Any = SimpleNamespace(text=text)
        try:
            return await answer_grammar(service, None, tools)
        finally:
            await grammars.close()

    return asyncio.run(ask())


UNFOLLOWED = [
    {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}}},
    {"type": "object", "properties": {"a": {"type": "array", "pattern": "(", "minItems": -1}}},
    {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}, "b": {"type": "integer"}}},
    {"type": "object", "properties": {"a": {"type": "object", "required": "x"}}},
]


@pytest.mark.parametrize("parameters", UNFOLLOWED, ids=str)
def test_a_required_call_is_possible_with_any_schema(
    tmp_path: Path, parameters: dict[str, Any]
) -> None:
    assert "<function=f>" in source_of(tmp_path, parameters, must_call=True)
    with pytest.raises(ApiError) as refused:
        source_of(tmp_path, parameters, "hermes", must_call=True, is_strict=True)
    assert (refused.value.status, refused.value.param) == (400, "tools")
    assert "%json" not in str(refused.value)


def test_a_choice_of_tools_limits_what_is_written(tmp_path: Path) -> None:
    assert source_of(tmp_path, {}) == ""
    assert "<function=f>" in source_of(tmp_path, {}, is_limited=True)
