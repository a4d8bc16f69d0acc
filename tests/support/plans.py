"""Runs sequences on a plan as an engine would, without one: blocks, chunks, batches and greedy ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Plan
from llmsrv.backend.sampling import SamplingParameters


@dataclass
class Run:
    """One sequence: what it was asked, what it put out."""

    prompt_ids: Sequence[int]
    max_tokens: int
    parameters: SamplingParameters = SamplingParameters(temperature=0.0)
    forced_ids: Sequence[int] = ()  # fed instead of what was sampled
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)
    num_computed: int = 0

    def fed(self) -> list[int]:
        return [*self.prompt_ids, *(self.forced_ids or self.ids)]


def batch_of(rows: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> Batch:
    """A batch of whole pieces: (ids, first position, blocks) of each; the last row's logits."""
    lengths = [len(ids) for ids, _, _ in rows]
    positions = np.concatenate([np.arange(start, start + len(ids)) for ids, start, _ in rows])
    sequences = np.repeat(np.arange(len(rows)), lengths)
    tables = np.zeros((len(rows), max(len(blocks) for _, _, blocks in rows)), np.int32)
    for table, (_, _, blocks) in zip(tables, rows):
        table[: len(blocks)] = blocks
    slot_mapping = tables[sequences, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
    return Batch(
        ids=np.concatenate([np.asarray(ids, np.int32) for ids, _, _ in rows]),
        positions=positions.astype(np.int32),
        sequences=sequences.astype(np.int32),
        slot_mapping=slot_mapping + positions % BLOCK_SIZE,
        block_tables=tables,
        logit_rows=(np.cumsum(lengths) - 1).astype(np.int32),
    )


def generate(plan: Plan, runs: Sequence[Run], chunk: int, seed: int = 0) -> None:
    """Runs them all to their end in one batch, prompts `chunk` tokens at a time, each in blocks
    scattered over the cache; of a chunk inside a prompt the logits are computed and left alone."""
    free = iter(np.random.default_rng(seed).permutation(_num_blocks(runs)) + 1)
    blocks = [[next(free) for _ in range(_blocks(run))] for run in runs]
    for slot, run in enumerate(runs):
        plan.sampling.set(slot, run.parameters)
    while active := [i for i, run in enumerate(runs) if len(run.ids) < run.max_tokens]:
        rows = []
        for i in active:
            run = runs[i]
            rows.append((run.fed()[run.num_computed:][:chunk], run.num_computed, blocks[i]))
            run.num_computed += len(rows[-1][0])
        plan.forward(batch_of(rows))
        positions = np.array([len(runs[i].ids) for i in active], np.int64)
        samples = plan.sample(np.array(active, np.int32), positions)
        for i, id, logprob, best in zip(
            active, samples.ids.tolist(), samples.logprobs.tolist(), samples.alternatives
        ):
            run = runs[i]
            if run.num_computed >= len(run.prompt_ids) + len(run.ids):
                run.ids.append(id)
                run.logprobs.append(logprob)
                run.alternatives.append(dict(zip(best[0].tolist(), best[1].tolist())))


def _blocks(run: Run) -> int:
    return -(-(len(run.prompt_ids) + run.max_tokens) // BLOCK_SIZE)


def _num_blocks(runs: Sequence[Run]) -> int:
    return sum(_blocks(run) for run in runs)
