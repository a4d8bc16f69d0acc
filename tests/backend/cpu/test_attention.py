"""The CPU backend against the reference backend: Attention over the KV cache."""

import numpy as np
import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.config import default_cache_dir
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


@pytest.mark.parametrize("heads, kv_heads, head_dim, window, softcap", ATTENTIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_over_the_cache(cpu, heads, kv_heads, head_dim, window, softcap, interleaved):
    errors = attention_errors(cpu, heads, kv_heads, head_dim, window, softcap, interleaved)
    # The cache rounds to float16, and large scores amplify the error.
    assert errors.max() < 2e-2
    assert errors.mean() < 5e-4


def test_the_cache_holds_elements_of_eight_bits(cpu8):
    check_attention_errors(cpu8, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("bits, error", [(8, 2e-2), (32, 1e-5)])
def test_the_cache_holds_elements_of_8_or_32_bits(cpu, bits, error):
    backend = CPUBackend(CPUOptions(default_cache_dir(), 2, kv_cache_bits=bits, tiers=(cpu.tier,)))
    check_attention_errors(backend, error)


def check_attention_errors(backend, error):
    assert attention_errors(backend, 6, 2, 40, None, None, False).mean() < error
    assert attention_errors(backend, 4, 4, 64, 100, None, False).mean() < error


def attention_errors(backend, heads, kv_heads, head_dim, window, softcap, interleaved):
    """Differences from the reference: a prompt of 290 rows; then seven more rows; then a decode
    row and prompts of 17 and 1 rows in one batch."""
    errors = []
    width = (heads + 2 * kv_heads) * head_dim
    frequencies = np.float32(100.0) ** -np.linspace(0, 1, head_dim // 2, dtype=np.float32)
    norm = tensor("norm", random(head_dim, seed=3))
    operations = (
        RopeAndStore("qkv", 0, frequencies, None, 1.1, interleaved, norm, norm, 1e-6),
        Attention("out", "qkv", 0, head_dim**-0.5, window, softcap),
    )
    widths = {"qkv": width, "out": heads * head_dim}
    program = Program(operations, widths, 1, heads, kv_heads, head_dim, VOCAB)
    plans = [b.compile(program, LIMITS, lambda: None) for b in (backend, ReferenceBackend())]
    blocks = list(np.random.default_rng(0).permutation(40) + 1)
    steps = [
        [Piece([0] * 290, 0, blocks[:20])],
        [Piece([0] * 7, 290, blocks[:20])],
        [Piece([0], 297, blocks[:20]), Piece([0] * 17, 0, blocks[20:22]), Piece([0], 0, [50])],
    ]
    for seed, pieces in enumerate(steps):
        batch = batch_of(pieces)
        qkv = random(len(batch.ids), width, seed=seed)
        for plan in plans:
            write_buffer(plan, "qkv", qkv)
        for plan in plans:
            plan.forward(batch)
        ours, theirs = (plan.read("out") for plan in plans)
        errors.append(np.abs(ours - theirs).ravel())
    return np.concatenate(errors)
