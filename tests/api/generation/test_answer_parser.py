"""llmsrv.api.generation.answer_parser: reasoning, text and calls, from pieces or from the whole."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.api.generation.answer_parser import AnswerParser
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.tools import ToolUse
from llmsrv.text.tool_calls.formats import FORMATS

HERMES = ToolUse(FORMATS["hermes"], {"f": ToolDefinition("f")})
CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call>'


def parsed(pieces: list[str], tools: ToolUse | None, is_thinking: bool | None) -> Delta:
    """The answer, put together from the deltas of its pieces."""
    parser = AnswerParser(tools, is_thinking)
    answer = Delta(0)
    for i, piece in enumerate(pieces):
        parts = parser.push(piece, is_last=i == len(pieces) - 1)
        for call in parts.tool_calls:
            assert (call.id is None) == (call.name is None) == (call.index < len(answer.tool_calls))
            call.id = "any"
        answer.add(Delta(0, parts.text, parts.reasoning, parts.tool_calls))
    assert parser.num_tool_calls == len(answer.tool_calls)
    return answer


FRAGMENTS = ["<think>", "</think>", CALL, CALL[:20], "<tool", "a", " ", "\n", "{", "é"]


@settings(max_examples=30)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=8),
    cuts=st.sets(st.integers(0, 200), max_size=10),
    tools=st.sampled_from([None, HERMES]),
    is_thinking=st.sampled_from([None, False, True]),
)
def test_an_answer_parsed_in_pieces_is_the_whole_one(
    fragments: list[str], cuts: set[int], tools: ToolUse | None, is_thinking: bool | None
) -> None:
    text = "".join(fragments)
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[begin:end] for begin, end in zip(ends, ends[1:])]
    pieces = pieces if "".join(pieces) == text else [text]
    assert parsed([*pieces, ""], tools, is_thinking) == parsed([text], tools, is_thinking)


def test_an_answer_has_reasoning_text_and_calls() -> None:
    answer = parsed([f"<think>hm</think>Let me see. {CALL}"], HERMES, is_thinking=False)
    assert answer.reasoning == "hm"
    assert answer.text == "Let me see."
    (call,) = answer.tool_calls
    assert (call.name, call.arguments) == ("f", '{"a": [1, "}"]}')


def test_an_answer_without_tools_or_reasoning_is_its_text() -> None:
    answer = parsed([f"<think>{CALL}"], None, is_thinking=None)
    assert answer == Delta(0, text=f"<think>{CALL}")
