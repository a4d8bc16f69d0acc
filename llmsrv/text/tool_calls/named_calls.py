"""Calls written as a name and JSON arguments, with marks around them: DeepSeek, Kimi K2 and
Functionary.

Sources: the chat templates of the models.
"""

import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

from llmsrv.text.marked_text import Markup
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import TagFormat
from llmsrv.text.structural_tag import TagsWithSeparatorFormat
from llmsrv.text.structural_tag import TriggeredTagsFormat
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.tool_calls.json_calls import JsonCallParser
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.parser import ToolCallParser
from llmsrv.text.tool_calls.parser import Tools
from llmsrv.text.tool_calls.parser import WrittenCall
from llmsrv.text.tool_calls.values import arguments_schema


@dataclass(frozen=True)
class NamedFormat(ToolCallFormat):
    """Calls as a name and JSON arguments, with marks around them.

    section        the marks around all calls; "" for none
    begin          of a call; NAME stands for the name
    end            of a call
    separator      text between calls
    header         matches what follows an opening, up to the bracket of the arguments
    call_openings  marks that begin a call
    more_marks     that stand in `begin` and `end`
    """

    begin: str
    end: str
    header: re.Pattern[str]
    call_openings: tuple[str, ...]
    section: tuple[str, str] = ("", "")
    separator: str = ""
    more_marks: tuple[str, ...] = ()

    @property
    def openings(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.section[0], *self.call_openings)))

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(filter(None, (*self.openings, self.section[1], *self.more_marks)))

    def parser(self, tools: Tools, at_most_one: bool = False) -> ToolCallParser:
        return JsonCallParser(self, tools, at_most_one, self.header)

    def written(self, calls: Sequence[WrittenCall]) -> Iterator[str]:
        before_name, after_name = self.begin.split("NAME")
        yield Markup(self.section[0])
        for number, (name, arguments) in enumerate(calls):
            yield self.separator if number else ""
            yield Markup(before_name)
            yield name
            yield Markup(after_name)
            yield json.dumps(arguments, ensure_ascii=False)
            yield Markup(self.end)
        yield Markup(self.section[1])

    def calls(self, tools: Tools, at_most_one: bool) -> Format:
        return self._section(tools, at_most_one)

    def text_or_calls(self, tools: Tools) -> Format:
        section = self._section(tools, at_most_one=False)
        if isinstance(section, TagFormat):
            return TriggeredTagsFormat([section.begin], [section])
        return TriggeredTagsFormat([self.call_openings[0]], section.tags)

    def _section(self, tools: Tools, at_most_one: bool) -> TagFormat | TagsWithSeparatorFormat:
        tags = [
            json_tag(
                self.begin.replace("NAME", name),
                json.dumps(arguments_schema(schema)).encode(),
                self.end,
            )
            for name, schema in tools.items()
        ]
        calls = TagsWithSeparatorFormat(
            tags, self.separator, at_least_one=True, stop_after_first=at_most_one
        )
        return TagFormat(self.section[0], calls, self.section[1]) if self.section[0] else calls
