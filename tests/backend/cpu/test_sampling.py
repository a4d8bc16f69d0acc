"""Sampling in C against the contract: ids, log-probabilities and counts, bit for bit."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.backend.base import Limits
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of

NUM_SLOTS = 4
LIMITS = Limits(max_rows=40, max_logit_rows=40, max_slots=NUM_SLOTS, num_blocks=3)


@cache
def plan_of(backend, vocab_size):
    program = Program((), {"logits": vocab_size}, 1, 1, 1, 16, vocab_size)
    return backend.compile(program, LIMITS, lambda: None)


def random_logits(seed, num_rows, vocab_size, has_ties=False, bad=()):
    """Random logits; the last rows each get one of the bad values."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(num_rows, vocab_size)).astype(np.float32)
    if has_ties:
        logits = np.round(logits)  # gives both 0 and -0
    for row, value in enumerate(bad[:num_rows]):
        logits[-1 - row, rng.integers(vocab_size)] = value
    return logits


def check_samples(backend, logits, slots, parameters, drafts=None, targets=None, masks=()):
    """parameters, masks: one for each slot"""
    plan = plan_of(backend, logits.shape[1])
    table = SamplingTable(NUM_SLOTS, logits.shape[1])
    plan.buffers["logits"][: len(logits), : logits.shape[1]] = logits
    history = [3, 5, 5], [1, 1, 1, 3, 60]
    for each in (plan.sampling, table):
        for slot, values in enumerate(parameters):
            each.set(slot, values, *history)
        for slot, mask in enumerate(masks):
            each.set_grammar(slot, mask)
    where = np.array(slots, np.int32), np.arange(len(slots), dtype=np.int64) * 2**33
    ours = plan.sample(*where, targets, drafts)
    theirs = sample(logits, table, *where, targets, drafts)
    assert ours.ids.tolist() == theirs.ids.tolist()
    np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    assert ours.ranks.tolist() == theirs.ranks.tolist()
    for mine, yours in zip(ours.alternatives, theirs.alternatives, strict=True):
        np.testing.assert_array_equal(mine[0], yours[0])
        np.testing.assert_array_equal(mine[1], yours[1])
    for slot, extras in table.extras.items():
        np.testing.assert_array_equal(plan.sampling.extras[slot].counts, extras.counts)


def parameters_of(vocab_size):
    ids = st.integers(0, vocab_size - 1)
    return st.builds(
        SamplingParameters,
        seed=st.integers(0, 2**64 - 1),
        choice=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0, 40.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 40, 3000]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01, 1e-6]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0]),
        typical_p=st.sampled_from([1.0, 1.0, 0.9, 0.2, 1e-6]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 1000.0]),
        presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
        num_logprobs=st.sampled_from([-1, 0, 1, 20, 1000]),
        logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=5),
        allowed=st.none() | st.lists(ids, max_size=30).map(lambda ids: mask_of(ids, vocab_size)),
        min_tokens=st.sampled_from([0, 0, 1, 2**31 - 1]),
        end_ids=st.lists(ids, max_size=4),
    )


@st.composite
def steps(draw):
    """Arguments of check_samples."""
    vocab_size = draw(st.sampled_from([61, 97, 128, 1000, 4099]))
    num_slots = draw(st.integers(1, NUM_SLOTS))
    num_rows = [draw(st.integers(1, 4)) for _ in range(num_slots)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = np.repeat(rng.permutation(num_slots), num_rows)
    logits = random_logits(
        draw(st.integers(0, 2**32)),
        len(slots),
        vocab_size,
        draw(st.booleans()),
        draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 3e38]), max_size=2)),
    )
    is_first = np.diff(slots, prepend=-1) != 0
    likely = np.where(np.isfinite(logits), logits, 0).argmax(axis=1)[:-1]
    drafts = np.where(rng.random(len(likely)) < 0.7, likely, rng.integers(0, vocab_size))
    drafts = np.where(is_first, -1, np.append(0, drafts)).astype(np.int32)
    targets = np.where(is_first & (rng.random(len(slots)) < 0.2), 7, -1).astype(np.int32)
    drafts[1:][targets[:-1] >= 0] = -1
    masks = [
        None if draw(st.booleans()) else ~mask_of(rng.integers(0, vocab_size, 40), vocab_size)
        for _ in range(num_slots)
    ]
    if masks[0] is not None:
        masks[0] = np.stack([masks[0], ~masks[0]])
    parameters = [draw(parameters_of(vocab_size)) for _ in range(num_slots)]
    return logits, slots, parameters, drafts, targets, masks


@settings(max_examples=25)
@given(steps())
def test_samples_are_those_of_the_contract(cpu, step):
    check_samples(cpu, *step)


@pytest.mark.parametrize("values", [
    {"num_logprobs": 0},
    {"num_logprobs": 20},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.5},
    {"logit_bias": {3: 100.0}},
    {"allowed": mask_of([5, 6], 97)},
    {"min_tokens": 1, "end_ids": range(90)},
])
def test_each_parameter_alone(cpu, values):
    logits = random_logits(7, 4, 97)
    check_samples(cpu, logits, range(4), [SamplingParameters(seed=7, **values)] * 4)


def test_all_logits_minus_infinity_fail_and_equal_ones_take_the_lowest_id(cpu):
    logits = np.full((3, 97), -np.inf, np.float32)
    logits[1], logits[2, [50, 60]] = 2.0, 1.0
    for values in {"temperature": 0}, {"top_k": 3}, {"num_logprobs": 97}:
        check_samples(cpu, logits, range(3), [SamplingParameters(seed=1, **values)] * 3)


def test_a_large_vocabulary_of_equal_logits_does_not_overflow(cpu):
    parameters = SamplingParameters(seed=5, top_p=0.75, typical_p=0.5, num_logprobs=3)
    check_samples(cpu, np.zeros((1, 1 << 18), np.float32), [0], [parameters])
