"""llmsrv.text.tool_calls.formats: which format a template shows, and grammars in every format."""

import json
import re
from dataclasses import fields
from typing import Any

import pytest

from llmsrv.config import Config
from llmsrv.text.grammar import GrammarError
from llmsrv.text.marked_text import Markup
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tool_calls.formats import FORMATS
from llmsrv.text.tool_calls.formats import detect_format
from tests.support.calls import TOOLS
from tests.support.calls import parse
from tests.support.grammars import Texts

DEEPSEEK = "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool.type + '<｜tool▁sep｜>' }}"


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("{{ 'Environment: ipython' }}", "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("{{ messages }}", None),
        ("""{{ '{"name": "' + tool_call.name + '", "parameters": ' }}""", "json"),
        (r"""{{- "{\"name\": <function-name>}" }}""", "json"),
        ("{{ '<tool_call>\n<function=' + name + '>\n<parameter=' + key + '>' }}", "qwen3_coder"),
        ("{%- set begin = '<seed:tool_call>' -%}{{ '<function=' }}<parameter=", "seed"),
        ("{{ '<|python_tag|>' }}{{ '<function=' + name + '>' + arguments }}ipython", "functionary"),
        ("{{ '\n<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>", "glm"),
        ("{%- set begin = '<minimax:tool_call>' -%}{{ '<invoke name=\"' }}", "minimax_m2"),
        ("{{ '<tool_call>' }}{{ '<invoke name=\"' }}", None),
        ("{{ '<|channel|>commentary to=functions.' }}", None),
        ("{{ '<TOOLCALL>[' }}", "nemotron"),
        (DEEPSEEK + "{{ '\n' + '```json' + '\n' }}", "deepseek_v3"),
        (DEEPSEEK, "deepseek_v31"),
        ("{% set dsml_token = '｜DSML｜' %}<{{ dsml_token }}function_calls>", "deepseek_v32"),
        ("{% set dsml_token = '｜DSML｜' %}<{{ dsml_token }}tool_calls>", "deepseek_v4"),
        ("<|START_ACTION|>[{\"tool_name\": \"\"}]<|END_ACTION|>", "cohere"),
        ("{{ '<|tools_prefix|>[' }}", "apertus"),
        ("{{ '<|tool_call>call:' }}{{ '<|channel>' }}", "gemma4"),
        ("{{ '<start_function_call>call:' }}", "functiongemma"),
        ('{% set s = "List of tools: [" %}', "lfm2"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("{{ '<|tool_list_start|>' }}", "lfm2"),
        ("{{ '<|tool|>' + tools + '<|/tool|>' }}", "phi4"),
        ("respond only with <|tool_call|> followed by a JSON list of tools used", "granite"),
        ("{{ ' functools[' }}", "functools"),
        ("{{ '\n<tool_calls>[' }}", "apriel"),
        ("{{ '<tool_calls>\n' }}{% if message.role == 'ipython' %}", "minimax_m1"),
        ("{{ '<atem:invoke name=' }}{\"name\": }", None),
        ("in the format [func_name1(params_name1=params_value1), func_name2()]", "pythonic"),
    ],
)
def test_the_format_is_detected_from_the_template(template: str, format: str | None) -> None:
    assert detect_format(template) == format


def test_every_format_can_be_chosen_by_its_option() -> None:
    (option,) = (field for field in fields(Config) if field.name == "tool_call_parser")
    assert option.metadata["choices"] == ("auto", *FORMATS)


# A call of g, and one whose unit is not among those that the schema lists.
CALLS = {
    "qwen3_coder": "<tool_call>\n<function=g>\n<parameter=text>\nhi\n</parameter>\n"
    "<parameter=number>\n12\n</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n"
    "</tool_call>",
    "seed": "<seed:tool_call>\n<function=g>\n<parameter=text>hi</parameter>\n"
    "<parameter=number>12</parameter>\n<parameter=unit>C</parameter>\n</function>\n"
    "</seed:tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="g">\n<parameter name="text">hi</parameter>\n'
    '<parameter name="number">12</parameter>\n<parameter name="unit">C</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "glm": "<tool_call>g\n<arg_key>text</arg_key>\n<arg_value>hi</arg_value>\n"
    "<arg_key>number</arg_key>\n<arg_value>12</arg_value>\n<arg_key>unit</arg_key>\n"
    "<arg_value>C</arg_value>\n</tool_call>",
    "pythonic": '[g(text="hi", number=12, unit="C")]',
    "lfm2": '<|tool_call_start|>[g(text="hi", number=12, unit="C")]<|tool_call_end|>',
    "olmo3": '<function_calls>\ng(text="hi", number=12, unit="C")\n</function_calls>',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n"
    '{"text": "hi", "number": 12, "unit": "C"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>"
    '{"text": "hi", "number": 12, "unit": "C"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "functiongemma": "<start_function_call>call:g{text:<escape>hi<escape>,number:12,"
    "unit:<escape>C<escape>}<end_function_call>",
    "gemma4": '<|tool_call>call:g{text:<|"|>hi<|"|>,number:12,unit:<|"|>C<|"|>}<tool_call|>',
    "apertus": '<|tools_prefix|>[{"g": {"text": "hi", "number": 12, "unit": "C"}}]<|tools_suffix|>',
    "cohere": '<|START_ACTION|>[{"tool_name": "g", "parameters": {"text": "hi", "number": 12, '
    '"unit": "C"}}]<|END_ACTION|>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.g:0"
    '<|tool_call_argument_begin|>{"text": "hi", "number": 12, "unit": "C"}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
    "functionary": '<function=g>{"text": "hi", "number": 12, "unit": "C"}</function>',
    "hermes": '<tool_call>\n{"name": "g", "arguments": {"text": "hi", "number": 12, "unit": "C"}}\n'
    "</tool_call>",
    "minimax_m1": '<tool_calls>\n{"name": "g", "arguments": {"text": "hi", "number": 12, '
    '"unit": "C"}}\n</tool_calls>',
    "llama3": '{"name": "g", "parameters": {"text": "hi", "number": 12, "unit": "C"}}',
    "json": '{"name": "g", "arguments": {"text": "hi", "number": 12, "unit": "C"}}',
} | {
    f"deepseek_{version}": f"<｜DSML｜{tag}>\n<｜DSML｜invoke name=\"g\">\n"
    '<｜DSML｜parameter name="text" string="true">hi</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="number" string="false">12</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="unit" string="true">C</｜DSML｜parameter>\n'
    f"</｜DSML｜invoke>\n</｜DSML｜{tag}>"
    for version, tag in [("v32", "function_calls"), ("v4", "tool_calls")]
} | {
    name: f'{begin}[{{"name": "g", "arguments": {{"text": "hi", "number": 12, "unit": "C"}}}}]{end}'
    for name, begin, end in [
        ("mistral", "[TOOL_CALLS]", ""),
        ("granite", "<|tool_call|>", ""),
        ("phi4", "<|tool_call|>", "<|/tool_call|>"),
        ("functools", "functools", ""),
        ("nemotron", "<TOOLCALL>", "</TOOLCALL>"),
        ("apriel", "<tool_calls>", "</tool_calls>"),
    ]
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_required_call_is_written_in_the_models_format(
    texts: Texts, tokenizer: Tokenizer, format: str
) -> None:
    call = CALLS[format]
    wanted = {"text": "hi", "number": 12, "unit": "C"}
    content, [(name, arguments)] = parse(format, list(call))
    assert (content, name, json.loads(arguments)) == ("", "g", wanted)
    forced = structural_tag_source(FORMATS[format].calls(TOOLS, at_most_one=True), tokenizer)
    assert texts.take(forced, call)
    assert not texts.take(forced, re.sub(r"\bC\b", "K", call))
    assert not texts.take(forced, call.replace("12", "many"))
    assert not texts.take(forced, "text")


ARGUMENTS = {
    "text": 'a "b"\n\n\\c <tool_call> é', "number": -15, "flag": True, "items": [1, {"k": None}],
    "maybe": None, "unit": "C",
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_calls_that_the_server_writes_are_read_back(format: str) -> None:
    written: list[tuple[str, Any]] = [("g", ARGUMENTS), ("get_weather", {})]
    text = "".join(FORMATS[format].written(written))
    content, found = parse(format, [text])
    assert content.strip() == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == written


@pytest.mark.parametrize("format", FORMATS)
def test_only_the_marks_around_calls_are_markup(format: str) -> None:
    marks = FORMATS[format].marks
    pieces = list(FORMATS[format].written([("f", {"a": " ".join(marks)})]))
    markup = "".join(piece for piece in pieces if isinstance(piece, Markup))
    plain = "".join(piece for piece in pieces if not isinstance(piece, Markup))
    is_bare = format in ("llama3", "json", "pythonic")
    assert is_bare or markup.startswith(FORMATS[format].openings[0])
    for mark in marks:
        assert mark in plain or json.dumps(mark, ensure_ascii=False)[1:-1] in plain


@pytest.mark.parametrize("format", FORMATS)
def test_free_answers_hold_text_or_calls_in_the_models_format(
    texts: Texts, tokenizer: Tokenizer, format: str
) -> None:
    call = CALLS[format]
    free = structural_tag_source(FORMATS[format].text_or_calls(TOOLS), tokenizer)
    assert texts.take(free, "No call at all.")
    assert texts.take(free, call)
    assert not texts.take(free, re.sub(r"\bC\b", "K", call))


NESTED = {
    "type": "object",
    "properties": {
        "list": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        "any": {},
    },
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "at": {"type": ["number", "null"]}},
            "required": ["name"],
        }
    },
}


@pytest.mark.parametrize(
    ("arguments", "is_right"),
    [
        ('list:[{name:<|"|>a<|"|>,at:null},{name:<|"|><|"|>}],map:{x:1,y:2},any:[true]', True),
        ("list:[],any:1.5", True),
        ("map:{}", True),
        ("", True),
        ("list:[{at:1}]", False),
        ('map:{x:<|"|>1<|"|>}', False),
        ("list:{}", False),
        ('list:[{name:<|"|>a<|"|>,other:1}]', False),
    ],
)
def test_values_within_arguments_follow_the_schema_also_without_json(
    texts: Texts, tokenizer: Tokenizer, arguments: str, is_right: bool
) -> None:
    form = FORMATS["gemma4"].calls({"f": NESTED}, at_most_one=True)
    source = structural_tag_source(form, tokenizer)
    assert texts.take(source, f"<|tool_call>call:f{{{arguments}}}<tool_call|>") is is_right


def test_a_schema_that_refers_to_itself_everywhere_is_refused_at_once() -> None:
    node = {"type": "object", "properties": {f"p{i}": {"$ref": "#/$defs/Node"} for i in range(50)}}
    with pytest.raises(GrammarError, match="more than 1000 values"):
        FORMATS["gemma4"].calls({"f": node | {"$defs": {"Node": node}}}, at_most_one=True)


ODD = {"type": "object", "properties": {"any": {}, "never": {"not": {}}, "no": False}}


@pytest.mark.parametrize("format", FORMATS)
def test_arguments_that_may_be_anything_or_nothing_are_no_obstacle(
    texts: Texts, tokenizer: Tokenizer, format: str
) -> None:
    source = structural_tag_source(FORMATS[format].calls({"f": ODD}, at_most_one=True), tokenizer)
    assert texts.take(source, "".join(FORMATS[format].written([("f", {"any": [1, 2]})])))
    assert texts.take(source, "".join(FORMATS[format].written([("f", {})])))
    assert not texts.take(source, "".join(FORMATS[format].written([("f", {"never": 1})])))


@pytest.mark.parametrize("format", FORMATS)
def test_a_keyword_that_is_not_followed_is_refused_in_every_format(
    texts: Texts, tokenizer: Tokenizer, format: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(GrammarError, match="uniqueItems"):
        form = FORMATS[format].calls({"f": schema}, at_most_one=True)
        texts.take(structural_tag_source(form, tokenizer), "")
