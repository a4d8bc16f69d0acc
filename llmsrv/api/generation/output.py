"""From the tokens of one choice to what its reader gets: reasoning, text and tool calls.

Text passes the detokenizer, then the stop strings, then the parser of reasoning and calls.  The
engine ends a choice by token; a stop string, or the only call that is allowed, ends it here by
text, and every later token is dropped.
Knows no dialect and no HTTP.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from llmsrv.api.generation.answer_parser import AnswerParser
from llmsrv.api.generation.answer_parser import ToolCallDelta
from llmsrv.api.generation.tools import ToolUse
from llmsrv.engine.messages import Tokens
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.stop import StopMatcher
from llmsrv.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability.

    alternatives  the most likely tokens at its position, most likely first
    text_offset   where its text begins, in characters of the choice's text
    rank          its place among all tokens, from 1
    """

    id: int
    logprob: float
    alternatives: list[tuple[int, float]]
    text_offset: int = 0
    rank: int = 0


@dataclass
class Delta:
    """What one event adds to a choice.

    reasoning, text, tool_calls  new pieces, in the order in which a model writes them
    token_ids                    the tokens that came, an end token included
    logprobs                     of the tokens whose text begins in what was added so far
    finish_reason                "stop", "length", "tool_calls" or "abort"; None if more may follow
    stop_string                  the stop string that ended the choice, if one did
    """

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None

    def add(self, other: "Delta") -> None:
        self.text += other.text
        self.reasoning += other.reasoning
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.stop_string = other.stop_string
        for call in other.tool_calls:
            if call.index < len(self.tool_calls):
                self.tool_calls[call.index].arguments += call.arguments
            else:
                self.tool_calls.append(call)


@dataclass(frozen=True, slots=True)
class OutputRules:
    """How the output of a request's choices is read, and which text ends it.

    stop_strings         the first to be complete ends a choice
    includes_stop        the text includes the stop string or end token that ended it
    end_ids              tokens that end a choice
    min_tokens           stop strings are not matched before this many tokens
    skip_special_tokens  special tokens have no text, except visible_special_ids
    tools                None if the model may not call tools
    is_thinking          True if the prompt already opened the thinking block; None if the model
                         does not think
    """

    stop_strings: Sequence[str] = ()
    includes_stop: bool = False
    end_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    visible_special_ids: frozenset[int] = frozenset()
    tools: ToolUse | None = None
    is_thinking: bool | None = None


class ChoiceOutput:
    """One choice as it grows.

    num_tokens            tokens that count in usage: up to the end token, or to the token that
                          completed a stop string
    num_reasoning_tokens  of these, the tokens of the reasoning and of the tags around it
    finish_reason         "stop", "length" or "abort"; None while more may follow
    """

    def __init__(self, index: int, tokenizer: Tokenizer, rules: OutputRules) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: str | None = None
        self._rules = rules
        self._detokenizer = Detokenizer(
            tokenizer, rules.skip_special_tokens, rules.visible_special_ids
        )
        self._stop = None
        if rules.stop_strings:
            self._stop = StopMatcher(rules.stop_strings, rules.includes_stop)
        self._parser = None
        if rules.tools is not None or rules.is_thinking is not None:
            self._parser = AnswerParser(rules.tools, rules.is_thinking)
        # Where each token's text begins, until the answer after the reasoning does.
        self._offsets: list[int] | None = None if rules.is_thinking is None else []
        self._unreleased = ""  # decoded, and held back or cut off by the stop strings
        self._num_decoded = 0  # characters decoded, released or not
        self._num_released = 0
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is not all released
        self._token_ids: list[int] = []  # in no delta yet

    def push(self, tokens: Tokens) -> Delta | None:
        """Takes what the engine sent; None if no text can be released yet."""
        if self._rules.tools is None or not self._rules.tools.at_most_one:
            return self._push(tokens)
        joined: Delta | None = None
        for position in range(len(tokens.ids)):  # the tokens after the call do not count
            if delta := self._push(_token_at(tokens, position)):
                joined = joined or Delta(self.index)
                joined.add(delta)
            if self.finish_reason:
                break
        return joined

    def _push(self, tokens: Tokens) -> Delta | None:
        text = ""
        for position, id in enumerate(tokens.ids):
            self.num_tokens += 1
            self._token_ids.append(id)
            if id in self._rules.end_ids and not self._rules.includes_stop:
                break  # the engine ends the choice here too
            if self._offsets is not None:
                self._offsets.append(self._num_decoded)
            decoded = self._detokenizer.push([id])
            if tokens.logprobs:
                self._note_logprob(tokens, position)
            self._num_decoded += len(decoded)
            text += self._release(decoded)
            if self.finish_reason:
                break
        if text or self.finish_reason:
            return self._delta(text)
        self._count_reasoning()
        return None

    def finish(self, reason: str) -> Delta:
        """The choice's last delta, when the engine ended it."""
        decoded = self._detokenizer.flush()
        self._num_decoded += len(decoded)
        text = self._release(decoded)
        if self.finish_reason is None:
            self.finish_reason = reason
            text += self._stop.flush() if self._stop else ""
        return self._delta(text)

    def _release(self, decoded: str) -> str:
        """The text that may be sent now: all but what may be the beginning of a stop string."""
        if self._stop is None or self.num_tokens <= self._rules.min_tokens:
            return decoded
        text, is_matched = self._stop.push(decoded)
        self._unreleased = (self._unreleased + decoded)[len(text) :]
        if is_matched:
            self.finish_reason = "stop"
        return text

    def _note_logprob(self, tokens: Tokens, position: int) -> None:
        alternatives = tokens.alternatives[position] if tokens.alternatives else []
        id, logprob = tokens.ids[position], tokens.logprobs[position]
        self._logprobs.append(TokenLogprob(id, logprob, alternatives, self._num_decoded))

    def _delta(self, text: str) -> Delta:
        token_ids, self._token_ids = self._token_ids, []
        delta = Delta(self.index, text, token_ids=token_ids, finish_reason=self.finish_reason)
        if self.finish_reason and self._stop:
            delta.stop_string = self._stop.matched
        self._num_released += len(text)
        if self._logprobs:
            delta.logprobs = self._take_logprobs(is_cut=delta.stop_string is not None)
        if self._parser:
            self._parse(self._parser, delta)
        return delta

    def _take_logprobs(self, is_cut: bool) -> list[TokenLogprob]:
        """Log-probabilities go with their text; a token that a stop string cut off has none."""
        taken = [token for token in self._logprobs if token.text_offset < self._num_released]
        if self.finish_reason and not is_cut:
            taken = self._logprobs  # the last token may be half a character, without text
        self._logprobs = self._logprobs[len(taken) :]
        return taken

    def _parse(self, parser: AnswerParser, delta: Delta) -> None:
        """Splits the delta's text into its parts."""
        cut_off = "" if delta.stop_string is None else self._unreleased
        reason = delta.finish_reason
        parts = parser.push(delta.text, reason is not None, cut_off, reason == "length")
        delta.reasoning, delta.text = parts.reasoning, parts.text
        delta.tool_calls = parts.tool_calls
        if parser.has_ended and reason is None:
            self.finish_reason = delta.finish_reason = "stop"
        if delta.finish_reason == "stop" and parser.num_tool_calls:
            delta.finish_reason = "tool_calls"
        self._count_reasoning()

    def _count_reasoning(self) -> None:
        """A token counts if its text begins before the end of the reasoning."""
        reasoning = self._parser.reasoning_parser if self._parser else None
        if reasoning is None or self._offsets is None:
            return
        if reasoning.has_reasoning:
            end, offsets = reasoning.reasoning_end, self._offsets
            self.num_reasoning_tokens = len(offsets) if end is None else bisect_left(offsets, end)
        if reasoning.is_answering:
            self._offsets = None


def _token_at(tokens: Tokens, position: int) -> Tokens:
    one = slice(position, position + 1)
    return Tokens(
        tokens.request,
        tokens.choice,
        tokens.ids[one],
        tokens.logprobs[one],
        tokens.alternatives[one],
        tokens.ranks[one],
    )
