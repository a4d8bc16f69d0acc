"""llmsrv.api.generation.message: the parts of a message, told in pieces or at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.api.generation.message import MessageReader
from llmsrv.api.generation.tools import ToolUse
from llmsrv.api.openai.schema import Function
from llmsrv.api.openai.schema import Tool
from llmsrv.text.tool_calls import FORMATS

TOOL = Tool("function", Function("f"))
HERMES = ToolUse([TOOL], FORMATS["hermes"], {"f": TOOL}, must_call=False, at_most_one=False)
CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call>'


def joined(pieces: list[str], tools: ToolUse | None, is_thinking: bool | None) -> dict[str, Any]:
    """A streamed message put together as OpenAI's clients do."""
    reader = MessageReader(tools, is_thinking)
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for i, piece in enumerate([*pieces, ""]):
        for delta in reader.deltas(piece, is_last=i == len(pieces)):
            message["content"] += delta.get("content", "")
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append(call["function"])
                else:
                    function = message["tool_calls"][call["index"]]
                    function["arguments"] += call["function"]["arguments"]
    return message


def whole(text: str, tools: ToolUse | None, is_thinking: bool | None) -> dict[str, Any]:
    message = MessageReader(tools, is_thinking).message(text)
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content") or "",
        "tool_calls": [call["function"] for call in message.get("tool_calls", ())],
    }


FRAGMENTS = ["<think>", "</think>", CALL, CALL[:20], "<tool", "a", " ", "\n", "{", "é"]


@settings(max_examples=30)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=8),
    cuts=st.sets(st.integers(0, 200), max_size=10),
    tools=st.sampled_from([None, HERMES]),
    is_thinking=st.sampled_from([None, False, True]),
)
def test_a_streamed_message_is_the_whole_one(
    fragments: list[str], cuts: set[int], tools: ToolUse | None, is_thinking: bool | None
) -> None:
    text = "".join(fragments)
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[begin:end] for begin, end in zip(ends, ends[1:])]
    pieces = pieces if "".join(pieces) == text else [text]
    assert joined(pieces, tools, is_thinking) == whole(text, tools, is_thinking)


def test_a_message_has_thoughts_text_and_calls() -> None:
    message = MessageReader(HERMES, is_thinking=False).message(
        f"<think>hm</think>Let me see. {CALL}"
    )
    assert message["reasoning_content"] == "hm"
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": [1, "}"]}'}
    assert set(call) == {"id", "type", "function"}


@pytest.mark.parametrize("reason, told", [("stop", "tool_calls"), ("length", "length")])
def test_a_call_ends_with_tool_calls_unless_it_is_cut(reason: str, told: str) -> None:
    reader = MessageReader(HERMES, is_thinking=None)
    reader.message(CALL)
    assert reader.finish_reason(reason) == told


def test_a_message_without_tools_or_thoughts_is_its_text() -> None:
    message = MessageReader(None, is_thinking=None).message(f"<think>{CALL}")
    assert message == {
        "role": "assistant",
        "content": f"<think>{CALL}",
        "refusal": None,
        "annotations": [],
    }
