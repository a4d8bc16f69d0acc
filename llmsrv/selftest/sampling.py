"""Sampling on a backend against the contract: ids, ranks and log-probabilities, bit for bit."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Program
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.random_tensors import float_bytes
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of
from llmsrv.selftest.batches import Piece
from llmsrv.selftest.batches import batch_of

NUM_SLOTS = 32
LIMITS = Limits(max_rows=NUM_SLOTS, max_logit_rows=NUM_SLOTS, max_slots=NUM_SLOTS, num_blocks=64)
NUM_ROUNDS = 3
VOCAB_SIZES = 61, 1000, 4099, 128256
HISTORY = [3, 5, 5], [1, 1, 1, 3, 60]  # ids of prompt and output


def parameters_for(vocab_size: int) -> list[SamplingParameters]:
    """One for each slot: every parameter alone, then random mixtures."""
    allowed = mask_of(range(0, vocab_size, 7), vocab_size)
    alone: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 40.0},
        {"temperature": 0.01},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"typical_p": 0.5},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": -0.2},
        {"logit_bias": {3: 100.0, 60: -100.0}},
        {"allowed": allowed},
        {"min_tokens": 2**31 - 1, "end_ids": range(vocab_size // 2)},
        {"num_logprobs": 0},
        {"num_logprobs": 20},
        {"num_logprobs": 1000},
    ]
    num_alone = len(alone)
    rng = np.random.default_rng(vocab_size)
    while len(alone) < NUM_SLOTS:
        mixed: dict[str, Any] = {}
        for index in rng.choice(num_alone, 4, replace=False):
            mixed |= alone[index]
        alone.append(mixed)
    return [SamplingParameters(seed=seed, **values) for seed, values in enumerate(alone)]


def sampling_differences(backend: Backend) -> Iterator[str]:
    """A sentence for each difference; none if the backend samples by the contract."""
    for vocab_size in VOCAB_SIZES:
        for has_ties in (False, True):
            what = f"{vocab_size} ids" + ", with ties" * has_ties
            plan = _plan(backend, vocab_size, has_ties)
            yield from (f"{what}: {message}" for message in _differences(plan, vocab_size))


def _plan(backend: Backend, vocab_size: int, has_ties: bool) -> Plan:
    """Its logits are the rows of a random table; one row has no number, one only equal ones."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(scale=3, size=(NUM_SLOTS, vocab_size)).astype(np.float32)
    if has_ties:
        logits = np.round(logits)
    logits[0, vocab_size // 2] = np.nan
    logits[1] = 1.0
    table = Tensor("logits", "BF16", logits.shape, float_bytes("BF16", logits))
    program = Program((Embed("logits", table),), {"logits": vocab_size}, 1, 1, 1, 16, vocab_size)
    return backend.compile(program, LIMITS, lambda: None)


def _differences(plan: Plan, vocab_size: int) -> Iterator[str]:
    table = SamplingTable(NUM_SLOTS, vocab_size)
    slots = np.arange(NUM_SLOTS, dtype=np.int32)
    grammar = ~mask_of(range(0, vocab_size, 3), vocab_size)
    for each in (plan.sampling, table):
        for slot, parameters in enumerate(parameters_for(vocab_size)):
            each.set(slot, parameters, *HISTORY)
            if slot % 5 == 4:
                each.set_grammar(slot, grammar)
    pieces = [Piece([row], 0, [1 + row]) for row in range(NUM_SLOTS)]
    for round_index in range(NUM_ROUNDS):
        plan.forward(batch_of(pieces))
        logits = plan.read("logits")
        positions = np.full(NUM_SLOTS, round_index, np.int64) * 2**33
        ours = plan.sample(slots, positions)
        wanted = sample(logits, table, slots, positions)
        for row in range(NUM_SLOTS):
            if message := _row_difference(ours, wanted, row):
                yield f"round {round_index}, row {row}: {message}"


def _row_difference(ours: Samples, wanted: Samples, row: int) -> str:
    """Empty if there is none."""
    for name in ("ids", "ranks", "logprobs"):
        mine, theirs = (getattr(samples, name)[row] for samples in (ours, wanted))
        if not _is_same(mine, theirs):
            return f"{name} {mine} instead of {theirs}"
    pairs = zip(ours.alternatives[row], wanted.alternatives[row])
    return "" if all(_is_same(mine, theirs) for mine, theirs in pairs) else "other alternatives"


def _is_same(mine: Array, theirs: Array) -> bool:
    is_float = np.asarray(mine).dtype.kind == "f"
    return bool(np.array_equal(mine, theirs, equal_nan=is_float))
