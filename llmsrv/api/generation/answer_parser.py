"""Splits the text of one choice into reasoning, text and tool calls, as it arrives."""

from dataclasses import dataclass
from dataclasses import field

from llmsrv.api.generation.tools import ToolUse
from llmsrv.text.reasoning import THINK_END
from llmsrv.text.reasoning import THINK_START
from llmsrv.text.reasoning import ReasoningParser
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tool_calls.parser import CallDelta

NO_IDS: frozenset[int] = frozenset()  # shared: an empty set takes 200 bytes


@dataclass
class ToolCallDelta:
    """A piece of a tool call.  id, name: only with the call's first piece."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass
class AnswerParts:
    reasoning: str = ""
    text: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


class AnswerParser:
    """How the text is cut into pieces does not matter.  num_tool_calls: so far."""

    def __init__(self, tools: ToolUse | None = None, is_thinking: bool | None = None) -> None:
        """is_thinking: True if the prompt already opened the thinking block; None if the model does
        not think."""
        self.reasoning_parser = None if is_thinking is None else ReasoningParser(is_thinking)
        self._tools = tools
        self._tool_calls = tools.parser() if tools else None

    @property
    def num_tool_calls(self) -> int:
        return self._tool_calls.num_calls if self._tool_calls else 0

    @property
    def has_ended(self) -> bool:
        """True if nothing that the model may still write is part of the answer."""
        return self._tool_calls is not None and self._tool_calls.has_ended

    def push(
        self, text: str, is_last: bool = False, cut_off: str = "", is_cut: bool = False
    ) -> AnswerParts:
        """Takes the next text.  With the last, everything that was held back comes out.

        cut_off: after the last text, as in ReasoningParser.flush().  is_cut: as in
        ToolCallParser.flush()."""
        parts = AnswerParts(text=text)
        if self.reasoning_parser:
            parts.reasoning, parts.text = self.reasoning_parser.push(text)
            if is_last:
                reasoning, text = self.reasoning_parser.flush(cut_off)
                parts.reasoning += reasoning
                parts.text += text
        if self._tool_calls:
            parts.text, calls = self._tool_calls.push(parts.text)
            if is_last:
                text, further_calls = self._tool_calls.flush(is_cut)
                parts.text += text
                calls += further_calls
            parts.tool_calls = [self._with_id(call) for call in calls]
        return parts

    def _with_id(self, call: CallDelta) -> ToolCallDelta:
        assert self._tools is not None
        id = None if call.name is None else self._tools.new_call_id()
        return ToolCallDelta(call.index, call.arguments, id, call.name)


def visible_special_tokens(
    tokenizer: Tokenizer, tools: ToolUse | None, is_thinking: bool | None
) -> frozenset[int]:
    """Special tokens whose text the parser needs to see."""
    if tools is None and is_thinking is None:
        return NO_IDS
    texts = [] if is_thinking is None else [THINK_START, THINK_END]
    if tools:
        texts += tools.format.marks
    special = tokenizer.special_tokens
    return frozenset(special[text] for text in texts if text in special)
