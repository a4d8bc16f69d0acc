"""What a request says of the form of its answer, in the words of OpenAI, MLC or vLLM, as the one
grammar that the engine follows.

Source: OpenAI API reference, "Structured Outputs"; vLLM, "Structured Outputs".
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import TypeVar

import msgspec

from llmsrv.api.schema import NOTHING
from llmsrv.api.schema import GenerationRequest
from llmsrv.api.schema import ResponseFormat
from llmsrv.api.schema import StructuredOutputs
from llmsrv.api.service import Service
from llmsrv.errors import ApiError
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import Tag
from llmsrv.text.grammar import behind_thoughts
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import either_source
from llmsrv.text.grammar import grammar_source
from llmsrv.text.grammar import json_source
from llmsrv.text.grammar import regex_source
from llmsrv.text.grammar import triggered_source
from llmsrv.text.reasoning import CLOSING
from llmsrv.text.reasoning import OPENING
from llmsrv.text.tokenizer import Tokenizer

# Makes a source of text/grammar.py, or raises GrammarError.
Maker = Callable[[], str]

T = TypeVar("T")

ANY_OBJECT = {"type": "object"}


async def grammar_of(
    service: Service,
    asked: GenerationRequest,
    is_thinking: bool | None = None,
    or_else: Maker | None = None,
) -> str:
    """The grammar for Submit, "" where the request wants none.

    is_thinking  whether the prompt has begun the thoughts before the answer; None: there are none
    or_else      what the answer may be instead

    Raises ApiError 400 naming the field, when it does not compile or is not the only one.
    """
    found = list(_makers(asked, service.text.tokenizer))
    if not found:
        return ""
    if len(found) > 1:
        (first, _), (second, _), *_ = found
        message = f"Invalid '{second}': only one of '{first}' and '{second}' may be given."
        raise ApiError(400, message, param=second, code="invalid_value")
    param, maker = found[0]
    if or_else is None:
        return await checked(service, maker, param, is_thinking)
    return await checked(service, lambda: either_source(or_else(), maker()), param, is_thinking)


async def checked(service: Service, maker: Maker, param: str, is_thinking: bool | None) -> str:
    """The grammar for Submit, once it has compiled; ApiError 400 naming `param` if it does not."""
    try:
        source = maker()
        if is_thinking is not None:
            tokenizer = service.text.tokenizer
            source = behind_thoughts(source, tokenizer, OPENING, CLOSING, is_thinking)
        return await service.text.grammars.check(source)
    except GrammarError as error:
        is_schema = "json" in param or param in ("response_format", "tools")
        code = "invalid_json_schema" if is_schema else "invalid_grammar"
        raise ApiError(400, f"Invalid '{param}': {error}.", param=param, code=code) from None


def _makers(asked: GenerationRequest, tokenizer: Tokenizer) -> Iterator[tuple[str, Maker]]:
    """Every grammar of the request, under the name that an error gives it."""
    if asked.response_format is not None and asked.response_format.type != "text":
        yield "response_format", _of_format(asked.response_format, tokenizer)
    if asked.structured_outputs is not None:
        for name, maker in _of_outputs(asked.structured_outputs, tokenizer):
            yield f"structured_outputs.{name}", maker
    if asked.guided_json != NOTHING:
        yield "guided_json", lambda: json_source(bytes(asked.guided_json))
    if (pattern := asked.guided_regex) is not None:
        yield "guided_regex", lambda: regex_source(pattern)
    if (choices := asked.guided_choice) is not None:
        yield "guided_choice", lambda: choice_source(choices)
    if (grammar := asked.guided_grammar) is not None:
        yield "guided_grammar", lambda: grammar_source(grammar)


def _of_outputs(asked: StructuredOutputs, tokenizer: Tokenizer) -> Iterator[tuple[str, Maker]]:
    spaces = asked.whitespace_pattern
    if asked.json != NOTHING:
        yield "json", lambda: json_source(bytes(asked.json), spaces)
    if asked.json_object:
        yield "json_object", lambda: json_source(ANY_OBJECT, spaces)
    if (pattern := asked.regex) is not None:
        yield "regex", lambda: regex_source(pattern)
    if (choices := asked.choice) is not None:
        yield "choice", lambda: choice_source(choices)
    if (grammar := asked.grammar) is not None:
        yield "grammar", lambda: grammar_source(grammar)
    if (text := asked.structural_tag) is not None:
        yield "structural_tag", lambda: _of_tags_text(text, tokenizer)


def _of_format(form: ResponseFormat, tokenizer: Tokenizer) -> Maker:
    if form.type == "json_object":
        schema: Any = ANY_OBJECT if form.schema == NOTHING else bytes(form.schema)
        return lambda: json_source(schema)
    if form.type == "json_schema":
        named = _required(form.json_schema, "json_schema")
        return lambda: json_source(bytes(named.schema))
    if form.type == "structural_tag":
        return lambda: _of_tags(form, tokenizer)
    text = _required(form.regex if form.type == "regex" else form.grammar, form.type)
    return lambda: regex_source(text) if form.type == "regex" else grammar_source(text)


def _of_tags_text(text: str, tokenizer: Tokenizer) -> str:
    try:
        form = msgspec.json.decode(text, type=ResponseFormat)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(str(error)) from None
    return _of_tags(form, tokenizer)


def _of_tags(form: ResponseFormat, tokenizer: Tokenizer) -> str:
    asked = form.tags or form.structures or []
    tags = [Tag(tag.begin, bytes(tag.schema), tag.end) for tag in asked]
    if not tags or not form.triggers:
        raise GrammarError("a structural tag needs 'tags' and 'triggers'")
    return triggered_source(tags, form.triggers, tokenizer)


def _required(value: T | None, name: str) -> T:
    if value is None:
        param = f"response_format.{name}"
        message = f"Missing required parameter: '{param}'."
        raise ApiError(400, message, param=param, code="missing_required_parameter")
    return value
