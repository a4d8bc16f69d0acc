"""Puts the calls of an answer together, as a client does."""

from collections.abc import Sequence
from typing import Any

from llmsrv.text.tool_calls.formats import FORMATS

Calls = list[tuple[str, str]]

# The tools of the tests; g has an argument of every type.
TOOLS: dict[str, dict[str, Any] | None] = {
    "f": None,
    "get_weather": None,
    "g": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "number": {"type": "integer"},
            "flag": {"type": "boolean"},
            "items": {"type": "array"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "unit": {"$ref": "#/$defs/Unit"},
        },
        "required": ["text"],
        "$defs": {"Unit": {"enum": ["C", "F"]}},
    },
}


def parse(
    format: str, pieces: Sequence[str], at_most_one: bool = False, is_cut: bool = False
) -> tuple[str, Calls]:
    """The content, and the name and arguments of each call, joined as a client does."""
    parser = FORMATS[format].parser(TOOLS, at_most_one)
    content = ""
    names: list[str] = []
    arguments: list[list[str]] = []
    for text, deltas in [*map(parser.push, pieces), parser.flush(is_cut)]:
        content += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(names)
                names.append(delta.name)
                arguments.append([])
            arguments[delta.index].append(delta.arguments)
    assert parser.num_calls == len(names)
    return content, list(zip(names, map("".join, arguments)))
