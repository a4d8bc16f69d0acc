"""Grammars in the engine: which token ids may come next so that the output follows the grammar.

Grammars are compiled on a separate thread, so running streams do not wait for them.  The first one
also loads the vocabulary.  The server has already compiled each grammar in a process that it can
kill (text/worker.py); both compile under the same limits.
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

# Well above the worker's stack: a grammar that compiled there must not overflow here.
STACK_BYTES = 16 << 20
MAX_CACHED_GRAMMARS = 16  # compiled, for requests with the same grammar


class Grammar:
    """The state of one sequence's grammar, after the tokens so far."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def copy(self) -> "Grammar":
        """The same state for another sequence."""
        return Grammar(self._matcher.deep_copy(), self._words * 32)

    def masks(self, drafts: Sequence[int] = ()) -> Mask | None:
        """The ids that are allowed next, and after each draft token.

        Returns [rows, words], as SamplingTable.set_grammar takes them.  There are no rows after a
        draft token that is forbidden or that completes the text.  Returns None if no id is allowed:
        the vocabulary cannot reach the grammar's end, or the grammar has become too complex.
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
        """Advances by an id that the mask allowed; returns whether that completes the text."""
        self._matcher.consume_token(id)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        return self._matcher.is_accepting()

    def forced(self) -> list[int]:
        """The ids that must come next, up to the first choice."""
        return self._matcher.compute_ff_tokens()


class GrammarCompiler:
    """Compiles the grammars of one model, one at a time.

    read_vocabulary  called once, on the compiler's thread, for the first grammar
    vocab_size       of the model
    """

    def __init__(self, read_vocabulary: Callable[[], "LLTokenizer"], vocab_size: int) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocab_size = vocab_size
        self._vocabulary: "LLTokenizer | None" = None
        self._compiled = functools.lru_cache(MAX_CACHED_GRAMMARS)(self._compile)
        self._thread = ThreadPoolExecutor(1, "grammars")

    def compile(self, source: str) -> "Future[Grammar]":
        """The grammar's initial state; each sequence needs its own copy.

        source  from text/grammar.py
        An invalid grammar sets an ApiError 400; any other exception is an internal error.
        """
        before = threading.stack_size(STACK_BYTES)
        try:
            return self._thread.submit(self._compiled, source)  # this may start the thread
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
