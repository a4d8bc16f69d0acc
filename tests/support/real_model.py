"""The real model of the tests, its golden answers, and a question to it."""

import json
from pathlib import Path
from typing import Any

from openai import OpenAI

MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
GOLDEN = json.loads(
    (Path(__file__).parents[1] / "data/golden/smollm2-135m-instruct-q4_1.json").read_text()
)["cases"]


def chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=QUESTION, **settings)
