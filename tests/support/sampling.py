"""Samples single rows by the reference sampler."""

import numpy as np

from llmsrv.backend.sampling.reference_sampler import candidates
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable

ONE = 1 << 40


def table_of(parameters, vocab_size, prompt_ids=(), output_ids=()):
    """A table with a slot for each of `parameters`."""
    table = SamplingTable(len(parameters), vocab_size)
    for slot, each in enumerate(parameters):
        table.set(slot, each, prompt_ids, output_ids)
    return table


def sample_one(logits, position=0, prompt_ids=(), output_ids=(), **parameters):
    rows = np.array([logits], np.float32)
    table = table_of([SamplingParameters(**parameters)], rows.shape[1], prompt_ids, output_ids)
    return sample(rows, table, np.zeros(1, np.int32), np.array([position]))


def kept(logits, **parameters):
    """The ids that can be drawn -> their weights."""
    logits = np.array(logits, np.float32)
    table = table_of([SamplingParameters(**parameters)], len(logits))
    ids, weights = candidates(logits, table.parameters[0], table.extras.get(0))
    return dict(zip(ids.tolist(), weights.tolist()))


def random_logits(seed, size=500, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def softmax64(logits):
    exp = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return exp / exp.sum()
