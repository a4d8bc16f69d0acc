"""What a request says of the form of its answer, in the words of OpenAI, MLC or vLLM, as the one
grammar that the engine follows.

Source: OpenAI API reference, "Structured Outputs"; vLLM, "Structured Outputs".
"""

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import TypeVar

import msgspec

from llmsrv.api.openai.schema import GenerationRequest
from llmsrv.api.openai.schema import NOTHING
from llmsrv.api.openai.schema import ResponseFormat
from llmsrv.api.openai.schema import StructuredOutputs
from llmsrv.errors import ApiError
from llmsrv.registry.service import Service
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import behind_thoughts
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import either_source
from llmsrv.text.grammar import grammar_source
from llmsrv.text.grammar import json_source
from llmsrv.text.grammar import regex_source
from llmsrv.text.reasoning import CLOSING
from llmsrv.text.reasoning import OPENING
from llmsrv.text.structural_tag import TriggeredTags
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.structural_tag import parse_format
from llmsrv.text.structural_tag import tags_source
from llmsrv.text.tokenizer import Tokenizer

# Makes a source of text/grammar.py, or raises GrammarError.
Maker = Callable[[], str]

T = TypeVar("T")

ANY_OBJECT = {"type": "object"}
BAD_SCHEMA = "invalid_json_schema"
BAD_GRAMMAR = "invalid_grammar"


@dataclass(frozen=True)
class Wanted:
    """A grammar that a request wants, and what an error calls it: the field, and the code."""

    param: str
    make: Maker
    code: str = BAD_SCHEMA


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
    found = list(_wanted(asked, service.text.tokenizer))
    if not found:
        return ""
    if len(found) > 1:
        first, second, *_ = found
        message = f"Invalid '{second.param}': only one of '{first.param}' and it may be given."
        raise ApiError(400, message, param=second.param, code="invalid_value")
    wanted = found[0]
    if or_else is not None:
        wanted = replace(wanted, make=lambda: either_source(or_else(), found[0].make()))
    return await checked(service, wanted, is_thinking)


async def checked(service: Service, wanted: Wanted, is_thinking: bool | None) -> str:
    """The grammar for Submit, once compiled; ApiError 400 naming its field if it does not."""
    try:
        source = wanted.make()
        if is_thinking is not None:
            tokenizer = service.text.tokenizer
            source = behind_thoughts(source, tokenizer, OPENING, CLOSING, is_thinking)
        return await service.text.grammars.check(source)
    except (GrammarError, RecursionError) as error:
        message = f"Invalid '{wanted.param}': {error}."
        raise ApiError(400, message, param=wanted.param, code=wanted.code) from None


def _wanted(asked: GenerationRequest, tokenizer: Tokenizer) -> Iterator[Wanted]:
    if asked.response_format is not None and asked.response_format.type != "text":
        yield _of_format(asked.response_format, tokenizer)
    if asked.structured_outputs is not None:
        yield from _of_outputs(asked.structured_outputs, tokenizer)
    if asked.guided_json != NOTHING:
        yield Wanted("guided_json", lambda: json_source(bytes(asked.guided_json)))
    if (pattern := asked.guided_regex) is not None:
        yield Wanted("guided_regex", lambda: regex_source(pattern), BAD_GRAMMAR)
    if (choices := asked.guided_choice) is not None:
        yield Wanted("guided_choice", lambda: choice_source(choices), BAD_GRAMMAR)
    if (grammar := asked.guided_grammar) is not None:
        yield Wanted("guided_grammar", lambda: grammar_source(grammar), BAD_GRAMMAR)


def _of_outputs(asked: StructuredOutputs, tokenizer: Tokenizer) -> Iterator[Wanted]:
    spaces, name = asked.whitespace_pattern, "structured_outputs."
    if asked.json != NOTHING:
        yield Wanted(name + "json", lambda: json_source(bytes(asked.json), spaces))
    if asked.json_object:
        yield Wanted(name + "json_object", lambda: json_source(ANY_OBJECT, spaces))
    if (pattern := asked.regex) is not None:
        yield Wanted(name + "regex", lambda: regex_source(pattern), BAD_GRAMMAR)
    if (choices := asked.choice) is not None:
        yield Wanted(name + "choice", lambda: choice_source(choices), BAD_GRAMMAR)
    if (grammar := asked.grammar) is not None:
        yield Wanted(name + "grammar", lambda: grammar_source(grammar), BAD_GRAMMAR)
    if (text := asked.structural_tag) is not None:
        yield Wanted(name + "structural_tag", lambda: _of_tags_text(text, tokenizer), BAD_GRAMMAR)


def _of_format(form: ResponseFormat, tokenizer: Tokenizer) -> Wanted:
    name = "response_format"
    match form.type:
        case "json_schema":
            named = _required(form.json_schema, "json_schema")
            return Wanted(name, lambda: json_source(bytes(named.schema)))
        case "regex":
            pattern = _required(form.regex, "regex")
            return Wanted(name, lambda: regex_source(pattern), BAD_GRAMMAR)
        case "grammar":
            grammar = _required(form.grammar, "grammar")
            return Wanted(name, lambda: grammar_source(grammar), BAD_GRAMMAR)
        case "structural_tag":
            return Wanted(name, lambda: _of_tags(form, tokenizer), BAD_GRAMMAR)
    schema: Any = ANY_OBJECT if form.schema == NOTHING else bytes(form.schema)
    return Wanted(name, lambda: json_source(schema))


def _of_tags_text(text: str, tokenizer: Tokenizer) -> str:
    try:
        form = msgspec.json.decode(text, type=ResponseFormat)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(str(error)) from None
    return _of_tags(form, tokenizer)


def _of_tags(form: ResponseFormat, tokenizer: Tokenizer) -> str:
    if form.format != NOTHING:
        return tags_source(parse_format(bytes(form.format)), tokenizer)
    asked = form.tags or form.structures or []
    tags = [json_tag(tag.begin, bytes(tag.schema), tag.end) for tag in asked]
    if not tags or not form.triggers:
        raise GrammarError("a structural tag needs 'format', or 'structures' and 'triggers'")
    return tags_source(TriggeredTags(form.triggers, tags), tokenizer)


def _required(value: T | None, name: str) -> T:
    if value is None:
        param = f"response_format.{name}"
        message = f"Missing required parameter: '{param}'."
        raise ApiError(400, message, param=param, code="missing_required_parameter")
    return value
