"""Grammars in the engine: which ids a sequence may draw next so that its text follows one.

A grammar is compiled on a thread of its own, so that running streams do not wait for it; the first
one waits for the vocabulary as well.  The server has tried each of them in a process that it could
kill (text/worker.py), and both compile under the same limits.
"""

import functools
import threading
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from llmsrv.backend.sampling.table import Mask
from llmsrv.errors import ApiError
from llmsrv.text.grammar import compile_source
from llmsrv.text.grammar import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance import LLTokenizer

# Well above what the worker allows: what compiled there must not overflow here.
STACK_BYTES = 16 << 20
MAX_CACHED_GRAMMARS = 16  # compiled ones, for requests that come with the same


class Grammar:
    """The state of one sequence in its grammar: a place between two of its tokens."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def copy(self) -> "Grammar":
        """Another sequence at the same place."""
        return Grammar(self._matcher.deep_copy(), self._words * 32)

    def masks(self, drafts: Sequence[int] = ()) -> Mask | None:
        """[rows, words], as SamplingTable.set_grammar takes them: the ids that may come next, and
        behind each draft those that may follow it.  There are no rows behind a draft that may not
        come, or that ends the text.

        None when nothing may come: the vocabulary has no way to the grammar's end, or the grammar
        has become too complex to go on with.
        """
        masks = np.zeros((1 + len(drafts), self._words), np.uint32)
        num_taken = 0
        for row, mask in enumerate(masks):
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if row == len(drafts) or not self._matcher.try_consume_tokens([drafts[row]]):
                break
            num_taken += 1
        if num_taken:
            self._matcher.rollback(num_taken)
        return None if self._matcher.is_error() else masks[: num_taken + 1]

    def accept(self, id: int) -> bool:
        """Goes on behind an id that its mask allowed; whether the text is complete and ends."""
        self._matcher.consume_token(id)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def may_end(self) -> bool:
        """Whether the text is complete as it is."""
        return self._matcher.is_accepting()

    def forced(self) -> list[int]:
        """The ids of the only text that may come next, as far as it goes."""
        return self._matcher.compute_ff_tokens()


class GrammarCompiler:
    """Compiles the grammars of one model, one after the other.

    read_vocabulary  called once, on its thread, for the first grammar
    vocab_size       of the model
    """

    def __init__(self, read_vocabulary: Callable[[], "LLTokenizer"], vocab_size: int) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocab_size = vocab_size
        self._vocabulary: "LLTokenizer | None" = None
        self._compiled = functools.lru_cache(MAX_CACHED_GRAMMARS)(self._compile)
        self._thread = ThreadPoolExecutor(1, "grammars")

    def compile(self, source: str) -> "Future[Grammar]":
        """The place before all text, of which each sequence takes a copy.  The error is an ApiError
        400, or one of ours.

        source  of text/grammar.py
        """
        before = threading.stack_size(STACK_BYTES)
        try:
            return self._thread.submit(self._compiled, source)  # which may start the thread
        finally:
            threading.stack_size(before)

    def _compile(self, source: str) -> Grammar:
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        try:
            matcher = compile_source(source, self._vocabulary)
        except GrammarError as error:
            raise ApiError(400, f"Invalid grammar: {error}", code="invalid_grammar") from None
        return Grammar(matcher, self._vocab_size)
