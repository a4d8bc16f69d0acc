"""Reads Python's literals, as models write them in calls, into the values of JSON, and writes them.

A small reader of our own: what a model writes is never handed to Python's compiler.  The time is
linear in the text.
Source: The Python Language Reference, section 2.4 (literals) and 6.2 (lists, dictionaries).
"""

import json
import re
from typing import Any

MAX_DEPTH = 100  # brackets within brackets

_CONSTANTS = {
    "True": True, "False": False, "None": None, "true": True, "false": False, "null": None,
}  # fmt: skip
_SPACE = re.compile(r"(?:\s++|#[^\n]*+|\\\n)*+")
_WORD = re.compile(r"[A-Za-z]++")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?+)(?:0[xX](?P<hex>[\da-fA-F]++)|0[oO](?P<octal>[0-7]++)|0[bB](?P<binary>[01]++)"
    r"|(?P<decimal>(?:\d[\d_]*+)?+(?:\.\d*+)?+(?:[eE][-+]?\d++)?+))(?![\w.])",
    re.ASCII,
)
_STRING = re.compile(
    r"""(?P<prefix>[rR]?+)(?:"{3}(?P<a>(?:[^"\\]++|\\.|"(?!""))*+)"{3}"""
    r"""|'{3}(?P<b>(?:[^'\\]++|\\.|'(?!''))*+)'{3}"""
    r'''|"(?P<c>(?:[^"\\\n]++|\\.)*+)"|'(?P<d>(?:[^'\\\n]++|\\.)*+)')''',
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"""\\(?:u(?P<high>[dD][89abAB][\da-fA-F]{2})\\u(?P<low>[dD][c-fC-F][\da-fA-F]{2})"""
    r"|(?:x(?P<x>[\da-fA-F]{2})|u(?P<u>[\da-fA-F]{4})|U(?P<U>[\da-fA-F]{8}))"
    r"|(?P<octal>[0-7]{1,3})|(?P<other>.))",
    re.DOTALL,
)
_ESCAPED = {
    "\n": "", "\\": "\\", "'": "'", '"': '"',
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
}  # fmt: skip
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def read_literal(text: str) -> Any:
    """The value of a literal.  A tuple becomes a list; JSON's constants are also read.

    Raises ValueError if the text is no literal, or is nested too deeply."""
    reader = _Reader(text)
    value = reader.value(MAX_DEPTH)
    if reader.position < len(text):
        raise ValueError("a literal is followed by more")
    return value


def write_literal(value: Any) -> str:
    """A value of JSON as a literal.  RecursionError if it is nested too deeply."""
    if isinstance(value, dict):
        pairs = (f"{write_literal(key)}: {write_literal(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(write_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


class _Reader:
    """position: up to which the text is read, the space after a value included."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.position = 0
        self._skip_space()

    def value(self, depth: int) -> Any:
        if not depth:
            raise ValueError("the literal is nested too deeply")
        opening = self._text[self.position : self.position + 1]
        if opening in _CLOSING:
            return self._collection(opening, depth - 1)
        if string := self._match(_STRING):
            return self._strings(string)
        if word := self._match(_WORD):
            if word[0] not in _CONSTANTS:
                raise ValueError(f"{word[0]!r} is no constant")
            return _CONSTANTS[word[0]]
        if (number := self._match(_NUMBER)) and number[0].lstrip("+-"):
            return _number(number)
        raise ValueError("this is no literal")

    def _collection(self, opening: str, depth: int) -> Any:
        """A list, a tuple, a dictionary, or a value in parentheses."""
        self._take(opening)
        closing = _CLOSING[opening]
        values: list[Any] = []
        pairs: dict[str, Any] = {}
        ends_in_comma = True
        while ends_in_comma and not self._take(closing):
            value = self.value(depth)
            if opening == "{":
                if not self._take(":"):
                    raise ValueError("a key has no value")
                pairs[_key(value)] = self.value(depth)
            else:
                values.append(value)
            ends_in_comma = self._take(",")
            if not ends_in_comma and not self._take(closing):
                raise ValueError(f"{closing!r} is missing")
        if opening == "{":
            return pairs
        is_in_parentheses = opening == "(" and len(values) == 1 and not ends_in_comma
        return values[0] if is_in_parentheses else values

    def _strings(self, first: re.Match[str]) -> str:
        """Strings that follow each other are one."""
        parts = [_string(first)]
        while string := self._match(_STRING):
            parts.append(_string(string))
        return "".join(parts)

    def _take(self, character: str) -> bool:
        if not self._text.startswith(character, self.position):
            return False
        self.position += 1
        self._skip_space()
        return True

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self.position)
        if match:
            self.position = match.end()
            self._skip_space()
        return match

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self.position)
        assert match is not None
        self.position = match.end()


def _number(match: re.Match[str]) -> int | float:
    for name, base in (("hex", 16), ("octal", 8), ("binary", 2)):
        if digits := match[name]:
            value: int | float = int(digits, base)
            break
    else:
        decimal = match["decimal"].replace("_", "")
        value = float(decimal) if set(decimal) & set(".eE") else int(decimal)
    return -value if match["sign"] == "-" else value


def _string(match: re.Match[str]) -> str:
    text = next(part for part in match.group("a", "b", "c", "d") if part is not None)
    return text if match["prefix"] else _ESCAPE.sub(_unescaped, text)


def _unescaped(match: re.Match[str]) -> str:
    """Half of an escaped character becomes U+FFFD, as in nested_json.  An escape that Python does
    not know stays as it is."""
    if match["high"]:
        return (bytes.fromhex(match["high"]) + bytes.fromhex(match["low"])).decode("utf-16-be")
    if digits := match["x"] or match["u"] or match["U"]:
        code = int(digits, 16)
    elif match["octal"]:
        code = int(match["octal"], 8)
    else:
        return _ESCAPED.get(match["other"], match[0])
    is_character = code <= 0x10FFFF and not 0xD800 <= code < 0xE000
    return chr(code) if is_character else "\ufffd"


def _key(value: Any) -> str:
    """A key in JSON's spelling, as json.dumps writes those that are no strings."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    raise ValueError("a collection is no key")
