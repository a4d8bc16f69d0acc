"""What is accepted as JSON (RFC 8259), as the value of a known and of an unknown field."""

import json
import time
from typing import Literal

import msgspec
import pytest

from llmsrv.api.decode import check_other_fields
from llmsrv.api.decode import decode_body
from llmsrv.errors import ApiError


class Body(msgspec.Struct):
    value: object = None


DECODER = msgspec.json.Decoder(Body)
WRONG_NUMBERS = (
    "- -1.0. ++1 +1 .123 0.1.2 0.3e+ 0.3e 0.e1 0E+ 0E 1.0e- 1eE2 -01 -1x -2. .2e-3 0x1 1. 012 -012 "
    "1+2 NaN -NaN Infinity -Infinity inf 2.e3 9.e+ 1ea \uff11 1_000 0b1 0o7 1f 1L"
).split()
WRONG_STRINGS = [
    *('"', '"a', '"\\"', '"\\a"', '"\\x00"', '"\\u"', '"\\u00A"', '"\\uqqqq"', '"\\u00e\u00e9"'),
    *('"\\\U0001f300"', '"\\ud800\\"', '"\\ud800\\u1"', '"\\ud800\\u1x"', '"a\nb"', '"\t"', "'a'"),
    *('"a\0a"', "\\u0020", '"\\UA66D"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud800a"', '""a'),
]
WRONG_STRUCTURES = [
    *("", " ", "nul", "truth", "True", "NULL", "<null>", "*", "1;", "1\0", "1\v", "[\f]"),
    *("[", "]", "[1", "[1,", "[,1]", "[1,]", "[1,,2]", "[1 2]", "[1 true]", "[3[4]]", "[1]]"),
    *('{"a"', '{"a":', '{"a":1', '{"a":1,}', '{"a":1,,"b":2}', '{"a" 1}', '{"a":1 2}', "{1:1}"),
    *("{a:1}", "{'a':1}", "{:1}", '{"a"::1}', '{"a","b"}', "{null:1}", "{,}", '["": 1]', "[:1]"),
    *("1//", "1/**/", "1#", "[\u2060]", "[\u00a0]", "a", "\ufeff1", "- 1", "1 000", "[" * 100_000),
    *("1}{", "1} {}"),
]
RIGHT = [
    *("0", "-0", "1", "-1", "10", "1.5", "1e3", "1E+2", "1e-2", "-1.5e10", "1e-400", "0e0"),
    *('""', '"a"', '"\\u0000"', '"\\u00e9"', '"\\ud83d\\ude00"', '"\\"\\\\\\/\\b\\f\\n\\r\\t"'),
    *('"\x7f"', '"\u2028"', '"\u00e9"', '"\U0010ffff"', '"\\ufffe"', "true", "false", "null"),
    *(" null\t\r\n", "[]", "[ ]", "{}", "{ }", "[[]]", '{"":0}', "[1, 2]", '[null,"a",{}]'),
]


def is_accepted(text: str, name: str) -> bool:
    body = b'{"%b":%b}' % (name.encode(), text.encode())
    try:
        decode_body(DECODER, body)
        check_other_fields(body, ("value",), False)
    except ApiError as error:
        assert (error.status, error.code) == (400, "invalid_json")
        return False
    return True


@pytest.mark.parametrize("name", ["value", "unknown"])
def test_88_json_is_accepted_and_nothing_else(name: str) -> None:
    for text in (*WRONG_NUMBERS, *WRONG_STRINGS, *WRONG_STRUCTURES):
        assert not is_accepted(text, name), text
    for text in RIGHT:
        assert is_accepted(text, name), text
        assert decode_body(DECODER, b'{"value":%b}' % text.encode()).value == json.loads(text)


@pytest.mark.parametrize("text", [b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'"\xe5', b"\xe9"])
def test_76_bytes_that_are_not_utf_8_are_not_json(text: bytes) -> None:
    for name in (b"value", b"unknown"):
        with pytest.raises(ApiError) as caught:
            decode_body(DECODER, b'{"%b":%b}' % (name, text))
        assert caught.value.code == "invalid_json"


def test_the_last_value_of_a_repeated_key_counts() -> None:
    class Choice(msgspec.Struct):
        a: int

    decoder = msgspec.json.Decoder(Choice)
    assert decode_body(decoder, b'{"a": "x", "a": 1}').a == 1
    with pytest.raises(ApiError, match="expected int, but got \"y\" instead"):
        decode_body(decoder, b'{"a": "x", "a": "y"}')


def test_an_error_quotes_a_long_value_only_in_part() -> None:
    class Choice(msgspec.Struct):
        a: Literal["b"]

    body = json.dumps({"a": "x" * 5_000_000}).encode()
    start_s = time.process_time()
    with pytest.raises(ApiError) as caught:
        decode_body(msgspec.json.Decoder(Choice), body)
    assert time.process_time() - start_s < 0.2
    assert len(caught.value.message) < 2000
