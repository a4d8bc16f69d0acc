"""The sampling contract: to the bit where it says so, and against oracles written another way."""

import math
import struct

import numpy as np
import pytest

from llmsrv.backend.sampling.philox import uniform_bits
from llmsrv.backend.sampling.reference_sampler import candidates
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.reference_sampler import weights_of
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of

ONE = 1 << 40


def table_of(parameters, vocab_size, prompt_ids=(), output_ids=()):
    """A table in which every slot has its own parameters."""
    table = SamplingTable(len(parameters), vocab_size)
    for slot, each in enumerate(parameters):
        table.set(slot, each, prompt_ids, output_ids)
    return table


def sample_one(logits, position=0, prompt_ids=(), output_ids=(), **parameters):
    rows = np.array([logits], np.float32)
    table = table_of([SamplingParameters(**parameters)], rows.shape[1], prompt_ids, output_ids)
    return sample(rows, table, np.zeros(1, np.int32), np.array([position]))


def kept(logits, **parameters):
    """The ids that may be drawn, with their weights."""
    logits = np.array(logits, np.float32)
    table = table_of([SamplingParameters(**parameters)], len(logits))
    ids, weights = candidates(logits, table.parameters[0], table.extras.get(0))
    return dict(zip(ids.tolist(), weights.tolist()))


def random_logits(seed, size=500, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


# ---- exp and weights


def round32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def scalar_weight(x):
    """The contract's exp for one number, in Python floats rounded after every operation.  A float64
    product or sum of two float32 rounds to the same float32 as the exact one (53 >= 2 * 24 + 2)."""
    hexadecimals = "0x1.6a23d0p-10 0x1.123a20p-7 0x1.5558f2p-5 0x1.555492p-3 0x1.fffffcp-2 1 1"
    n = round(round32(x * float.fromhex("0x1.715476p+0")))  # ties to even
    r = round32(x - round32(n * float.fromhex("0x1.62e4p-1")))
    r = round32(r - round32(n * float.fromhex("0x1.7f7d1cp-20")))
    value, *others = [float.fromhex(text) for text in hexadecimals.split()]
    for coefficient in others:
        value = round32(round32(value * r) + coefficient)
    return math.floor(math.ldexp(value, n + 40))


def test_weights_are_those_of_scalar_float32_arithmetic():
    x = -np.random.default_rng(0).uniform(0, 28, 3000).astype(np.float32)
    half_steps = -np.arange(0.5, 40.5) * np.float32(math.log(2))  # where n changes
    x = np.concatenate([x, half_steps, [-28, -27.7, -1e-7, -1e-30, -0.0]]).astype(np.float32)
    assert weights_of(x).tolist() == [scalar_weight(float(each)) for each in x]


def test_the_largest_logit_weighs_exactly_one():
    assert weights_of(np.zeros(1, np.float32)).tolist() == [ONE]
    assert kept([3.0, 7.5, -np.inf], temperature=0.3)[1] == ONE


def test_weights_are_near_exp():
    x = -np.random.default_rng(1).uniform(0, 10, 100_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(weights_of(x) / ONE / exact - 1).max() < 1.1e-7


def test_weights_far_down_are_zero_and_never_drawn():
    assert kept([0, -27.5, -28.1, -1000, -np.inf]) == {0: ONE, 1: scalar_weight(-27.5)}


# ---- Each filter against sorting in float64


def softmax64(logits):
    exp = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return exp / exp.sum()


def oracle_top_k(p, k):
    return set(sorted(range(len(p)), key=lambda id: -p[id])[:k])


def oracle_until(p, order, share):
    ids, mass = set(), 0.0
    for id in order:
        ids.add(int(id))
        mass += p[id]
        if mass >= share:
            break
    return ids


def oracle_top_p(p, share):
    return oracle_until(p, np.argsort(-p), share)


def oracle_min_p(p, share):
    return {id for id, each in enumerate(p) if each >= share * p.max()}


def oracle_typical_p(p, share):
    surprise = -np.log(p)
    return oracle_until(p, np.argsort(np.abs(surprise - (p * surprise).sum())), share)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name, value, oracle", [
    ("top_k", 1, oracle_top_k),
    ("top_k", 40, oracle_top_k),
    ("top_k", 499, oracle_top_k),
    ("top_p", 0.01, oracle_top_p),
    ("top_p", 0.5, oracle_top_p),
    ("top_p", 0.95, oracle_top_p),
    ("min_p", 0.001, oracle_min_p),
    ("min_p", 0.3, oracle_min_p),
    ("typical_p", 0.1, oracle_typical_p),
    ("typical_p", 0.9, oracle_typical_p),
])
def test_a_filter_keeps_what_sorting_in_float64_keeps(seed, name, value, oracle):
    logits = random_logits(seed)
    assert set(kept(logits, **{name: value})) == oracle(softmax64(logits), value)


def test_filters_apply_one_after_the_other_each_to_what_is_left():
    logits = random_logits(3)
    ids = sorted(oracle_top_k(softmax64(logits), 60))
    ids = [ids[i] for i in sorted(oracle_top_p(softmax64(logits[ids]), 0.9))]
    ids = [ids[i] for i in sorted(oracle_min_p(softmax64(logits[ids]), 0.05))]
    ids = [ids[i] for i in sorted(oracle_typical_p(softmax64(logits[ids]), 0.8))]
    assert list(kept(logits, top_k=60, top_p=0.9, min_p=0.05, typical_p=0.8)) == ids
    assert 1 < len(ids) < 60


def test_temperature_divides_before_the_filters():
    logits = random_logits(4)
    assert kept(logits, temperature=2.0, top_p=0.7) == kept(logits / 2, top_p=0.7)


@pytest.mark.parametrize("parameters", [
    {"top_k": 3}, {"top_p": 0.3}, {"typical_p": 0.3}, {"top_k": 3, "top_p": 0.99}
])
def test_among_equals_the_lowest_ids_are_kept(parameters):
    assert list(kept([1.0] * 10, **parameters)) == [0, 1, 2]


def test_a_share_is_reached_exactly_not_passed():
    assert list(kept([1.0] * 4, top_p=0.5)) == [0, 1]
    assert list(kept([1.0] * 4, top_p=0.5 + 2**-32)) == [0, 1, 2]


@pytest.mark.parametrize("parameters", [
    {"top_p": 0.0}, {"typical_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-30}
])
def test_at_least_one_id_is_always_kept(parameters):
    assert list(kept([0.0, 2.0, 1.0], **parameters)) == [1]


def test_neutral_parameters_keep_everything():
    logits = random_logits(5, scale=1.0)
    assert len(kept(logits, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)) == 500
    assert kept(logits, top_k=500) == kept(logits, top_k=10**6) == kept(logits)


def test_top_k_of_one_is_greedy_even_where_weights_are_equal():
    logits = np.float32([5, np.nextafter(np.float32(5), np.float32(6))])
    assert weights_of((logits - logits.max()) / np.float32(100)).tolist() == [ONE, ONE]
    assert list(kept(logits, temperature=100.0, top_k=1)) == [1]


def test_a_vocabulary_of_equal_logits_does_not_overflow():
    size = 1 << 18
    assert len(kept(np.zeros(size), top_p=0.75, typical_p=0.5)) == size * 3 // 8


# ---- Bias, masks, penalties


def test_greedy_takes_the_lowest_id_among_the_largest():
    assert sample_one([1, 4, 4, 2], temperature=0).ids.tolist() == [1]


def test_bias_is_added_before_everything():
    assert sample_one([1, 4, 3.5], temperature=0, logit_bias={2: 1, 0: 2}).ids.tolist() == [2]
    assert sample_one([1, 4], temperature=0, logit_bias={1: -100}).ids.tolist() == [0]


def test_masks_hide_ids_and_the_grammar_narrows_them_further():
    size = 70
    logits = np.arange(size)[None].astype(np.float32)
    allowed = SamplingParameters(temperature=0, allowed=mask_of([3, 33, 65], size))
    banned = SamplingParameters(temperature=0, allowed=~mask_of([69, 68], size))
    table = table_of([allowed, banned, SamplingParameters(temperature=0)], size)
    slots, positions = np.arange(3, dtype=np.int32), np.zeros(3, np.int64)
    rows = np.repeat(logits, 3, axis=0)
    assert sample(rows, table, slots, positions).ids.tolist() == [65, 67, 69]
    for slot in range(3):
        table.set_grammar(slot, mask_of([33, 31, 68], size))
    assert sample(rows, table, slots, positions).ids.tolist() == [33, 33, 68]


def test_mask_words_are_32_ids_each_lowest_bit_first():
    assert mask_of([0, 31, 32], 33).tolist() == [0x80000001, 1]
    assert mask_of([0, 31, 32], 33).dtype == np.uint32


def penalised(logits, prompt_ids, output_ids, repetition, presence, frequency):
    """Step 2 of the contract for each id by itself, in float32."""
    out = []
    for id, value in enumerate(np.float32(logits)):
        count = np.float32(output_ids.count(id))
        if id in prompt_ids or count:
            value = value / repetition if value > 0 else value * repetition
        if count:
            value = value - presence
            value = value - frequency * count
        out.append(value)
    return out


def test_penalties_are_those_of_each_id_by_itself():
    logits = random_logits(6, size=40)
    prompt_ids, output_ids = [1, 2, 3, 3, 7], [3, 5, 5, 5, 39]
    penalties = [np.float32(each) for each in (1.3, 0.4, 0.15)]
    extras = {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.15, "seed": 9
    }
    table = table_of([SamplingParameters(**extras)], 40, prompt_ids, output_ids)
    ids, weights = candidates(logits, table.parameters[0], table.extras[0])
    expected = penalised(logits, prompt_ids, output_ids, *penalties)
    assert dict(zip(ids.tolist(), weights.tolist())) == kept(expected)


def test_what_is_drawn_is_counted_for_the_next_penalty():
    logits = np.array([[2.0, 1.5, 1.2]], np.float32)
    table = table_of([SamplingParameters(temperature=0, frequency_penalty=0.5)], 3)
    slot = np.zeros(1, np.int32)
    drawn = [int(sample(logits, table, slot, np.array([i])).ids[0]) for i in range(6)]
    assert drawn == [0, 0, 1, 2, 0, 1]


def test_a_slot_forgets_its_sequence_when_it_is_set_again():
    table = table_of([SamplingParameters(temperature=0, logit_bias={0: 100})], 2)
    table.set(0, SamplingParameters(temperature=0))
    rows = np.array([[1.0, 2.0]], np.float32)
    assert sample(rows, table, np.zeros(1, np.int32), np.zeros(1, np.int64)).ids.tolist() == [1]
    assert not table.parameters["has_extras"].any()


# ---- Drafts


def test_rows_behind_a_draft_are_penalised_as_if_it_were_put_out():
    rows = np.array([[2.0, 1.8, 1.5]] * 4, np.float32)
    table = table_of([SamplingParameters(temperature=0, presence_penalty=0.4)] * 2, 3)
    slots, positions = np.array([0, 0, 0, 1], np.int32), np.array([0, 1, 2, 0])
    drafts = np.array([-1, 0, 1, -1], np.int32)
    assert sample(rows, table, slots, positions, drafts=drafts).ids.tolist() == [0, 1, 0, 0]
    assert table.extras[0].counts.tolist() == [2, 1, 0]
    assert table.extras[1].counts.tolist() == [1, 0, 0]


def test_nothing_behind_a_wrong_draft_is_counted():
    rows = np.array([[2.0, 1.0, 1.0]] * 3, np.float32)
    table = table_of([SamplingParameters(temperature=0, presence_penalty=0.1)], 3)
    drafts = np.array([-1, 2, 0], np.int32)
    sample(rows, table, np.zeros(3, np.int32), np.arange(3), drafts=drafts)
    assert table.extras[0].counts.tolist() == [1, 0, 0]


def test_each_drafted_row_has_a_grammar_mask_of_its_own():
    rows = np.array([[3.0, 2.0, 1.0]] * 3, np.float32)
    table = table_of([SamplingParameters(temperature=0)], 3)
    table.set_grammar(0, np.stack([mask_of([2], 3), mask_of([1, 2], 3)]))
    drafts = np.array([-1, 2, 1], np.int32)
    samples = sample(rows, table, np.zeros(3, np.int32), np.arange(3), drafts=drafts)
    assert samples.ids.tolist() == [2, 1, 1]


def test_end_ids_are_banned_before_min_tokens_only():
    rows = np.array([[3.0, 2.0, 1.0]] * 2, np.float32)
    table = table_of([SamplingParameters(temperature=0, min_tokens=5, end_ids=[0])], 3)
    drafts = np.array([-1, 1], np.int32)
    samples = sample(rows, table, np.zeros(2, np.int32), np.array([4, 5]), drafts=drafts)
    assert samples.ids.tolist() == [1, 0]


# ---- The draw


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
def test_frequencies_are_those_of_the_exact_distribution(parameters):
    """Chi-square with a fixed seed; the bound is passed by chance once in 100,000."""
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


def test_a_row_is_sampled_alone_as_in_any_batch():
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


def test_seeds_up_to_64_bits_are_kept_whole():
    logits = random_logits(12)
    seeds = (0, 1, 1 << 32, (1 << 64) - 1)
    drawn = [[int(sample_one(logits, i, seed=s).ids[0]) for i in range(8)] for s in seeds]
    assert len({tuple(ids) for ids in drawn}) == 4


# ---- Rows that cannot be sampled


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


def test_a_nan_behind_a_mask_is_still_a_failure():
    samples = sample_one([1, np.nan, 3], temperature=0, allowed=mask_of([0], 3))
    assert samples.ids.tolist() == [FAILED]


# ---- Log-probabilities


def test_log_probabilities_are_of_the_models_own_logits():
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


def test_alternatives_among_equals_are_the_lowest_ids():
    ids, _ = sample_one([1, 5, 1, 1, 1], temperature=0, num_logprobs=3).alternatives[0]
    assert ids.tolist() == [1, 0, 2]


def test_no_more_alternatives_than_there_are_ids():
    samples = sample_one([1, 5, 1], temperature=0, num_logprobs=20)
    assert samples.alternatives[0][0].tolist() == [1, 0, 2]


@pytest.mark.parametrize("num_logprobs, has_logprob", [(-1, False), (0, True), (2, True)])
def test_log_probabilities_come_where_they_are_asked_for(num_logprobs, has_logprob):
    samples = sample_one([1, 5, 1], temperature=0, num_logprobs=num_logprobs)
    assert bool(np.isfinite(samples.logprobs[0])) == has_logprob
    assert len(samples.alternatives[0][0]) == max(num_logprobs, 0)


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
