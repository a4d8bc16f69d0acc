"""llmsrv.text.json_schema: what generators write is served, and the rest named or left out."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.grammar import regex_source
from llmsrv.text.json_schema import lenient_schema
from llmsrv.text.json_schema import skeleton_schema
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tool_calls.formats import FORMATS
from tests.support.grammars import Texts

ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$"
)
ZOD_IBAN = r"^[A-Z]{2}(?!00|01|99)\d{2}[A-Z0-9]{11,30}$"
ZOD_EMOJI = (
    r"^(?=[\s\S]*[\p{Extended_Pictographic}\p{Regional_Indicator}\u20E3])"
    r"[\p{Extended_Pictographic}\p{Emoji_Component}]+$"
)
INTEGER = {"type": "integer"}
STRING = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "text", "other"),
    [
        ({"$schema": "https://spec.openapis.org/oas/3.1/dialect/base", **INTEGER}, "1", "a"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", **INTEGER}, "1", "a"),
        (INTEGER | {"minimum": -(2**63), "maximum": 2**63 - 1}, "-5", "a"),
        (INTEGER | {"minimum": 0, "maximum": 2**64 - 1}, "12345678901234567890", "-1"),
        (INTEGER | {"minimum": 1 - 2**53, "maximum": 2**53 - 1}, "9007199254740991", "1e99"),
        (INTEGER | {"minimum": 1, "exclusiveMinimum": True}, "2", "1"),
        (INTEGER | {"minimum": 1, "exclusiveMinimum": False}, "1", "0"),
        (INTEGER | {"const": 10**17}, str(10**17), str(10**17 + 1)),
        ({"type": "number", "minimum": -1.7976931348623157e308}, "-5.5", "a"),
        ({"type": "number", "maximum": 3.4028234663852886e38}, "5.5", "a"),
        ({"type": "array", "uniqueItems": False}, "[]", "{}"),
        (STRING | {"format": "uuid4"}, '"x"', "1"),
        (STRING | {"format": "starts_with", "pattern": "^ab.*"}, '"abc"', '"xab"'),
        (STRING | {"format": "email", "pattern": ZOD_EMAIL}, '"a.b@c.de"', '"a..b@c.de"'),
        (STRING | {"pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, '"-.5"', '"-."'),
        (STRING | {"format": "hostname", "pattern": "^(?=.{1,253}$).+$"}, '"a.de"', '"a b"'),
        (STRING | {"pattern": r"^\\d\d$"}, r'"\\d1"', '"11"'),
        (STRING | {"format": "iban", "pattern": ZOD_IBAN}, '"DE02A1234567890"', '"DE01A123456789"'),
        (STRING | {"format": "emoji", "pattern": ZOD_EMOJI}, '"👍🏽"', '"12"'),
        (STRING | {"nullable": True}, "null", "1"),
        (STRING | {"nullable": True, "enum": [None]}, "null", '"a"'),
        (STRING | {"nullable": False}, '"a"', "null"),
        ({"type": "object", "properties": {"a": {"not": {}}, "b": {}}}, '{"b": 1}', '{"a": 1}'),
        (
            {"type": "object", "propertyNames": STRING, "additionalProperties": INTEGER},
            '{"a": 1}',
            '{"a": "b"}',
        ),
        (
            {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": INTEGER},
            '{"a": 1}',
            '{"b": 1}',
        ),
        (
            {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": INTEGER},
            '{"ab": 1}',
            '{"b": 1}',
        ),
        (
            {"type": "object", "propertyNames": {"minLength": 2}, "additionalProperties": INTEGER},
            '{"ab": 1}',
            '{"b": 1}',
        ),
        (
            {"type": "object", "propertyNames": {"format": "uuid"}, "additionalProperties": {}},
            '{"12345678-1234-1234-1234-123456789abc": 1}',
            '{"b": 1}',
        ),
        (
            {"type": "object", "propertyNames": {"format": "date-time"}},
            '{"2026-02-28T23:59:60.5+01:00": 1}',
            '{"2026-02-28": 1}',
        ),
        (
            {
                "type": "object",
                "propertyNames": {"$ref": "#/$defs/Name"},
                "$defs": {"Name": {"enum": ["a"], "title": "Name"}},
            },
            '{"a": 1}',
            '{"b": 1}',
        ),
        ({"properties": {"not": INTEGER, "format": STRING}, "type": "object"}, '{"not": 1}', "1"),
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_no_obstacle(
    texts: Texts, schema: dict[str, Any], text: str, other: str
) -> None:
    assert texts.take(json_schema_source(schema), text)
    assert not texts.take(json_schema_source(schema), other)


UNFOLLOWED = [
    {"type": "object", "propertyNames": {"not": {"const": "a"}}},
    {"type": "array", "uniqueItems": True},
    STRING | {"pattern": "(?!x)y"},
    STRING | {"pattern": r"\bword\b"},
    STRING | {"not": {"const": "a"}},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    INTEGER | {"const": 1234567890123456789},
    INTEGER | {"multipleOf": 2**53 + 1},
    {"if": {}, "then": {}, "type": "object"},
]


@pytest.mark.parametrize("schema", UNFOLLOWED, ids=str)
def test_an_unfollowed_keyword_is_left_out_unless_the_schema_is_strict(
    texts: Texts, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    wanted = {"type": "object", "properties": {"a": schema, "b": {"enum": [1]}}}
    source = json_schema_source(lenient_schema(wanted))
    assert texts.take(source, '{"b": 1}') and not texts.take(source, '{"b": 2}')
    assert texts.take(json_schema_source(skeleton_schema(wanted)), '{"b": 1}')
    with pytest.raises(GrammarError) as refused:
        form = FORMATS["hermes"].calls({"f": wanted}, at_most_one=True)
        texts.take(structural_tag_source(form, tokenizer), "")
    assert any(key in str(refused.value) for key in schema if key != "type")
    assert "%json" not in str(refused.value) and "tool_call" not in str(refused.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 5, "required": 1, "properties": {"a": 1}, "anyOf": 2, "enum": {}},
        {"properties": {"a": {"type": ["foo", 1], "pattern": "(", "$ref": "http://x"}}},
        {"type": "object", "propertyNames": {"format": {}}, "nullable": [], "not": {}},
    ],
    ids=str,
)
def test_schemas_that_are_none_are_simplified_without_an_error(schema: dict[str, Any]) -> None:
    simplified = skeleton_schema(schema)
    json.dumps(simplified)
    for format in FORMATS.values():
        format.calls({"f": simplified}, at_most_one=True)
        format.parser({"f": schema}).push("<tool_call>\n<function=f>\n<parameter=a>\n1\n</")


KEYWORDS = ["type", "enum", "const", "properties", "required", "anyOf", "oneOf", "allOf", "items"]
KEYWORDS += ["$ref", "$defs", "pattern", "format", "propertyNames", "additionalProperties", "not"]
KEYWORDS += ["minimum", "exclusiveMaximum", "uniqueItems", "dependencies", "minLength"]
KEYWORDS += ["nullable", "a"]
SCALARS = st.sampled_from([None, True, 0, 2**63, 1e308, "object", "string", "#/$defs/a", "(?=a)"])
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=12,
)


SCHEMAS = st.dictionaries(st.sampled_from(KEYWORDS), ANYTHING, max_size=6)


@given(schema=SCHEMAS)
def test_no_schema_breaks_the_server(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    check_schema(tokenizer, schema)


@pytest.mark.slow
@settings(max_examples=300)
@given(schema=SCHEMAS)
def test_none_of_many_schemas_breaks_the_server(
    tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    check_schema(tokenizer, schema)


def check_schema(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    json.dumps([lenient_schema(schema), skeleton_schema(schema)])
    for format in FORMATS.values():
        parser = format.parser({"f": schema})
        parser.push("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n[f(a=1, b=2)]")
        try:
            structural_tag_source(format.calls({"f": schema}, at_most_one=True), tokenizer)
        except GrammarError:
            pass


def test_digits_in_a_pattern_are_ascii(texts: Texts) -> None:
    assert texts.take(regex_source(r"\d[\d-]\D\\d"), r"1-x\d")
    assert not texts.take(regex_source(r"\d"), "٣")
    assert texts.take(regex_source(r"\D"), "٣")
