"""Sampling kernels in every order of execution, and steps enqueued before earlier ones are read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of
from tests.support.cuda import every_mode
from tests.support.cuda import install_stand_in
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.sampling_steps import CUDASampling
from tests.support.sampling_steps import check_counts
from tests.support.sampling_steps import check_samples
from tests.support.sampling_steps import check_step
from tests.support.sampling_steps import cuda_sampling
from tests.support.sampling_steps import NUM_SLOTS
from tests.support.sampling_steps import random_logits
from tests.support.sampling_steps import set_slots
from tests.support.sampling_steps import Step
from tests.support.sampling_steps import steps

__all__ = ["every_mode"]
pytestmark = needs_emulation

SIZE = 4500  # three chunks
EVERYTHING = {
    "temperature": 0.8,
    "top_k": 60,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.1,
    "num_logprobs": 5,
    "logit_bias": {3: 4.0, 4400: -2.0},
    "allowed": ~mask_of(range(0, SIZE, 7), SIZE),
    "min_tokens": 2**31 - 1,
    "end_ids": [1, 4499],
}


def step_of_everything():
    """Four slots: one with drafts and all parameters, one greedy, one without filters, one with a
    target."""
    parameters = [
        SamplingParameters(seed=1, **EVERYTHING),
        SamplingParameters(temperature=0),
        SamplingParameters(seed=2, num_logprobs=0),
        SamplingParameters(seed=3, num_logprobs=2, temperature=0),
    ]
    slots = np.array([2, 0, 0, 0, 1, 3, 3])
    logits = random_logits(5, len(slots), SIZE)
    logits[4, 17] = np.nan
    drafts = np.array([-1, -1, 5, 9, -1, -1, -1], np.int32)
    targets = np.array([-1, -1, -1, -1, -1, 4321, -1], np.int32)
    masks = np.stack([~mask_of(range(0, SIZE, 5), SIZE), ~mask_of(range(0, SIZE, 3), SIZE)])
    return Step(logits, slots, parameters, drafts, targets, [masks])


def test_a_step_of_everything():
    samples = check_step(cuda_sampling(install_stand_in()), step_of_everything())
    assert samples.ids[4:6].tolist() == [FAILED, 4321]


@pytest.mark.slow
def test_in_every_mode(every_mode):
    check_step(cuda_sampling(install_stand_in()), step_of_everything())
    if every_mode != "checked":
        flat = SamplingParameters(seed=5, top_p=0.75, typical_p=0.5, num_logprobs=3000)
        logits = np.round(random_logits(6, 1, 5000, has_ties=True) / 3)
        check_step(cuda_sampling(install_stand_in()), Step(logits, [0], [flat]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2047, 2048, 2049])
def test_as_many_candidates_as_the_list_takes(size):
    """And one less or more."""
    parameters = SamplingParameters(seed=5, top_p=0.75, typical_p=0.5, num_logprobs=size)
    step = Step(np.zeros((1, size), np.float32), [0], [parameters])
    check_step(cuda_sampling(install_stand_in()), step)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"order": "reversed"}, {"order": "random", "seed": 7}])
def test_random_steps_in_other_orders(fields):
    with mode(**fields):
        make_sampling = cuda_sampling(install_stand_in())

        @settings(max_examples=15)
        @given(steps((97, 1000, 4099)))
        def check(step):
            check_step(make_sampling, step)

        check()


@pytest.mark.slow
def test_random_steps_are_free_of_races_and_stay_in_bounds():
    with mode(is_checked=True):
        make_sampling = cuda_sampling(install_stand_in())

        @settings(max_examples=6)
        @given(steps((97, 2500)))
        def check(step):
            check_step(make_sampling, step)

        check()


@pytest.fixture(params=[False, True], ids=["at once", "lazy"])
def sampling(request):
    with mode(is_lazy=request.param):
        yield CUDASampling(install_stand_in(), 97)


def rows_of(slots):
    """Arguments of enqueue but for the logits; at position 0."""
    return np.array(slots, np.int32), np.zeros(len(slots), np.int64), None, None


def test_two_steps_may_be_unread_and_each_counts_what_the_one_before_drew(sampling):
    table = SamplingTable(NUM_SLOTS, 97)
    parameters = [SamplingParameters(seed=1, presence_penalty=2.0, frequency_penalty=1.0)] * 2
    logits = random_logits(1, 2, 97)
    for each in (sampling.table, table):
        set_slots(each, Step(logits, [], parameters))
    pending = [sampling.enqueue(logits, *rows_of([0, 1])) for _ in range(2)]
    for _ in range(6):
        check_samples(pending.pop(0).read(), sample(logits, table, *rows_of([0, 1])[:2]))
        pending.append(sampling.enqueue(logits, *rows_of([0, 1])))
    for last in pending:
        check_samples(last.read(), sample(logits, table, *rows_of([0, 1])[:2]))
    check_counts(sampling, table)


@pytest.mark.slow
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_calls_take_effect_in_their_order(sampling, seed):
    """Slots and grammars are set at random between steps, of which up to two are unread."""
    rng = np.random.default_rng(seed)
    table = SamplingTable(NUM_SLOTS, 97)
    pending = []

    def step(slots):
        if len(pending) == 2:
            check_samples(*read(pending.pop(0)))
        logits = random_logits(int(rng.integers(2**32)), len(slots), 97)
        ours = sampling.enqueue(logits, *rows_of(slots))
        pending.append((ours, sample(logits, table, *rows_of(slots))))

    for slot in range(NUM_SLOTS):
        set_at_random(rng, slot, sampling.table, table)
    for _ in range(20):
        match rng.integers(4):
            case 0:
                set_at_random(rng, int(rng.integers(NUM_SLOTS)), sampling.table, table)
            case 1:
                mask = ~mask_of(rng.integers(0, 97, 30), 97) if rng.random() < 0.8 else None
                slot = int(rng.integers(NUM_SLOTS))
                for each in (sampling.table, table):
                    each.set_grammar(slot, mask)
            case _:
                step(rng.permutation(NUM_SLOTS)[: rng.integers(1, NUM_SLOTS + 1)])
    step(range(NUM_SLOTS))
    for each in pending:
        check_samples(*read(each))
    check_counts(sampling, table)


def read(pending):
    ours, wanted = pending
    return ours.read(), wanted


def set_at_random(rng, slot, *tables):
    values = {
        "seed": int(rng.integers(2**63)),
        "temperature": float(rng.choice([0.0, 1.0])),
        "top_k": int(rng.choice([0, 9])),
        "num_logprobs": int(rng.choice([-1, 3])),
        "frequency_penalty": float(rng.choice([0.0, 2.0])),
        "logit_bias": {int(rng.integers(97)): 5.0} if rng.random() < 0.5 else {},
        "min_tokens": int(rng.integers(2)),
        "end_ids": rng.integers(0, 97, 40).tolist(),
    }
    history = rng.integers(0, 97, (2, 9)).tolist()
    for table in tables:
        table.set(slot, SamplingParameters(**values), *history)


def test_what_is_set_later_does_not_change_a_step_that_is_enqueued(sampling):
    logits = np.arange(97, dtype=np.float32)[None]
    sampling.table.set(0, SamplingParameters(temperature=0, logit_bias={3: 99.0}, min_tokens=9))
    sampling.table.set_grammar(0, mask_of([3, 4], 97))
    first = sampling.enqueue(logits, *rows_of([0]))
    sampling.table.set_grammar(0, mask_of([4, 5], 97))
    second = sampling.enqueue(logits, *rows_of([0]))
    assert first.read().ids.tolist() == [3]
    sampling.table.set(0, SamplingParameters(temperature=0))
    third = sampling.enqueue(logits, *rows_of([0]))
    assert [second.read().ids[0], third.read().ids[0]] == [5, 96]


def test_a_slot_that_is_set_again_counts_from_its_own_output(sampling):
    logits = np.zeros((1, 97), np.float32)
    parameters = SamplingParameters(temperature=0, frequency_penalty=1.0)
    sampling.table.set(0, parameters, [], [0, 1, 1])
    assert sampling.enqueue(logits, *rows_of([0])).read().ids.tolist() == [2]
    sampling.table.set(0, parameters, [], [0, 2])
    assert sampling.counts(0)[:4].tolist() == [1, 2, 1, 0]
    assert sampling.enqueue(logits, *rows_of([0])).read().ids.tolist() == [1]
    assert sampling.counts(0)[:4].tolist() == [1, 1, 1, 0]
    sampling.table.set(0, SamplingParameters(temperature=0))
    assert sampling.enqueue(logits, *rows_of([0])).read().ids.tolist() == [0]
    assert sampling.counts(0) is None


def test_the_ids_stay_on_the_device_for_the_next_step(sampling):
    logits = random_logits(3, 3, 97)
    logits[1, 5] = np.inf
    for slot in range(3):
        sampling.table.set(slot, SamplingParameters(seed=slot))
    samples = sampling.enqueue(logits, *rows_of([0, 1, 2])).read()
    assert sampling.ids.get()[:3].tolist() == samples.ids.tolist()
    assert samples.ids[1] == FAILED
