"""llmsrv.text.gbnf: grammars match the texts that they match in llama.cpp."""

import time

import pytest

from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import gbnf_to_lark
from llmsrv.text.grammar import grammar_source
from tests.support.grammars import Texts

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws # as many as there are
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("gbnf", "text", "other"),
    [
        ('root ::= word " " word\nword ::= [a-z ]+', "ab cd", "ab"),
        ('root ::= ("a" | "ab") "bc"', "abc", "ac"),
        ('root ::= ("a" | "ab") "bc"', "abbc", "bc"),
        ('root ::= [a-z]{2,3} "x"', "abx", "ax"),
        ('root ::= "a"{2} "b"{1,}', "aabb", "abb"),
        ('root ::= ("a"? "b"?)* "c"', "abbac", "ab"),
        ('root ::= . [^\\n] "\\U0001F600"', "\néx".replace("x", "😀"), "a\n😀"),
        ("root ::= [a\\]\\-z-]+", "a]-z", "b"),
        ("root ::= left | right\nleft ::= left [a] | [a]\nright ::= [b] right |", "aaa", "ab"),
        ("root ::= ( # a comment\n [a]\n | [b]\n)\n", "b", "ab"),
        ("root ::= A-1 _b\nA-1 ::= [a]\n\n_b ::= [b]|\n [c]", "ac", "a"),
        ("root ::= [a]\nroot ::= [b]", "b", "a"),
        (JSON, '{"a": [1, -2.50, "x\\u00e9"], "b": {}}', '{"a": 1,}'),
    ],
)
def test_a_text_is_matched_as_by_llama_cpp(
    texts: Texts, gbnf: str, text: str, other: str
) -> None:
    source = grammar_source(gbnf)
    assert texts.take(source, text)
    assert not texts.take(source, other)


@pytest.mark.parametrize(
    ("gbnf", "why"),
    [
        ("root ::= (", "line 1, rule 'root': expected \\)"),
        ("root ::= item\n", "line 1, rule 'root': there is no rule 'item'"),
        ("item ::= [a]", "no rule 'root'"),
        ('root ::= "a"\nitem = "b"', "line 2, rule 'item': expected ::="),
        ('root ::= "a', "line 1, rule 'root': the text ends too early"),
        ("root ::= [z-a]", "line 1, rule 'root': a range"),
        ("root ::= []", "line 1, rule 'root': a class of characters is empty"),
        ('root ::= "\\d"', "line 1, rule 'root': unknown escape"),
        ('root ::= "\\ud800"', "line 1, rule 'root': .* is no character"),
        ("root ::= *", "line 1, rule 'root': expected an item before"),
        ("root ::= [a]{,2}", "line 1, rule 'root': expected {n}"),
        ("root ::= [a]{3,2}", "line 1, rule 'root': a repetition ends"),
        ("root ::= <think> [a]", "line 1, rule 'root': of tokens, only"),
        ("root ::= [a] )", "line 1, rule 'root': expected a line end"),
        ("root ::= " + "(" * 60_000 + "[a]" + ")" * 60_000, "nested too deeply"),
        ("::= [a]", "line 1: expected the name of a rule"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_an_invalid_grammar_is_refused_by_line_and_rule(gbnf: str, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        gbnf_to_lark(grammar_source(gbnf))


@pytest.mark.parametrize("gbnf", ["\n" * 100_000 + "root", "root ::= " + "[a] " * 50_000])
def test_a_long_grammar_is_read_in_linear_time(gbnf: str) -> None:
    begun_at_s = time.process_time()
    try:
        gbnf_to_lark(grammar_source(gbnf))
    except GrammarError:
        pass
    assert time.process_time() - begun_at_s < 2
