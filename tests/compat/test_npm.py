"""OpenAI's client for Node, installed by npm."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import RunningServer

pytestmark = pytest.mark.compat

SCRIPT = """
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "SmolLM2-135M-Instruct";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"],
    },
  },
}];

const whole = await client.chat.completions.create({ model, messages, temperature: 0 });

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}

const calling = client.chat.completions.stream({
  model, messages, temperature: 0, tools, tool_choice: "required", parallel_tool_calls: false,
});
const called = await calling.finalChatCompletion();

const completion = await client.completions.create({
  model, prompt: "The capital of France is", max_tokens: 3, temperature: 0, logprobs: 1,
});
const models = [];
for await (const model of client.models.list()) models.push(model.id);

let error = null;
try {
  await client.chat.completions.create({ model, messages, temperature: 3 });
} catch (caught) {
  error = { name: caught.constructor.name, param: caught.param, code: caught.code };
}
console.log(JSON.stringify({ whole, streamed, usage, called, completion, models, error }));
"""


@pytest.fixture(scope="module")
def answers(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script received, by the names of its variables."""
    folder = tmp_path_factory.mktemp("npm")
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs node and npm")
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "openai"]
    try:
        installed = subprocess.run(install, capture_output=True, text=True, timeout=60, cwd=folder)
    except subprocess.TimeoutExpired:
        pytest.skip("npm cannot fetch openai within 60 s")
    if installed.returncode:
        pytest.skip(f"npm cannot fetch openai: {installed.stderr[-500:]}")
    return run_script(folder, f"{server.url}/v1")


def run_script(folder: Path, url: str) -> dict[str, Any]:
    script = folder / "client.mjs"
    script.write_text(SCRIPT)
    run = subprocess.run(["node", str(script), url], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def test_a_chat_is_answered(answers: dict[str, Any]) -> None:
    choice = answers["whole"]["choices"][0]
    assert choice["message"]["content"] == "The capital of France is Paris."
    assert choice["finish_reason"] == "stop"


def test_a_streamed_chat_adds_up_to_the_unstreamed_one(answers: dict[str, Any]) -> None:
    whole = answers["whole"]
    assert answers["streamed"] == whole["choices"][0]["message"]["content"]
    assert answers["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_the_client_assembles_a_streamed_tool_call(answers: dict[str, Any]) -> None:
    choice = answers["called"]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def test_the_client_understands_completions_models_and_errors(answers: dict[str, Any]) -> None:
    (choice,) = answers["completion"]["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert "SmolLM2-135M-Instruct" in answers["models"]
    code = "decimal_above_max_value"
    assert answers["error"] == {"name": "BadRequestError", "param": "temperature", "code": code}
