"""The grammar that one answer must follow: a form that the request wants, tool calls, or either.

A dialect reads its own fields into a WantedGrammar.  Here the grammar is combined with that of the
tool calls, put after the reasoning, and compiled once to see that it can be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

from llmsrv.api.generation.tools import ToolUse
from llmsrv.errors import ApiError
from llmsrv.registry.service import Service
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import after_reasoning_source
from llmsrv.text.grammar import alternation_source
from llmsrv.text.reasoning import THINK_END
from llmsrv.text.reasoning import THINK_START
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer

BAD_SCHEMA = "invalid_json_schema"
BAD_GRAMMAR = "invalid_grammar"


@dataclass(frozen=True)
class WantedGrammar:
    """param, code: for the error if the grammar does not compile.  make_source: returns a source
    of text/grammar.py, or raises GrammarError."""

    param: str
    make_source: Callable[[], str]
    code: str = BAD_SCHEMA


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
    try:
        source = wanted.make_source()
        if is_thinking is not None:
            tokenizer = service.text.tokenizer
            source = after_reasoning_source(source, tokenizer, THINK_START, THINK_END, is_thinking)
        return await service.text.grammars.check(source)
    except (GrammarError, RecursionError) as error:
        message = f"Invalid '{wanted.param}': {error}."
        raise ApiError(400, message, param=wanted.param, code=wanted.code) from None


def _with_calls(
    answer_format: WantedGrammar | None, tools: ToolUse, tokenizer: Tokenizer
) -> WantedGrammar | None:
    """Tool calls if there must be any; else the format or calls; else, for strict tools and where
    not every tool may be called, free answers whose calls follow their schemas."""
    calls = WantedGrammar(
        "tools",
        lambda: structural_tag_source(
            tools.format.calls(tools.schemas, tools.at_most_one), tokenizer
        ),
    )
    if tools.must_call:
        return calls
    if answer_format is not None:
        make_format = answer_format.make_source
        return replace(
            answer_format,
            make_source=lambda: alternation_source(calls.make_source(), make_format()),
        )
    if tools.is_limited or any(tool.is_strict for tool in tools.callable.values()):
        free = tools.format.text_or_calls(tools.schemas)
        return WantedGrammar("tools", lambda: structural_tag_source(free, tokenizer))
    return None
