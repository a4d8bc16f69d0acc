"""How close a plan comes to golden data, teacher-forced: at every step, the log-probability that it
gives to float32's best token, and whether that is its own best token too."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Plan
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.reference_sampler import log_softmax
from tests.support.plans import Piece
from tests.support.plans import batch_of


@dataclass(frozen=True)
class Step:
    """agrees: both have the same best token; error: of its log-probability; gap: between float32's
    two best."""

    agrees: bool
    error: float
    gap: float


def steps(plan: Plan, program: Program, case: dict[str, Any]) -> Iterator[Step]:
    """Every step of a golden case, from one forward: the plan needs a logit row for each."""
    prompt, greedy = case["prompt_ids"], case["greedy_ids"]
    ids = [*prompt, *greedy[:-1]]
    batch = batch_of([Piece(ids, 0, list(range(1, 2 + len(ids) // BLOCK_SIZE)))])
    rows = np.arange(len(prompt) - 1, len(ids), dtype=np.int32)
    is_long = program.long_from is not None and len(prompt) + len(greedy) > program.long_from
    batch = dataclasses.replace(batch, logit_rows=rows, is_long=np.array([is_long]))
    plan.forward(batch)
    for logits, top in zip(plan.read("logits"), case["top10_logprobs"], strict=True):
        (best, logprob), (_, second) = top[:2]
        ours = float(log_softmax(logits, np.array([best]))[0])
        yield Step(int(logits.argmax()) == best, abs(ours - logprob), logprob - second)
