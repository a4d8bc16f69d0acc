"""The rows of a step whose logits are wanted, and what sampling them returns."""

from typing import NamedTuple

from llmsrv.backend.sampling.samples import Samples
from llmsrv.engine.messages import Tokens
from llmsrv.engine.scheduler import Chunk
from llmsrv.engine.sequence import Sequence
from llmsrv.errors import ApiError

NO_ID = -1


class LogitRow(NamedTuple):
    """A row whose logits are wanted.

    token_index  index in the sequence of the token that the row samples or evaluates
    target       the prompt's token there, if its log-probability is wanted; else NO_ID
    draft        the drafted token before it, if there is one; else NO_ID
    """

    sequence: Sequence
    token_index: int
    target: int
    draft: int

    @property
    def is_valid(self) -> bool:
        """Whether all tokens that the row was computed from are the sequence's own tokens."""
        if self.token_index != self.sequence.num_tokens:
            return False  # an earlier draft token was rejected
        return self.draft == NO_ID or self.draft == self.sequence.output_ids[-1]


def logit_rows_of(chunk: Chunk) -> list[LogitRow]:
    """The chunk's logit rows, which are its last rows."""
    sequence, prompt_ids = chunk.sequence, chunk.sequence.submit.prompt_ids
    rows = []
    for i in range(chunk.num_rows - chunk.num_logit_rows, chunk.num_rows):
        token_index = sequence.num_computed + i + 1
        target = prompt_ids[token_index] if token_index < len(prompt_ids) else NO_ID
        draft = chunk.draft[i - chunk.num_tokens] if i >= chunk.num_tokens else NO_ID
        rows.append(LogitRow(sequence, token_index, target, draft))
    return rows


def tokens_of_row(sequence: Sequence, choice: int, row: int, samples: Samples) -> Tokens:
    """The token of one row.  Raises ApiError if the row could not be sampled."""
    id = int(samples.ids[row])
    if id < 0:
        raise ApiError(500, "The model's output is not a number; nothing can be sampled.")
    logprobs: list[float] = []
    alternatives: list[list[tuple[int, float]]] = []
    ranks: list[int] = []
    if sequence.submit.sampling.num_logprobs >= 0:
        ids, values = samples.alternatives[row]
        logprobs = [float(samples.logprobs[row])]
        alternatives = [list(zip(ids.tolist(), values.tolist(), strict=True))]
        ranks = [int(samples.ranks[row])]
    return Tokens(sequence.submit.request, choice, [id], logprobs, alternatives, ranks)
