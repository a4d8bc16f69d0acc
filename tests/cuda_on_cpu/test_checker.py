"""The checker: each kind of error is found in a kernel that has it, and not in its correct twin."""

import numpy as np
import pytest

from tests.support.cuda import launch
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

# Every kernel has the same arguments: x and out have 64 elements, counter is one zero, is_broken.
CODE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <emulated_ptx.h>
#define KERNEL(name) \\
    extern "C" __global__ void name(float *out, const float *x, unsigned *counter, int is_broken)

KERNEL(barrier_between_write_and_read)
{
    __shared__ float shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    if (!is_broken)
        __syncthreads();
    out[threadIdx.x] = shared[63 - threadIdx.x];
}

KERNEL(barrier_before_reuse)
{
    __shared__ float shared[64];
    for (int i = 0; i < 3; i++) {
        shared[threadIdx.x] = x[threadIdx.x] + i;
        __syncthreads();
        out[threadIdx.x] = shared[63 - threadIdx.x];
        if (!is_broken)
            __syncthreads();
    }
}

KERNEL(syncwarp_between_lanes)
{
    __shared__ float shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    if (!is_broken)
        __syncwarp();
    out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

KERNEL(blocks_write_apart)
{
    out[is_broken ? threadIdx.x : 32 * blockIdx.x + threadIdx.x] = x[threadIdx.x];
}

KERNEL(count_is_atomic)
{
    if (is_broken)
        counter[0] += 1;
    else
        atomicAdd(counter, 1u);
}

KERNEL(index_in_array)
{
    out[threadIdx.x + (is_broken && threadIdx.x == 31 ? 33 : 0)] = x[threadIdx.x];
}

KERNEL(index_in_dynamic_shared)
{
    extern __shared__ float shared[];
    shared[threadIdx.x + is_broken] = x[threadIdx.x];
}

KERNEL(index_in_static_shared)
{
    __shared__ float shared[32];
    __shared__ float other[32];
    other[threadIdx.x] = shared[threadIdx.x] = 0.0f;
    shared[threadIdx.x + is_broken] = x[threadIdx.x];
}

KERNEL(shared_is_written_first)
{
    __shared__ float shared[32];
    if (!is_broken || threadIdx.x != 3)
        shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

KERNEL(load_is_aligned)
{
    const float4 value = *(const float4 *)(x + 4 * (threadIdx.x % 4) + is_broken);
    out[threadIdx.x] = value.x + value.w;
}

KERNEL(copy_is_waited_for)
{
    __shared__ __align__(16) float shared[128];
    cp_async_16(shared + 4 * threadIdx.x, x + 4 * (threadIdx.x % 16), true);
    cp_async_commit();
    if (!is_broken)
        cp_async_wait<0>();
    out[threadIdx.x] = shared[4 * threadIdx.x];
    cp_async_wait<0>();
}

KERNEL(copy_does_not_overwrite_what_is_read)
{
    __shared__ __align__(16) float shared[128];
    for (int i = 0; i < 3; i++) {
        cp_async_16(shared + 4 * threadIdx.x, x + 4 * (threadIdx.x % 16), true);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        out[threadIdx.x] = shared[127 - threadIdx.x];
        if (!is_broken)
            __syncthreads();
    }
}

KERNEL(ldmatrix_after_barrier)
{
    __shared__ __align__(16) float shared[128];
    unsigned matrices[4];
    for (int i = 0; i < 4; i++)
        shared[32 * i + threadIdx.x] = x[threadIdx.x];
    if (!is_broken)
        __syncwarp();
    ldmatrix_x4<false>(matrices, shared + 4 * threadIdx.x);
}

#define LAST_BLOCK(name, fence_before, fence_after)                \\
    KERNEL(name)                                                   \\
    {                                                              \\
        __shared__ bool is_last;                                   \\
        out[32 * blockIdx.x + threadIdx.x] = x[threadIdx.x];       \\
        __syncthreads();                                           \\
        if (threadIdx.x == 0) {                                    \\
            if (fence_before)                                      \\
                __threadfence();                                   \\
            is_last = atomicAdd(counter, 1u) == gridDim.x - 1;     \\
            if (fence_after)                                       \\
                __threadfence();                                   \\
        }                                                          \\
        __syncthreads();                                           \\
        if (is_last)                                               \\
            out[threadIdx.x] += out[32 + threadIdx.x];             \\
    }
LAST_BLOCK(fence_before_count, !is_broken, true)
LAST_BLOCK(fence_after_count, true, !is_broken)

KERNEL(barrier_before_fence)
{
    __shared__ bool is_last;
    out[32 * blockIdx.x + threadIdx.x] = x[threadIdx.x];
    if (!is_broken)
        __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (is_last)
        out[threadIdx.x] += out[32 + threadIdx.x];
}
"""

# kernel, number of blocks, of threads, what the checker says of the broken one
CASES = [
    ("barrier_between_write_and_read", 1, 64, "race"),
    ("barrier_before_reuse", 1, 64, "race"),
    ("syncwarp_between_lanes", 1, 64, "race"),
    ("blocks_write_apart", 2, 32, "race"),
    ("count_is_atomic", 1, 32, "race"),
    ("index_in_array", 1, 32, "out of bounds"),
    ("index_in_dynamic_shared", 1, 32, "out of bounds"),
    ("index_in_static_shared", 1, 32, "out of bounds"),
    ("shared_is_written_first", 1, 32, "uninitialised shared memory"),
    ("load_is_aligned", 1, 32, "misaligned"),
    ("copy_is_waited_for", 1, 32, "not waited for"),
    ("copy_does_not_overwrite_what_is_read", 1, 32, "race"),
    ("ldmatrix_after_barrier", 1, 32, "race"),
    ("fence_before_count", 2, 32, "race"),
    ("fence_after_count", 2, 32, "race"),
    ("barrier_before_fence", 2, 32, "race"),
]


@pytest.fixture(autouse=True)
def checked():
    with mode(is_checked=True):
        yield


def run(cupy, name, is_broken, *, grid=1, block=32):
    x, out, counter = cupy.asarray(np.ones(64, np.float32)), cupy.zeros(64, np.float32), None
    counter = cupy.zeros(1, np.uint32)
    arguments = out, x, counter, np.int32(is_broken)
    launch(CODE, name, arguments, grid=grid, block=block, shared_mem=128)


@pytest.mark.parametrize("name, grid, block, message", CASES)
def test_broken_kernel_is_found(cupy, name, grid, block, message):
    run(cupy, name, False, grid=grid, block=block)
    with pytest.raises(Exception, match=message):
        run(cupy, name, True, grid=grid, block=block)


def test_report_names_the_lines_and_threads(cupy):
    with pytest.raises(Exception) as raised:
        run(cupy, "barrier_between_write_and_read", True, block=64)
    text = str(raised.value)
    assert "race: write by thread 32 of block (0,0,0) at kernel.cu:11; earlier read by" in text
    assert "earlier read by thread 31 of block (0,0,0) at kernel.cu:14" in text


def test_view_is_the_bound_of_an_access(cupy):
    x, out = cupy.zeros(64, np.float32), cupy.zeros(64, np.float32)
    with pytest.raises(Exception, match="out of bounds.*write by thread 16"):
        launch(CODE, "index_in_array", (out[:16], x, cupy.zeros(1, np.uint32), np.int32(0)))


def test_of_views_that_overlap_the_longest_is_the_bound(cupy):
    out = cupy.zeros(64, np.float32)
    counter = cupy.zeros(1, np.uint32)
    launch(CODE, "index_in_array", (out[:16], out, counter, np.int32(0)), block=16)
    with pytest.raises(Exception, match="race"):  # not out of bounds
        launch(CODE, "index_in_array", (out[1:16], out, counter, np.int32(0)))
