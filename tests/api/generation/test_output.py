"""llmsrv.api.generation.output: how a choice ends, and which of its tokens are reasoning."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.output import ChoiceOutput
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.output import OutputRules
from llmsrv.api.generation.tools import ToolUse
from llmsrv.engine.messages import Tokens
from llmsrv.files.open import open_model
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from llmsrv.text.tool_calls.formats import FORMATS

HERMES = ToolUse(FORMATS["hermes"], {"f": ToolDefinition("f")})
CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(open_model(tiny_model))


def tokens_of(tokenizer: Tokenizer, text: str) -> Tokens:
    return Tokens(0, 0, tokenizer.encode(text, parse_special=False), [], [])


@pytest.mark.parametrize(
    ("reason", "wanted"), [("stop", "tool_calls"), ("length", "length"), ("abort", "abort")]
)
def test_a_call_ends_with_tool_calls_unless_it_is_cut(
    tokenizer: Tokenizer, reason: str, wanted: str
) -> None:
    output = ChoiceOutput(0, tokenizer, OutputRules(tools=HERMES))
    output.push(tokens_of(tokenizer, CALL))
    assert output.finish(reason).finish_reason == wanted
    assert output.finish_reason == reason  # what the counters see


@pytest.mark.parametrize("num_each", [1, 3, 100])
def test_the_only_call_that_is_allowed_ends_the_answer(
    tokenizer: Tokenizer, num_each: int
) -> None:
    tools = replace(HERMES, at_most_one=True)
    output = ChoiceOutput(0, tokenizer, OutputRules(tools=tools))
    ids = tokenizer.encode(f"So: {CALL}\n{CALL}", parse_special=False)
    answer = Delta(0)
    for first in range(0, len(ids), num_each):
        delta = output.push(Tokens(0, 0, ids[first : first + num_each], [], []))
        if delta:
            answer.add(delta)
        if output.finish_reason:
            break
    (call,) = answer.tool_calls
    assert (answer.text, call.arguments) == ("So:", '{"a": [1, "}"]}')
    assert (output.finish_reason, answer.finish_reason) == ("stop", "tool_calls")
    before_second = tokenizer.encode(f"So: {CALL}", parse_special=False)
    assert answer.token_ids == ids[: output.num_tokens]
    assert len(before_second) - len("</tool_call>") <= output.num_tokens < len(before_second)


@pytest.mark.parametrize("num_each", [1, 2, 100])
def test_reasoning_held_back_by_a_stop_string_is_counted(
    tokenizer: Tokenizer, num_each: int
) -> None:
    reasoning = tokenizer.encode("<think>one</think>", parse_special=False)
    ids = reasoning + tokenizer.encode("two", parse_special=False)
    rules = OutputRules(stop_strings=["</think>two!"], is_thinking=False)
    output = ChoiceOutput(0, tokenizer, rules)
    deltas = [
        output.push(Tokens(0, 0, ids[first : first + num_each], [], []))
        for first in range(0, len(ids), num_each)
    ]
    last = output.finish("length")
    assert "".join(delta.reasoning for delta in deltas if delta) + last.reasoning == "one"
    assert last.text == "two"
    assert output.num_reasoning_tokens == len(reasoning)


@pytest.mark.parametrize(
    ("stop", "text", "reasoning", "num_reasoning_chars"),
    [
        ("nk>one", "<thi", "", len("<think>one")),
        ("</think>", "", "one", len("<think>one</think>")),
        ("</think>tw", "", "one", len("<think>one</think>")),
        ("wo", "t", "one", len("<think>one</think>")),
    ],
)
def test_tags_within_a_stop_string_count_as_reasoning(
    tokenizer: Tokenizer, stop: str, text: str, reasoning: str, num_reasoning_chars: int
) -> None:
    output = ChoiceOutput(0, tokenizer, OutputRules(stop_strings=[stop], is_thinking=False))
    answer = Delta(0)
    for character in "<think>one</think>two":
        if output.finish_reason is None and (delta := output.push(tokens_of(tokenizer, character))):
            answer.add(delta)
    assert (answer.text, answer.reasoning) == (text, reasoning)
    assert (answer.finish_reason, answer.stop_string) == ("stop", stop)
    assert output.num_reasoning_tokens == num_reasoning_chars
