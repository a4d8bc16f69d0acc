"""From the tokens of one choice to the text that a client sees.

The engine ends a choice by token; here it ends by text: stop strings are matched on decoded text,
and every token after a match is dropped.  Knows nothing of chat, completions or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from llmsrv.engine.messages import Tokens
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.reasoning import ReasoningParser
from llmsrv.text.stop import StopMatcher
from llmsrv.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenEntry:
    """One token with its log-probability and the alternatives to it, most likely first."""

    id: int
    logprob: float
    alternatives: list[tuple[int, float]]
    start: int = 0  # where its text begins, in characters of the choice's text


@dataclass
class Delta:
    """What one event adds to a choice."""

    index: int
    text: str
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    ids: list[int] = field(default_factory=list)  # tokens that came, an end token included

    def add(self, other: "Delta") -> None:
        self.text += other.text
        self.entries += other.entries
        self.finish_reason = other.finish_reason
        self.ids += other.ids


@dataclass(frozen=True)
class TextRules:
    """How the text of a request's choices is made, and what ends it.

    stops         stop strings
    keeps_stop    whether what ended the text is part of it
    end_ids       of tokens that end a choice
    min_tokens    no stop string is looked for in the text of so many
    skip_special  whether special tokens are left out, but for those `shown`
    is_thinking   whether the prompt has begun the thoughts before the answer; None: the model has
                  none
    """

    stops: Sequence[str] = ()
    keeps_stop: bool = False
    end_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    skip_special: bool = True
    shown: frozenset[int] = frozenset()
    is_thinking: bool | None = None


class ChoiceOutput:
    """The text of one choice as it grows.

    num_tokens          tokens that count in usage: up to the end token, or to the one that
                        completed a stop string
    num_thought_tokens  of these, those of the thoughts and the tags around them
    finish_reason       None while the choice goes on
    """

    def __init__(self, index: int, tokenizer: Tokenizer, rules: TextRules) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_thought_tokens = 0
        self.finish_reason: str | None = None
        self._rules = rules
        self._detokenizer = Detokenizer(tokenizer, rules.skip_special, rules.shown)
        self._stop = StopMatcher(rules.stops, rules.keeps_stop) if rules.stops else None
        self._thoughts = None
        if rules.is_thinking is not None:
            self._thoughts = ReasoningParser(rules.is_thinking)
        self._is_cut = False  # a stop string ended the text
        self._num_decoded = 0  # characters decoded, sent or not
        self._num_sent = 0
        self._entries: list[TokenEntry] = []  # of tokens whose text is not all sent
        self._ids: list[int] = []  # not sent

    def push(self, tokens: Tokens) -> Delta | None:
        """Takes what the engine sent; None when there is nothing to show yet."""
        text = ""
        for position, id in enumerate(tokens.ids):
            self.num_tokens += 1
            self._ids.append(id)
            if id in self._rules.end_ids and not self._rules.keeps_stop:
                break  # the engine ends here too
            decoded = self._detokenizer.push([id])
            if self._thoughts and not self._thoughts.is_answering:
                self._count_thoughts(self._thoughts, decoded)
            if tokens.logprobs:
                self._remember(tokens, position)
            self._num_decoded += len(decoded)
            text += self._release(decoded)
            if self.finish_reason:
                return self._delta(text)
        return self._delta(text) if text else None

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
        """What of the text may be shown now: all but the beginning of a possible stop string."""
        if self._stop is None or self.num_tokens <= self._rules.min_tokens:
            return decoded
        text, matched = self._stop.push(decoded)
        if matched:
            self._is_cut = True
            self.finish_reason = "stop"
        return text

    def _count_thoughts(self, thoughts: ReasoningParser, decoded: str) -> None:
        thoughts.push(decoded)
        if thoughts.has_thoughts:
            self.num_thought_tokens = self.num_tokens

    def _remember(self, tokens: Tokens, position: int) -> None:
        alternatives = tokens.alternatives[position] if tokens.alternatives else []
        id, logprob = tokens.ids[position], tokens.logprobs[position]
        self._entries.append(TokenEntry(id, logprob, alternatives, self._num_decoded))

    def _delta(self, text: str) -> Delta:
        """Log-probabilities go with their text; what a stop string cut off has none."""
        self._num_sent += len(text)
        shown = [entry for entry in self._entries if entry.start < self._num_sent]
        if self.finish_reason and not self._is_cut:
            shown = self._entries  # the last may be half a character and have no text of its own
        self._entries = self._entries[len(shown) :]
        ids, self._ids = self._ids, []
        return Delta(self.index, text, shown, self.finish_reason, ids)
