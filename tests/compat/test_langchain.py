"""Runs LangChain's integration tests of chat models with langchain-openai as the client."""

from typing import Any

import pytest

from tests.support.server import RunningServer

pytest.importorskip("langchain_tests", reason="needs '.[compat]'")

from langchain_core.language_models import BaseChatModel  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from langchain_tests.integration_tests import ChatModelIntegrationTests  # noqa: E402

pytestmark = [pytest.mark.compat, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.filterwarnings("ignore")
class TestChatOpenAI(ChatModelIntegrationTests):
    _url = ""

    @pytest.fixture(autouse=True)
    def _find_server(self, server: RunningServer) -> None:
        self._url = f"{server.url}/v1"

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": self._url,
            "api_key": "none",
            "model": "SmolLM2-135M-Instruct",
            "temperature": 0,
            "max_retries": 0,
            "max_tokens": 200,
            "frequency_penalty": 0.4,
            "stream_usage": True,
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "second"

    @pytest.mark.xfail(reason="the model omits one of the two keys that the prompt asks for")
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)

    @pytest.mark.xfail(reason="the model does not call the tool")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
