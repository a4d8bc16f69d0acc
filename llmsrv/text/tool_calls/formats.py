"""The formats of tool calls, and which one a chat template shows.

Each is a row with the marks that a family of models writes around its calls.
"""

import re

from llmsrv.text.tool_calls.brace_calls import BraceFormat
from llmsrv.text.tool_calls.json_calls import JsonFormat
from llmsrv.text.tool_calls.named_calls import NamedFormat
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.python_calls import PythonFormat
from llmsrv.text.tool_calls.xml_calls import XmlFormat

_DEEPSEEK_SECTION = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
_DEEPSEEK_MARKS = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _function_tags(opening: str, closing: str, lines: bool = False) -> XmlFormat:
    return XmlFormat(
        opening,
        closing,
        name=("<function=", ">"),
        function_end="</function>",
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
        lines=lines,
    )


def _dsml(opening: str, closing: str) -> XmlFormat:
    return XmlFormat(
        opening,
        closing,
        name=('<｜DSML｜invoke name="', '">'),
        function_end="</｜DSML｜invoke>",
        key=('<｜DSML｜parameter name="', '" string="'),
        value=("", "</｜DSML｜parameter>"),
        kinds=('true">', 'false">'),
    )


FORMATS: dict[str, ToolCallFormat] = {
    "hermes": JsonFormat("<tool_call>", "</tool_call>"),
    "llama3": JsonFormat(
        "<|python_tag|>", arguments="parameters", is_bare=True, separator="; "
    ),
    "mistral": JsonFormat(
        "[TOOL_CALLS]",
        is_list=True,
        separator=", ",
        header=re.compile(r"(?P<name>[\w.-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*\{"),
        more_marks=("[ARGS]", "[CALL_ID]"),
        has_short_ids=True,
    ),
    "json": JsonFormat(is_bare=True),
    # Granite 3 and Phi-4-mini write a list of calls after the same token.
    "granite": JsonFormat("<|tool_call|>", is_list=True, separator=", "),
    "phi4": JsonFormat("<|tool_call|>", "<|/tool_call|>", is_list=True, separator=", "),
    "functools": JsonFormat("functools[", is_list=True, separator=", "),
    "nemotron": JsonFormat("<TOOLCALL>", "</TOOLCALL>", is_list=True, separator=", "),
    "minimax_m1": JsonFormat("<tool_calls>", "</tool_calls>"),
    "apriel": JsonFormat("<tool_calls>", "</tool_calls>", is_list=True, separator=", "),
    "cohere": JsonFormat(
        "<|START_ACTION|>", "<|END_ACTION|>", name="tool_name", arguments="parameters",
        is_list=True, separator=", ",
    ),
    "apertus": JsonFormat(
        "<|tools_prefix|>", "<|tools_suffix|>", is_keyed=True, is_list=True, separator=", "
    ),
    "qwen3_coder": _function_tags("<tool_call>", "</tool_call>", lines=True),
    "seed": _function_tags("<seed:tool_call>", "</seed:tool_call>"),
    "minimax_m2": XmlFormat(
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        name=('<invoke name="', '">'),
        function_end="</invoke>",
        key=('<parameter name="', '">'),
        value=("", "</parameter>"),
    ),
    "deepseek_v32": _dsml("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
    "deepseek_v4": _dsml("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
    "glm": XmlFormat(
        "<tool_call>",
        "</tool_call>",
        name=("", ""),
        function_end="",
        key=("<arg_key>", "</arg_key>"),
        value=("<arg_value>", "</arg_value>"),
    ),
    "deepseek_v3": NamedFormat(
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        header=re.compile(
            r"(?:<｜tool▁call▁begin｜>)?\s*(?:function)?\s*<｜tool▁sep｜>\s*"
            r"(?P<name>[\w.-]+)\s*(?:```(?:json)?)?\s*\{"
        ),
        call_openings=(_DEEPSEEK_CALL,),
        section=_DEEPSEEK_SECTION,
        separator="\n",
        more_marks=_DEEPSEEK_MARKS,
    ),
    "deepseek_v31": NamedFormat(
        begin="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜>",
        header=re.compile(
            r"(?:<｜tool▁call▁begin｜>)?\s*(?P<name>[\w.-]+)\s*<｜tool▁sep｜>\s*\{"
        ),
        call_openings=(_DEEPSEEK_CALL,),
        section=_DEEPSEEK_SECTION,
        more_marks=_DEEPSEEK_MARKS,
    ),
    "kimi_k2": NamedFormat(
        begin="<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        header=re.compile(
            r"(?:<\|tool_call_begin\|>)?\s*(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?\s*"
            r"<\|tool_call_argument_begin\|>\s*\{"
        ),
        call_openings=("<|tool_call_begin|>",),
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        more_marks=("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    "functionary": NamedFormat(
        begin="<function=NAME>",
        end="</function>",
        header=re.compile(r"(?P<name>[\w.-]+)>\s*\{"),
        call_openings=("<function=",),
        more_marks=("</function>",),
    ),
    "pythonic": PythonFormat(),
    "lfm2": PythonFormat(("<|tool_call_start|>", "<|tool_call_end|>")),
    "olmo3": PythonFormat(("<function_calls>", "</function_calls>"), lines=True),
    "functiongemma": BraceFormat(
        "<start_function_call>", "<end_function_call>", "<escape>", ("<start_function_response>",)
    ),
    "gemma4": BraceFormat("<|tool_call>", "<tool_call|>", '<|"|>', ("<|tool_response>",)),
}

# The first pattern found in a template names its format: each comes before those that its template
# also contains.  None: of the formats that are not known.
_SHOWN_BY: list[tuple[str | None, str]] = [
    ("qwen3_coder", r"<tool_call>(?s:.*)<parameter=|<parameter=(?s:.*)<tool_call>"),
    ("seed", "<seed:tool_call>"),
    ("functionary", "<function="),
    ("glm", "<arg_key>"),
    ("minimax_m2", "<minimax:tool_call>"),
    ("deepseek_v4", r"(?:｜DSML｜|dsml_token \}\}|dsml_token \+ ')tool_calls>"),
    ("deepseek_v32", "｜DSML｜"),
    (None, r"<(?:\w+:)?invoke\b|<function name="),
    ("gemma4", r"<\|tool_call>"),
    ("functiongemma", "<start_function_call>"),
    (None, r"<\|channel\|>"),
    ("cohere", r"<\|START_ACTION\|>"),
    ("apertus", r"<\|tools_prefix\|>"),
    ("nemotron", "<TOOLCALL>"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>(?s:.*)```json"),
    ("deepseek_v31", "<｜tool▁calls▁begin｜>"),
    ("kimi_k2", r"<\|tool_calls_section_begin\|>"),
    # LFM2.5 shows its calls nowhere.
    ("lfm2", r"<\|tool_call_start\|>|<\|tool_list_start\|>|List of tools: \["),
    ("phi4", r"<\|/tool_call\|>|<\|/tool\|>"),
    ("granite", r"<\|tool_call\|>"),
    ("functools", r"functools\["),
    ("olmo3", "<function_calls>"),
    ("apriel", r"<tool_calls>\["),
    ("minimax_m1", "<tool_calls>"),
    ("mistral", r"\[TOOL_CALLS\]"),
    ("pythonic", r"\[func_name1\(|\[func1\("),
    ("hermes", "<tool_call>"),
    ("llama3", r"<\|python_tag\|>|ipython"),
    ("json", r'"name"\s*:|\\"name\\"'),
]


def detect_format(template: str) -> str | None:
    """The name of the format that a chat template shows; None if it is none of these."""
    return next((name for name, shown in _SHOWN_BY if re.search(shown, template)), None)
