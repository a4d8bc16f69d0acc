"""Structured outputs: by schema, pattern, choice, grammar and structural tag."""

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from typing import cast

import msgspec
import pytest
from openai import BadRequestError
from openai import OpenAI

from llmsrv.api.generation.grammar import answer_grammar
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.structured import wanted_grammar
from llmsrv.errors import ApiError
from llmsrv.files.open import open_model
from llmsrv.registry.service import Service
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.made_schemas import make_schema
from tests.support.server import RunningServer

MODEL = "SmolLM2-135M-Instruct"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMED = {"name": "person", "schema": PERSON, "strict": True}
TAG = {"begin": "<f>", "schema": PERSON, "end": "</f>"}
TAGS = {"type": "structural_tag", "triggers": ["<f"]}
TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<f"],
    "tags": [
        {
            "type": "tag",
            "begin": "<f>",
            "content": {"type": "json_schema", "json_schema": PERSON},
            "end": "</f>",
        }
    ],
}


# ---- The grammar that a request wants


class Unchecked:
    """Accepts every grammar."""

    async def check(self, source: str) -> str:
        return source


@pytest.fixture(scope="module")
def service(tiny_model: Path) -> Service:
    tokenizer = load_tokenizer(open_model(tiny_model))
    text = SimpleNamespace(tokenizer=tokenizer, grammars=Unchecked())
    return cast(Service, SimpleNamespace(text=text))


def source_of(service: Service, **fields: Any) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    request = msgspec.json.decode(msgspec.json.encode(body), type=ChatCompletionRequest)
    return asyncio.run(
        answer_grammar(service, wanted_grammar(request, service.text.tokenizer))
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"response_format": {"type": "json_object", "schema": json.dumps(PERSON)}},
        {"guided_json": PERSON},
        {"json_schema": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": PERSON}, "response_format": {"type": "text"}},
    ],
)
def test_a_schema_may_be_in_many_fields(service: Service, fields: dict[str, Any]) -> None:
    assert source_of(service, **fields) == json_schema_source(PERSON)


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({"guided_regex": "a+"}, [{"response_format": {"type": "regex", "regex": "a+"}}]),
        ({"guided_choice": ["a", "b"]}, [{"structured_outputs": {"choice": ["a", "b"]}}]),
        (
            {"guided_grammar": "start: /a/"},
            [
                {"response_format": {"type": "grammar", "grammar": "start: /a/"}},
                {"grammar": "start: /a/"},
            ],
        ),
        (
            {"response_format": {"type": "json_object"}},
            [{"structured_outputs": {"json_object": True}}],
        ),
        (
            {"response_format": {**TAGS, "tags": [TAG]}},
            [
                {"response_format": {**TAGS, "structures": [TAG]}},
                {"response_format": {"type": "structural_tag", "format": TRIGGERED}},
                {"structured_outputs": {"structural_tag": json.dumps({**TAGS, "tags": [TAG]})}},
            ],
        ),
    ],
)
def test_other_forms_have_vllm_s_names_too(
    service: Service, fields: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    for other in others:
        assert source_of(service, **other) == source_of(service, **fields) != ""


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": None}, {"guided_json": None}, {"response_format": {"type": "text"}}],
)
def test_most_requests_want_no_grammar(service: Service, fields: dict[str, Any]) -> None:
    assert source_of(service, **fields) == ""


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", ""),
        ({"guided_json": True}, "guided_json", "invalid_json_schema"),
        ({"guided_json": {}}, "guided_json", "invalid_json_schema"),
        ({"guided_regex": ""}, "guided_regex", "invalid_grammar"),
        ({"guided_choice": [""]}, "guided_choice", "invalid_grammar"),
        ({"guided_grammar": ""}, "guided_grammar", "invalid_grammar"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json", "invalid_json_schema"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "invalid_grammar"),
        (
            {"structured_outputs": {"structural_tag": "{"}},
            "structured_outputs.structural_tag",
            "invalid_grammar",
        ),
        ({"response_format": TAGS}, "response_format", "invalid_grammar"),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "grammar"}}},
            "response_format",
            "invalid_grammar",
        ),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format", "invalid_grammar"),
        (
            {"response_format": {"type": "grammar", "grammar": ""}},
            "response_format",
            "invalid_grammar",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format",
            "invalid_json_schema",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "regex"}},
            "response_format.regex",
            "missing_required_parameter",
        ),
    ],
)
def test_an_error_names_the_field_at_fault(
    service: Service, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as refused:
        source_of(service, **fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert code in ("", refused.value.code)


def test_a_server_follows_a_pattern_and_refuses_an_invalid_one(tiny_client: OpenAI) -> None:
    def ask(pattern: str) -> str:
        body = {"guided_regex": pattern}
        answer = tiny_client.completions.create(
            model="tiny", prompt="Hi", max_tokens=9, extra_body=body
        )
        return answer.choices[0].text

    assert re.fullmatch(r"[a-f]{3}-[0-9]{2}", ask(r"[a-f]{3}-[0-9]{2}"))
    with pytest.raises(BadRequestError, match="look-behind") as refused:
        ask("(?<=a)b")
    assert (refused.value.param, refused.value.code) == ("guided_regex", "invalid_grammar")


# ---- Answers of a real model


def ask(server: RunningServer, **fields: Any) -> tuple[str, str]:
    """The first choice's text and finish reason."""
    choice = post(server, **fields)["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def post(server: RunningServer, **fields: Any) -> Any:
    question = {"role": "user", "content": "Describe a thing of your choice as JSON."}
    body = {"model": MODEL, "messages": [question], "max_tokens": 120, **fields}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.slow
def test_every_finished_answer_is_valid_under_its_schema(server: RunningServer) -> None:
    jsonschema = pytest.importorskip("jsonschema")

    def check(seed: int) -> bool:
        schema = make_schema(seed)
        named = {"name": "made", "schema": schema}
        text, reason = ask(
            server, seed=seed, response_format={"type": "json_schema", "json_schema": named}
        )
        if reason == "stop":
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.validate(json.loads(text), schema, format_checker=checker)
        return reason == "stop"

    with ThreadPoolExecutor(32) as threads:
        stopped = list(threads.map(check, range(200)))
    assert sum(stopped) > 180


@pytest.mark.slow
def test_a_structured_answer_is_the_same_streamed_or_in_a_batch(
    server: RunningServer, client: OpenAI
) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 60,
        "seed": 7,
        "response_format": {"type": "json_schema", "json_schema": NAMED},
    }
    alone, reason = ask(server, **fields)
    assert reason == "stop" and json.loads(alone).keys() == {"name", "age"}

    plain = {**fields, "response_format": {"type": "text"}}
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda form: ask(server, **form), [fields, plain, plain] * 4))
    assert set(answers[::3]) == {(alone, "stop")}

    with client.chat.completions.create(**fields, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == alone


HOSTILE: dict[str, dict[str, Any]] = {
    "parentheses": {"guided_grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "parentheses of a pattern": {"guided_regex": "(" * 60_000 + "a" + ")" * 60_000},
    "parentheses in GBNF": {"guided_grammar": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "repetition": {"guided_regex": "a{0,1000000000}"},
    "nested stars": {"guided_grammar": 'start: ("a"*)*'},
    "chain": {
        "guided_grammar": "start: r0\n"
        + "".join(f"r{i}: r{i + 1}\n" for i in range(5000))
        + 'r5000: "a"'
    },
    "rules in a circle": {"guided_grammar": "start: a\na: b\nb: a"},
    "reference to itself": {"guided_json": {"$ref": "#"}},
    "references in a circle": {
        "guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    },
    "reference to elsewhere": {"guided_json": {"$ref": "http://example.com/schema.json"}},
    "allOf of anyOf": {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"type": "string", "pattern": f"a{i}"}, {"type": "integer"}]}
                for i in range(200)
            ]
        }
    },
    "choices": {"guided_grammar": "start: " + " | ".join(f'"w{i}"' for i in range(40_000))},
    "7 MB": {"guided_json": {"enum": ["x" * 7_000_000]}},
    "deep": {"guided_json": json.loads('{"items":' * 400 + "true" + "}" * 400)},
    "nothing": {"guided_grammar": ""},
    "empty string": {"guided_json": ""},
    "empty schema": {"guided_json": {}},
    "true": {"guided_json": True},
    "false": {"guided_json": False},
    "look-behind": {"guided_json": {"type": "string", "pattern": "(?<=a)b"}},
}
# Valid and harmless: max_tokens ends their answers.
ENDLESS: dict[str, dict[str, Any]] = {
    "nested quantifiers": {"guided_regex": "((a{0,1000}){0,1000}){0,1000}"},
    "length": {"guided_json": {"type": "string", "minLength": 1_000_000_000}},
    "recursion": {"guided_json": {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_grammar_is_refused_and_the_next_request_served(
    server: RunningServer, fields: dict[str, Any]
) -> None:
    engine = server.engine_pid()
    begun_at_s = time.monotonic()
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, **fields)
    assert time.monotonic() - begun_at_s < 4  # 1.1 s on an idle machine
    error = json.load(refused.value)["error"]
    assert refused.value.code == 400
    assert (error["param"], error["code"]) in (
        ("guided_grammar", "invalid_grammar"),
        ("guided_regex", "invalid_grammar"),
        ("guided_json", "invalid_json_schema"),
    )
    assert len(error["message"]) < 800
    assert ask(server, guided_choice=["yes"]) == ("yes", "stop")
    assert server.engine_pid() == engine


@pytest.mark.slow
@pytest.mark.parametrize("fields", ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_grammar_ends_at_max_tokens(
    server: RunningServer, fields: dict[str, Any]
) -> None:
    text, reason = ask(server, max_tokens=20, temperature=0, **fields)
    assert text and reason == "length"
