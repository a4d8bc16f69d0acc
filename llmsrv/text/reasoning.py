"""Separates a model's reasoning from its answer as the text arrives.

Text between <think> tags at the beginning is reasoning; everything after it is the answer.  Like
the tool call parser, this is a state machine over characters: how the text is cut into pieces does
not matter.
"""

from collections.abc import Callable

THINK_START = "<think>"
THINK_END = "</think>"


def template_has_reasoning(template: str) -> bool:
    """True if a chat template has thinking tags."""
    return THINK_END in template


class ReasoningParser:
    """Parses one answer.  Drops the tags, and whitespace before the reasoning and the answer.

    has_reasoning  whether the prompt or the answer opened the reasoning
    reasoning_end  where the closing tag ends, in characters of text; None until it was seen
    """

    def __init__(self, is_open: bool) -> None:
        """is_open: the prompt already ends with the opening tag, as in some templates."""
        self.has_reasoning = is_open
        self.reasoning_end: int | None = None
        self._num_read = 0  # characters
        self._state: Callable[[str], tuple[str, str]] = (
            self._in_reasoning if is_open else self._before_tag
        )
        self._leading_space: list[str] = []  # before the answer, while no tag was seen
        self._pending = ""  # possibly the beginning of a tag
        self._part_has_text = False  # the current part has text

    @property
    def is_answering(self) -> bool:
        """True if all text that follows belongs to the answer."""
        return self._state == self._in_answer

    def push(self, text: str) -> tuple[str, str]:
        """Takes the next text; returns the new reasoning and the new answer text."""
        self._num_read += len(text)
        text, self._pending = self._pending + text, ""
        return self._state(text)

    def flush(self, cut_off: str = "") -> tuple[str, str]:
        """At the end: returns a pending partial tag as text.

        cut_off: text that a stop string removed.  It only affects has_reasoning and
        reasoning_end."""
        pending, self._pending = self._pending, ""
        if self._state == self._in_reasoning:
            rest = pending, ""
        else:
            rest = "", self._with_leading_space(pending)
        if cut_off:
            self._num_read -= len(pending)
            self.push(pending + cut_off)
        return rest

    def _before_tag(self, text: str) -> tuple[str, str]:
        begun = text.lstrip()
        self._leading_space.append(text[: len(text) - len(begun)])
        if begun.startswith(THINK_START):
            self.has_reasoning = True
            self._leading_space = []
            self._state = self._in_reasoning
            return self._in_reasoning(begun.removeprefix(THINK_START))
        if THINK_START.startswith(begun):
            self._pending = begun
            return "", ""
        self._part_has_text = True
        self._state = self._in_answer
        return "", self._with_leading_space(begun)

    def _with_leading_space(self, text: str) -> str:
        space, self._leading_space = self._leading_space, []
        return "".join([*space, text])

    def _in_reasoning(self, text: str) -> tuple[str, str]:
        thinking, tag, rest = text.partition(THINK_END)
        if tag:
            thinking = self._without_leading_space(thinking)
            self._part_has_text = False
            self.reasoning_end = self._num_read - len(rest)
            self._state = self._in_answer
            return thinking, self._without_leading_space(rest)
        lengths = range(len(THINK_END) - 1, 0, -1)
        num_open = next((n for n in lengths if text.endswith(THINK_END[:n])), 0)
        self._pending = text[len(text) - num_open :]
        return self._without_leading_space(text[: len(text) - num_open]), ""

    def _in_answer(self, text: str) -> tuple[str, str]:
        return "", self._without_leading_space(text)

    def _without_leading_space(self, text: str) -> str:
        """Drops whitespace at the beginning of the current part."""
        text = text if self._part_has_text else text.lstrip()
        self._part_has_text = self._part_has_text or bool(text)
        return text
