"""The grammar that one answer must follow: a form that the request wants, tool calls, or either.

A dialect reads its own fields into a WantedGrammar.  Here the grammar is combined with that of the
tool calls, put after the reasoning, and compiled once to see that it can be.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import partial

from llmsrv.api.generation.tools import Simplify
from llmsrv.api.generation.tools import ToolUse
from llmsrv.errors import ApiError
from llmsrv.registry.service import Service
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import after_reasoning_source
from llmsrv.text.grammar import alternation_source
from llmsrv.text.json_schema import lenient_schema
from llmsrv.text.json_schema import skeleton_schema
from llmsrv.text.reasoning import THINK_END
from llmsrv.text.reasoning import THINK_START
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tool_calls.parser import Tools

BAD_SCHEMA = "invalid_json_schema"
BAD_GRAMMAR = "invalid_grammar"

# What is made of the schemas of tools that are not strict, until a grammar compiles.
SIMPLIFIED: list[Simplify] = [
    lenient_schema,
    skeleton_schema,
    lambda schema: {"type": "object", "additionalProperties": True},
]


@dataclass(frozen=True)
class WantedGrammar:
    """param, code: for the error if the grammar does not compile.  make_source: returns a source
    of text/grammar.py, or raises GrammarError.  fallbacks: make sources that ask for less, tried in
    order if it does not compile."""

    param: str
    make_source: Callable[[], str]
    code: str = BAD_SCHEMA
    fallbacks: Sequence[Callable[[], str]] = ()


async def answer_grammar(
    service: Service,
    answer_format: WantedGrammar | None,
    tools: ToolUse | None = None,
    is_thinking: bool | None = None,
) -> str:
    """The grammar for Submit; "" if the answer is free.

    answer_format  followed by an answer that does not call tools
    is_thinking    True if the prompt already opened the thinking block; None if the model does not
                   think
    Raises ApiError 400 naming the field of a grammar that does not compile.
    """
    wanted = _with_calls(answer_format, tools, service.text.tokenizer) if tools else answer_format
    if wanted is None:
        return ""
    reason = ""
    for make_source in (wanted.make_source, *wanted.fallbacks):
        try:
            # Tens of milliseconds for a large one.
            source = await asyncio.to_thread(make_source)
            if is_thinking is not None:
                source = await asyncio.to_thread(
                    after_reasoning_source,
                    source,
                    service.text.tokenizer,
                    THINK_START,
                    THINK_END,
                    is_thinking,
                )
            return await service.text.grammars.check(source)
        except (GrammarError, RecursionError) as error:
            reason = reason or str(error)
    message = f"Invalid '{wanted.param}': {reason}."
    raise ApiError(400, message, param=wanted.param, code=wanted.code)


def _with_calls(
    answer_format: WantedGrammar | None, tools: ToolUse, tokenizer: Tokenizer
) -> WantedGrammar | None:
    """Tool calls if there must be any; else the format or calls; else, for strict tools and where
    not every tool may be called, free answers whose calls follow their schemas."""
    make_format: Callable[[Tools], Format]
    if tools.must_call or answer_format is not None:
        make_format = partial(tools.format.calls, at_most_one=tools.at_most_one)
    elif tools.is_limited or any(tool.is_strict for tool in tools.callable.values()):
        make_format = tools.format.text_or_calls
    else:
        return None

    def make_source(simplify: Simplify) -> str:
        source = structural_tag_source(make_format(tools.schemas(simplify)), tokenizer)
        if answer_format is None or tools.must_call:
            return source
        return alternation_source(source, answer_format.make_source())

    first, *further = (partial(make_source, simplify) for simplify in SIMPLIFIED)
    if all(tool.is_strict for tool in tools.callable.values()):
        further = []
    if answer_format is None or tools.must_call:
        return WantedGrammar("tools", first, fallbacks=further)
    return replace(answer_format, make_source=first, fallbacks=further)
