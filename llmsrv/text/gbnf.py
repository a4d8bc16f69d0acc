"""Converts GBNF, llama.cpp's grammars, to llguidance's variant of Lark.

A GBNF grammar matches characters.  Lark's terminals match as much as they can, so that "a" | "ab"
before "bc" would refuse "abc".  So every character of the grammar becomes a terminal of its own,
and all else becomes rules, which the Earley parser tries in every way.
Source: llama.cpp, grammars/README.md and src/llama-grammar.cpp.
"""

import re
from typing import NoReturn

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_OR_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_LINE_END = re.compile(r"\r\n?|\n")
_COUNT = re.compile(r"\{[ \t]*([0-9]+)[ \t]*(?:(,)[ \t]*([0-9]*)[ \t]*)?\}")
_TOKEN = re.compile(r"<\[([0-9]+)\]>")
_CHARACTER = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([trn\\\"\[\]-])|([^\\])",
    re.DOTALL,
)
_ESCAPED = {"t": "\t", "r": "\r", "n": "\n"}
_MAX_CODE_POINT = 0x10FFFF


class GbnfError(ValueError):
    """The text is no GBNF grammar; the message names the line and the rule."""


def lark_of_gbnf(text: str) -> str:
    """The grammar as Lark.  Raises GbnfError, or RecursionError if it is nested too deeply."""
    return _Parser(text).grammar()


class _Parser:
    """A recursive descent over the text, which writes Lark as it reads."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._rule = ""  # the name of the rule that is being read
        self._names: dict[str, str] = {}  # of rules -> in Lark
        self._used: dict[str, tuple[str, int]] = {}  # names -> the rule and position of first use
        self._terminals: dict[str, str] = {}  # character classes -> in Lark
        self._rules: dict[str, str] = {}

    def grammar(self) -> str:
        self._skip(_SPACE_OR_LINES)
        while self._position < len(self._text):
            self._read_rule()
        if "root" not in self._rules:
            raise GbnfError("there is no rule 'root'")
        for name, (self._rule, self._position) in self._used.items():
            if name not in self._rules:
                self._fail(f"there is no rule '{name[:64]}'")
        lines = [f"start: {self._names['root']}"]
        lines += [f"{self._names[name]}: {body}" for name, body in self._rules.items()]
        lines += [f"{name}: /{pattern}/" for pattern, name in self._terminals.items()]
        return "\n".join(lines)

    def _read_rule(self) -> None:
        self._rule = name = self._take_name()
        self._skip(_SPACE)
        if not self._text.startswith("::=", self._position):
            self._fail("expected ::=")
        self._position += 3
        self._skip(_SPACE_OR_LINES)
        self._rules[name] = self._alternatives(_SPACE)
        self._lark_name(name)
        if self._position < len(self._text) and not self._skip(_LINE_END):
            self._fail("expected a line end")
        self._skip(_SPACE_OR_LINES)

    def _alternatives(self, space: re.Pattern[str]) -> str:
        """space: what may stand between items, with line ends only within parentheses."""
        found = [self._sequence(space)]
        while self._next == "|":
            self._position += 1
            self._skip(_SPACE_OR_LINES)
            found.append(self._sequence(space))
        return " | ".join(found)

    def _sequence(self, space: re.Pattern[str]) -> str:
        items: list[str] = []
        while (item := self._item(items)) is not None:
            items.append(item)
            self._skip(space)
        return " ".join(items) or '""'

    def _item(self, before: list[str]) -> str | None:
        """The next item; a repetition replaces the last of those before it."""
        match self._next:
            case '"':
                return self._literal()
            case "[":
                return self._class()
            case ".":
                self._position += 1
                return self._terminal(r"(?s:.)")
            case "(":
                return self._group()
            case "<" | "!":
                return self._token()
            case "*" | "+" | "?" | "{":
                if not before:
                    self._fail("expected an item before the repetition")
                return f"({before.pop()}){self._repetition()}"
        if _NAME.match(self._text, self._position):
            start, name = self._position, self._take_name()
            self._used.setdefault(name, (self._rule, start))
            return self._lark_name(name)
        return None

    def _literal(self) -> str:
        self._position += 1
        characters = []
        while self._next != '"':
            characters.append(self._terminal(f"[{self._character()}]"))
        self._position += 1
        return f"({' '.join(characters)})" if characters else '""'

    def _class(self) -> str:
        self._position += 1
        is_negated = self._next == "^"
        self._position += is_negated
        ranges = []
        while self._next != "]":
            first = last = self._character()
            if self._next == "-" and self._text[self._position + 1 : self._position + 2] != "]":
                self._position += 1
                last = self._character()
            if int(last[3:-1], 16) < int(first[3:-1], 16):
                self._fail("a range of characters ends before it begins")
            ranges.append(first if first == last else f"{first}-{last}")
        self._position += 1
        if not ranges:
            self._fail("a class of characters is empty")
        return self._terminal(f"[{'^' if is_negated else ''}{''.join(ranges)}]")

    def _character(self) -> str:
        r"""The next character of a literal or class, as \x{HEX}."""
        match = _CHARACTER.match(self._text, self._position)
        if match is None:
            self._fail("unknown escape sequence" if self._next else "the text ends too early")
        self._position = match.end()
        if escape := match[4]:
            code = ord(_ESCAPED.get(escape, escape))
        else:
            code = ord(match[5]) if match[5] else int(match[1] or match[2] or match[3], 16)
        if code > _MAX_CODE_POINT or 0xD800 <= code < 0xE000:
            self._fail(f"{match[0]} is no character")
        return f"\\x{{{code:x}}}"

    def _group(self) -> str:
        self._position += 1
        self._skip(_SPACE_OR_LINES)
        inner = self._alternatives(_SPACE_OR_LINES)
        if self._next != ")":
            self._fail("expected )")
        self._position += 1
        return f"({inner})"

    def _token(self) -> str:
        token = _TOKEN.match(self._text, self._position)
        if token is None:
            self._fail("of tokens, only <[id]> is supported")
        self._position = token.end()
        return token[0]

    def _repetition(self) -> str:
        if self._next != "{":
            self._position += 1
            return self._text[self._position - 1]
        count = _COUNT.match(self._text, self._position)
        if count is None:
            self._fail("expected {n}, {n,} or {n,m}")
        self._position = count.end()
        least, comma, most = count[1], count[2], count[3]
        if most and int(most) < int(least):
            self._fail("a repetition ends before it begins")
        return f"{{{least}{comma or ''}{most or ''}}}"

    def _terminal(self, pattern: str) -> str:
        return self._terminals.setdefault(pattern, f"C{len(self._terminals)}")

    def _lark_name(self, name: str) -> str:
        return self._names.setdefault(name, f"r{len(self._names)}")

    def _take_name(self) -> str:
        name = _NAME.match(self._text, self._position)
        if name is None:
            self._fail("expected the name of a rule")
        self._position = name.end()
        return name[0]

    @property
    def _next(self) -> str:
        return self._text[self._position : self._position + 1]

    def _skip(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self._text, self._position)
        self._position = match.end() if match else self._position
        return match is not None

    def _fail(self, reason: str) -> NoReturn:
        line = self._text.count("\n", 0, self._position) + 1
        rule = f", rule '{self._rule[:64]}'" if self._rule else ""
        raise GbnfError(f"line {line}{rule}: {reason}")
