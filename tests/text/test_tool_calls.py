"""llmsrv.text.tool_calls: finds calls in every format, however the text is cut."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.text.tool_calls import FORMATS
from llmsrv.text.tool_calls import ToolCallParser
from llmsrv.text.tool_calls import detect_format

NAMES = ["f", "get_weather"]
Calls = list[tuple[str, str]]


def parse(format: str, pieces: list[str], at_most_one: bool = False) -> tuple[str, Calls]:
    """The content, and the name and arguments of each call, joined as a client does."""
    parser = ToolCallParser(FORMATS[format], NAMES, at_most_one)
    content = ""
    names: list[str] = []
    arguments: list[list[str]] = []
    for text, deltas in [*map(parser.push, pieces), parser.flush()]:
        content += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(names)
                names.append(delta.name)
                arguments.append([])
            arguments[delta.index].append(delta.arguments)
    return content, list(zip(names, map("".join, arguments)))


CASES: list[tuple[str, str, str, Calls]] = [
    # format, answer, text, calls
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "",
     [("f", '{"a": 1}')]),
    ("hermes", 'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
     '<tool_call>{"name": "get_weather", "arguments": {"q": "} \\" {"}}</tool_call>', "Let me see.",
     [("f", "{}"), ("get_weather", '{"q": "} \\" {"}')]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": [1]}}, '
     '{"name": "f", "arguments": {}}]</tool_call>done', "done", [("f", '{"a": [1]}'), ("f", "{}")]),
    ("hermes", '<tool_call>{"arguments": {"a": {"b": 2}}, "name": "f"}</tool_call>', "",
     [("f", '{"a": {"b": 2}}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", r'<tool_call>{"arguments": {"a": "\ud83d"}, "name": "f"}</tool_call>', "",
     [("f", '{"a": "\ufffd"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "",
     [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call> x',
     '<tool_call>{"name": "nobody", "arguments": {}}</tool_call> x', []),
    ("hermes", " <tool_call> what?", " <tool_call> what?", []),
    ("hermes", "<tool_call>", "<tool_call>", []),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama3", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}; '
     '{"name": "f", "parameters": {}}', "", [("f", '{"a": 1}'), ("f", "{}")]),
    ("llama3", 'No {"name": "f", "parameters": {}}', 'No {"name": "f", "parameters": {}}', []),
    ("llama3", '{"answer": {"a": 42}} it is', '{"answer": {"a": 42}} it is', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "f", '
     '"arguments": {}, "id": "123456789"}]', "", [("f", '{"a": 1}'), ("f", "{}")]),
    ("mistral", 'ok[TOOL_CALLS]f[ARGS]{"a": {}}[TOOL_CALLS]get_weather{"b": 1}', "ok",
     [("f", '{"a": {}}'), ("get_weather", '{"b": 1}')]),
    ("mistral", "[TOOL_CALLS]nobody{}", "[TOOL_CALLS]nobody{}", []),
    ("json", ' {"function": {"name": "f", "arguments": {"a": 1}}}', "", [("f", '{"a": 1}')]),
    ("json", '[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    ("json", "[1] as they say", "[1] as they say", []),
    ("json", "", "", []),
    ("json", " \n", " \n", []),
]  # fmt: skip


@pytest.mark.parametrize("format, answer, text, calls", CASES)
def test_calls_are_found_in_the_formats_of_all_models(
    format: str, answer: str, text: str, calls: Calls
) -> None:
    assert parse(format, [answer]) == (text, calls)
    assert parse(format, list(answer)) == (text, calls)


@st.composite
def answers_in_pieces(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A format, and an answer in pieces: cases and fragments of them in any order."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    answers = [answer for other, answer, _, _ in CASES if other == format]
    fragments = ["{", "}", "[", "]", '"', "\\", " ", ",", ";", "x", '"name": "f", ', '"arguments":']
    marks = [FORMATS[format].opening, FORMATS[format].closing, '{"name": "f", "arguments": {']
    text = "".join(draw(st.lists(st.sampled_from(answers + fragments + marks), max_size=8)))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return format, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


@given(case=answers_in_pieces(), at_most_one=st.booleans())
def test_the_result_does_not_depend_on_the_pieces(
    case: tuple[str, list[str]], at_most_one: bool
) -> None:
    format, pieces = case
    text = "".join(pieces)
    whole = parse(format, [text], at_most_one)
    assert parse(format, pieces, at_most_one) == whole
    assert parse(format, list(text), at_most_one) == whole
    assert len(whole[1]) <= 1 or not at_most_one


@settings(max_examples=50)
@given(text=st.text("{}[]\"\\ a<tool_call>/"))
def test_text_without_a_call_is_returned_unchanged(text: str) -> None:
    for format in FORMATS:
        assert parse(format, list(text)) == (text, [])


def test_arguments_are_streamed_as_they_arrive() -> None:
    parser = ToolCallParser(FORMATS["hermes"], NAMES)
    assert parser.push('<tool_call>{"name": "f", "arguments": {"a')[1][0].name == "f"
    assert [delta.arguments for delta in parser.push('": 1')[1]] == ['": 1']


@pytest.mark.parametrize(
    "format, answer",
    [
        ("mistral", "[TOOL_CALLS]" * 5_000),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]" + "x" * 50_000),
        pytest.param("mistral", '[TOOL_CALLS]f{"a": 1}' * 5_000, marks=pytest.mark.slow),
        ("llama3", '{"name": "f", "parameters": {}}; ' * 5_000),
        ("llama3", "<|python_tag|>{" * 5_000),
        ("json", '{"id": "a", ' * 5_000),
        ("json", "{" + " " * 50_000),
        ("json", '{"function": {"name": "\\\\' + "\\n" * 20_000),
        pytest.param("json", "[" * 50_000, marks=pytest.mark.slow),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 30_000),
        ("hermes", '<tool_call>{"arguments": ' + "[" * 20_000 + "]" * 20_000 + ', "name": "f"}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 50_000),
        ("hermes", "<tool_call>" * 5_000),
        ("hermes", "<tool_call>{" * 5_000),
        pytest.param(
            "hermes",
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 5_000,
            marks=pytest.mark.slow,
        ),
        ("hermes", "<tool_cal" * 20_000),
        pytest.param("hermes", " " * 100_000, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[:30],
)
def test_long_and_broken_answers_take_linear_time(format: str, answer: str) -> None:
    def seconds(pieces: list[str]) -> float:
        begun_at = time.process_time()
        parse(format, pieces)
        return time.process_time() - begun_at

    half = len(answer) // 2
    assert seconds([answer]) < 2  # 0.1 s; in quadratic time, minutes
    in_pieces = [answer[i : i + 5] for i in range(0, half, 5)]
    assert seconds(in_pieces) < 2


@pytest.mark.parametrize(
    "template, format",
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("{{ 'Environment: ipython' }}", "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("{{ messages }}", "json"),
    ],
)
def test_the_format_is_detected_from_the_template(template: str, format: str) -> None:
    assert detect_format(template) == format


def test_arguments_are_json_if_the_keys_are_in_another_order() -> None:
    _, [(_, arguments)] = parse("json", ['{"arguments": {"a": "é"}, "name": "f"}'])
    assert json.loads(arguments) == {"a": "é"}
