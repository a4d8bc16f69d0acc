"""What sampling returns: ids, and the log-probabilities that were asked for."""

from dataclasses import dataclass

from llmsrv.backend.arrays import Floats
from llmsrv.backend.sampling.table import Ids

FAILED = -1  # in place of an id: the row could not be sampled


@dataclass(frozen=True)
class Samples:
    """What one step sampled, a row for each logit row.

    ids           [R] int32, FAILED if the row could not be sampled
    logprobs      [R] float32, of the sampled id; NaN if not asked for or if the row FAILED
    ranks         [R] int32, of the sampled id among all logits, the largest first and ties by
                  lowest id: from 1; 0 if not asked for or if the row FAILED
    alternatives  for each row its largest (ids, logprobs), most likely first; empty if not asked
                  for
    """

    ids: Ids
    logprobs: Floats
    ranks: Ids
    alternatives: list[tuple[Ids, Floats]]
