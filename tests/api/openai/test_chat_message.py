"""llmsrv.api.openai.chat: an assistant's message in OpenAI's shape, whole and in pieces."""

import pytest

from llmsrv.api.generation.answer_parser import ToolCallDelta
from llmsrv.api.generation.output import Delta
from llmsrv.api.openai.chat import message_deltas
from llmsrv.api.openai.chat import message_of

CALL = ToolCallDelta(0, '{"a": 1}', "call_1", "f")
FUNCTION = {"name": "f", "arguments": '{"a": 1}'}


def test_a_message_has_reasoning_text_and_calls() -> None:
    message = message_of(Delta(0, "Let me see.", "hm", [CALL]), has_reasoning=True)
    assert message["reasoning_content"] == "hm"
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [{"id": "call_1", "type": "function", "function": FUNCTION}]


def test_a_message_without_tools_or_reasoning_is_its_text() -> None:
    assert message_of(Delta(0, "<think>"), has_reasoning=False) == {
        "role": "assistant",
        "content": "<think>",
        "refusal": None,
        "annotations": [],
    }


@pytest.mark.parametrize(("calls", "content"), [([], ""), ([CALL], None)])
def test_only_a_message_of_calls_alone_has_no_content(
    calls: list[ToolCallDelta], content: str | None
) -> None:
    message = message_of(Delta(0, tool_calls=calls), has_reasoning=True)
    assert message["content"] == content and message["reasoning_content"] is None


def test_each_kind_of_part_is_a_delta_of_its_own() -> None:
    assert message_deltas(Delta(0, "Let me see.", "hm", [CALL])) == [
        {"reasoning_content": "hm"},
        {"content": "Let me see."},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": FUNCTION}]},
    ]
    assert message_deltas(Delta(0)) == []


def test_further_pieces_of_a_call_are_its_arguments_alone() -> None:
    delta = Delta(0, tool_calls=[ToolCallDelta(1, "}")])
    assert message_deltas(delta) == [
        {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]}
    ]
