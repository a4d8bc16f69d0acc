"""Runs sequences on a plan without an engine: blocks, chunks, batches, greedy ids."""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Plan
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.selftest import batches


@dataclass
class Piece:
    """Consecutive rows of one sequence."""

    ids: Sequence[int]
    start: int  # position of the first row
    blocks: Sequence[int]  # of the sequence, from position 0
    wants_logits: bool = True  # for the last row
    is_long: bool = False
    num_drafts: int = 0  # rows at the end with draft tokens; they want logits too


@dataclass
class Run:
    """One sequence: its prompt, its parameters and its output."""

    prompt_ids: Sequence[int]
    max_tokens: int
    parameters: SamplingParameters = SamplingParameters(temperature=0.0)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_blocks(self) -> int:
        return -(-(len(self.prompt_ids) + self.max_tokens) // BLOCK_SIZE)

    def next_piece(self, chunk: int, blocks: Sequence[int]) -> Piece:
        ids = [*self.prompt_ids, *self.ids][self.num_computed:]
        piece = Piece(ids[:chunk], self.num_computed, blocks, wants_logits=len(ids) <= chunk)
        self.num_computed += len(piece.ids)
        return piece


def batch_of(pieces: Sequence[Piece]) -> Batch:
    return batches.batch_of(
        [
            batches.Piece(
                piece.ids,
                piece.start,
                piece.blocks,
                (1 + piece.num_drafts) if piece.wants_logits else 0,
                piece.is_long,
            )
            for piece in pieces
        ]
    )


def generate_from_drafts(
    plan: Plan, run: Run, propose: Callable[[Sequence[int]], Sequence[int]]
) -> None:
    """Runs a sequence in slot 0 to its end; `propose` drafts ids that may follow its output."""
    blocks = list(range(1, 1 + run.num_blocks))
    plan.sampling.set(0, run.parameters, run.prompt_ids)
    while len(run.ids) < run.max_tokens:
        drafts = list(propose(run.ids))[: run.max_tokens - len(run.ids) - 1]
        ids = [*run.prompt_ids, *run.ids, *drafts][run.num_computed:]
        plan.forward(batch_of([Piece(ids, run.num_computed, blocks, num_drafts=len(drafts))]))
        slots = np.zeros(len(drafts) + 1, np.int32)
        positions = np.arange(len(slots), dtype=np.int64) + len(run.ids)
        samples = plan.sample(slots, positions, drafts=np.array([-1, *drafts], np.int32))
        drawn = samples.ids.tolist()
        num_right = next((i for i, draft in enumerate(drafts) if draft != drawn[i]), len(drafts))
        run.ids += drawn[: num_right + 1]
        run.num_computed = len(run.prompt_ids) + len(run.ids) - 1


def generate(plan: Plan, runs: Sequence[Run], chunk: int = 512, seed: int = 0) -> None:
    """Runs all of them to their end, on blocks scattered over the cache.  Every batch has a piece
    of each, of at most `chunk` rows."""
    free = np.random.default_rng(seed).permutation(sum(run.num_blocks for run in runs)) + 1
    blocks = np.split(free, np.cumsum([run.num_blocks for run in runs])[:-1])
    for slot, run in enumerate(runs):
        plan.sampling.set(slot, run.parameters, run.prompt_ids)
    while active := [i for i, run in enumerate(runs) if len(run.ids) < run.max_tokens]:
        pieces = [runs[i].next_piece(chunk, blocks[i].tolist()) for i in active]
        plan.forward(batch_of(pieces))
        slots = [i for i, piece in zip(active, pieces) if piece.wants_logits]
        positions = np.array([len(runs[i].ids) for i in slots], np.int64)
        samples = plan.sample(np.array(slots, np.int32), positions)
        for row, slot in enumerate(slots):
            runs[slot].ids.append(int(samples.ids[row]))
            runs[slot].logprobs.append(float(samples.logprobs[row]))
            ids, logprobs = samples.alternatives[row]
            runs[slot].alternatives.append(dict(zip(ids.tolist(), logprobs.tolist())))
