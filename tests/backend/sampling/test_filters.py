"""Weights to the bit, and each filter against sorting in float64."""

import math
import struct

import numpy as np
import pytest

from llmsrv.backend.sampling.reference_sampler import weights_of
from tests.support.sampling import ONE
from tests.support.sampling import kept
from tests.support.sampling import random_logits
from tests.support.sampling import softmax64


def round32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def scalar_weight(x):
    """The contract's exp for one number, in Python floats that are rounded after every operation.

    A float64 product or sum of two float32 rounds to the same float32 as the exact value, since
    53 >= 2 * 24 + 2.
    """
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


def test_weights_are_close_to_exp():
    x = -np.random.default_rng(1).uniform(0, 10, 100_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(weights_of(x) / ONE / exact - 1).max() < 1.1e-7


def test_tiny_weights_are_zero_and_never_drawn():
    assert kept([0, -27.5, -28.1, -1000, -np.inf]) == {0: ONE, 1: scalar_weight(-27.5)}


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


def test_each_filter_applies_to_what_the_ones_before_it_kept():
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
def test_ties_keep_the_lowest_ids(parameters):
    assert list(kept([1.0] * 10, **parameters)) == [0, 1, 2]


def test_a_share_that_is_met_exactly_keeps_no_further_id():
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
