"""Usage and counters of requests, however they end: the application alone, with a scripted
engine."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import cast

import pytest

from llmsrv.api.gate import Gate
from llmsrv.api.generation.output import ChoiceOutput
from llmsrv.api.generation.output import OutputRules
from llmsrv.config import Config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.generation import Generation
from llmsrv.engine.messages import Tokens
from llmsrv.errors import ApiError
from llmsrv.http_app import build_http_app
from llmsrv.registry.models import Model
from llmsrv.registry.models import Models
from llmsrv.registry.service import Service
from llmsrv.registry.service import load_text_model
from tests.support.application import Answer
from tests.support.application import ask
from tests.support.scripted_engine import Script
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_engine import finish
from tests.support.scripted_engine import tokens

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def text_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_text_model(tiny_model, None, tmp_path_factory.mktemp("cache"))


@dataclass
class Outcome:
    answer: Answer
    model: Model
    engine: ScriptedEngine

    @property
    def counted(self) -> tuple[int, int, dict[str, int]]:
        """Prompt tokens, output tokens, and the choices by how they ended."""
        counters = self.model.counters
        return counters.prompt_tokens, counters.generation_tokens, dict(counters.finished)


Run = Callable[..., Outcome]


@pytest.fixture
def run(text_model: Any, tiny_model: Path) -> Run:
    def run_once(
        script: Script,
        leaves_after: bytes = b"\0",
        config: Config = Config(),
        **fields: Any,
    ) -> Outcome:
        """A chat with `fields`, or a completion if they have a prompt."""
        model, engine = Model(["tiny"], tiny_model), ScriptedEngine(script)
        client = cast(EngineClient, engine)
        model.service = Service(config, model.names, client, text_model, model.counters)
        app = build_http_app(Models(config, [model]), Gate("127.0.0.1", [], []), lambda: {})
        path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
        given = {} if "prompt" in fields else {"messages": MESSAGES}
        body = json.dumps({"model": "tiny", **given, **fields}).encode()
        headers = {"content-type": "application/json"}
        answer = asyncio.run(
            ask(app, "POST", path, headers, body, lambda sent: leaves_after in sent)
        )
        return Outcome(answer, model, engine)

    return run_once


def generate(generation: Generation) -> None:
    """Three tokens of the first choice, two of each other choice."""
    generation.admit(num_cached_tokens=0)
    tokens(generation, 0, 70)
    for choice in generation.unfinished:
        tokens(generation, choice, 71, 72)


def timed_out(generation: Generation) -> None:
    generate(generation)
    generation.end(ApiError(504, "Too late.", code="request_timeout"))


def crashed(generation: Generation) -> None:
    generate(generation)
    generation.lose("it crashed", "engine_restarted", is_poison=False, retry={})


def shut_down(generation: Generation) -> None:
    generate(generation)
    generation.lose("the end", "server_shutting_down", is_poison=False, retry={})


FAILURES = [
    (timed_out, 504, "request_timeout"),
    (crashed, 500, "engine_restarted"),
    (shut_down, 500, "server_shutting_down"),
]
ROUTES = [{"prompt": [5, 6, 7]}, {"messages": MESSAGES}]


@pytest.mark.parametrize("fields", ROUTES, ids=["completion", "chat"])
@pytest.mark.parametrize("failure, status, code", FAILURES)
def test_a_stream_that_fails_sends_usage_and_then_the_error(
    run: Run, failure: Script, status: int, code: str, fields: dict[str, Any]
) -> None:
    options = {"include_usage": True}
    outcome = run(failure, **fields, n=2, stream=True, stream_options=options)
    *_, last, usage, error = outcome.answer.events
    assert last["usage"] is None and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert error["error"]["code"] == code and not outcome.answer.is_whole
    num_prompt = usage["usage"]["prompt_tokens"]
    assert outcome.counted == (num_prompt, 5, {"error": 2})


@pytest.mark.parametrize("fields", ROUTES, ids=["completion", "chat"])
@pytest.mark.parametrize("failure, status, code", FAILURES)
def test_a_whole_answer_that_fails_is_an_error_and_its_tokens_are_counted(
    run: Run, failure: Script, status: int, code: str, fields: dict[str, Any]
) -> None:
    outcome = run(failure, **fields, n=2)
    assert outcome.answer.status == status
    assert json.loads(outcome.answer.body)["error"]["code"] == code
    assert outcome.counted[1:] == (5, {"error": 2})


def test_a_fault_in_the_output_ends_its_request_and_frees_the_engine(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(output: ChoiceOutput, tokens: Tokens) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ChoiceOutput, "push", faulty)
    outcome = run(generate, prompt=[5, 6, 7], n=2)
    assert outcome.answer.status == 500
    assert outcome.engine.aborted == [(0, None)]
    assert outcome.counted == (3, 0, {"error": 2})


def test_the_tokens_of_a_client_that_leaves_are_counted(run: Run) -> None:
    outcome = run(generate, leaves_after=b'"text":"', prompt=[5, 6, 7], n=2, stream=True)
    assert outcome.counted == (3, 5, {"abort": 2})
    assert outcome.engine.aborted == [(0, None)]


@pytest.mark.parametrize("options", [None, {"include_usage": False}])
def test_usage_may_be_forced_on_every_stream(run: Run, options: Any) -> None:
    def finishes(generation: Generation) -> None:
        generate(generation)
        finish(generation, 0)

    config = Config(enable_force_include_usage=True)
    outcome = run(finishes, config=config, prompt=[5, 6, 7], stream=True, stream_options=options)
    *_, usage, done = outcome.answer.events
    assert done == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 6


def test_a_request_that_was_never_admitted_counts_no_tokens(run: Run) -> None:
    def refused(generation: Generation) -> None:
        generation.lose("it crashed", "engine_restarted", is_poison=False, retry={})

    outcome = run(refused, prompt=[5, 6, 7], stream=True)
    assert (outcome.answer.status, outcome.counted) == (503, (0, 0, {"error": 1}))


def test_tokens_after_a_stop_string_are_not_counted(run: Run) -> None:
    def goes_on(generation: Generation) -> None:
        generation.admit(num_cached_tokens=2)
        tokens(generation, 0, 70, 71, 72)
        tokens(generation, 0, 73, 74)
        tokens(generation, 1, 70)
        finish(generation, 1)

    def goes_on_to_the_end(generation: Generation) -> None:
        goes_on(generation)
        finish(generation, 0)

    whole = json.loads(run(goes_on_to_the_end, prompt=[5, 6, 7], n=2).answer.body)
    letter = whole["choices"][0]["text"][1]
    outcome = run(goes_on, prompt=[5, 6, 7], n=2, stop=letter)
    assert json.loads(outcome.answer.body)["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,  # two up to the stop string, one of the other choice
        "total_tokens": 6,
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 2},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "audio_tokens": 0,
            "reasoning_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    assert outcome.counted == (3, 3, {"stop": 1, "length": 1})
    assert outcome.engine.aborted[0] == (0, 0)


@pytest.mark.parametrize(
    "is_thinking, reasoning, answer",
    [
        (False, " <think>one\ntwo</think>", "three"),
        (False, "", " <b>one</b>"),
        (False, "", "one</think>"),
        (True, "one</think>", "<think>two</think>"),
        (True, "one <", ""),
        (None, "", "<think>one</think>two"),
    ],
)
@pytest.mark.parametrize("num_each", [1, 2, 100])
def test_reasoning_and_its_tags_are_counted_in_tokens(
    text_model: Any, num_each: int, is_thinking: bool | None, reasoning: str, answer: str
) -> None:
    tokenizer = text_model.tokenizer
    reasoning_ids = tokenizer.encode(reasoning, parse_special=False)
    ids = reasoning_ids + tokenizer.encode(answer, parse_special=False)
    output = ChoiceOutput(0, tokenizer, OutputRules(is_thinking=is_thinking))
    for first in range(0, len(ids), num_each):
        output.push(Tokens(0, 0, ids[first : first + num_each], [], []))
    assert output.num_reasoning_tokens == len(reasoning_ids)
