"""Structural tags: which answers each format accepts, and which formats are refused."""

import json
from typing import Any

import pytest

from llmsrv.text.grammar import GrammarError
from llmsrv.text.structural_tag import parse_format
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer
from tests.support.grammars import Texts

SPECIAL = "<|im_start|>"
INTEGER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ANY = {"type": "any_text"}


def text(value: str) -> Any:
    return {"type": "const_string", "value": value}


def tag(begin: str, end: str, content: Any = None) -> Any:
    content = content or {"type": "json_schema", "json_schema": INTEGER}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def format_source(form: Any, tokenizer: Tokenizer) -> str:
    return structural_tag_source(parse_format(json.dumps(form).encode()), tokenizer)


F = '<call>f {"n": 1}</call>'
G = '<call>g {"n": 2}</call>'
CALLS = [tag("<call>f ", "</call>"), tag("<call>g ", "</call>")]
TRIGGERED = {"type": "triggered_tags", "triggers": ["<call>"], "tags": CALLS}
SEPARATED = {"type": "tags_with_separator", "tags": CALLS, "separator": "; "}
ONE, FIRST = {"at_least_one": True}, {"stop_after_first": True}
THOUGHTS = {"type": "sequence", "elements": [tag("<think>", "</think>", ANY), TRIGGERED]}


@pytest.mark.parametrize(
    ("form", "taken", "others"),
    [
        (text('a "b"\n'), ['a "b"\n'], ["a", ""]),
        ({"type": "regex", "pattern": "a/b+"}, ["a/bb"], ["a/"]),
        ({"type": "json_schema", "json_schema": INTEGER}, ['{"n": 1}'], ["{}"]),
        (ANY, ["", "all <b>"], []),
        ({"type": "or", "elements": [text("a"), tag("<", ">")]}, ["a", '<{"n": 1}>'], ["", "a<"]),
        ({"type": "sequence", "elements": [text("a"), text(""), ANY]}, ["a", "a b"], ["b"]),
        (tag("<", ">", ANY), ["<>", "<a b>"], ["<a> b", "a>", "<a"]),
        (tag("<", "", ANY), ["<", "<a b> c"], ["a"]),
        (tag("<", ">", tag("[", "]", ANY)), ["<[a>]>"], ["<[a>", "<a>"]),
        (tag("<", f">{SPECIAL}"), [f'<{{"n": 1}}>{SPECIAL}'], ['<{"n": 1}>']),
        (tag("<", SPECIAL, ANY), [f"<a b{SPECIAL}"], ["<a b", f"<{SPECIAL}a"]),
        (TRIGGERED, ["", "</call>", F, f"a {F} b {G}."], ["<call>h", '<call>f {"n": "1"}</call>']),
        (TRIGGERED | ONE, [F, f"a {F} b {G}."], ["", "a"]),
        (TRIGGERED | FIRST, ["", "a", f"a {F}"], [f"{F} b", F + G]),
        (TRIGGERED | ONE | FIRST, [F, f"a {F}"], ["a", F + G]),
        (tag("[", "]", TRIGGERED), ["[]", f"[a {F} b]"], ["[a", "[]]", "[<call>h]"]),
        (tag("[", "]", TRIGGERED | FIRST), ["[]", "[a]", f"[a {F}]"], [f"[{F} b]", f"[{F}"]),
        (SEPARATED, ["", F, f"{F}; {G}; {F}"], [F + G, "a", f"{F}; "]),
        (SEPARATED | ONE, [F, f"{F}; {G}"], [""]),
        (SEPARATED | FIRST, ["", F], [f"{F}; {G}"]),
        (tag(SPECIAL + "[", "]", SEPARATED | ONE), [f"{SPECIAL}[{G}; {F}]"], [G, f"[{G}]"]),
        (THOUGHTS, ["<think>a <call></think>", f"<think></think>a {F}"], ["", F, "<think>"]),
    ],
    ids=str,
)
def test_a_format_accepts_its_answers_and_no_others(
    texts: Texts, tokenizer: Tokenizer, form: Any, taken: list[str], others: list[str]
) -> None:
    source = format_source(form, tokenizer)
    for answer in taken:
        assert texts.take(source, answer), answer
    for answer in others:
        assert not texts.take(source, answer), answer


def test_a_special_token_may_be_the_trigger(texts: Texts, tokenizer: Tokenizer) -> None:
    tags = [tag(f"{SPECIAL}f ", ""), tag(f"{SPECIAL}g ", SPECIAL)]
    form = {"type": "triggered_tags", "triggers": [SPECIAL], "tags": tags}
    source = format_source(form, tokenizer)
    assert texts.take(source, f'text {SPECIAL}f {{"n": 1}}{SPECIAL}g {{"n": 2}}{SPECIAL}')
    assert not texts.take(source, f"text {SPECIAL}h")


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"type": "qwen_xml_parameter", "json_schema": {}}, "'qwen_xml_parameter'"),
        (ANY | {"excludes": ["a"]}, "unknown field `excludes`"),
        ({"type": "const_string"}, "missing required field `value`"),
        (tag("<", ">") | {"end": [">", "]"]}, r"Expected `str`, got `array` - at `\$.end`"),
        ({"type": "sequence", "elements": [ANY, text("a")]}, "'any_text' has to be the last"),
        ({"type": "sequence", "elements": [TRIGGERED, ANY]}, "'triggered_tags' has to be the last"),
        ({"type": "or", "elements": []}, "'or' needs"),
        (TRIGGERED | {"triggers": ["<tool>"]}, "no tag begins with the trigger '<tool>'"),
        (TRIGGERED | {"triggers": [""]}, "triggers that are not empty"),
        ({"type": "json_schema", "json_schema": True}, "an object, but got true"),
        ({"type": "regex", "pattern": "(a*)*"}, "mere repetition"),
        (text("x" * 600_000), "at most 524288"),
        (TRIGGERED | {"triggers": ["<call>"] * 65}, "at most 64 triggers"),
        (TRIGGERED | {"triggers": ["<"] * 60, "tags": CALLS * 1000}, "more than 524288 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_error_names_what_is_not_supported(tokenizer: Tokenizer, form: Any, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        format_source(form, tokenizer)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_format_that_is_nested_too_deeply_is_refused(tokenizer: Tokenizer, depth: int) -> None:
    nested = '{"type":"or","elements":[' * depth + '{"type":"any_text"}' + "]}" * depth
    with pytest.raises(GrammarError, match="recursion|too deeply|at most"):
        structural_tag_source(parse_format(nested.encode()), tokenizer)
