"""Barriers, deadlocks, the orders of threads and blocks, workers, and the limits of a launch."""

import numpy as np
import pytest

from tests.support.cuda import launch
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

CODE = """
extern "C" __global__ void order(int *out, int *count)
{
    out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(count, 1);
}

extern "C" __global__ void poison(float *out)
{
    extern __shared__ float dynamic[];
    __shared__ float fixed[32];
    out[threadIdx.x] = dynamic[threadIdx.x];
    out[32 + threadIdx.x] = fixed[threadIdx.x];
    dynamic[threadIdx.x] = fixed[threadIdx.x] = 1.0f;
}

extern "C" __global__ void barriers_at_two_lines(int *out)
{
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

extern "C" __global__ void exit_before_a_barrier(int *out)
{
    if (threadIdx.x == 5)
        return;
    __syncthreads();
}

extern "C" __global__ void barrier_and_shuffle(int *out)
{
    if (threadIdx.x < 16)
        __syncthreads();
    else
        out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

extern "C" __global__ void trap(int *out)
{
    assert(threadIdx.x < 7);
}

extern "C" __global__ void indices(int *out)
{
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 100 * block + thread;
}

extern "C" __global__ void __launch_bounds__(16 * 2, 1) bounded(int *out)
{
}

extern "C" __global__ void block_sums(int *out, const int *x)
{
    __shared__ int sum;
    if (threadIdx.x == 0)
        sum = 0;
    __syncthreads();
    atomicAdd(&sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0)
        out[blockIdx.x] = sum;
}
"""


def order_of(cupy, **fields):
    with mode(**fields):
        out, count = cupy.empty(3 * 64, np.int32), cupy.zeros(1, np.int32)
        launch(CODE, "order", (out, count), grid=3, block=64)
        return out.get()


def test_threads_run_in_order_or_reversed(cupy):
    assert (order_of(cupy) == np.arange(192)).all()
    assert (order_of(cupy, order="reversed") == np.arange(192)[::-1]).all()


def test_random_order_depends_on_the_seed(cupy):
    first, again, other = (order_of(cupy, order="random", seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert sorted(first) == sorted(other) == list(range(192))


def test_shared_memory_of_a_new_block_is_nan(cupy):
    out = cupy.zeros(64, np.float32)
    launch(CODE, "poison", (out,), grid=2, shared_mem=128)
    assert np.isnan(out.get()).all()


@pytest.mark.parametrize(
    "name, block, message",
    [
        ("barriers_at_two_lines", 64, "divergent barrier: __syncthreads at line 21 while others"),
        ("exit_before_a_barrier", 64, "divergent barrier"),
        ("barrier_and_shuffle", 32, "deadlock: 16 threads wait at __syncthreads, 16 in a warp"),
        ("trap", 32, r"thread \(7,0,0\): assertion threadIdx.x < 7 failed"),
    ],
)
@pytest.mark.parametrize("order", ["in_order", "reversed", "random"])
def test_kernel_that_would_hang_or_trap_is_an_error(cupy, name, block, message, order):
    out = cupy.zeros(64, np.int32)
    wanted = message if order == "in_order" else None
    with mode(order=order), pytest.raises(Exception, match=wanted):
        launch(CODE, name, (out,), block=block)
    launch(CODE, "order", (out, cupy.zeros(1, np.int32)), block=64)  # the next launch works
    assert (out.get() == np.arange(64)).all()


def test_indices_have_three_dimensions(cupy):
    out = cupy.empty(24 * 30, np.int32)
    kernel = cupy.RawModule(code=CODE).get_function("indices")
    kernel((2, 3, 4), (5, 3, 2), (out,))
    assert (out.get() == np.add.outer(100 * np.arange(24), np.arange(30)).ravel()).all()


@pytest.mark.parametrize("order", ["in_order", "random"])
def test_workers_share_the_blocks(cupy, order):
    x = np.random.default_rng(0).integers(0, 100, (50, 96), np.int32)
    out = cupy.zeros(50, np.int32)
    with mode(workers=2, order=order):
        launch(CODE, "block_sums", (out, cupy.asarray(x)), grid=50, block=96)
    assert (out.get() == x.sum(axis=1)).all()


@pytest.mark.parametrize(
    "name, grid, block, shared_mem, message",
    [
        ("order", (1,), (1025,), 0, "1 to 1024 threads"),
        ("order", (0,), (32,), 0, "a grid has"),
        ("order", (1, 65536), (32,), 0, "a grid has"),
        ("poison", (1,), (32,), (48 << 10) + 4, "dynamic shared memory"),
        ("poison", (1,), (32,), (48 << 10) - 64, "49216 bytes of static and dynamic"),
        ("bounded", (1,), (33,), 0, "__launch_bounds__"),
    ],
)
def test_launch_over_a_limit_is_refused(cupy, name, grid, block, shared_mem, message):
    out = cupy.zeros(2048, np.int32)
    arguments = (out, out) if name == "order" else (out,)
    kernel = cupy.RawModule(code=CODE).get_function(name)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match=message):
        kernel(grid, block, arguments, shared_mem=shared_mem)


def test_dynamic_shared_memory_can_be_raised_to_the_limit_of_the_device(cupy, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "75")
    kernel = cupy.RawModule(code=CODE).get_function("poison")
    kernel.max_dynamic_shared_size_bytes = 64 << 10
    out = cupy.zeros(64, np.float32)
    kernel((1,), (32,), (out,), shared_mem=(64 << 10) - 128)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="static and dynamic"):
        kernel((1,), (32,), (out,), shared_mem=64 << 10)
    with pytest.raises(cupy.cuda.driver.CUDADriverError):
        kernel.max_dynamic_shared_size_bytes = (64 << 10) + 4
