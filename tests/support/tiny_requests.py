"""Requests to a server with the tiny random model."""

import json
import urllib.error
import urllib.request
from typing import Any

from openai import OpenAI

from tests.support.server import RunningServer
from tests.support.servers import KEY

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


def complete(client: OpenAI, prompt: Any = "hello", **fields: Any) -> Any:
    known = {name: fields.pop(name) for name in ("n", "stream") if name in fields}
    body = {"max_tokens": 8, "seed": 1, **fields}
    return client.completions.create(model="tiny", prompt=prompt, **known, extra_body=body)


def chat(client: OpenAI, messages: list[Any] = MESSAGES, **fields: Any) -> Any:
    known = {name: fields.pop(name) for name in ("stream",) if name in fields}
    body = {"max_tokens": 8, "seed": 1, **fields}
    return client.chat.completions.create(
        model="tiny", messages=messages, **known, extra_body=body
    )


def post(server: RunningServer, path: str, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The status, and the error object if there is one."""
    return post_body(server, path, json.dumps({"model": "tiny", **fields}))


def post_body(server: RunningServer, path: str, body: str) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}{path}", body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, {}
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
