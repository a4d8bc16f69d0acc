"""Structural tags: grammars for answers in which certain texts introduce others.

The formats are those of XGrammar's documentation, which vLLM also accepts, with one restriction:
free text must be followed by something that ends it, or by the end of the answer.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import NamedTuple
from typing import TypeVar

import msgspec

from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import MAX_SOURCE_BYTES
from llmsrv.text.grammar import check_source_size
from llmsrv.text.grammar import checked_schema
from llmsrv.text.grammar import lark_regex
from llmsrv.text.grammar import lark_source
from llmsrv.text.grammar import lark_text

if TYPE_CHECKING:
    from llmsrv.text.tokenizer import Tokenizer

T = TypeVar("T")

MAX_TRIGGERS = 64

# ---- Formats; unknown fields are refused


class _Format(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    pass


class ConstStringFormat(_Format, tag="const_string"):
    value: str


class AnyTextFormat(_Format, tag="any_text"):
    pass


class JSONSchemaFormat(_Format, tag="json_schema"):
    json_schema: msgspec.Raw


class RegexFormat(_Format, tag="regex"):
    pattern: str


class SequenceFormat(_Format, tag="sequence"):
    elements: list["Format"]


class OrFormat(_Format, tag="or"):
    elements: list["Format"]


class TagFormat(_Format, tag="tag"):
    begin: str
    content: "Format"
    end: str


class TriggeredTagsFormat(_Format, tag="triggered_tags"):
    """Free text in which each trigger must start one of the tags that begin with it."""

    triggers: list[str]
    tags: list[TagFormat]
    at_least_one: bool = False
    stop_after_first: bool = False


class TagsWithSeparatorFormat(_Format, tag="tags_with_separator"):
    """Tags with a separator between them, and no other text."""

    tags: list[TagFormat]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = (
    ConstStringFormat
    | AnyTextFormat
    | JSONSchemaFormat
    | RegexFormat
    | SequenceFormat
    | OrFormat
    | TagFormat
    | TriggeredTagsFormat
    | TagsWithSeparatorFormat
)


def parse_format(text: bytes) -> Format:
    """Parses a format; raises GrammarError naming the part that is not valid."""
    check_source_size(text)
    try:
        form: Format = msgspec.json.decode(text, type=Format)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(f"the format is not possible: {error}") from None
    return form


def json_tag(begin: str, schema: bytes, end: str) -> TagFormat:
    """A tag whose content is JSON that follows a schema."""
    return TagFormat(begin, JSONSchemaFormat(msgspec.Raw(schema)), end)


def structural_tag_source(form: Format, tokenizer: "Tokenizer") -> str:
    """The grammar source for a format.  Text of a special token means that token."""
    rules = _Rules(tokenizer)
    try:
        rules.add("start", rules.add_format(form, _END_OF_ANSWER))
    except RecursionError:
        raise GrammarError("the format is nested too deeply") from None
    return lark_source("\n".join(rules.lines))


# ---- Rules


class _End(NamedTuple):
    """What ends a format.

    name      of the rule or terminal that matches it; "" for the end of the answer
    is_token  whether it begins with a special token, which free text cannot contain
    """

    name: str
    is_token: bool = False


_END_OF_ANSWER = _End("")


class _Rules:
    """The lines of one grammar."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.lines = [r"TEXT: /(.|\n)*/"]
        self._num_names = 0
        self._room_bytes = MAX_SOURCE_BYTES
        self._tokenizer = tokenizer

    def add(self, name: str, *alternatives: str) -> str:
        line = f"{name}: {' | '.join(alternatives)}"
        self.lines.append(line)
        self._room_bytes -= len(line)
        if self._room_bytes < 0:  # a tag is repeated for every trigger it begins with
            raise GrammarError(f"the format takes more than {MAX_SOURCE_BYTES} bytes of rules")
        return name

    def add_format(self, form: Format, end: _End | None) -> str:
        """Adds the rule of a format and its end; end is None if another rule matches the end."""
        match form:
            case ConstStringFormat(value):
                return self._followed_by_end(self._text(value), end)
            case JSONSchemaFormat(schema):
                value = json.dumps(checked_schema(bytes(schema)))
                return self._followed_by_end(self.add(self._name("json"), f"%json {value}"), end)
            case RegexFormat(pattern):
                return self._followed_by_end(lark_regex(pattern), end)
            case AnyTextFormat():
                return self._any_text(end)
            case SequenceFormat(elements):
                *first, last = _not_empty(elements, "sequence")
                parts = [self.add_format(element, None) for element in first]
                parts.append(self.add_format(last, end))
                return self.add(self._name("sequence"), " ".join(parts))
            case OrFormat(elements):
                either = [self.add_format(element, end) for element in _not_empty(elements, "or")]
                return self.add(self._name("or"), *either)
            case TagFormat():
                return self._tag(form, form.begin, end)
            case TriggeredTagsFormat():
                return self._triggered(form, end)
            case TagsWithSeparatorFormat():
                return self._separated(form, end)

    def _any_text(self, end: _End | None, kind: str = "any_text") -> str:
        if end is None:
            raise GrammarError(f"'{kind}' has to be the last of a sequence: nothing else ends it")
        # A special token ends free text unambiguously; a plain end must match lazily, at its first
        # occurrence.
        lazy = "" if end.is_token or not end.name else "[lazy]"
        name = self._name("text")
        self.add(name + lazy, f"TEXT {end.name}")
        return name

    def _tag(self, tag: TagFormat, begin: str, end: _End | None) -> str:
        """The rule of a tag; `begin` is what is left of its beginning after the trigger."""
        if not tag.end:
            inner = self.add_format(tag.content, end)
            return self.add(self._name("tag"), f"{self._text(begin)} {inner}")
        inner = self.add_format(tag.content, self._add_end(tag.end))
        return self._followed_by_end(f"{self._text(begin)} {inner}", end)

    def _triggered(self, form: TriggeredTagsFormat, end: _End | None) -> str:
        if len(form.triggers) > MAX_TRIGGERS:
            raise GrammarError(f"'triggered_tags' takes at most {MAX_TRIGGERS} triggers")
        text = self._any_text(end, "triggered_tags")
        tags = _not_empty(form.tags, "triggered_tags")
        found = [self._trigger(t, tags) for t in _not_empty(form.triggers, "triggered_tags")]
        tag, name = self.add(self._name("tags"), *found), self._name("triggered")
        if form.stop_after_first:
            assert end is not None
            only = f"{tag} {end.name}"
            return self.add(name, only) if form.at_least_one else self.add(name, only, text)
        return self.add(name, f"{tag}{'+' if form.at_least_one else '*'} {text}")

    def _trigger(self, trigger: str, tags: Sequence[TagFormat]) -> str:
        """Free text up to a trigger, and the tags that may follow."""
        if not trigger:
            raise GrammarError("expected triggers that are not empty")
        opening = self._leading_token(trigger) or trigger
        begun = [
            self._tag(tag, tag.begin.removeprefix(opening), None)
            for tag in tags
            if tag.begin.startswith(trigger)
        ]
        if not begun:
            raise GrammarError(f"no tag begins with the trigger {trigger[:64]!r}")
        text = self._any_text(self._add_end(opening))
        return self.add(self._name("trigger"), f"{text} ({' | '.join(begun)})")

    def _separated(self, form: TagsWithSeparatorFormat, end: _End | None) -> str:
        tags = [self.add_format(tag, None) for tag in _not_empty(form.tags, "tags_with_separator")]
        tag = self.add(self._name("tags"), *tags)
        further = "" if form.stop_after_first else f"({self._text(form.separator)} {tag})*"
        return self._followed_by_end(f"({tag} {further}){'' if form.at_least_one else '?'}", end)

    def _add_end(self, text: str) -> _End:
        tokens = self._tokenizer.special_tokens
        has_tokens = any(p in tokens for p in self._tokenizer.split(text, parse_special=True))
        name = self._name("end" if has_tokens else "END")  # only rules may contain tokens
        return _End(self.add(name, self._text(text)), self._leading_token(text) is not None)

    def _followed_by_end(self, taken: str, end: _End | None) -> str:
        return self.add(self._name("ended"), f"{taken} {end.name if end else ''}")

    def _name(self, kind: str) -> str:
        self._num_names += 1
        return f"{kind}_{self._num_names}"

    def _text(self, text: str) -> str:
        return lark_text(text, self._tokenizer) or '""'

    def _leading_token(self, text: str) -> str | None:
        """The special token that the text begins with, or None."""
        before, *rest = self._tokenizer.split(text, parse_special=True)
        is_token = not before and rest and rest[0] in self._tokenizer.special_tokens
        return rest[0] if is_token else None


def _not_empty(elements: list[T], kind: str) -> list[T]:
    if not elements:
        raise GrammarError(f"'{kind}' needs at least one of each")
    return elements
