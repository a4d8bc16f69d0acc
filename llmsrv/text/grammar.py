"""Grammars that constrain answers.  Converts a client's schema, regex or grammar to the text that
llguidance accepts (a source), and compiles a source to a matcher.

The server makes sources.  That is fast and safe for any input from a client.  Compiling is neither,
so a killable process (worker.py) tries it first.  The engine compiles only sources that succeeded
there, under the same limits.

Source: llguidance, docs/syntax.md and docs/json_schema.md.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from llmsrv.text import nested_json
from llmsrv.text.gbnf import GbnfError
from llmsrv.text.gbnf import lark_of_gbnf
from llmsrv.text.json_schema import UnfollowedError
from llmsrv.text.json_schema import digits_as_ecma
from llmsrv.text.json_schema import followed_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance import LLTokenizer

    from llmsrv.text.tokenizer import Tokenizer

MAX_SOURCE_BYTES = 1 << 19
MAX_ERROR_CHARS = 500
# JSON as Python's json.dumps writes it.  With free whitespace, a small model that gets lost emits
# whitespace forever, and far fewer tokens are forced.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# In addition to llguidance's own limits, which bound the mask of a step to about 20 ms.  50,000
# lexer states take about 100 MB.
MAX_LEXER_STATES = 50_000

# The patterns below take time linear in any text: what repeats is possessive, stops at
# the end of its line, or has an end that cannot begin it again.
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*\])")
_LARK = re.compile(r"^[ \t]*+(%llguidance\b|start[ \t]*+:)", re.MULTILINE)
_IN_LARK = {"/": r"\/", "\n": r"\n", "\r": r"\r"}
# Escape sequences match as a whole and stay unchanged.
_NOT_IN_LARK = re.compile(r"\\.|[/\n\r]", re.DOTALL)
_IN_SCHEMA = "failed to compile JSON schema: "
_OUR_LINES = re.compile(r"\n *[0-9]+ \| ")  # llguidance quotes the grammar around a schema
# What an error is about -> the message that names the keyword.
_NAMED_KEYWORDS = {
    "regex parse error": "'pattern' is not supported: {}",
    "lookarounds not supported": "'pattern' is not supported: {}",
    "oneOf constraints": "'oneOf' with alternatives that overlap is not supported",
    "for integer range": "'minimum' or 'maximum' of this size is not supported",
    "for float range": "'minimum' or 'maximum' of this size is not supported",
    "Pointer '": "'$ref' leads nowhere: {}",
    "retrieving it failed": "'$ref' leads out of the schema: {}",
}
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*+"?')  # or a rest of a line
_COUNTS = re.compile(r"(?<!\\)\{([\d\s,]*+)\}")
_EXCESSIVE = re.compile(r"[1-9]\d{6}")
_NESTED_IN_PATTERN = re.compile(r"(?<!\\)\((?:\?:)?(?:\\?[\w.]|\[[^\[\]]*\])[*+]\)[*+]")
_NESTED_IN_RULES = re.compile(r'\(\s*(?:""|[\w-]+|\[[^\[\]]*\])\s*[*+]\s*\)\s*[*+]')


class GrammarError(ValueError):
    """A refused grammar; the message tells the client why."""


# ---- Sources


def json_schema_source(schema: Any, whitespace_pattern: str | None = None) -> str:
    """Source for JSON that follows a JSON Schema, given as an object or as JSON text.

    whitespace_pattern  regular expression for whitespace between JSON tokens; None: JSON_STYLE
    """
    return _source_from([{"json_schema": checked_schema(schema, whitespace_pattern)}])


def regex_source(pattern: str) -> str:
    """Source for text that fully matches a regular expression of Rust's `regex` crate."""
    return lark_source(f"start: {lark_regex(pattern)}")


def choice_source(choices: Sequence[str]) -> str:
    """Source for one of several texts."""
    if not any(choices):
        raise GrammarError("expected at least one text that is not empty")
    if (size := sum(map(len, choices))) > MAX_SOURCE_BYTES:
        raise _too_large(size)
    # One terminal, because rules cannot separate a choice from another that starts with it.
    return lark_source(f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}")


def grammar_source(text: str) -> str:
    """Source for a grammar in llguidance's variant of Lark, or in GBNF."""
    if not text.strip():
        raise GrammarError("expected a grammar in Lark or GBNF, but got an empty string")
    check_source_size(text)
    _check_repetitions(_LITERAL.sub('""', text), _NESTED_IN_RULES)
    return lark_source(text) if _LARK.search(text) else _source_from([{"gbnf": text}])


def alternation_source(first: str, second: str) -> str:
    """Source for the texts of either of two sources."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": "start: @first | @second"}]
    for name, source in (("first", first), ("second", second)):
        start, *further = json.loads(source)["grammars"]
        grammars += [{"name": name, **start}, *further]
    return _source_from(grammars)


def after_reasoning_source(
    source: str, tokenizer: "Tokenizer", opening: str, closing: str, is_begun: bool
) -> str:
    """Source for the texts of `source` after reasoning, which is any text between two tags.

    is_begun  the prompt ends with the opening tag; otherwise the reasoning is optional
    """
    rest, *further = json.loads(source)["grammars"]
    lazy = "" if closing in tokenizer.special_tokens else "[lazy]"
    reasoning = "reasoning" if is_begun else f"({lark_text(opening, tokenizer)} reasoning)?"
    lines = [
        f"start: {reasoning} @answer",
        "reasoning: closed_text SPACES",
        f"closed_text{lazy}: TEXT {lark_text(closing, tokenizer)}",
        r"TEXT: /(.|\n)*/",
        r"SPACES: /\s{0,4}/",
    ]
    return _source_from([{"lark_grammar": "\n".join(lines)}, {"name": "answer", **rest}, *further])


def lark_regex(pattern: str) -> str:
    """A regular expression as a Lark terminal."""
    if not pattern:
        raise GrammarError("expected a regular expression, but got an empty string")
    check_source_size(pattern)
    _check_repetitions(pattern, _NESTED_IN_PATTERN)
    pattern = digits_as_ecma(pattern)
    return f"/{_NOT_IN_LARK.sub(lambda match: _IN_LARK.get(match[0], match[0]), pattern)}/"


def lark_text(text: str, tokenizer: "Tokenizer") -> str:
    """A text in Lark: plain pieces as strings, special tokens as their ids."""
    pieces = tokenizer.split(text, parse_special=True)
    ids = tokenizer.special_tokens
    return " ".join(f"<[{ids[p]}]>" if p in ids else json.dumps(p) for p in pieces if p)


def checked_schema(schema: Any, whitespace_pattern: str | None = None) -> dict[str, Any]:
    """Checks a schema as given to json_schema_source; returns it with llguidance's options."""
    if isinstance(schema, bytes | str):
        check_source_size(schema)
        schema = _parse_json(schema)
    if isinstance(schema, str):  # MLC's clients send the schema as a string
        schema = _parse_json(schema)
    if not isinstance(schema, dict):
        got = _truncated_json(schema)
        raise GrammarError(f"expected a schema that is an object, but got {got}")
    if not schema:
        raise GrammarError("the schema is empty; for any JSON object ask for 'json_object'")
    options: dict[str, Any] = JSON_STYLE
    if whitespace_pattern is not None:
        options = {"whitespace_flexible": True, "whitespace_pattern": whitespace_pattern}
    try:
        return followed_schema(schema) | {"x-guidance": options}
    except UnfollowedError as error:
        raise GrammarError(str(error)) from None
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None


def _parse_json(text: bytes | str) -> Any:
    try:
        return nested_json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None


def _check_repetitions(text: str, nested: re.Pattern[str]) -> None:
    """Refuses repetitions that can only be a mistake or an attack."""
    if any(map(_EXCESSIVE.search, _COUNTS.findall(text))):
        raise GrammarError("a repetition of a million times or more is refused")
    if found := nested.search(text):
        raise GrammarError(f"a repetition of a mere repetition is refused: {found[0][:64]}")


def _truncated_json(value: Any) -> str:
    return json.dumps(value)[:64]


def lark_source(lark: str) -> str:
    return _source_from([{"lark_grammar": lark}])


def _source_from(grammars: list[dict[str, Any]]) -> str:
    try:
        source = json.dumps({"grammars": grammars})
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    check_source_size(source)
    return source


def check_source_size(text: bytes | str) -> None:
    if len(text) > MAX_SOURCE_BYTES:
        raise _too_large(len(text))


def _too_large(size: int) -> GrammarError:
    return GrammarError(f"the grammar has {size} bytes; at most {MAX_SOURCE_BYTES} are possible")


# ---- Compiling, in the worker and in the engine; llguidance is imported nowhere else


def load_ll_tokenizer(model_path: Path, cache_dir: Path, vocab_size: int = 0) -> "LLTokenizer":
    """Loads a model's tokens for llguidance; takes 0.4 s for 49k tokens.

    vocab_size  of the model, which may have more ids than tokens; 0: the number of tokens
    """
    from llguidance import LLTokenizer
    from llguidance import TokenizerWrapper

    from llmsrv.files.open import open_model
    from llmsrv.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_model(model_path), cache_dir)
    num_tokens = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    unused = range(num_tokens, vocab_size)
    end_ids = sorted(id for id in tokenizer.end_ids if id < num_tokens)

    class Tokens:
        """The tokenizer interface that llguidance expects."""

        eos_token_id = end_ids[0] if end_ids else 0
        bos_token_id = None
        tokens = [tokenizer.token_bytes(id) for id in range(num_tokens)] + [b"" for _ in unused]
        special_token_ids = [
            *(id for id in range(num_tokens) if not tokenizer.is_text(id)), *unused
        ]

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode(), parse_special=False, is_start=False)

    return LLTokenizer(TokenizerWrapper(Tokens()), eos_token=end_ids)


def compile_source(source: str, vocabulary: "LLTokenizer") -> "LLMatcher":
    """Compiles a source to a matcher in its initial state.

    Raises GrammarError.  May crash, run for minutes or take gigabytes, unless the worker has
    accepted the same source."""
    from llguidance import LLMatcher
    from llguidance import LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(_client_message(matcher.get_error()))
    if matcher.is_stopped():
        raise GrammarError("the grammar allows no text, or none but the empty one")
    return matcher


def gbnf_to_lark(source: str) -> str:
    """Converts the GBNF in a source to Lark.  May be as slow as compile_source."""
    grammars = json.loads(source)["grammars"]
    for grammar in grammars:
        if (gbnf := grammar.pop("gbnf", None)) is None:
            continue
        try:
            grammar["lark_grammar"] = lark_of_gbnf(gbnf)
        except GbnfError as error:
            raise GrammarError(str(error)) from None
        except RecursionError:
            raise GrammarError("the grammar is nested too deeply") from None
    return _source_from(grammars)


def _client_message(error: str) -> str:
    """llguidance's error message without its dump of the parser state."""
    message = error.partition("\n<")[0].strip()
    if _IN_SCHEMA in message:
        message = _OUR_LINES.split(message.partition(_IN_SCHEMA)[2])[0]
    for mark, named in _NAMED_KEYWORDS.items():
        if mark in message:
            message = named.format(message)
    if unsupported := _UNSUPPORTED.search(message):
        names = ", ".join(json.loads(unsupported[1]))
        return f"it uses keywords of JSON Schema that are not supported: {names}"
    if message == "NoExtensionBias":
        return "the grammar allows no text that ends"
    return message[:MAX_ERROR_CHARS]
