"""From the text of a choice to the parts of an assistant's message: content, reasoning, calls."""

from dataclasses import dataclass
from dataclasses import field
from typing import Any

from llmsrv.api.generation.tools import ToolUse
from llmsrv.api.generation.tools import call_id
from llmsrv.text.reasoning import CLOSING
from llmsrv.text.reasoning import OPENING
from llmsrv.text.reasoning import ReasoningParser
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tool_calls import CallDelta


@dataclass
class Parts:
    """What is new of a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class MessageReader:
    """Reads one choice.  num_calls: tool calls so far."""

    def __init__(self, tools: ToolUse | None, is_thinking: bool | None) -> None:
        """is_thinking: whether the prompt has begun the thoughts; None: the model has none."""
        self._tools = tools
        self._reasoning = None if is_thinking is None else ReasoningParser(is_thinking)
        self._calls = tools.parser() if tools else None

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls if self._calls else 0

    def read(self, text: str, is_last: bool) -> Parts:
        """Takes the next text; with the last, everything that was held back comes out."""
        parts = Parts(text)
        if self._reasoning:
            parts.reasoning, parts.content = self._reasoning.push(text)
            if is_last:
                reasoning, content = self._reasoning.flush()
                parts.reasoning += reasoning
                parts.content += content
        if self._calls:
            parts.content, parts.calls = self._calls.push(parts.content)
            if is_last:
                content, calls = self._calls.flush()
                parts.content += content
                parts.calls += calls
        return parts

    def finish_reason(self, reason: str) -> str:
        """What the client is told when the choice ended so."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def message(self, text: str) -> dict[str, Any]:
        """The whole message."""
        parts = self.read(text, is_last=True)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parts.content if parts.content or not parts.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if self._reasoning:
            message["reasoning_content"] = parts.reasoning or None
        if parts.calls:
            message["tool_calls"] = self._whole_calls(parts.calls)
        return message

    def deltas(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        """What a stream says of the next text, one kind of part in each delta."""
        if self._reasoning is None and self._calls is None:
            return [{"content": text}] if text else []
        parts = self.read(text, is_last)
        deltas: list[dict[str, Any]] = []
        if parts.reasoning:
            deltas.append({"reasoning_content": parts.reasoning})
        if parts.content:
            deltas.append({"content": parts.content})
        if parts.calls:
            deltas.append({"tool_calls": [self._call(call) for call in parts.calls]})
        return deltas

    def _call(self, call: CallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        assert self._tools is not None
        return {
            "index": call.index,
            "id": call_id(self._tools.format),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _whole_calls(self, deltas: list[CallDelta]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.name is not None:
                calls.append(self._call(delta))
                del calls[-1]["index"]
            else:
                calls[delta.index]["function"]["arguments"] += delta.arguments
        return calls


def shown_tokens(
    tokenizer: Tokenizer, tools: ToolUse | None, is_thinking: bool | None
) -> frozenset[int]:
    """Special tokens that the reader of messages needs to see."""
    texts = [] if is_thinking is None else [OPENING, CLOSING]
    if tools:
        texts += [tools.format.opening, tools.format.closing, "[ARGS]", "[CALL_ID]"]
    special = tokenizer.special_tokens
    return frozenset(special[text] for text in texts if text in special)


def begins_thinking(tokenizer: Tokenizer, prompt_ids: list[int]) -> bool:
    """Whether the prompt ends with the tag that opens the thoughts."""
    end = b"".join(map(tokenizer.token_bytes, prompt_ids[-16:]))
    return end.decode(errors="replace").rstrip().endswith(OPENING)
