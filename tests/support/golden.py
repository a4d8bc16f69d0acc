"""How near a plan comes to golden data: the log-probability of float32's best token at every step,
and whether it is the plan's best too, teacher-forced."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Plan
from llmsrv.backend.sampling.reference_sampler import log_softmax
from tests.support.plans import Piece
from tests.support.plans import batch_of


@dataclass(frozen=True)
class Step:
    """agrees: both have the same best token; gap: between float32's two best."""

    agrees: bool
    error: float
    gap: float


def steps(plan: Plan, case: dict[str, Any], vocab_size: int) -> Iterator[Step]:
    """Every step of a golden case.  The plan must take logit rows for all of them at once."""
    prompt, greedy = case["prompt_ids"], case["greedy_ids"]
    ids = [*prompt, *greedy[:-1]]
    batch = batch_of([Piece(ids, 0, list(range(1, 2 + len(ids) // BLOCK_SIZE)))])
    rows = np.arange(len(prompt) - 1, len(ids), dtype=np.int32)
    long_from = plan.program.long_from  # type: ignore[attr-defined]
    is_long = long_from is not None and len(prompt) + len(greedy) > long_from
    batch = dataclasses.replace(batch, logit_rows=rows, is_long=np.array([is_long]))
    plan.forward(batch)
    logits = plan.buffers["logits"][: len(rows), :vocab_size]  # type: ignore[attr-defined]
    for row, top in zip(logits, case["top10_logprobs"], strict=True):
        (best, logprob), (_, second) = top[:2]
        ours = float(log_softmax(row, np.array([best]))[0])
        yield Step(int(row.argmax()) == best, abs(ours - logprob), logprob - second)
