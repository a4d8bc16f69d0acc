"""Attention over the KV cache on a backend, compared with the reference backend."""

import numpy as np

from llmsrv.backend.program import Attention
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.reference.backend import ReferenceBackend
from tests.support.operations import LIMITS
from tests.support.operations import VOCAB
from tests.support.operations import random
from tests.support.operations import tensor
from tests.support.operations import write_buffer
from tests.support.plans import Piece
from tests.support.plans import batch_of

ATTENTIONS = [
    # heads, kv heads, head_dim, window, softcap
    (4, 2, 16, None, None),
    (9, 3, 64, None, None),
    (1, 1, 8, 20, None),
    (6, 2, 24, 260, 30.0),
    (16, 1, 32, 1, 5.0),
    (4, 4, 256, None, None),
]
BLOCKS = list(np.random.default_rng(0).permutation(40) + 1)
# A prompt of 290 rows; then seven more rows; then a decode row and prompts of 17 and 1 rows.
STEPS = [
    [Piece([0] * 290, 0, BLOCKS[:20])],
    [Piece([0] * 7, 290, BLOCKS[:20])],
    [Piece([0], 297, BLOCKS[:20]), Piece([0] * 17, 0, BLOCKS[20:22]), Piece([0], 0, [50])],
]


def attention_errors(
    backend, heads, kv_heads, head_dim, window, softcap, interleaved=False, steps=STEPS
):
    """Differences from the reference, over all steps."""
    program = attention_program(heads, kv_heads, head_dim, window, softcap, interleaved)
    plans = [b.compile(program, LIMITS, lambda: None) for b in (backend, ReferenceBackend())]
    errors = []
    for seed, pieces in enumerate(steps):
        batch = batch_of(pieces)
        qkv = random(len(batch.ids), program.buffers["qkv"], seed=seed)
        ours, theirs = (run_attention(plan, batch, qkv) for plan in plans)
        errors.append(np.abs(ours - theirs).ravel())
    return np.concatenate(errors)


def attention_program(heads, kv_heads, head_dim, window, softcap, interleaved=False):
    """Norms of each head, rope and attention."""
    frequencies = np.float32(100.0) ** -np.linspace(0, 1, head_dim // 2, dtype=np.float32)
    norm = tensor("norm", random(head_dim, seed=3))
    operations = (
        RopeAndStore("qkv", 0, frequencies, None, 1.1, interleaved, norm, norm, 1e-6),
        Attention("out", "qkv", 0, head_dim**-0.5, window, softcap),
    )
    widths = {"qkv": (heads + 2 * kv_heads) * head_dim, "out": heads * head_dim}
    return Program(operations, widths, 1, heads, kv_heads, head_dim, VOCAB)


def run_attention(plan, batch, qkv):
    write_buffer(plan, "qkv", qkv)
    plan.forward(batch)
    return plan.read("out")
