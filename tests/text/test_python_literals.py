"""llmsrv.text.tool_calls.python_literals: reads what Python reads, and evaluates nothing."""

import ast
import json
import time
import warnings
from typing import Any

import pytest
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.text.tool_calls.python_literals import MAX_DEPTH
from llmsrv.text.tool_calls.python_literals import read_literal
from llmsrv.text.tool_calls.values import json_of_python


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_what_repr_writes_is_read_back(value: Any) -> None:
    assert read_literal(repr(value)) == as_json(value)


FRAGMENTS = [
    "1", "-", "+", ".5", "1.", "1e5", "0x1F", "0o7", "0b1", "1_0", "007", "True", "None", "[", "]",
    "(", ")", "{", "}", ",", ":", " ", "\n", "#", "'", '"', "'''", '"""', "\\", "\\n", "\\x41",
    "\\u00e9", "\\U0001f600", "\\101", "\\q", "a", "é", "r'", "'a'", "{'a': 1}",
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
@example("[1, ]")
@example("(1)")
@example("(1,)")
@example("()")
@example("'a' \"b\"")
@example("'''a'b\nc'''")
@example("{1: 2, None: 3}")
@example("r'\\n'")
def test_a_literal_has_the_value_that_it_has_in_python(text: str) -> None:
    """Whatever this reads, Python reads alike; it may refuse more."""
    try:
        found = read_literal(text)
    except ValueError:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            expected = ast.literal_eval(text.strip())
    except SyntaxError:
        return  # such as 007, or a bracket closed on a line that is not indented
    assert found == as_json(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[true, False, null]", [True, False, None]),
        (r"'\ud83d\ude00'", "\U0001f600"),
        (r"'\ud83d'", "\ufffd"),
        (r"'\ude00\ud83d'", "\ufffd\ufffd"),
        (r"'\U00110000'", "\ufffd"),
        ("'a' # why\n 'b'", "ab"),
        ("{'a': (1, [2]), 'b': {}}", {"a": [1, [2]], "b": {}}),
        ("-0x10", -16),
    ],
)
def test_literals_become_values_of_json(text: str, value: Any) -> None:
    assert read_literal(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "word", "f(1)", "1 + 2", "1 2", "[1", "1]", "{1}", "{[]: 1}", "'a", "b'a'", "f'{1}'", "-",
     "...", "1j", "__import__('os')", "[1, , 2]", "{'a' 1}", "'a\nb'", "9" * 5_000],
)  # fmt: skip
def test_other_text_is_no_literal(text: str) -> None:
    with pytest.raises(ValueError):
        read_literal(text)
    assert json.loads(json_of_python(text)) == text.strip()


def test_the_depth_of_brackets_is_limited() -> None:
    assert read_literal("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    too_deep = MAX_DEPTH + 1
    for text in ("[" * too_deep + "]" * too_deep, "(" * 10**6, "{1:" * 10**6):
        with pytest.raises(ValueError):
            read_literal(text)


@pytest.mark.parametrize(
    "text",
    ["[" + "'a', " * 25_000 + "]", "'" + "\\n" * 25_000, "'a' " * 25_000, "'''" + "'" * 25_000,
     "{" + "1: 2, " * 25_000, "1" * 250_000, "[" + " " * 250_000, '"' * 250_000, "#" * 250_000,
     "0x" + "f" * 250_000, "1_" * 250_000, "[" + "\n#" * 250_000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_long_literals_take_linear_time(text: str) -> None:
    begin_s = time.process_time()
    json_of_python(text)
    assert time.process_time() - begin_s < 1  # about 0.03 s
