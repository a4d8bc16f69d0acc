"""Text in which the server's own markup stands next to text that came from a caller.

A chat template must never turn a caller's "<|im_end|>" into the token of that name.  Markup that
the server itself puts into a message, such as that of an earlier call, is meant as tokens.
"""

from collections.abc import Iterable


class Markup(str):
    """Text of our own: what reads like a special token is one."""


class MarkedText(str):
    """A string that remembers which of its pieces are Markup.

    What is made from it with the methods of str is an ordinary string, and so without markup."""

    pieces: tuple[str, ...]

    def __new__(cls, pieces: Iterable[str]) -> "MarkedText":
        pieces = tuple(pieces)
        text = super().__new__(cls, "".join(pieces))
        text.pieces = pieces
        return text
