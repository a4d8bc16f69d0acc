"""llmsrv.text.nested_json: halves of escaped characters never get further."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.text import nested_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'{"city": "\ud83d"}', {"city": "\ufffd"}),
        (r'{"\uDE00": 1}', {"\ufffd": 1}),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r'"\ud83d\ud83d\ude00"', "\ufffd\U0001f600"),
        (r'"\ude00\ud83d"', "\ufffd\ufffd"),
        (r'"\\ud83d"', r"\ud83d"),
        (r'"\\\ud83dx"', "\\\ufffdx"),
        (r'"\"\ud83d\\ude00"', "\"\ufffd\\ude00"),
        (r'"\u00e9\ud7ff\ue000"', "\u00e9\ud7ff\ue000"),
    ],
)
def test_half_of_an_escaped_character_is_replaced(text: str, value: object) -> None:
    assert nested_json.loads(text) == value


@given(st.text(st.characters(exclude_categories=())))
def test_a_string_is_read_as_a_utf16_decoder_would(text: str) -> None:
    units = text.encode("utf-16-le", "surrogatepass")
    wanted = units.decode("utf-16-le", "surrogatepass")  # halves that meet are one character
    wanted = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in wanted)
    assert nested_json.loads(json.dumps(text)) == wanted


def test_other_errors_are_those_of_json() -> None:
    with pytest.raises(ValueError):
        nested_json.loads(r'"\ud83d')
    with pytest.raises(RecursionError):
        nested_json.loads("[" * 100_000)
