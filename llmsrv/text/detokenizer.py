"""Turns token ids into text as they arrive.  Knows nothing of requests or stop strings.

A token may end in the middle of a character.  The output is always whole characters: an incomplete
one is held back until the next ids complete it, or until it is clear that it never will be complete
and it becomes U+FFFD.  Joined, the pieces equal the bytes of all ids decoded once with
errors="replace".

An answer continues its prompt, so a leading space is kept, even if the tokenizer puts a space
before every prompt.
"""

import codecs
from collections.abc import Collection
from collections.abc import Iterable

from llmsrv.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence.  Takes time linear in the number of ids, for any chunks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        kept_special_ids: Collection[int] = frozenset(),
    ) -> None:
        """kept_special_ids: special tokens to keep even if the others are skipped."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._kept_special_ids = kept_special_ids
        self._incomplete = b""  # the beginning of a character

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these ids complete; "" if there is none yet."""
        if self._skip_special_tokens:
            kept = self._kept_special_ids
            ids = (id for id in ids if id in kept or not self._tokenizer.is_special(id))
        return self._decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """At the end: returns U+FFFD if the last character is incomplete, else ""."""
        return self._decode(b"", is_final=True)

    def _decode(self, data: bytes, is_final: bool = False) -> str:
        # An incremental decoder of codecs does the same, but takes more memory than all of this.
        data = self._incomplete + data
        text, num_decoded = codecs.utf_8_decode(data, "replace", is_final)
        self._incomplete = data[num_decoded:]
        return text
