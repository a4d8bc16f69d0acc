"""Follows the brackets and strings of JSON that arrives in pieces, and checks nothing else."""

import re

_BRACKET_OR_QUOTE = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')


class JsonScanner:
    """Tracks the brackets of a JSON value that arrives in pieces; `depth` of them are open."""

    def __init__(self) -> None:
        self.depth = 0
        self.has_ended = False
        self._is_in_string = False
        self._is_escaped = False

    def next_bracket(self, text: str, position: int) -> int:
        """Returns the position after the next bracket, or the end of the text."""
        while position < len(text):
            if self._is_in_string:
                position = self._string(text, position)
                continue
            found = _BRACKET_OR_QUOTE.search(text, position)
            if found is None:
                break
            position = found.end()
            if found[0] != '"':
                self.depth += 1 if found[0] in "{[" else -1
                self.has_ended = self.depth == 0
                return position
            self._is_in_string = True
        return len(text)

    def end(self, text: str, position: int, depth: int) -> int:
        """Returns the position after the bracket that closes the depth-th open one, or the end of
        the text."""
        while position < len(text) and self.depth >= depth:
            position = self.next_bracket(text, position)
        return position

    def _string(self, text: str, position: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        found = _QUOTE_OR_ESCAPE.search(text, position)
        if found is None:
            return len(text)
        self._is_escaped = found[0] == "\\"
        self._is_in_string = self._is_escaped
        return found.end()
