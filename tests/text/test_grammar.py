"""Which input becomes a source, and which is refused before anything is compiled."""

import json
import time
from collections.abc import Callable

import pytest

from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import MAX_SOURCE_BYTES
from llmsrv.text.grammar import after_reasoning_source
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import grammar_source
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.grammar import regex_source
from llmsrv.text.tokenizer import Tokenizer
from tests.support.grammars import Texts

INTEGER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
SPECIAL = "<|im_start|>"


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (True, "an object, but got true"),
        (False, "an object, but got false"),
        (None, "an object, but got null"),
        ([1], r"an object, but got \[1\]"),
        ("", "not JSON"),
        ({}, "empty"),
        ("{}", "empty"),
        (b"{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ({"enum": ["x" * MAX_SOURCE_BYTES]}, "at most 524288"),
        (b'{"enum": ["' + b"x" * 10_000_000 + b'"]}', "at most 524288"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_a_schema_is_an_object_of_bounded_size(schema: object, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        json_schema_source(schema)


def test_a_schema_may_be_a_string_of_json() -> None:
    wanted = json_schema_source(INTEGER)
    assert json_schema_source(json.dumps(INTEGER)) == wanted
    assert json_schema_source(json.dumps(json.dumps(INTEGER)).encode()) == wanted


@pytest.mark.parametrize(
    "make", [lambda: regex_source(""), lambda: choice_source([""]), lambda: grammar_source(" \n")]
)
def test_empty_input_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(GrammarError, match="empty"):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (regex_source, "a{0,1000000000}"),
        (regex_source, "a{1000000}"),
        (regex_source, "x(a+)+y"),
        (regex_source, r"(?:\w*)*"),
        (regex_source, "([a-z]+)*"),
        (grammar_source, 'start: ("a"*)*'),
        (grammar_source, 'root ::= ( item + ) *\nitem ::= "a"'),
        (grammar_source, 'start: "a"{ 0 , 1000000000 }'),
    ],
)
def test_repetitions_that_are_a_mistake_or_an_attack_are_refused(
    make: Callable[[str], str], text: str
) -> None:
    with pytest.raises(GrammarError, match="a repetition of a"):
        make(text)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (regex_source, r"\{1000000\}|a{0,999999}"),
        (regex_source, r"(a+b)*(ab*)+([0-9]{3})+\(a*\)*"),
        (grammar_source, 'start: ("a" B*)* "{1000000}" "(a*)*"'),
        (regex_source, "{" + "1" * 200_000),
        (regex_source, "([" * 200_000),
        (regex_source, "(" * 400_000),
    ],
)
def test_other_repetitions_are_accepted_and_checked_quickly(
    make: Callable[[str], str], text: str
) -> None:
    start_s = time.process_time()
    make(text)
    assert time.process_time() - start_s < 1.0


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "object", "if": {}, "not": {}}, "not supported: if, not"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-behind"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' .* overlap"),
        ({"type": "array", "uniqueItems": True}, "not supported: uniqueItems"),
        ({"const": 1234567890123456789}, "'const' holds a number beyond"),
        ({"type": "integer", "enum": [12345678901234567890]}, "'enum' holds a number beyond"),
        ({"type": "integer", "maximum": 2**53 + 1}, "'maximum' holds a number beyond"),
        ({"type": "number", "maximum": 1e20}, "'minimum' or 'maximum'"),
        ({"$ref": "#/components/x"}, r"'\$ref' leads nowhere"),
        ({"$ref": "#"}, "allows no text that ends"),
        ({"$ref": "http://example.com/schema.json"}, "does not fetch"),
        ({"enum": []}, "empty"),
    ],
    ids=str,
)
def test_the_error_names_what_a_schema_cannot_ask_for(
    texts: Texts, schema: dict[str, object], why: str
) -> None:
    with pytest.raises(GrammarError, match=why):
        texts.take(json_schema_source(schema), "")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("a/b", "a/b"), (r"a\/b", "a/b"), (r"\\/", "\\/"), ("a\nb", "a\nb"), ("^[a-c]+$", "abc")],
)
def test_a_pattern_matches_the_same_in_a_grammar_as_alone(
    texts: Texts, pattern: str, text: str
) -> None:
    assert texts.take(regex_source(pattern), text)


@pytest.mark.parametrize(
    ("gbnf", "text", "other"),
    [
        ('root ::= "a/b" [/] "\\x41\\u00e9"', "a/b/Aé", "a/b/A"),
        ('root ::= item+\nitem ::= "- " [^\\r\\n]+ "\\n"', "- x\n- y\n", "- x"),
        ('root ::= yes | "no" # or not\nyes ::= "yes" "!"{1,3}', "yes!!", "yes"),
        ('root ::= "(" root ")" | ""', "(())", "(()"),
    ],
)
def test_gbnf_is_accepted(texts: Texts, gbnf: str, text: str, other: str) -> None:
    assert texts.take(grammar_source(gbnf), text)
    assert not texts.take(grammar_source(gbnf), other)


@pytest.mark.parametrize(
    ("text", "is_begun", "is_taken"),
    [
        ("well ...</think>\n\nyes", True, True),
        ("yes", True, False),
        ("well ...</think>\n\nwell", True, False),
        ("yes", False, True),
        ("<think>or no?</think>yes", False, True),
        ("<think>or no?", False, False),
    ],
)
def test_an_answer_may_follow_reasoning(
    texts: Texts, tokenizer: Tokenizer, text: str, is_begun: bool, is_taken: bool
) -> None:
    for plain in (choice_source(["yes", "no"]), grammar_source('root ::= "yes" | "no"')):
        source = after_reasoning_source(plain, tokenizer, "<think>", "</think>", is_begun)
        assert texts.take(source, text) == is_taken
    yes = choice_source(["yes"])
    source = after_reasoning_source(yes, tokenizer, SPECIAL, SPECIAL, is_begun)
    text = text.replace("<think>", SPECIAL).replace("</think>", SPECIAL)
    assert texts.take(source, text) == is_taken
