"""The draw, rows that cannot be sampled, and log-probabilities."""

import numpy as np
import pytest

from llmsrv.backend.sampling.philox import uniform_bits
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of
from tests.support.sampling import kept
from tests.support.sampling import random_logits
from tests.support.sampling import sample_one
from tests.support.sampling import softmax64
from tests.support.sampling import table_of


def test_the_draw_walks_the_weights_in_id_order():
    logits = random_logits(7, size=60)
    weights = kept(logits)
    for position in range(50):
        target = uniform_bits(99, 3, position) * sum(weights.values()) >> 64
        for id in sorted(weights):
            target -= weights[id]
            if target < 0:
                break
        assert sample_one(logits, position, seed=99, choice=3).ids.tolist() == [id]


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.6}, marks=pytest.mark.slow),
        {"top_p": 0.8, "min_p": 0.1},
    ],
)
def test_frequencies_match_the_exact_distribution(parameters):
    """Chi-square with a fixed seed; chance alone exceeds the bound once in 100,000."""
    draws = 3000
    logits = random_logits(8, size=12, scale=1.5)
    weights = kept(logits, **parameters)
    table = table_of([SamplingParameters(seed=2024, **parameters)], 12)
    slot = np.zeros(1, np.int32)
    drawn = [int(sample(logits[None], table, slot, np.array([i])).ids[0]) for i in range(draws)]
    expected = {id: draws * weight / sum(weights.values()) for id, weight in weights.items()}
    assert set(drawn) <= set(weights)
    chi_square = sum((drawn.count(id) - e) ** 2 / e for id, e in expected.items())
    degrees = len(expected) - 1
    # Wilson & Hilferty 1931: the cube root of chi-square / degrees is nearly normal.
    z = ((chi_square / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / (2 / (9 * degrees)) ** 0.5
    assert z < 4.27


def test_a_row_samples_the_same_alone_and_in_any_batch():
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 3, (16, 300)).astype(np.float32)
    parameters = [
        SamplingParameters(
            seed=int(rng.integers(1 << 63)),
            temperature=float(rng.choice([0, 0.5, 1.0])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([0.5, 1.0])),
            num_logprobs=int(rng.choice([-1, 0, 3])),
            frequency_penalty=float(rng.choice([0.0, 0.7])),
        )
        for _ in range(16)
    ]
    slots, positions = rng.permutation(16).astype(np.int32), rng.integers(0, 1000, 16)
    together = sample(logits, table_of(parameters, 300), slots, positions)
    for row in range(16):
        table, one = table_of(parameters, 300), slice(row, row + 1)
        alone = sample(logits[one], table, slots[one], positions[one])
        assert alone.ids[0] == together.ids[row]
        assert alone.logprobs.tobytes() == together.logprobs[one].tobytes()
        np.testing.assert_array_equal(alone.alternatives[0], together.alternatives[row])


def test_all_64_bits_of_a_seed_count():
    logits = random_logits(12)
    seeds = (0, 1, 1 << 32, (1 << 64) - 1)
    drawn = [[int(sample_one(logits, i, seed=s).ids[0]) for i in range(8)] for s in seeds]
    assert len({tuple(ids) for ids in drawn}) == 4


@pytest.mark.parametrize("bad", [[1, np.nan, 2], [1, np.inf, 2], [-np.inf] * 3])
@pytest.mark.parametrize("parameters", [
    {"temperature": 0}, {"num_logprobs": 2}, {"logit_bias": {1: -100.0}, "top_p": 0.5}
])
def test_a_bad_row_fails_alone(bad, parameters):
    rows = np.array([[1, 2, 3], bad, [3, 2, 1]], np.float32)
    each = [SamplingParameters(temperature=0), SamplingParameters(**parameters)]
    table = table_of([each[0], each[1], each[0]], 3)
    samples = sample(rows, table, np.arange(3, dtype=np.int32), np.zeros(3, np.int64))
    assert samples.ids.tolist() == [2, FAILED, 0]
    assert np.isnan(samples.logprobs[1]) and len(samples.alternatives[1][0]) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_everything_masked_fails(temperature):
    samples = sample_one([1, 2, 3], temperature=temperature, allowed=mask_of([], 3))
    assert samples.ids.tolist() == [FAILED]


def test_a_masked_nan_still_fails_the_row():
    samples = sample_one([1, np.nan, 3], temperature=0, allowed=mask_of([0], 3))
    assert samples.ids.tolist() == [FAILED]


def test_log_probabilities_are_those_of_the_unmodified_logits():
    logits = random_logits(13, size=50_000)
    samples = sample_one(
        logits, temperature=0.5, top_k=3, logit_bias={7: 50.0}, num_logprobs=4, seed=5
    )
    exact = np.log(softmax64(logits))
    assert samples.ids.tolist() == [7]
    assert abs(samples.logprobs[0] - exact[7]) < 2e-6
    ids, logprobs = samples.alternatives[0]
    assert ids.tolist() == np.argsort(-logits)[:4].tolist()
    np.testing.assert_allclose(logprobs, exact[ids], atol=2e-6)


def test_tied_alternatives_are_the_lowest_ids():
    ids, _ = sample_one([1, 5, 1, 1, 1], temperature=0, num_logprobs=3).alternatives[0]
    assert ids.tolist() == [1, 0, 2]


@pytest.mark.parametrize("target, rank", [(1, 1), (0, 2), (2, 3), (4, 4), (3, 5)])
def test_the_rank_counts_larger_logits_and_equal_ones_of_lower_ids(target, rank):
    logits = np.array([[2, 5, 2, 0, 1]], np.float32)
    table = table_of([SamplingParameters(num_logprobs=0)], 5)
    where = np.zeros(1, np.int32), np.zeros(1, np.int64), np.array([target], np.int32)
    assert sample(logits, table, *where).ranks.tolist() == [rank]


def test_there_are_no_more_alternatives_than_ids():
    samples = sample_one([1, 5, 1], temperature=0, num_logprobs=20)
    assert samples.alternatives[0][0].tolist() == [1, 0, 2]


@pytest.mark.parametrize("num_logprobs, has_logprob", [(-1, False), (0, True), (2, True)])
def test_log_probabilities_are_returned_only_if_asked_for(num_logprobs, has_logprob):
    samples = sample_one([1, 5, 1], temperature=0, num_logprobs=num_logprobs)
    assert bool(np.isfinite(samples.logprobs[0])) == has_logprob
    assert len(samples.alternatives[0][0]) == max(num_logprobs, 0)
    assert bool(samples.ranks[0]) == has_logprob


def test_a_target_is_reported_and_neither_drawn_nor_counted():
    rows = np.array([[1, 5, 1], [2, 0, 1]], np.float32)
    parameters = SamplingParameters(temperature=0, num_logprobs=2, presence_penalty=1.0)
    table = table_of([parameters], 3)
    slots, positions = np.zeros(2, np.int32), np.zeros(2, np.int64)
    samples = sample(rows, table, slots, positions, np.array([2, -1], np.int32))
    assert samples.ids.tolist() == [2, 0]
    exact = rows - np.log(np.exp(rows.astype(np.float64)).sum(axis=1, keepdims=True))
    assert samples.logprobs == pytest.approx([exact[0, 2], exact[1, 0]], abs=1e-6)
    assert samples.alternatives[0][0].tolist() == [1, 0]
    assert table.extras[0].counts.tolist() == [1, 0, 0]


def test_a_batch_without_logit_rows_samples_nothing():
    table, none = SamplingTable(1, 5), np.zeros(0, np.int32)
    samples = sample(np.zeros((0, 5), np.float32), table, none, none.astype(np.int64))
    assert len(samples.ids) == len(samples.logprobs) == len(samples.alternatives) == 0
