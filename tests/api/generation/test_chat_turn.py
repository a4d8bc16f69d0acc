"""llmsrv.api.generation.chat_turn: what a dialect can build on, without any dialect."""

import asyncio
from pathlib import Path
from typing import Any
from typing import cast

import pytest

from llmsrv.api.generation.chat_turn import ChatTurn
from llmsrv.api.generation.chat_turn import DEFAULT_MODEL_REPETITION
from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.conversation import Message
from llmsrv.api.generation.conversation import ParamNames
from llmsrv.api.generation.conversation import ToolChoice
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.job import Usage
from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.options import RepetitionDetection
from llmsrv.api.generation.output import Delta
from llmsrv.asgi.request import Request
from llmsrv.config import Config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.generation import Generation
from llmsrv.engine.messages import Submit
from llmsrv.errors import ApiError
from llmsrv.registry.counters import Counters
from llmsrv.registry.service import Service
from llmsrv.registry.service import load_text_model
from tests.support.scripted_engine import Script
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_engine import finish
from tests.support.scripted_engine import tokens

HELLO = [Message("user", "hello")]
TOOL = ToolDefinition("f", parameters={"properties": {"a": {"type": "integer"}}})
OPTIONS = GenerationOptions()
NAMES = ParamNames("input", "template", "reasoning.effort")


@pytest.fixture(scope="module")
def text_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_text_model(tiny_model, None, tmp_path_factory.mktemp("cache"))


def refuse(generation: Generation) -> None:
    raise AssertionError("the engine gets no request")


def run(
    turn: ChatTurn,
    text_model: Any,
    script: Script = refuse,
    submits: list[Submit] | None = None,
    **settings: Any,
) -> tuple[list[Delta], Usage]:
    """Every delta of the turn, and its usage.  submits: gets the engine's."""
    config = Config(reasoning_parser="think", tool_call_parser="hermes", **settings)
    engine = ScriptedEngine(script, [] if submits is None else submits)
    service = Service(config, ["tiny"], cast(EngineClient, engine), text_model, Counters())

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def deltas() -> tuple[list[Delta], Usage]:
        request = Request({"method": "POST", "path": "/", "headers": []}, receive)
        running = await turn.start(request, service)
        assert running.is_thinking is False and running.prompt_ids
        return [delta async for delta in running.job.deltas()], running.job.usage()

    return asyncio.run(deltas())


def test_a_turn_has_reasoning_text_and_calls_with_their_tokens(text_model: Any) -> None:
    pieces = ["<think>hm", "</think>Let me see.", '<tool_call>{"name": "f", "arguments": {"a"',
              ": 1}}</tool_call>"]  # fmt: skip
    ids = [text_model.tokenizer.encode(piece, parse_special=False) for piece in pieces]

    def answer(generation: Generation) -> None:
        generation.admit(num_cached_tokens=3)
        for piece in ids:
            tokens(generation, 0, *piece)
        finish(generation, 0, "stop")

    turn = ChatTurn(conversation=Conversation(messages=HELLO, tools=[TOOL]), options=OPTIONS)
    deltas, usage = run(turn, text_model, answer)
    thought, text, call, arguments, last = deltas
    assert (thought.reasoning, thought.token_ids) == ("hm", ids[0])
    assert (text.text, text.token_ids) == ("Let me see.", ids[1])
    (begun,) = call.tool_calls
    assert (begun.index, begun.name, begun.arguments) == (0, "f", '{"a"') and begun.id
    (further,) = arguments.tool_calls
    assert (further.index, further.name, further.arguments) == (0, None, ": 1}")
    assert (last.finish_reason, last.text) == ("tool_calls", "")
    assert usage.num_output_tokens == sum(map(len, ids)) and usage.num_cached_tokens == 3
    assert len(ids[0]) < usage.num_reasoning_tokens < len(ids[0] + ids[1])


ASKED = RepetitionDetection(max_pattern_size=9, min_count=3)


@pytest.mark.parametrize(
    ("options", "settings", "max_tokens", "max_pattern_size"),
    [
        (OPTIONS, {}, None, DEFAULT_MODEL_REPETITION.max_pattern_size),
        (OPTIONS, {"model": ["other.gguf"]}, None, None),
        (OPTIONS, {"default_max_tokens": 50}, 50, None),
        (OPTIONS, {"default_max_tokens": 10**6}, None, None),
        (GenerationOptions(max_tokens=60), {"default_max_tokens": 50}, 60, None),
        (GenerationOptions(max_tokens=60), {}, 60, None),
        (GenerationOptions(repetition_detection=ASKED), {}, None, 9),
        (GenerationOptions(repetition_detection=RepetitionDetection()), {}, None, None),
    ],
)
def test_an_answer_is_limited_by_the_request_or_the_server_or_by_repetition(
    text_model: Any,
    options: GenerationOptions,
    settings: dict[str, Any],
    max_tokens: int | None,
    max_pattern_size: int | None,
) -> None:
    """max_tokens  None: what the context leaves"""
    submits: list[Submit] = []

    def answer(generation: Generation) -> None:
        generation.admit(num_cached_tokens=0)
        finish(generation, 0, "length")

    turn = ChatTurn(conversation=Conversation(messages=HELLO), options=options)
    run(turn, text_model, answer, submits, **settings)
    (submit,) = submits
    assert submit.max_tokens == (max_tokens or 512 - len(submit.prompt_ids))
    detection = submit.repetition_detection
    assert (detection and detection.max_pattern_size) == max_pattern_size


@pytest.mark.parametrize(
    ("fields", "options", "param"),
    [
        ({"reasoning_effort": "low"}, OPTIONS, "reasoning.effort"),
        ({"template_variables": {"x": [1]}}, OPTIONS, "template.x"),
        ({}, GenerationOptions(max_tokens=512), "input"),
        ({"messages": [Message("user", "a" * 10_000)]}, OPTIONS, "input"),
    ],
)
def test_errors_name_fields_as_the_dialect_does(
    text_model: Any, fields: dict[str, Any], options: GenerationOptions, param: str
) -> None:
    conversation = Conversation(**{"messages": HELLO, "param_names": NAMES, **fields})
    with pytest.raises(ApiError) as caught:
        run(ChatTurn(conversation=conversation, options=options), text_model)
    assert caught.value.param == param and param in caught.value.message


@pytest.mark.parametrize(
    ("tools", "choice"),
    [([], ToolChoice(must_call=True)), ([TOOL], ToolChoice(allowed_names=["g"]))],
)
def test_a_tool_choice_must_name_tools_of_the_request(
    text_model: Any, tools: list[ToolDefinition], choice: ToolChoice
) -> None:
    conversation = Conversation(messages=HELLO, tools=tools)
    with pytest.raises(ApiError) as caught:
        run(ChatTurn(conversation=conversation, options=OPTIONS, tool_choice=choice), text_model)
    assert caught.value.param == "tool_choice"
