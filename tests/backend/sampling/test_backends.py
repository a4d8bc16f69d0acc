"""Sampling on each backend against the contract: ids, log-probabilities and counts, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings

from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import mask_of
from tests.backend.conftest import cpu_backend
from tests.backend.conftest import tiers
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation
from tests.support.sampling_steps import check_step
from tests.support.sampling_steps import cpu_sampling
from tests.support.sampling_steps import cuda_sampling
from tests.support.sampling_steps import random_logits
from tests.support.sampling_steps import Step
from tests.support.sampling_steps import steps

CUDA = pytest.param(None, id="CUDA", marks=[needs_emulation, pytest.mark.slow])


@pytest.fixture(scope="session", params=[*tiers(16), CUDA])
def sampling(request):
    if request.param:
        return cpu_sampling(cpu_backend(*request.param))
    return cuda_sampling(install_stand_in())


@settings(max_examples=25)
@given(steps())
def test_samples_are_those_of_the_contract(sampling, step):
    check_step(sampling, step)


@pytest.mark.parametrize("values", [
    {"num_logprobs": 0},
    {"num_logprobs": 20},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.5},
    {"logit_bias": {3: 100.0}},
    {"allowed": mask_of([5, 6], 97)},
    {"min_tokens": 1, "end_ids": range(90)},
])
def test_each_parameter_alone(sampling, values):
    logits = random_logits(7, 4, 97)
    check_step(sampling, Step(logits, range(4), [SamplingParameters(seed=7, **values)] * 4))


def test_filters_apply_in_order_to_what_the_ones_before_kept(sampling):
    logits = random_logits(8, 40, 300) / 3
    values = {"top_k": 60, "top_p": 0.7, "min_p": 0.4, "typical_p": 0.7}
    check_step(sampling, Step(logits, [0] * 40, [SamplingParameters(seed=8, **values)]))


def test_a_row_fails_by_either_nan(sampling):
    logits = random_logits(9, 3, 97)
    logits[:2, 50] = np.nan, -np.nan
    samples = check_step(sampling, Step(logits, range(3), [SamplingParameters(temperature=0)] * 3))
    assert (samples.ids[:2] == FAILED).all() and samples.ids[2] >= 0


def test_all_logits_minus_infinity_fail_and_equal_ones_take_the_lowest_id(sampling):
    logits = np.full((3, 97), -np.inf, np.float32)
    logits[1], logits[2, [50, 60]] = 2.0, 1.0
    for values in {"temperature": 0}, {"top_k": 3}, {"num_logprobs": 97}:
        parameters = [SamplingParameters(seed=1, **values)] * 3
        check_step(sampling, Step(logits, range(3), parameters))


def test_a_large_vocabulary_of_equal_logits_does_not_overflow(sampling):
    parameters = SamplingParameters(seed=5, top_p=0.75, typical_p=0.5, num_logprobs=3)
    check_step(sampling, Step(np.zeros((1, 1 << 18), np.float32), [0], [parameters]))
