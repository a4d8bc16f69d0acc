"""Detects what a chat template supports: renders small conversations and looks at the result.

Templates refuse, drop or misprint what they were not written for: a system role, a message without
content, two calls in one message.  Few say so, and no two in the same way.  So each template is
probed once, at load, with texts that are easy to find in its output.  The facts decide how
api/generation/template_messages.py translates a conversation for it.

Knows nothing of how a template is rendered.
"""

import enum
import json
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
# Takes messages and tools; returns the prompt, or None if the template refuses them or fails.
Render = Callable[[Messages, Messages | None], str | None]


class Arguments(enum.Enum):
    """What a call's arguments may be.  ANY: an object is best, but other values appear too."""

    ANY = "any"
    OBJECT = "object"
    STRING = "string"


class CallIds(enum.Enum):
    """Which ids calls may have.  NINE: nine letters and digits, as Mistral's templates demand.
    FUNCTION: functions.NAME:INDEX, as Kimi's templates show instead of the name."""

    ANY = "any"
    NINE = "nine"
    FUNCTION = "function"


@dataclass(frozen=True, kw_only=True)
class TemplateFacts:
    """What a template supports.  The defaults describe one that accepts everything.

    needs_parts                content must be a list of parts, not a string
    has_system_role            a system message appears in the prompt
    keeps_system_after_result  even if the conversation ends with the result of a call
    takes_late_system          anywhere in the conversation, and more than one
    takes_repeated_roles       two user messages in a row
    takes_user_after_result    a user message right after the result of a call
    takes_null_content         in a message that only has calls; otherwise it must be ""
    has_tools                  it describes tools to the model
    needs_system_for_tools     it describes them only if there is a system message
    needs_tools_list           it fails without tools unless they are an empty list
    has_calls                  calls appear in the prompt
    has_results                results of calls appear in the prompt
    takes_calls_with_content   a message with both keeps its calls
    takes_several_calls        in one message
    switches                   variables that turn thinking on or off
    """

    needs_parts: bool = False
    has_system_role: bool = True
    keeps_system_after_result: bool = True
    takes_late_system: bool = True
    takes_repeated_roles: bool = True
    takes_user_after_result: bool = True
    takes_null_content: bool = True
    has_tools: bool = False
    needs_system_for_tools: bool = False
    needs_tools_list: bool = False
    has_calls: bool = True
    has_results: bool = True
    takes_calls_with_content: bool = True
    takes_several_calls: bool = True
    arguments: Arguments = Arguments.ANY
    call_ids: CallIds = CallIds.ANY
    switches: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line, for the log."""
        parts = ["content only in parts"] if self.needs_parts else []
        if not self.has_system_role:
            parts.append("no system role")
        elif self.takes_late_system:
            parts.append("system messages anywhere")
        else:
            parts.append("one system message, at the beginning")
        if not self.takes_repeated_roles:
            parts.append("user and assistant alternate")
        parts += self._describe_tools() if self.has_tools else ["no tools"]
        if self.switches:
            parts.append("thinking set by " + ", ".join(self.switches))
        return "; ".join(parts)

    def _describe_tools(self) -> list[str]:
        if not self.has_calls:
            return ["tools", "no calls" if self.has_results else "no calls and results"]
        num_calls = "several calls" if self.takes_several_calls else "one call"
        parts = ["tools", f"{num_calls} a message"]
        parts += [] if self.takes_null_content else ["no null content"]
        parts += {
            Arguments.ANY: [],
            Arguments.OBJECT: ["arguments only as objects"],
            Arguments.STRING: ["arguments as strings"],
        }[self.arguments]
        parts += {
            CallIds.ANY: [],
            CallIds.NINE: ["call ids of nine letters and digits"],
            CallIds.FUNCTION: ["call ids functions.NAME:INDEX"],
        }[self.call_ids]
        return parts


# Variables of published templates that turn thinking on or off, or say how much.
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_mode", "reasoning_mode")

# Texts that no template writes on its own.
FIRST_USER, SECOND_USER = "probe user one", "probe user two"
FIRST_SYSTEM, SECOND_SYSTEM = "probe system one", "probe system two"
ANSWER = "probe answer"
RESULTS = ("probe result one", "probe result two")
NAMES = ("probe_first", "probe_second")
KEY = "probe_key"
VALUES = ("probe value one", "probe value two")
NINE_IDS = ("probe0001", "probe0002")
FOREIGN_ID = "call_0123456789abcdef01234567"
TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe description",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "probe parameter"}},
            "required": [KEY],
        },
    },
}


def probe(render: Render, variables: Collection[str]) -> TemplateFacts:
    """Renders about a dozen small conversations.  variables: the names that the template uses."""
    return _Probe(render).facts(variables)


class _Probe:
    def __init__(self, render: Render) -> None:
        self._render = render
        # The forms of content, and of no tools, in which a single message appears
        self._needs_parts = False
        self._no_tools: Messages | None = None

    def facts(self, variables: Collection[str]) -> TemplateFacts:
        switches = tuple(name for name in SWITCHES if name in variables)
        if not self._finds_plain_form():
            # Nothing of the message appears, so nothing can be detected.
            return TemplateFacts(has_tools="tools" in variables, switches=switches)
        user = self._message("user", FIRST_USER)
        system = self._message("system", FIRST_SYSTEM)
        late_system = self._message("system", SECOND_SYSTEM)
        answer = self._message("assistant", ANSWER)
        again = self._message("user", SECOND_USER)
        late = [system, user, answer, late_system, again]
        has_system_role = self._shows([system, user], FIRST_SYSTEM, FIRST_USER)
        return TemplateFacts(
            needs_parts=self._needs_parts,
            needs_tools_list=self._no_tools is not None,
            has_system_role=has_system_role,
            takes_late_system=self._shows(late, FIRST_SYSTEM, FIRST_USER, SECOND_SYSTEM),
            takes_repeated_roles=self._shows([user, again], FIRST_USER, SECOND_USER),
            switches=switches,
            **(self._tool_facts(system, user, again) if "tools" in variables else {}),
        )

    def _finds_plain_form(self) -> bool:
        forms: list[tuple[bool, Messages | None]] = [(False, None), (True, None), (False, [])]
        for self._needs_parts, self._no_tools in forms:
            if self._shows([self._message("user", FIRST_USER)], FIRST_USER):
                return True
        return False

    def _tool_facts(
        self, system: dict[str, Any], user: dict[str, Any], again: dict[str, Any]
    ) -> dict[str, Any]:
        """The fields of TemplateFacts about tools and calls."""
        if self._describes_tools([user]):
            start = [user]
        elif self._describes_tools([system, user]):
            start = [self._message("system", ""), user]
        else:
            return {}
        facts = {"has_tools": True, "needs_system_for_tools": len(start) > 1}
        arguments, with_string = self._arguments_and_text(start)
        with_null = self._text([*start, *self._calls(arguments, None)])
        with_empty = self._text([*start, *self._calls(arguments, "")])
        if VALUES[0] not in with_null + with_empty:
            return facts | {"has_calls": False, "has_results": RESULTS[0] in with_empty}
        takes_null = VALUES[0] in with_null and (
            VALUES[0] not in with_empty or _num_nulls(with_null) <= _num_nulls(with_empty)
        )
        content = None if takes_null else ""
        turn = self._calls(arguments, content)
        two_calls = self._calls(arguments, content, num_calls=2)
        foreign_id = self._calls(arguments, content, ids=[FOREIGN_ID])
        return facts | {
            "takes_null_content": takes_null,
            "takes_calls_with_content": self._shows(
                [*start, *self._calls(arguments, ANSWER)], VALUES[0]
            ),
            "takes_several_calls": self._shows([*start, *two_calls], *VALUES, *RESULTS),
            "keeps_system_after_result": self._shows([system, user, *turn], FIRST_SYSTEM),
            "takes_user_after_result": self._shows([*start, *turn, again], SECOND_USER),
            "arguments": (
                Arguments.STRING if isinstance(arguments, str)
                else Arguments.ANY if VALUES[0] in with_string
                else Arguments.OBJECT
            ),
            "call_ids": (
                CallIds.FUNCTION if NAMES[0] not in with_null + with_empty
                else CallIds.ANY if self._shows([*start, *foreign_id], VALUES[0])
                else CallIds.NINE
            ),
        }

    def _arguments_and_text(self, start: Messages) -> tuple[Any, str]:
        """Arguments in the form that the template expects, and its output for a string."""
        as_object, as_string = {KEY: VALUES[0]}, json.dumps({KEY: VALUES[0]})
        for content in ("", None):  # some templates drop calls unless content is null
            with_object = self._text([*start, *self._calls(as_object, content)])
            with_string = self._text([*start, *self._calls(as_string, content)])
            if VALUES[0] in with_object + with_string:
                break
        # Python's own spelling of an object is not JSON: such a template expects a string.
        object_is_right = VALUES[0] in with_object and f"{{'{KEY}'" not in with_object
        expects_string = as_string in with_string and not object_is_right
        return as_string if expects_string else as_object, with_string

    # ---- Conversations, and how the template renders them

    def _message(self, role: str, content: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": content}]
        return {"role": role, "content": parts if self._needs_parts else content}

    def _calls(
        self,
        arguments: Any,
        content: str | None,
        *,
        num_calls: int = 1,
        ids: Sequence[str] = NINE_IDS,
    ) -> Messages:
        """A message with calls, and their results."""
        every = [arguments, _with_second_value(arguments)][:num_calls]
        calls = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": each}}
            for id, name, each in zip(ids, NAMES, every)
        ]
        results = [
            self._message("tool", result) | {"tool_call_id": id, "name": name}
            for id, name, result in zip(ids, NAMES, RESULTS[:num_calls])
        ]
        assistant = self._message("assistant", content or "")
        if content is None:
            assistant["content"] = None
        return [assistant | {"tool_calls": calls}, *results]

    def _describes_tools(self, messages: Messages) -> bool:
        with_tools = self._render(messages, [TOOL])
        return with_tools is not None and with_tools != self._render(messages, self._no_tools)

    def _text(self, messages: Messages) -> str:
        """The prompt with tools; "" if the template fails."""
        return self._render(messages, [TOOL]) or ""

    def _shows(self, messages: Messages, *texts: str) -> bool:
        tools = [TOOL] if any("tool_calls" in message for message in messages) else self._no_tools
        rendered = self._render(messages, tools) or ""
        return all(text in rendered for text in texts)


def _with_second_value(arguments: Any) -> Any:
    if isinstance(arguments, str):
        return arguments.replace(VALUES[0], VALUES[1])
    return {KEY: VALUES[1]}


def _num_nulls(text: str) -> int:
    return text.count("None") + text.count("null")
