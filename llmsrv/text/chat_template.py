"""Renders a conversation into a prompt with the model's Jinja template, as text or as token ids.

The template writes special tokens as text between the messages, but a message may contain the same
text: "<|im_end|>" typed by a user must stay ten characters and never end a turn.  So before
rendering, wherever a caller's string contains the text of a special token, or ends with the start
of one, we replace that part by an unguessable placeholder.  After rendering, every special token in
the text was written by the template.  Only then do we restore the replaced text, inside the plain
pieces, and encode it as plain text.  A template that cuts characters out of the middle of a message
could still assemble a token; we know of none.

Templates come from the model's file or from the person who started the server, never from a
request.  The sandbox shields Python's internals, and loops end at a deadline.  Memory is not
limited.
Source: transformers, utils/chat_template_utils.py, for what templates may use.
"""

import json
import re
import secrets
import time
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.text import reasoning
from llmsrv.text.marked_text import MarkedText
from llmsrv.text.marked_text import Markup
from llmsrv.text.template_probe import TemplateFacts
from llmsrv.text.template_probe import probe
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import label_special
from llmsrv.text.tokenizer import longest_match_pattern
from llmsrv.text.tool_calls.formats import detect_format

RENDER_S = 1.0  # of the thread's CPU time
PROBE_S = 0.25  # CPU time of the whole probe, which usually takes a few milliseconds
_deadline_s: ContextVar[float] = ContextVar("deadline_s")

# The error code if the template itself fails, rather than refusing the messages.
TEMPLATE_FAILED = "template_failed"


class ChatTemplate:
    """A compiled template and the tokenizer whose special tokens it writes.

    tool_call_format  how the template writes tool calls: a name in tool_calls.formats.FORMATS; None
                      if that is not known
    has_reasoning     whether the template has <think> tags
    facts             what it supports, detected by probing it
    is_slow           whether a rendering hit its deadline; do not render on the event loop then
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str = "the model") -> None:
        """origin: the file the template comes from, for error messages.

        Raises StartupError if the template does not compile."""
        self._tokenizer = tokenizer
        self._special_pattern = longest_match_pattern(tokenizer.special_tokens)
        self._partial_tokens = _partial_tokens(tokenizer)
        self._max_partial_chars = max(map(len, self._partial_tokens), default=0)
        try:
            source.encode()  # a model's file may contain invalid UTF-8
            environment = _environment()
            parsed = environment.parse(source)
            self._variable_names = jinja2.meta.find_undeclared_variables(parsed)
            self._template = environment.from_string(_add_deadline_to_loops(parsed))
        except Exception as error:  # the compiler evaluates constants, so it may raise anything
            line = getattr(error, "lineno", None)
            place = f" at line {line}" if line else ""
            raise StartupError(
                f"{origin}: its chat template does not compile{place}: {error}; "
                "use another one with --chat-template FILE"
            ) from None
        self.tool_call_format = detect_format(source)
        self.has_reasoning = reasoning.template_has_reasoning(source)
        self.is_slow = False
        self.facts = self._probe()

    @property
    def has_unknown_tool_calls(self) -> bool:
        """True if the template takes tools, and shows calls in no format that is known."""
        return self.tool_call_format is None and self.facts.has_tools

    def uses_variable(self, variable: str) -> bool:
        """True if the template uses a variable of this name."""
        return variable in self._variable_names

    def _probe(self) -> TemplateFacts:
        deadline_s = time.thread_time() + PROBE_S

        def render(
            messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
        ) -> str | None:
            _deadline_s.set(deadline_s)
            try:
                return self._template.render(self._variables_for(messages, tools))
            except TimeoutError:
                raise
            except Exception:  # a template is foreign code and may raise anything
                return None

        try:
            return probe(render, self._variable_names)
        except TimeoutError:
            self.is_slow = True
            return TemplateFacts(has_tools=self.uses_variable("tools"))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt as text.

        continue_final_message  leave the last message open, for the model to continue it
        extra                   more variables for the template, such as enable_thinking

        Raises ApiError 400 with the template's own message if it refuses the conversation."""
        text, placeholders = self._render(
            messages, tools, add_generation_prompt, continue_final_message, extra
        )
        return placeholders.restore(text)

    def encode(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the prompt as ids.  Only special tokens that the template wrote become tokens.

        BOS is there once if the model wants it, whether or not the template writes it.  Raises
        like render()."""
        text, placeholders = self._render(
            messages, tools, add_generation_prompt, continue_final_message, extra
        )
        ids: list[int] = []
        for is_special, piece in label_special(self._tokenizer.split(text, parse_special=True)):
            plain = placeholders.restore(piece)
            ids += self._tokenizer.encode(plain, parse_special=is_special, is_start=not ids)
        return self._tokenizer.with_bos(ids)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        extra: Mapping[str, Any] | None,
    ) -> tuple[str, "_Placeholders"]:
        placeholders = _Placeholders()
        end = placeholders.replace("") if continue_final_message else ""  # of the last message
        try:
            safe_messages = self._replace_in(messages, placeholders)
            if continue_final_message:
                _append_text(safe_messages[-1], end)
            variables = self._variables_for(
                safe_messages, self._replace_in(tools, placeholders), add_generation_prompt
            )
            safe_extra = self._replace_in(dict(extra or {}), placeholders)
            text = self._render_in_time(safe_extra | variables)
        except _RaisedByTemplate as error:
            message = placeholders.restore(str(error))
            raise ApiError(400, message, param="messages", code="invalid_value") from None
        except Exception as error:  # a template is foreign code and may raise anything
            self.is_slow |= isinstance(error, TimeoutError)
            reason = placeholders.restore(f"{type(error).__name__}: {error}")
            message = f"The model's chat template fails on these messages: {reason}"
            raise ApiError(400, message, param="messages", code=TEMPLATE_FAILED) from None
        if end and end not in text:
            message = "The model's chat template leaves the last message out."
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")
        return text[: text.rindex(end)] if end else text, placeholders

    def _render_in_time(self, variables: Mapping[str, Any]) -> str:
        token = _deadline_s.set(time.thread_time() + RENDER_S)
        try:
            return self._template.render(variables)
        finally:
            _deadline_s.reset(token)  # or the context of each waiting request would hold it

    def _variables_for(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool = True,
    ) -> dict[str, Any]:
        return {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokenizer.named_tokens,
        }

    def _replace_in(self, value: Any, placeholders: "_Placeholders") -> Any:
        """Replaces text that could form a special token, at any depth of a caller's value."""
        if isinstance(value, MarkedText):
            return "".join(self._replace_in(piece, placeholders) for piece in value.pieces)
        if isinstance(value, Markup):
            return value
        if isinstance(value, str):
            return self._replace_in_text(value, placeholders)
        if isinstance(value, dict):
            return {
                self._replace_in(key, placeholders): self._replace_in(item, placeholders)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._replace_in(item, placeholders) for item in value]
        return value

    def _replace_in_text(self, text: str, placeholders: "_Placeholders") -> str:
        if self._special_pattern is None:
            return text
        size = len(text.rstrip())  # templates often strip whitespace
        cut = self._find_partial_token(text, size)
        head = self._special_pattern.sub(lambda match: placeholders.replace(match[0]), text[:cut])
        tail = placeholders.replace(text[cut:size]) if cut < size else ""
        return head + tail + text[size:]

    def _find_partial_token(self, text: str, size: int) -> int:
        """Returns where a partial special token at the end of text[:size] starts, else size.

        The template's own text after it could complete the token."""
        starts = range(max(0, size - self._max_partial_chars), size)
        return next((start for start in starts if text[start:size] in self._partial_tokens), size)


def _append_text(message: dict[str, Any], text: str) -> None:
    if isinstance(message["content"], list):
        message["content"].append({"type": "text", "text": text})
    else:
        message["content"] = (message["content"] or "") + text


class _Placeholders:
    """The texts replaced during one rendering.

    A placeholder consists of digits and "~", so that neither case changes nor JSON encoding alter
    it.  It contains 20 random digits, so that no message contains it."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._mark = ""

    def replace(self, text: str) -> str:
        if not self._mark:
            self._mark = f"{secrets.randbelow(10**20):020d}"
        self._texts.append(text)
        return f"~{self._mark}~{len(self._texts) - 1}~"

    def restore(self, text: str) -> str:
        if not self._mark:
            return text
        placeholder = re.compile(f"~{self._mark}~([0-9]+)~")
        return placeholder.sub(lambda match: self._texts[int(match[1])], text)


def _partial_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """All proper prefixes of the texts of special tokens."""
    texts = tokenizer.special_tokens
    return frozenset(text[:length] for text in texts for length in range(1, len(text)))


# ---- What templates may use


def _add_deadline_to_loops(template: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Makes every loop of the template check the rendering deadline."""
    for loop in template.find_all(jinja2.nodes.For):
        timed = jinja2.nodes.Filter(loop.iter, "timed", [], [], None, None)
        loop.iter = timed.set_lineno(loop.lineno)
    return template


def _check_deadline(items: Iterable[Any]) -> Iterator[Any]:
    deadline_s = _deadline_s.get()
    for item in items:
        if time.thread_time() > deadline_s:
            raise TimeoutError(f"it takes more than {RENDER_S:g} s")
        yield item


class _RaisedByTemplate(Exception):
    """Raised by raise_exception(message): the template refuses the conversation."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's text for training; here it has
    no effect."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.filters["timed"] = _check_deadline
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_list_of_iterator,
    )


def _list_of_iterator(value: Any) -> list[Any]:
    """`map` and `select` return iterators, which json does not write."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
