"""llmsrv.text.tool_calls: finds calls in every format, however the text is cut."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.text.tool_calls.formats import FORMATS
from tests.support.calls import Calls
from tests.support.calls import TOOLS
from tests.support.calls import parse

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
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call> x', " x",
     [("nobody", "{}")]),
    ("hermes", " <tool_call> what?", "  what?", []),
    ("hermes", "<tool_call>", "", []),
    ("hermes", '<tool_call>{"a": 1}</tool_call>', '{"a": 1}', []),
    ("hermes", '<tool_call>{"name": "f", "argum', "", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_', "", [("f", "{}")]),
    ("hermes", 'I think that <tool_', "I think that ", []),
    ("hermes", "if a <", "if a <", []),
    ("hermes", '<tool_<tool_call>call>', "<tool_\ncall>", []),
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
    ("mistral", '[TOOL_CALLS][TOOL_CALLS] [[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS][", "", []),
    ("mistral", "[TOOL_CALLS]nobody{}", "", [("nobody", "{}")]),
    ("mistral", "[TOOL_CALLS] or nothing", " or nothing", []),
    ("json", ' {"function": {"name": "f", "arguments": {"a": 1}}}', "", [("f", '{"a": 1}')]),
    ("json", '[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    ("json", "[1] as they say", "[1] as they say", []),
    ("json", '{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', []),
    ("json", '{"name": "get_w', "", []),
    ("json", '[{"type": "function", "function": {"na', "", []),
    ("json", '{"name": "Rome", "argum', '{"name": "Rome", "argum', []),
    ("json", '{"namely": 1', '{"namely": 1', []),
    ("json", "", "", []),
    ("json", " \n", " \n", []),
    ("granite", '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, '
     '{"name": "f", "arguments": {}}]', "", [("f", '{"a": 1}'), ("f", "{}")]),
    ("phi4", '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>', "",
     [("f", '{"a": 1}')]),
    ("functools", 'Yes. functools[{"name": "f", "arguments": {"a": 1}}]', "Yes.",
     [("f", '{"a": 1}')]),
    ("nemotron", 'So:\n<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}, '
     '{"name": "f", "arguments": {}}]</TOOLCALL>', "So:", [("f", '{"a": 1}'), ("f", "{}")]),
    ("apriel", '<tool_calls>[{"name": "f", "arguments": {}, "id": "1"}]</tool_calls>', "",
     [("f", "{}")]),
    ("deepseek_v3", "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
     '{"a": {"b": 1}}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
     'get_weather\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "Hm.",
     [("f", '{"a": {"b": 1}}'), ("get_weather", "{}")]),
    ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
     "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "",
     [("f", '{"a": 1}'), ("f", "{}")]),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
     '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>', "",
     [("f", '{"a": 1}')]),
    ("cohere", 'Ok.<|START_ACTION|>[\n'
     '    {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}},\n'
     '    {"tool_call_id": "1", "tool_name": "f", "parameters": {}}\n]<|END_ACTION|>', "Ok.",
     [("f", '{"a": 1}'), ("f", "{}")]),
    ("cohere", '<|START_ACTION|>[{"parameters": {"a": 1}, "tool_name": "f"}]<|END_ACTION|>', "",
     [("f", '{"a": 1}')]),
    ("apertus", 'So<|tools_prefix|>[{"f": {"a": {"b": 1}}}, {"get_weather": {}}]<|tools_suffix|>',
     "So", [("f", '{"a": {"b": 1}}'), ("get_weather", "{}")]),
    ("functionary", '<function=f>{"a": 1}</function><function=f>{}</function>', "",
     [("f", '{"a": 1}'), ("f", "{}")]),
]  # fmt: skip

QWEN = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>"
ALL_TYPES = (
    '<parameter=text>\na "b"\n\nc\n</parameter>\n'
    "<parameter=number>\n12345678901234567890\n</parameter>\n<parameter=flag>\nTrue\n</parameter>\n"
    "<parameter=items>\n[1, 2]\n</parameter>\n<parameter=maybe>\nNone\n</parameter>\n"
    "<parameter=unit>\nC\n</parameter>\n"
)
OTHER_TYPES = (
    "<parameter=number>\nmany\n</parameter>\n<parameter=items>\n['a', True]\n</parameter>\n"
    "<parameter=maybe>\n\n</parameter>\n"
)
TWO_CALLS = (
    QWEN.format("g", "<parameter=text>\n12\n</parameter>\n")
    + "\n"
    + QWEN.format("f", "<parameter=n>\n12\n</parameter>\n<parameter=s>\nab\n</parameter>\n")
)
XML_CASES: list[tuple[str, str, str, Calls]] = [
    ("qwen3_coder", QWEN.format("f", ""), "", [("f", "{}")]),
    ("qwen3_coder", "I look.\n" + QWEN.format("g", ALL_TYPES), "I look.",
     [("g", '{"text": "a \\"b\\"\\n\\nc", "number": 12345678901234567890, "flag": true, '
       '"items": [1, 2], "maybe": null, "unit": "C"}')]),
    ("qwen3_coder", TWO_CALLS, "", [("g", '{"text": "12"}'), ("f", '{"n": 12, "s": "ab"}')]),
    ("qwen3_coder", QWEN.format("g", OTHER_TYPES), "",
     [("g", '{"number": "many", "items": ["a", true], "maybe": ""}')]),
    ("qwen3_coder", "<function=f>\n<parameter=a>1</parameter></function>", "",
     [("f", '{"a": 1}')]),
    ("qwen3_coder", "<tool_call>\n<function=g>\n<parameter=text>\nhal", "",
     [("g", '{"text": "hal')]),
    ("qwen3_coder", "<tool_call>\n<function=g>\n<parameter=te", "", [("g", "{")]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n</tool_call>ok", "ok", [("f", "{}")]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<function=g>\n</function>", "",
     [("f", "{}"), ("g", "{}")]),
    ("qwen3_coder", "<tool_call>no</tool_call>", "no", []),
    ("qwen3_coder", "x <function=a b>", "x a b>", []),
    ("seed", "<seed:tool_call>\n<function=g>\n<parameter=text>a < b</parameter>\n"
     "<parameter=number>-1</parameter>\n</function>\n</seed:tool_call>", "",
     [("g", '{"text": "a < b", "number": -1}')]),
    ("minimax_m2", '<minimax:tool_call>\n<invoke name="g">\n<parameter name="text">a</parameter>'
     '\n</invoke>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>', "",
     [("g", '{"text": "a"}'), ("f", "{}")]),
    ("deepseek_v32", 'Hm.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="g">\n'
     '<｜DSML｜parameter name="text" string="true">12</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="maybe" string="true">null</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="items" string="false">[1]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
     '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="b" string="true">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
     "</｜DSML｜function_calls>", "Hm.",
     [("g", '{"text": "12", "maybe": "null", "items": [1]}'), ("f", '{"a": 1, "b": "1"}')]),
    ("deepseek_v4", '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="g">\n'
     '<｜DSML｜parameter name="maybe" string="false">null</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="number" string="yes">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
     "</｜DSML｜tool_calls>", "", [("g", '{"maybe": null}')]),
    ("glm", "<tool_call>g\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n"
     "<arg_key>number</arg_key>\n<arg_value>1</arg_value>\n</tool_call>\n"
     "<tool_call>f\n</tool_call>", "", [("g", '{"text": "a", "number": 1}'), ("f", "{}")]),
]  # fmt: skip

PYTHON_CASES: list[tuple[str, str, str, Calls]] = [
    ("pythonic", "[f()]", "", [("f", "{}")]),
    ("pythonic", """[g(text="a, ']' b", number=1), f(a=[1, (2, 'x')], b={'c': None})]""", "",
     [("g", '{"text": "a, \']\' b", "number": 1}'),
      ("f", '{"a": [1, [2, "x"]], "b": {"c": null}}')]),
    ("pythonic", '[g("a", 2, flag=true)]', "", [("g", '{"text": "a", "number": 2, "flag": true}')]),
    ("pythonic", "[f(a=1.5, b=-2, c=0x10, d=word)]", "",
     [("f", '{"a": 1.5, "b": -2, "c": 16, "d": "word"}')]),
    ("pythonic", '[f(a=\'\'\'x "y" \\\'z\'\'\', b="")]', "",
     [("f", '{"a": "x \\"y\\" \'z", "b": ""}')]),
    ("pythonic", "[nobody()]", "[nobody()]", []),
    ("pythonic", "[1] as they say", "[1] as they say", []),
    ("pythonic", "f(a=1)", "f(a=1)", []),
    ("pythonic", "[get_wea", "", []),
    ("lfm2", 'Hm.<|tool_call_start|>[f(a="x"), f()]<|tool_call_end|>', "Hm.",
     [("f", '{"a": "x"}'), ("f", "{}")]),
    ("olmo3", "<function_calls>\nf(a=1)\ng(text=\"x\")\n</function_calls>", "",
     [("f", '{"a": 1}'), ("g", '{"text": "x"}')]),
]  # fmt: skip
BRACE_CASES: list[tuple[str, str, str, Calls]] = [
    ("gemma4", 'Hm.<|tool_call>call:g{flag:true,items:[1,<|"|>a, ]b<|"|>,'
     '{k:null,<|"|>x:y<|"|>:[]}],text:<|"|>a "b"\n{c},<|"|>,unit:<|"|>C<|"|>}<tool_call|>'
     "<|tool_call>call:f{}<tool_call|>",
     "Hm.", [("g", '{"flag": true, "items": [1, "a, ]b", {"k": null, "x:y": []}], '
              '"text": "a \\"b\\"\\n{c},", "unit": "C"}'), ("f", "{}")]),
    ("gemma4", "<|tool_call>call:g{text:12,number:12,maybe:null}<tool_call|>", "",
     [("g", '{"text": "12", "number": 12, "maybe": null}')]),
    ("gemma4", "<|tool_call>call:f{a:[1,b:{c}<tool_call|>", "", [("f", "{")]),
    ("gemma4", "<|tool_call>call:f{a:[1 2],b:{c}}<tool_call|> ok", " ok",
     [("f", '{"a": ["1 2"], "b": "{c}"}')]),
    ("gemma4", "<|tool_call>no call:f{<tool_call|>", "no call:f{", []),
    ("functiongemma", "<start_function_call>call:f{a:<escape>x<escape>, b: -1.5}"
     "<end_function_call><start_function_response>", "", [("f", '{"a": "x", "b": -1.5}')]),
    ("functiongemma", "<start_function_call>call:f{a:<escape>x<esc", "", [("f", "{")]),
]  # fmt: skip
ALL_CASES = CASES + XML_CASES + PYTHON_CASES + BRACE_CASES


@pytest.mark.parametrize("format, answer, text, calls", ALL_CASES)
def test_calls_are_found_in_the_formats_of_all_models(
    format: str, answer: str, text: str, calls: Calls
) -> None:
    assert parse(format, [answer]) == (text, calls)
    assert parse(format, list(answer)) == (text, calls)


@st.composite
def answers_in_pieces(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A format, and an answer in pieces: cases and fragments of them in any order."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    answers = [answer for other, answer, _, _ in ALL_CASES if other == format]
    fragments = ["{", "}", "[", "]", '"', "\\", " ", ",", ";", "x", '"name": "f", ', '"arguments":']
    marks = [*FORMATS[format].marks, '{"name": "f", "arguments": {']
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
@given(text=st.text("{}[]\"\\ a<tool_cal>/"))
def test_text_without_a_call_is_returned_unchanged(text: str) -> None:
    for format in FORMATS:
        marks = FORMATS[format].marks
        is_unmarked = not any(mark in text for mark in marks)
        ends_in_mark = any(text.endswith(mark[:n]) for mark in marks for n in range(2, len(mark)))
        if is_unmarked and not ends_in_mark and text.strip()[:1] not in ("{", "["):
            assert parse(format, list(text)) == (text, [])


@given(case=answers_in_pieces())
def test_content_never_holds_the_marks_of_calls(case: tuple[str, list[str]]) -> None:
    check_content(*case)


@pytest.mark.slow
@settings(max_examples=200)
@given(case=answers_in_pieces())
def test_content_of_many_answers_never_holds_the_marks_of_calls(
    case: tuple[str, list[str]]
) -> None:
    check_content(*case)


def check_content(format: str, pieces: list[str]) -> None:
    content, _ = parse(format, pieces)
    assert not any(mark in content for mark in FORMATS[format].marks)


@pytest.mark.parametrize(
    "format, answer, text", [case[:3] for case in ALL_CASES if case[3]], ids=str
)
def test_a_call_cut_off_anywhere_leaves_no_mark_in_the_content(
    format: str, answer: str, text: str
) -> None:
    marks = FORMATS[format].marks
    for size in range(len(answer)):
        content, _ = parse(format, [answer[:size]], is_cut=True)
        shown = content.strip()
        assert text.strip().startswith(shown), size
        assert not any(shown.endswith(mark[:n]) for mark in marks for n in range(1, len(mark) + 1))


@pytest.mark.parametrize("format", ["deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4"])
def test_a_call_cut_off_within_a_character_leaves_no_mark_in_the_content(format: str) -> None:
    answer = "".join(FORMATS[format].written([("f", {"a": "b"})])).encode()
    for size in range(len(answer)):
        content, _ = parse(format, list(answer[:size].decode(errors="replace")), is_cut=True)
        assert content.strip() == "", size


def test_arguments_are_streamed_as_they_arrive() -> None:
    parser = FORMATS["hermes"].parser({"f": None})
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
        ("qwen3_coder", "<tool_call><function=" * 5_000),
        ("qwen3_coder", "<function=g>" * 5_000),
        ("qwen3_coder", "<function=g><parameter=" * 5_000),
        ("qwen3_coder", "<function=g><parameter=text>" + "</param" * 10_000),
        ("qwen3_coder", "<function=g><parameter=items>" + "[" * 50_000 + "</parameter>"),
        ("glm", "<tool_call>" + "g" * 50_000),
        ("pythonic", "[f(a=" + "[" * 50_000),
        ("pythonic", "[f(a=" + "'\\" * 25_000),
        ("pythonic", "[f(" + " " * 50_000 + "x" + " " * 50_000 + ")"),
        ("lfm2", "<|tool_call_start|>[" + "f(a=1), " * 5_000),
        ("gemma4", "<|tool_call>call:f{a:" + "[" * 50_000 + "]" * 50_000 + "}"),
        ("gemma4", "<|tool_call>call:f{a:" + '<|"|>' * 10_000 + "<|" * 10_000),
        ("gemma4", "<|tool_call>call:f{" + "a:1," * 5_000 + "b:[" + "c," * 20_000 + "]}"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>f" * 3_000),
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


def test_strings_in_tags_are_streamed_as_they_arrive() -> None:
    parser = FORMATS["qwen3_coder"].parser(TOOLS)
    assert parser.push("<tool_call>\n<function=g>")[1][0].name == "g"
    pieces = ["\n<parameter=text>\nfor", " \"x\"", ":\n", "y\n</param", "eter>\n</function>"]
    streamed = ["".join(delta.arguments for delta in parser.push(piece)[1]) for piece in pieces]
    assert streamed == ['"text": "for', ' \\"x\\"', ":", "\\ny", '"}']


def test_arguments_are_json_if_the_keys_are_in_another_order() -> None:
    _, [(_, arguments)] = parse("json", ['{"arguments": {"a": "é"}, "name": "f"}'])
    assert json.loads(arguments) == {"a": "é"}
