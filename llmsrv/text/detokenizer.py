"""Turns token ids into text as they arrive.  Knows nothing of requests or stop strings.

A token may end in the middle of a character, so what comes out is always whole characters: an
unfinished one is held back until the next ids complete it, or show that it never will be; then it
becomes U+FFFD.  All pieces together are the bytes of all ids, decoded once with errors="replace".

An answer continues its prompt: a blank that it begins with is text and stays, also where the
tokenizer puts a blank before every prompt.
"""

import codecs
from collections.abc import Collection
from collections.abc import Iterable

from llmsrv.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence.  Linear in the number of ids, whatever the chunks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        shown: Collection[int] = frozenset(),
    ) -> None:
        """shown: special tokens that are not skipped all the same."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown
        self._decoder = _Utf8Decoder("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; "" when there is none yet."""
        if self._skip_special_tokens:
            ids = (id for id in ids if not self._tokenizer.is_special(id) or id in self._shown)
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """At the end: U+FFFD for a character that was left unfinished, else ""."""
        return self._decoder.decode(b"", final=True)
