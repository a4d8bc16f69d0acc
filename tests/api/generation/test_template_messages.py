"""llmsrv.api.generation.template_messages: every template takes what clients send.

The shapes of published templates times the conversations that clients have, from the request's JSON
to the text of the prompt.
"""

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from llmsrv.api.generation.prompt import prompt_ids
from llmsrv.api.openai.conversation import conversation_of
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.errors import ApiError
from llmsrv.files.gguf import open_gguf
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import CONTROL
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf
from tests.support.template_shapes import SHAPES

FOREIGN_IDS = "call_0123456789abcdef01234567", "toolu_01A09q90qw90lq917835lq9"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Wie das Wetter wird: größte Hitze, 天気",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("get_weather", "get_time")
]


def user(content: str = "first question") -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str = "be brief", role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def calls(*arguments: str, content: str | None = "", ids: Any = FOREIGN_IDS) -> dict[str, Any]:
    names = "get_weather", "get_time"
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": each}}
            for id, name, each in zip(ids, names, arguments)
        ],
    }


def result(content: Any = "sunny", id: str = FOREIGN_IDS[0]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


ROME, OSLO = '{"city": "Rome"}', '{"city": "Oslo"}'
ANSWER = {"role": "assistant", "content": "first answer"}
CALLED = ["first question", "get_weather", "Rome", "sunny"]

# Name -> messages, whether there are tools, the texts that the prompt must have.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], bool, list[str]]] = {
    "a system message": ([system(), user()], False, ["be brief", "first question"]),
    "no system message": ([user()], False, ["first question"]),
    "a late developer message": (
        [system(), user(), ANSWER, system("be kind", "developer"), user("second question")],
        False,
        ["be brief", "first question", "first answer", "be kind", "second question"],
    ),
    "a developer message between questions": (
        [user(), system("be kind", "developer"), user("second question")],
        False,
        ["first question", "be kind", "second question"],
    ),
    "tools": ([user()], True, ["first question", "größte Hitze, 天気"]),
    "tools and a system message": (
        [system(), user()], True, ["be brief", "first question", "größte Hitze, 天気"],
    ),
    "null content": ([user(), calls(ROME, content=None), result()], True, CALLED),
    "content and a call": (
        [user(), calls(ROME, content="let me see"), result()], True, CALLED,
    ),
    "two calls": (
        [user(), calls(ROME, OSLO), result(), result("noon", FOREIGN_IDS[1])],
        True,
        [*CALLED, "get_time", "Oslo", "noon"],
    ),
    "results in another order": (
        [user(), calls(ROME, OSLO), result("noon", FOREIGN_IDS[1]), result()],
        True,
        [*CALLED, "get_time", "Oslo", "noon"],
    ),
    "ids of nine characters": (
        [user(), calls(ROME, ids=["a1B2c3D4e"]), result(id="a1B2c3D4e")], True, CALLED,
    ),
    "empty arguments": ([user(), calls(""), result()], True, ["get_weather", "sunny"]),
    "null as arguments": ([user(), calls("null"), result()], True, ["get_weather", "sunny"]),
    "arguments cut off": ([user(), calls('{"city": "Ro'), result()], True, ["get_weather", "Ro"]),
    "arguments that are no object": ([user(), calls("[1, 2]"), result()], True, ["get_weather"]),
    "half an escaped character": (
        [user(), calls(r'{"city": "\ud83d"}'), result()], True, ["get_weather", "\ufffd"],
    ),
    "a result in parts": (
        [user(), calls(ROME), result([{"type": "text", "text": t} for t in ("sun", "ny")])],
        True,
        CALLED,
    ),
    "an answer to a result": (
        [system(), user(), calls(ROME), result(), ANSWER, user("second question")],
        True,
        [*CALLED, "be brief", "first answer", "second question"],
    ),
    "a question after a result": (
        [user(), calls(ROME), result(), user("second question")], True, [*CALLED, "second"],
    ),
    "a system message and a result": (
        [system(), user(), calls(ROME), result()], True, [*CALLED, "be brief"],
    ),
    "calls without tools": ([user(), calls(ROME), result()], False, ["sunny"]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    return load_tokenizer(open_gguf(write_gguf(path, tiny_vocabulary())))


@pytest.fixture(scope="module")
def templates(tokenizer: Tokenizer) -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(shape.source, tokenizer) for name, shape in SHAPES.items()}


def prompt(template: ChatTemplate, messages: list[dict[str, Any]], **fields: Any) -> str:
    ids = prompt_tokens(template, messages, **fields)
    return b"".join(map(template._tokenizer.token_bytes, ids)).decode()


def prompt_tokens(
    template: ChatTemplate, messages: list[dict[str, Any]], **fields: Any
) -> list[int]:
    tokenizer = template._tokenizer
    config = SimpleNamespace(tool_call_parser="auto")
    engine = SimpleNamespace(ready=SimpleNamespace(context_length=10_000))
    text = SimpleNamespace(template=template, tokenizer=tokenizer)
    service: Any = SimpleNamespace(text=text, config=config, engine=engine)
    request = {"model": "m", "messages": messages, **fields}
    body = msgspec.convert(request, ChatCompletionRequest)
    return asyncio.run(prompt_ids(service, conversation_of(body), body))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_template_takes_every_conversation(
    templates: dict[str, ChatTemplate], shape: str, conversation: str
) -> None:
    messages, has_tools, wanted = CONVERSATIONS[conversation]
    text = prompt(templates[shape], messages, **({"tools": TOOLS} if has_tools else {}))
    assert [part for part in wanted if part not in text] == []
    assert "None" not in text and "null" not in text
    assert has_tools is False or text.count("天気") == len(TOOLS)
    if templates[shape].facts.has_calls and "[call" in text:
        assert text.index("get_weather") < text.index("sunny")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_of_the_assistant_is_continued_by_every_template_that_ends_with_it(
    templates: dict[str, ChatTemplate], shape: str
) -> None:
    messages = [system(), user(), {"role": "assistant", "content": "so far"}]
    text = prompt(templates[shape], messages, continue_final_message=True)
    assert text.endswith("so far") and "be brief" in text


# ---- The texts themselves


@pytest.mark.parametrize(
    ("shape", "conversation", "text"),
    [
        (
            "gemma2", "a late developer message",
            "[user]be brief\n\nbe kind\n\nfirst question\n[model]first answer\n"
            "[user]second question\n[model]",
        ),
        (
            "mistral0.1", "a developer message between questions",
            "[INST] be kind\n\nfirst question\n\nsecond question [/INST]",
        ),
        ("phi3", "a system message", "[user]be brief\n\nfirst question\n[assistant]"),
        (
            "llama3.1", "two calls",
            '[system]\n[user]TOOLSfirst question\n'
            '[assistant]{"name": "get_weather", "parameters": {"city": "Rome"}}\n'
            '[ipython]"sunny"\n'
            '[assistant]{"name": "get_time", "parameters": {"city": "Oslo"}}\n'
            '[ipython]"noon"\n[assistant]',
        ),
        (
            "gpt-oss", "results in another order",
            '[tools TOOLS]\n[user]first question[get_weather]{"city": "Rome"}[result]"sunny"'
            '[get_time]{"city": "Oslo"}[result]"noon"[assistant]',
        ),
        (
            "nemo", "ids of nine characters",
            'TOOLS[INST]first question[/INST][TOOL_CALLS][{"name": "get_weather", "arguments": '
            '{"city": "Rome"}}a1B2c3D4e]</s>[TOOL_RESULTS]sunny a1B2c3D4e[/TOOL_RESULTS]',
        ),
        (
            "nemo", "a system message and a result",
            'TOOLS[INST]be brief\n\nfirst question[/INST][TOOL_CALLS][{"name": "get_weather", '
            '"arguments": {"city": "Rome"}}ab3e625ed]</s>[TOOL_RESULTS]sunny '
            'ab3e625ed[/TOOL_RESULTS]',
        ),
        (
            "qwen3.8", "arguments that are no object",
            "[tools TOOLS]\n[user]first question\n[assistant]<function=get_weather>"
            "<parameter=arguments>[1, 2]</parameter></function>\n[tool]sunny\n[assistant]",
        ),
        (
            "qwen3.8", "empty arguments",
            "[tools TOOLS]\n[user]first question\n[assistant]<function=get_weather></function>\n"
            "[tool]sunny\n[assistant]",
        ),
        (
            "deepseek-v3", "content and a call",
            '[tools TOOLS]\n[user]first question[assistant]let me see'
            '[call get_weather {"city": "Rome"}][tool]sunny[assistant]',
        ),
        (
            "deepseek-v3", "empty arguments",
            "[tools TOOLS]\n[user]first question[call get_weather {}][tool]sunny[assistant]",
        ),
        (
            "printed", "null content",
            '[tools TOOLS]\n[user]first question[assistant]get_weather {"city": "Rome"}[tool]sunny'
            "[assistant]",
        ),
        (
            "granite3.3", "null content",
            '[tools TOOLS]\n[user]first question\n[assistant]<|tool_call|>[{"name": "get_weather", '
            '"arguments": {"city": "Rome"}}]\n[tool]sunny\n[assistant]',
        ),
        (
            "kimi", "two calls",
            "[tools TOOLS]\n[user]first question[assistant]"
            '<call>functions.get_weather:0<args>{"city": "Rome"}'
            '<call>functions.get_time:1<args>{"city": "Oslo"}'
            "[tool]sunny of functions.get_weather:0[tool]noon of functions.get_time:1[assistant]",
        ),
        ("phi4-mini", "tools", "[system]TOOLS[user]first question[assistant]"),
        ("hermes", "no system message", "<tools></tools>[user]first question\n[assistant]"),
        (
            "devstral", "a late developer message",
            "be brief\n\nbe kind[user]first question[assistant]first answer[user]second question",
        ),
    ],
)
def test_a_prompt_is_as_the_template_means_it(
    templates: dict[str, ChatTemplate], shape: str, conversation: str, text: str
) -> None:
    messages, has_tools, _ = CONVERSATIONS[conversation]
    found = prompt(templates[shape], messages, **({"tools": TOOLS} if has_tools else {}))
    assert found.replace(json.dumps(TOOLS, ensure_ascii=False), "TOOLS") == text


# What a model's template says about calls, and how two of them appear as text.
WRITTEN = {
    "<|tool_call|>": (
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}, '
        '{"name": "get_time", "arguments": {"city": "Oslo"}}]'
    ),
    "List of tools: [": (
        '<|tool_call_start|>[get_weather(city="Rome"), get_time(city="Oslo")]<|tool_call_end|>'
    ),
    "<tool_call>": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call>'
    ),
    "<tool_call><function=<parameter=": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=get_time>\n<parameter=city>\nOslo\n</parameter>\n"
        "</function>\n</tool_call>"
    ),
}


@pytest.mark.parametrize("shown", WRITTEN)
def test_calls_become_text_in_the_models_format_if_the_template_renders_none(
    tokenizer: Tokenizer, shown: str
) -> None:
    source = SHAPES["granite3.3"].source.replace("<|tool_call|>", shown)
    template = ChatTemplate(source, tokenizer)
    messages, _, _ = CONVERSATIONS["two calls"]
    text = prompt(template, messages, tools=TOOLS)
    assert f"[assistant]{WRITTEN[shown]}\n[tool]sunny\n[tool]noon\n" in text


def test_only_the_markup_of_calls_becomes_special_tokens(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary()
    tokens, types = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    vocabulary["tokenizer.ggml.tokens"] = [*tokens, "<|tool_call|>"]
    vocabulary["tokenizer.ggml.token_type"] = [*types, CONTROL]
    tokenizer = load_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", vocabulary)))
    template = ChatTemplate(SHAPES["granite3.3"].source, tokenizer)
    called = calls('{"city": "<|tool_call|>"}', content="<|tool_call|>")
    ids = prompt_tokens(template, [user("<|tool_call|>"), called, result("<|tool_")], tools=TOOLS)
    assert ids.count(len(tokens)) == 1
    assert b"".join(map(tokenizer.token_bytes, ids)).count(b"<|tool_call|>") == 4


def test_a_template_without_a_system_role_hears_of_tools_in_the_first_user_message(
    templates: dict[str, ChatTemplate],
) -> None:
    for shape in ("gemma2", "mistral0.1", "phi3"):
        text = prompt(templates[shape], [system(), user(), ANSWER, user("again")], tools=TOOLS)
        first = text.split("first question")[0]
        assert "be brief\n\nYou may call one or more functions" in first
        assert json.dumps(TOOLS[0], ensure_ascii=False) in first


@pytest.mark.parametrize("shape", ["qwen2.5", "llama3.1", "granite3.3"])
def test_a_template_that_takes_a_conversation_gets_it_unchanged(
    templates: dict[str, ChatTemplate], shape: str
) -> None:
    messages = [system(), user(), ANSWER, system("be kind"), user("again")]
    assert prompt(templates[shape], messages) == templates[shape].render(messages)


def test_ids_are_replaced_alike_in_calls_and_results_of_every_turn(
    templates: dict[str, ChatTemplate],
) -> None:
    turns = [
        message
        for id in ("call_1", "call_2", "a1B2c3D4e", "call_1")
        for message in (user(), calls(ROME, ids=[id]), result(id=id), ANSWER)
    ]
    text = prompt(templates["nemo"], turns, tools=TOOLS)
    called = re.findall(r"}(\w{9})\]", text)
    assert called == re.findall(r"sunny (\w{9})\[", text)
    assert len(set(called)) == 3 and called[0] == called[3] and called[2] == "a1B2c3D4e"


def test_a_result_without_a_call_is_kept(templates: dict[str, ChatTemplate]) -> None:
    messages = [user(), calls(ROME, OSLO), result("lost", "nowhere"), result(), user("again")]
    for shape in ("llama3.1", "nemo", "qwen2.5", "gemma2"):
        text = prompt(templates[shape], messages, tools=TOOLS)
        assert "lost" in text and "sunny" in text


def test_a_refusal_that_remains_is_the_templates_own(templates: dict[str, ChatTemplate]) -> None:
    with pytest.raises(ApiError, match="roles must alternate"):
        prompt(templates["mistral0.1"], [ANSWER, user()])


def test_variables_that_a_template_does_not_know_change_nothing(
    templates: dict[str, ChatTemplate],
) -> None:
    plain = prompt(templates["qwen3"], [user()])
    assert prompt(templates["qwen3"], [user()], chat_template_kwargs={"thinking": True}) == plain
    quiet = prompt(templates["qwen3"], [user()], chat_template_kwargs={"enable_thinking": False})
    assert quiet != plain


def test_half_an_escaped_character_in_a_name_or_a_key_is_replaced(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary()
    tokenizer = load_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", vocabulary)))
    template = ChatTemplate(SHAPES["qwen3.8"].source, tokenizer)
    messages = [user(), calls(r'{"a\udc00": ["\ud83d", {"b": "\ud83d\ude00"}]}'), result()]
    assert "<parameter=a\ufffd>['\ufffd', {'b': '\U0001f600'}]" in prompt(
        template, messages, tools=TOOLS
    )
