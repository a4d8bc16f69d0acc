"""The form of an answer, in the fields of OpenAI, MLC, vLLM or llama.cpp, as one wanted grammar.

Source: OpenAI API reference, "Structured Outputs"; vLLM, "Structured Outputs".
"""

from collections.abc import Iterator
from typing import Any
from typing import TypeVar

import msgspec

from llmsrv.api.generation.grammar import BAD_GRAMMAR
from llmsrv.api.generation.grammar import WantedGrammar
from llmsrv.api.openai.schema import GenerationRequest
from llmsrv.api.openai.schema import NOTHING
from llmsrv.api.openai.schema import ResponseFormat
from llmsrv.api.openai.schema import StructuredOutputs
from llmsrv.errors import ApiError
from llmsrv.errors import missing
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import grammar_source
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.grammar import regex_source
from llmsrv.text.structural_tag import TriggeredTagsFormat
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.structural_tag import parse_format
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer

T = TypeVar("T")

ANY_OBJECT = {"type": "object"}


def wanted_grammar(body: GenerationRequest, tokenizer: Tokenizer) -> WantedGrammar | None:
    """None if the request does not ask for a form.

    Raises ApiError 400 naming the field, if it lacks a part or is not the only one.
    """
    wanted = list(_wanted_grammars(body, tokenizer))
    if len(wanted) > 1:
        first, second, *_ = wanted
        message = f"Invalid '{second.param}': only one of '{first.param}' and it may be given."
        raise ApiError(400, message, param=second.param, code="invalid_value")
    return wanted[0] if wanted else None


def _wanted_grammars(body: GenerationRequest, tokenizer: Tokenizer) -> Iterator[WantedGrammar]:
    if body.response_format is not None and body.response_format.type != "text":
        yield _response_format_grammar(body.response_format, tokenizer)
    if body.structured_outputs is not None:
        yield from _structured_outputs_grammars(body.structured_outputs, tokenizer)
    if body.guided_json != NOTHING:
        yield WantedGrammar("guided_json", lambda: json_schema_source(bytes(body.guided_json)))
    if (pattern := body.guided_regex) is not None:
        yield WantedGrammar("guided_regex", lambda: regex_source(pattern), BAD_GRAMMAR)
    if (choices := body.guided_choice) is not None:
        yield WantedGrammar("guided_choice", lambda: choice_source(choices), BAD_GRAMMAR)
    if (grammar := body.guided_grammar) is not None:
        yield WantedGrammar("guided_grammar", lambda: grammar_source(grammar), BAD_GRAMMAR)
    if gbnf := body.grammar:
        yield WantedGrammar("grammar", lambda: grammar_source(gbnf), BAD_GRAMMAR)
    if body.json_schema != NOTHING:
        yield WantedGrammar("json_schema", lambda: json_schema_source(bytes(body.json_schema)))


def _structured_outputs_grammars(
    outputs: StructuredOutputs, tokenizer: Tokenizer
) -> Iterator[WantedGrammar]:
    spaces, name = outputs.whitespace_pattern, "structured_outputs."
    if outputs.json != NOTHING:
        yield WantedGrammar(name + "json", lambda: json_schema_source(bytes(outputs.json), spaces))
    if outputs.json_object:
        yield WantedGrammar(name + "json_object", lambda: json_schema_source(ANY_OBJECT, spaces))
    if (pattern := outputs.regex) is not None:
        yield WantedGrammar(name + "regex", lambda: regex_source(pattern), BAD_GRAMMAR)
    if (choices := outputs.choice) is not None:
        yield WantedGrammar(name + "choice", lambda: choice_source(choices), BAD_GRAMMAR)
    if (grammar := outputs.grammar) is not None:
        yield WantedGrammar(name + "grammar", lambda: grammar_source(grammar), BAD_GRAMMAR)
    if (tags := outputs.structural_tag) is not None:
        yield WantedGrammar(
            name + "structural_tag", lambda: _tags_text_source(tags, tokenizer), BAD_GRAMMAR
        )


def _response_format_grammar(format: ResponseFormat, tokenizer: Tokenizer) -> WantedGrammar:
    name = "response_format"
    match format.type:
        case "json_schema":
            named = _required(format.json_schema, "json_schema")
            return WantedGrammar(name, lambda: json_schema_source(bytes(named.schema)))
        case "regex":
            pattern = _required(format.regex, "regex")
            return WantedGrammar(name, lambda: regex_source(pattern), BAD_GRAMMAR)
        case "grammar":
            grammar = _required(format.grammar, "grammar")
            return WantedGrammar(name, lambda: grammar_source(grammar), BAD_GRAMMAR)
        case "structural_tag":
            return WantedGrammar(name, lambda: _tags_source(format, tokenizer), BAD_GRAMMAR)
    schema: Any = ANY_OBJECT if format.schema == NOTHING else bytes(format.schema)
    return WantedGrammar(name, lambda: json_schema_source(schema))


def _tags_text_source(text: str, tokenizer: Tokenizer) -> str:
    try:
        format = msgspec.json.decode(text, type=ResponseFormat)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(str(error)) from None
    return _tags_source(format, tokenizer)


def _tags_source(format: ResponseFormat, tokenizer: Tokenizer) -> str:
    if format.format != NOTHING:
        return structural_tag_source(parse_format(bytes(format.format)), tokenizer)
    structures = format.tags or format.structures or []
    tags = [json_tag(tag.begin, bytes(tag.schema), tag.end) for tag in structures]
    if not tags or not format.triggers:
        raise GrammarError("a structural tag needs 'format', or 'structures' and 'triggers'")
    return structural_tag_source(TriggeredTagsFormat(format.triggers, tags), tokenizer)


def _required(value: T | None, name: str) -> T:
    if value is None:
        raise missing(f"response_format.{name}")
    return value
