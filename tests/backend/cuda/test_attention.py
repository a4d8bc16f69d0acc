"""The CUDA backend against the reference backend: rope, and Attention over the KV cache."""

import dataclasses

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.cuda.attention import AttentionKernels
from llmsrv.backend.cuda.attention import RopeWeights
from llmsrv.backend.cuda.attention import Tile
from llmsrv.backend.cuda.attention import choose_tile
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.step import Step
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.config import default_cache_dir
from tests.support.attention import ATTENTIONS
from tests.support.attention import BLOCKS
from tests.support.attention import attention_errors
from tests.support.attention import attention_program
from tests.support.attention import run_attention
from tests.support.cuda import MODES
from tests.support.cuda import install_stand_in
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.operations import LIMITS
from tests.support.operations import VOCAB
from tests.support.operations import random
from tests.support.operations import tensor
from tests.support.parameters import slow_but
from tests.support.plans import Piece
from tests.support.plans import batch_of

pytestmark = needs_emulation
SHAPE = (9, 3, 64, None, None)


@pytest.mark.parametrize("shape", slow_but([*ATTENTIONS, (18, 2, 80, 100, None)], SHAPE))
def test_attention_over_the_cache(cuda16, shape):
    errors = attention_errors(cuda16, *shape)
    # q, keys, values and weights round to float16, and large scores amplify the error.
    assert errors.max() < 2e-2
    assert errors.mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPE, (4, 4, 256, None, None)])
def test_attention_in_bfloat16(shape):
    assert attention_errors(new_backend(dtype="bfloat16"), *shape).mean() < 8e-3


def new_backend(dtype="float16", **options):
    install_stand_in()
    return CUDABackend(CUDAOptions(default_cache_dir(), dtype=dtype, warms_up=False, **options))


@pytest.mark.slow
def test_interleaved_rope_before_attention(cuda16):
    assert attention_errors(cuda16, *SHAPE, interleaved=True).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("shape", [(4, 2, 32, None, None), (3, 1, 16, 100, 20.0)])
def test_attention_in_every_order_of_threads(name, shape):
    with mode(**MODES[name]):
        assert attention_errors(new_backend(), *shape).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("max_shared_bytes", [64 << 10, 99 << 10, 227 << 10])
def test_attention_in_tiles_of_every_size(cuda16, monkeypatch, max_shared_bytes):
    device = dataclasses.replace(cuda16.device, max_shared_bytes=max_shared_bytes)
    monkeypatch.setattr(cuda16, "device", device)
    assert attention_errors(cuda16, 2, 1, 256, None, None).mean() < 1e-3
    assert attention_errors(cuda16, 2, 1, 128, None, None).mean() < 1e-3


def test_tiles_fit_into_shared_memory():
    tiles = {
        (dim, kib): choose_tile(dim, kib << 10) for dim in (64, 128, 256) for kib in (64, 99, 227)
    }
    assert tiles[64, 64] == tiles[64, 99] == tiles[64, 227] == Tile(4, 2, 64)
    assert tiles[128, 64] == Tile(4, 1, 32)
    assert tiles[128, 99] == tiles[128, 227] == Tile(4, 2, 32)
    assert tiles[256, 64] == Tile(2, 1, 16)
    assert tiles[256, 99] == tiles[256, 227] == Tile(4, 1, 32)
    for (dim, kib), tile in tiles.items():
        assert tile.shared_bytes(dim) <= kib << 10


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 700])
def test_a_long_row_is_split_and_combined(cuda16, window):
    blocks = list(range(1, 80))
    steps = [[Piece([0] * 290, start, blocks)] for start in range(0, 1160, 290)]
    steps.append([Piece([0] * 3, 1160, blocks)])
    assert attention_errors(cuda16, 6, 2, 32, window, None, steps=steps).mean() < 1e-3


@pytest.mark.slow
def test_with_batch_invariance_all_rows_decode_in_as_many_passes_as_memory_needs():
    backend = new_backend(batch_invariant=True)
    blocks = list(range(1, 80))
    steps = [[Piece([0] * 290, start, blocks)] for start in range(0, 1160, 290)]
    assert attention_errors(backend, 2, 1, 16, None, None, steps=steps).mean() < 1e-3


@pytest.mark.slow
def test_the_bits_of_a_row_that_decodes_do_not_depend_on_other_rows(cuda16):
    program = attention_program(6, 2, 32, None, None)
    plan = cuda16.compile(program, LIMITS, lambda: None)
    qkv = random(290, program.buffers["qkv"])
    prompt = batch_of([Piece([0] * 290, 0, BLOCKS[:20])])
    run_attention(plan, prompt, qkv)

    def output_among(*others):
        batch = batch_of([Piece([0], 290, BLOCKS[:20]), *others])
        return run_attention(plan, batch, qkv[: len(batch.ids)])[0].tobytes()

    alone = output_among()
    assert output_among(Piece([0], 0, [50])) == alone
    others = Piece([0] * 3, 0, [50]), Piece([0] * 40, 0, BLOCKS[20:23]), Piece([0], 0, [51])
    assert output_among(*others) == alone


@pytest.mark.slow
def test_with_batch_invariance_a_prompt_has_the_same_bits_in_any_chunks():
    program = attention_program(6, 2, 32, 50, None)
    plan = new_backend(batch_invariant=True).compile(program, LIMITS, lambda: None)
    qkv = random(130, program.buffers["qkv"])

    def output_in_chunks(size):
        parts = []
        for start in range(0, len(qkv), size):
            some = qkv[start : start + size]
            batch = batch_of([Piece([0] * len(some), start, BLOCKS[:20])])
            parts.append(run_attention(plan, batch, some).tobytes())
        return b"".join(parts)

    assert output_in_chunks(130) == output_in_chunks(40) == output_in_chunks(7)


# ---- Rope


@dataclasses.dataclass(frozen=True)
class Rope:
    """A RopeAndStore, and what rows it runs on."""

    interleaved: bool = False
    rotary_dim: int | None = None  # None: no rotation
    is_q_norm_across: bool = False
    has_norms: bool = True
    is_long: bool = False


ROPES = [
    Rope(rotary_dim=24),
    Rope(rotary_dim=8, interleaved=True, is_q_norm_across=True),
    Rope(has_norms=False),
    Rope(rotary_dim=16, is_long=True, has_norms=False),
]
HEADS, KV_HEADS, DIM, PADDED_DIM = 6, 2, 24, 32
POSITIONS = np.array([0, 1, 77, 4096, 131_071, 999_999, 1_000_000], np.int32)


@pytest.mark.parametrize("rope", slow_but(ROPES, ROPES[0]))
def test_rope_rotates_and_stores(rope):
    q, keys, values, qkv, operation = run_rope(rope)
    heads = qkv.reshape(len(qkv), -1, DIM).astype(np.float64)
    expected_q = rotated(normed(heads[:, :HEADS], operation.q_norm, 1e-6), operation, rope.is_long)
    k = heads[:, HEADS : HEADS + KV_HEADS]
    expected_k = rotated(normed(k, operation.k_norm, 1e-6), operation, rope.is_long)
    slots = 3 + 2 * np.arange(len(qkv))
    block, offset = np.divmod(slots, BLOCK_SIZE)
    # Rounding to float16 is the only error.
    close = {"rtol": 6e-4, "atol": 1e-5}
    np.testing.assert_allclose(q[..., :DIM], expected_q, **close)
    np.testing.assert_allclose(keys[block, 1, :, offset, :DIM], expected_k, **close)
    np.testing.assert_allclose(values[block, 1, :, offset, :DIM], heads[:, -KV_HEADS:], **close)
    for array in (q, keys, values):
        assert not array[..., DIM:].any()
    assert not keys[:, 0].any()


def run_rope(rope):
    cp = install_stand_in()
    shapes = {"q": (HEADS if rope.is_q_norm_across else 1) * DIM, "k": DIM}
    norms = {
        name: tensor(name, random(size, seed=size)) if rope.has_norms else None
        for name, size in shapes.items()
    }
    frequencies = None
    if rope.rotary_dim:
        frequencies = np.float32(500_000) ** -np.linspace(0, 1, rope.rotary_dim // 2)
        frequencies = frequencies.astype(np.float32)
    long = None if frequencies is None else frequencies / np.float32(3)
    operation = RopeAndStore(
        "qkv", 1, frequencies, long, 1.2, rope.interleaved, norms["q"], norms["k"], 1e-6
    )
    program = Program((operation,), {}, 2, HEADS, KV_HEADS, DIM, VOCAB)
    device = Device(cp, 0, "", 80, 2, 99 << 10)
    kernels = AttentionKernels(Kernels(cp), device, program, LIMITS)
    count = len(POSITIONS)
    qkv = random(count, (HEADS + 2 * KV_HEADS) * DIM)
    arrays = {
        "positions": POSITIONS,
        "sequences": np.zeros(count, np.int32),
        "slot_mapping": 3 + 2 * np.arange(count),
        "is_long": np.array([rope.is_long], np.int32),
    }
    step = Step({name: cp.asarray(each) for name, each in arrays.items()}, count, 0, False)
    weights = RopeWeights(
        *(None if each is None else cp.asarray(each) for each in (frequencies, long)),
        *(each and cp.asarray(each.data.view(np.float32)) for each in norms.values()),
    )
    q = cp.zeros((count, HEADS, PADDED_DIM), np.float16)
    cache = cp.zeros((2, 2, 2, KV_HEADS, BLOCK_SIZE, PADDED_DIM), np.float16)
    kernels.rope_and_store(operation, weights, cp.asarray(qkv), q, cache[0], cache[1], step)
    return q.get(), cache[0].get(), cache[1].get(), qkv, operation


def normed(heads, weight, eps):
    if weight is None:
        return heads
    weight = weight.data.view(np.float32)
    x = heads.reshape(len(heads), -1, len(weight))
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    return (x / np.sqrt(mean_square + eps) * weight).reshape(heads.shape)


def rotated(heads, operation, is_long):
    """In float64; only the angles are float32, as in the reference backend."""
    if operation.frequencies is None:
        return heads
    frequencies = operation.long_frequencies if is_long else operation.frequencies
    angles = (POSITIONS[:, None].astype(np.float32) * frequencies).astype(np.float64)
    half = len(frequencies)
    first, second = slice(0, half), slice(half, 2 * half)
    if operation.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    cos, sin = (f(angles)[:, None] * operation.magnitude for f in (np.cos, np.sin))
    out = heads.copy()
    out[..., first] = heads[..., first] * cos - heads[..., second] * sin
    out[..., second] = heads[..., second] * cos + heads[..., first] * sin
    return out
