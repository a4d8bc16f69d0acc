#!/usr/bin/env bash
# llguidance 1.9.1: integers of a JSON Schema beyond 2^53 are rounded to the nearest double.
#
# A good guess: a schema's `const` is matched as it is written, or refused.
# Seen: `const: 1234567890123456789` refuses that very number and accepts 1234567890123456768 alone;
# `enum` and `minimum` round the same way.  No error, no warning.  So ids of 18 digits, as databases
# hand them out, come out wrong without anyone noticing.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q 'llguidance==1.9.1' 'numpy==2.3.5'

"$directory/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

from llguidance import LLMatcher
from llguidance import LLTokenizer

tokenizer = LLTokenizer("byte")


def accepts(schema, text):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


SEEN = [
    ({"const": 1234567890123456789}, "1234567890123456789", False),
    ({"const": 1234567890123456789}, "1234567890123456768", True),
    ({"enum": [9007199254740993]}, "9007199254740993", False),
    ({"enum": [9007199254740993]}, "9007199254740992", True),
    ({"type": "integer", "minimum": 9007199254740993}, "9007199254740992", True),
    # Below 2^53 nothing is rounded.
    ({"const": 9007199254740991}, "9007199254740991", True),
]
print("llguidance", version("llguidance"))
for schema, text, seen in SEEN:
    found = accepts(schema, text)
    print(json.dumps(schema), text, "accepted" if found else "refused")
    assert found == seen, "the behaviour has changed"
PYTHON
