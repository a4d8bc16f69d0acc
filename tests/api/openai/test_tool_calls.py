"""Tools in requests, on a tiny random model."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.server import RunningServer
from tests.support.tiny_requests import MESSAGES
from tests.support.tiny_requests import WEATHER
from tests.support.tiny_requests import chat
from tests.support.tiny_requests import complete
from tests.support.tiny_requests import post_body

REFERENCE = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("depth", [100, 400, 960, 100_000])
def test_tools_nested_too_deeply_are_refused(tiny_server: RunningServer, depth: int) -> None:
    parameters = '{"a":' * depth + "{}" + "}" * depth
    tools = [{"type": "function", "function": {"name": "f", "parameters": "HERE"}}]
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "tools": tools})
    body = body.replace('"HERE"', parameters)
    status, error = post_body(tiny_server, "/v1/chat/completions", body)
    assert status == 400
    assert error["code"] in ("context_length_exceeded", "invalid_value", "invalid_json")


@pytest.mark.slow
def test_arguments_nested_too_deeply_are_text(roomy_client: OpenAI) -> None:
    call = {"name": "f", "arguments": "[" * 100_000}
    message = {"role": "assistant", "tool_calls": [{"id": "1", "function": call}]}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(roomy_client, [*MESSAGES, message])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_a_template_without_tools_gets_calls_and_results_as_text(roomy_client: OpenAI) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "tool", "tool_call_id": "2", "content": "snow"},
    ]
    answer = chat(roomy_client, messages, tools=[WEATHER], return_token_ids=True, max_tokens=1)
    prompt = complete(roomy_client, answer.prompt_token_ids, echo=True, max_tokens=1)
    text = prompt.choices[0].text
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert '"name": "get_weather"' in text and "<tools>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n' in text
    assert "user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsnow\n" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [REFERENCE]}},
    ],
    ids=str,
)
def test_a_required_call_is_made(roomy_client: OpenAI, choice: Any) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    answer = chat(roomy_client, **fields, max_tokens=120).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    stream = roomy_client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, max_tokens=120, stream=True, extra_body=fields
    )
    streamed = ""
    for chunk in stream:
        for delta in chunk.choices[0].delta.tool_calls or []:
            streamed += delta.function.arguments if delta.function else ""
    assert streamed == call.function.arguments
    assert chunk.choices[0].finish_reason == "tool_calls"


@pytest.mark.slow
def test_tool_choice_none_hides_the_tools(roomy_client: OpenAI) -> None:
    num_prompt_tokens = chat(roomy_client, tools=[WEATHER], tool_choice="none").usage.prompt_tokens
    assert num_prompt_tokens == chat(roomy_client).usage.prompt_tokens
