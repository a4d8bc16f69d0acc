"""Turns a conversation into a prompt by the model's own Jinja template, as text and as token ids.

The template writes special tokens as text between the messages, and a message may hold the same
text: "<|im_end|>" typed by a user must stay ten characters and never end a turn.  So where a
caller's string holds a special token's text, or ends with the beginning of one, that part is put
away before rendering behind a placeholder that nobody can guess.  After rendering, what spells a
special token was written by the template; only then is the text put back, inside the plain pieces,
which are encoded as any plain text.  A template that cuts characters out of the middle of a message
could still put a token together; we know of none.

Templates come from the model's file or from whoever started the server, never from a request.  The
sandbox keeps them from Python's internals, and their loops end at a deadline; their memory has no
bound.
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
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import alternate
from llmsrv.text.tokenizer import any_of
from llmsrv.text.tool_calls import detect_format

RENDER_S = 1.0  # of the thread's time on the CPU
_deadline_s: ContextVar[float] = ContextVar("deadline_s")

TEMPLATE_FAILED = "template_failed"  # code of an error that is the template's own, no refusal


class ChatTemplate:
    """A compiled template together with the tokenizer whose special tokens it writes.

    tool_call_format  how it shows its model to write tool calls: a name in tool_calls.FORMATS
    has_reasoning      whether it shows its model to think between tags
    is_slow           whether a rendering was cut at its deadline: not one for the event loop
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str = "the model") -> None:
        """origin: the file that the template is from, for error messages.

        Raises StartupError when the template does not compile."""
        self._tokenizer = tokenizer
        self._special = any_of(tokenizer.special_tokens)
        self._beginnings = _beginnings(tokenizer)
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        try:
            source.encode()  # a model's file may hold bytes that are no UTF-8
            environment = _environment()
            parsed = environment.parse(source)
            self._variables = jinja2.meta.find_undeclared_variables(parsed)
            self._template = environment.from_string(_timed_loops(parsed))
        except Exception as error:  # the compiler computes constants, so it may raise anything
            line = getattr(error, "lineno", None)
            place = f" at line {line}" if line else ""
            raise StartupError(
                f"{origin}: its chat template does not compile{place}: {error}; "
                "--chat-template FILE takes another"
            ) from None
        self.tool_call_format = detect_format(source)
        self.has_reasoning = reasoning.is_taught_by(source)
        self.is_slow = False

    def uses_variable(self, variable: str) -> bool:
        """Whether the template asks for a variable of this name."""
        return variable in self._variables

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text.

        continue_final_message  it ends within the last message, for the model to go on with it
        extra                   further variables for the template, as enable_thinking

        Raises ApiError 400 with the template's own words when it refuses the conversation."""
        text, hidden = self._render(
            messages, tools, add_generation_prompt, continue_final_message, extra
        )
        return hidden.put_back(text)

    def encode(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt as ids, with BOS once where the model wants it, whether the template writes it
        or not.  Special tokens are only those that the template wrote.  Raises as render does."""
        text, hidden = self._render(
            messages, tools, add_generation_prompt, continue_final_message, extra
        )
        ids: list[int] = []
        for is_special, piece in alternate(self._tokenizer.split(text, parse_special=True)):
            plain = hidden.put_back(piece)
            ids += self._tokenizer.encode(plain, parse_special=is_special, is_start=not ids)
        return self._tokenizer.with_bos(ids)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        extra: Mapping[str, Any] | None,
    ) -> tuple[str, "_Hidden"]:
        hidden = _Hidden()
        end = hidden.put_away("") if continue_final_message else ""  # of the last message
        try:
            guarded = self._guarded(messages, hidden)
            if continue_final_message:
                guarded[-1]["content"] += end
            variables = self._guarded(dict(extra or {}), hidden) | {
                "messages": guarded,
                "tools": self._guarded(tools, hidden),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._tokenizer.named_tokens,
            }
            _deadline_s.set(time.thread_time() + RENDER_S)
            text = self._template.render(variables)
        except _RaisedByTemplate as error:
            message = hidden.put_back(str(error))
            raise ApiError(400, message, param="messages", code="invalid_value") from None
        except Exception as error:  # a template is a foreign program: it may raise anything
            self.is_slow |= isinstance(error, TimeoutError)
            reason = hidden.put_back(f"{type(error).__name__}: {error}")
            message = f"The model's chat template fails on these messages: {reason}"
            raise ApiError(400, message, param="messages", code=TEMPLATE_FAILED) from None
        if end and end not in text:
            message = "The model's chat template leaves the last message out."
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")
        return text[: text.rindex(end)] if end else text, hidden

    def _guarded(self, value: Any, hidden: "_Hidden") -> Any:
        """A caller's value with what could spell a special token put away, at any depth."""
        if isinstance(value, str):
            return self._guarded_text(value, hidden)
        if isinstance(value, dict):
            return {self._guarded(k, hidden): self._guarded(v, hidden) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item, hidden) for item in value]
        return value

    def _guarded_text(self, text: str, hidden: "_Hidden") -> str:
        if self._special is None:
            return text
        size = len(text.rstrip())  # as templates like to strip blanks
        cut = self._open_end(text, size)
        head = self._special.sub(lambda match: hidden.put_away(match[0]), text[:cut])
        tail = hidden.put_away(text[cut:size]) if cut < size else ""
        return head + tail + text[size:]

    def _open_end(self, text: str, size: int) -> int:
        """Where text[:size] ends with the beginning of a special token, which what the template
        puts behind it could complete; size where it does not."""
        starts = range(max(0, size - self._longest_beginning), size)
        return next((start for start in starts if text[start:size] in self._beginnings), size)


class _Hidden:
    """The texts put away during one rendering.

    A placeholder is of digits and "~" alone, so that neither changing case nor writing JSON alters
    it, and holds 20 random digits, so that no message contains one."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._mark = ""

    def put_away(self, text: str) -> str:
        if not self._mark:
            self._mark = f"{secrets.randbelow(10**20):020d}"
        self._texts.append(text)
        return f"~{self._mark}~{len(self._texts) - 1}~"

    def put_back(self, text: str) -> str:
        if not self._mark:
            return text
        placeholder = re.compile(f"~{self._mark}~([0-9]+)~")
        return placeholder.sub(lambda match: self._texts[int(match[1])], text)


def _beginnings(tokenizer: Tokenizer) -> frozenset[str]:
    """Every proper beginning of a special token's text."""
    texts = tokenizer.special_tokens
    return frozenset(text[:length] for text in texts for length in range(1, len(text)))


# ---- What templates may use


def _timed_loops(template: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """The template with every loop under the rendering's deadline."""
    for loop in template.find_all(jinja2.nodes.For):
        timed = jinja2.nodes.Filter(loop.iter, "timed", [], [], None, None)
        loop.iter = timed.set_lineno(loop.lineno)
    return template


def _timed(items: Iterable[Any]) -> Iterator[Any]:
    deadline_s = _deadline_s.get()
    for item in items:
        if time.thread_time() > deadline_s:
            raise TimeoutError(f"it takes more than {RENDER_S:g} s")
        yield item


class _RaisedByTemplate(Exception):
    """raise_exception(message): the template refuses the conversation."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's text for training; here it is
    plain text."""

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
    environment.filters["timed"] = _timed
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
    """JSON without Jinja's own HTML escapes, which models have never seen."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
