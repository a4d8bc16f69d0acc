"""Parts a model's thoughts from its answer as the text arrives: what stands between <think> tags
at its beginning is reasoning, all after it the answer.

An automaton over characters, as the parser of tool calls: the pieces do not matter.
"""

from collections.abc import Callable

THINK_START = "<think>"
THINK_END = "</think>"


def is_taught_by(template: str) -> bool:
    """Whether a chat template knows of thoughts."""
    return THINK_END in template


class ReasoningParser:
    """Of one answer.  Blanks before each part are dropped with the tags.

    has_reasoning  there is a tag that opens them
    reasoning_end  where in the text the tag that closes them ends, in characters; None before it
    """

    def __init__(self, is_open: bool) -> None:
        """is_open: the prompt itself ends with the opening tag, as some templates have it."""
        self.has_reasoning = is_open
        self.reasoning_end: int | None = None
        self._num_read = 0  # characters that came in
        self._state: Callable[[str], tuple[str, str]] = (
            self._in_thoughts if is_open else self._before_tag
        )
        self._blanks: list[str] = []  # at the answer's beginning, where no tag has opened thoughts
        self._pending = ""  # what may be the beginning of a tag
        self._is_begun = False  # the part that is being read has text

    @property
    def is_answering(self) -> bool:
        """Whether all that follows is the answer."""
        return self._state == self._in_answer

    def push(self, text: str) -> tuple[str, str]:
        """Takes the next text; returns what is new of the reasoning, and of the answer."""
        self._num_read += len(text)
        text, self._pending = self._pending + text, ""
        return self._state(text)

    def flush(self, cut_off: str = "") -> tuple[str, str]:
        """At the end: what may have been a tag is none.

        cut_off: text that a stop string removed.  It only affects has_reasoning and
        reasoning_end."""
        pending, self._pending = self._pending, ""
        if self._state == self._in_thoughts:
            rest = pending, ""
        else:
            rest = "", self._with_blanks(pending)
        if cut_off:
            self._num_read -= len(pending)
            self.push(pending + cut_off)
        return rest

    def _before_tag(self, text: str) -> tuple[str, str]:
        begun = text.lstrip()
        self._blanks.append(text[: len(text) - len(begun)])
        if begun.startswith(THINK_START):
            self.has_reasoning = True
            self._blanks = []
            self._state = self._in_thoughts
            return self._in_thoughts(begun.removeprefix(THINK_START))
        if THINK_START.startswith(begun):
            self._pending = begun
            return "", ""
        self._is_begun = True
        self._state = self._in_answer
        return "", self._with_blanks(begun)

    def _with_blanks(self, text: str) -> str:
        blanks, self._blanks = self._blanks, []
        return "".join([*blanks, text])

    def _in_thoughts(self, text: str) -> tuple[str, str]:
        thoughts, tag, rest = text.partition(THINK_END)
        if tag:
            thoughts = self._without_blanks(thoughts)
            self._is_begun = False
            self.reasoning_end = self._num_read - len(rest)
            self._state = self._in_answer
            return thoughts, self._without_blanks(rest)
        lengths = range(len(THINK_END) - 1, 0, -1)
        num_open = next((n for n in lengths if text.endswith(THINK_END[:n])), 0)
        self._pending = text[len(text) - num_open :]
        return self._without_blanks(text[: len(text) - num_open]), ""

    def _in_answer(self, text: str) -> tuple[str, str]:
        return "", self._without_blanks(text)

    def _without_blanks(self, text: str) -> str:
        """The text without the blanks that the part begins with."""
        text = text if self._is_begun else text.lstrip()
        self._is_begun = self._is_begun or bool(text)
        return text
