"""Shuffles, votes, reductions and barriers of a warp and a block, against numpy."""

import numpy as np
import pytest

from tests.support.cuda import launch
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

LANES = np.arange(32)
CODE = """
extern "C" __global__ void shuffles(int *out, const int *x, int width)
{
    int value = x[threadIdx.x];
    out[threadIdx.x] = __shfl_sync(0xffffffffu, value, 5, width);
    out[32 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, 3, width);
    out[64 + threadIdx.x] = __shfl_down_sync(0xffffffffu, value, 3, width);
    out[96 + threadIdx.x] = __shfl_up_sync(0xffffffffu, value, 3, width);
}

extern "C" __global__ void votes(unsigned *out, const int *x)
{
    int value = x[threadIdx.x];
    out[threadIdx.x] = __ballot_sync(0xffffffffu, value > 5);
    out[32 + threadIdx.x] = __any_sync(0xffffffffu, value > 5);
    out[64 + threadIdx.x] = __all_sync(0xffffffffu, value > -100);
    out[96 + threadIdx.x] = __match_any_sync(0xffffffffu, value);
}

extern "C" __global__ void reductions(int *out, const int *x)
{
    int value = x[threadIdx.x];
    out[threadIdx.x] = __reduce_add_sync(0xffffffffu, value);
    out[32 + threadIdx.x] = __reduce_max_sync(0xffffffffu, value);
    out[64 + threadIdx.x] = __reduce_min_sync(0xffffffffu, value);
    out[96 + threadIdx.x] = (int)__reduce_xor_sync(0xffffffffu, (unsigned)value);
}

extern "C" __global__ void half_warp(int *out, const int *x)
{
    if (threadIdx.x >= 16)
        out[threadIdx.x] = __shfl_xor_sync(0xffff0000u, x[threadIdx.x], 1);
    else
        out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 2);
}

extern "C" __global__ void block_votes(int *out, const int *x)
{
    int value = x[threadIdx.x];
    out[threadIdx.x] = __syncthreads_count(value > 5);
    out[96 + threadIdx.x] = __syncthreads_and(value > -100);
    out[192 + threadIdx.x] = __syncthreads_or(value > 100);
}

extern "C" __global__ void lane_that_exited(unsigned *out, const int *x)
{
    if (threadIdx.x == 7)
        return;
    out[threadIdx.x] = __ballot_sync(0xffffffffu, x[threadIdx.x] > 5);
}

extern "C" __global__ void exited_lane_is_read(int *out, const int *x)
{
    if (threadIdx.x == 7)
        return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

extern "C" __global__ void own_lane_is_missing(int *out, const int *x)
{
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}

extern "C" __global__ void shuffle_in_a_branch(int *out, const int *x)
{
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
    __syncthreads();
}
"""


@pytest.fixture
def x():
    return np.random.default_rng(1).integers(-9, 9, 96, np.int32)


def run(cupy, name, x, size, *arguments, block=32):
    out = cupy.zeros(size, np.int32)
    launch(CODE, name, (out, cupy.asarray(x), *arguments), block=block)
    return out.get()


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(cupy, x, width):
    out = run(cupy, "shuffles", x, 128, np.int32(width)).reshape(4, 32)
    start, within = LANES // width * width, LANES % width
    assert (out[0] == x[start + 5 % width]).all()
    assert (out[1] == x[LANES ^ 3]).all()
    assert (out[2] == x[np.where(within + 3 < width, LANES + 3, LANES)]).all()
    assert (out[3] == x[np.where(within >= 3, LANES - 3, LANES)]).all()


def test_votes(cupy, x):
    out = run(cupy, "votes", x, 128).view(np.uint32).reshape(4, 32)
    x = x[:32]
    assert (out[0] == (x > 5) @ (1 << LANES)).all()
    assert (out[1] == (x > 5).any()).all()
    assert (out[2] == 1).all()
    assert (out[3] == (x[:, None] == x) @ (1 << LANES)).all()


def test_reductions(cupy, x):
    out = run(cupy, "reductions", x, 128).reshape(4, 32)
    x = x[:32]
    wanted = x.sum(), x.max(), x.min(), np.bitwise_xor.reduce(x)
    assert (out == np.array(wanted)[:, None]).all()


def test_half_warps_shuffle_apart(cupy, x):
    out = run(cupy, "half_warp", x, 32)
    assert (out == np.where(LANES < 16, x[LANES ^ 2], x[LANES ^ 1])).all()


def test_votes_of_a_block(cupy, x):
    out = run(cupy, "block_votes", x, 288, block=96).reshape(3, 96)
    assert (out == np.array([(x > 5).sum(), 1, 0])[:, None]).all()


def test_lanes_that_exited_need_not_arrive(cupy, x):
    out = run(cupy, "lane_that_exited", x, 32).view(np.uint32)
    others = LANES != 7
    assert (out == np.where(others, ((x[:32] > 5) & others) @ (1 << LANES), 0)).all()


def test_shuffle_from_a_lane_that_exited_is_an_error(cupy, x):
    with pytest.raises(Exception, match="reads a lane that does not take part at line 5"):
        run(cupy, "exited_lane_is_read", x, 32)


def test_mask_without_the_calling_lane_is_an_error(cupy, x):
    with pytest.raises(Exception, match="mask lacks the calling lane"):
        run(cupy, "own_lane_is_missing", x, 32)


def test_shuffle_that_half_of_the_warp_calls_is_an_error(cupy, x):
    with pytest.raises(Exception, match="deadlock|different collectives|divergent"):
        run(cupy, "shuffle_in_a_branch", x, 32)


@pytest.mark.parametrize("order", ["reversed", "random"])
def test_order_of_lanes_does_not_change_a_shuffle(cupy, x, order):
    expected = run(cupy, "shuffles", x, 128, np.int32(32))
    with mode(order=order):
        assert (run(cupy, "shuffles", x, 128, np.int32(32)) == expected).all()
