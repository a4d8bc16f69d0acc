"""Programs of a few operations on the reference backend."""

import numpy as np

from llmsrv.backend.base import Limits
from llmsrv.backend.program import Program
from llmsrv.backend.program import Tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from tests.support.plans import Piece
from tests.support.plans import batch_of

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
QKV_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS
NUM_BLOCKS = 24


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(name, values):
    values = np.asarray(values, np.float32)
    return Tensor(name, "F32", values.shape, values.reshape(-1).view(np.uint8))


def compiled(*operations, tick=lambda: None):
    """A plan of the operations, with a vocabulary of 12 ids."""
    program = Program(operations, {}, 1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, vocab_size=12)
    limits = Limits(max_rows=64, max_logit_rows=8, max_slots=8, num_blocks=NUM_BLOCKS)
    return ReferenceBackend().compile(program, limits, tick)


def forward(plan, *pieces):
    plan.forward(batch_of(pieces or [Piece([0], 0, [1])]))
    return plan.read("out")


def run(*operations, **buffers):
    """The buffer `out` after the operations, if the buffers held these values before."""
    plan = compiled(*operations)
    plan.buffers.update(buffers)
    return forward(plan)
