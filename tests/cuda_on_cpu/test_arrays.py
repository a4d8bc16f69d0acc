"""Arrays, device memory, pinned memory, and the arguments of a kernel."""

import numpy as np
import pytest

from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

CODE = """
struct Pair {
    int a, b;
};

extern "C" __global__ void store(long long *out, int i, long long l, float f, bool b, Pair pair)
{
    if (out != nullptr) {
        out[0] = i;
        out[1] = l;
        out[2] = (long long)f;
        out[3] = b;
        out[4] = pair.a + pair.b;
    }
}
"""
PAIR = np.array((30, 12), [("a", np.int32), ("b", np.int32)])[()]
ARGUMENTS = np.int32(-1), np.int64(1 << 40), np.float32(2.5), np.bool_(True), PAIR


@pytest.fixture
def store(cupy):
    kernel = cupy.RawModule(code=CODE).get_function("store")
    return lambda *arguments: kernel((1,), (1,), arguments)


def test_arguments_arrive_by_value(cupy, store):
    out = cupy.zeros(5, np.int64)
    store(out, *ARGUMENTS)
    assert out.get().tolist() == [-1, 1 << 40, 2, 1, 42]
    store(np.uintp(0), *ARGUMENTS)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (1, 3, "argument 1 has kind i and 8 bytes; the parameter has kind i and 4"),
        (1, np.float32(3), "argument 1 has kind f and 4 bytes; the parameter has kind i and 4"),
        (3, 2.5, "argument 3 has kind f and 8 bytes; the parameter has kind f and 4"),
        (0, np.int64(8), "argument 0 has kind i and 8 bytes; the parameter has kind p and 8"),
        (0, None, "None as the address 0xffffffff"),
    ],
)
def test_argument_of_a_wrong_size_or_kind_is_an_error(cupy, store, index, value, message):
    arguments = [cupy.zeros(5, np.int64), *ARGUMENTS]
    arguments[index] = value
    with pytest.raises(Exception, match=message):
        store(*arguments)


def test_number_of_arguments_is_checked(cupy, store):
    with pytest.raises(Exception, match="5 arguments for 6 parameters"):
        store(*ARGUMENTS)


def test_host_array_is_not_an_argument(store):
    with pytest.raises(TypeError, match="Unsupported type <class 'numpy.ndarray'>"):
        store(np.zeros(5, np.int64), *ARGUMENTS)


def test_kernel_that_does_not_compile_names_its_line(cupy):
    code = 'extern "C" __global__ void f(int *x)\n{\n    x = 1.0f + y;\n}\n'
    with pytest.raises(cupy.cuda.compiler.CompileException, match="kernel.cu:3.*'?y"):
        cupy.RawModule(code=code).compile()


def test_function_that_is_missing_is_an_error(cupy):
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_NOT_FOUND"):
        cupy.RawModule(code=CODE).get_function("load")


def test_device_array_does_not_become_a_host_array_unasked(cupy):
    x = cupy.zeros(4, np.float32)
    for convert in (np.asarray, lambda x: np.ones(4) + x, lambda x: np.sum(x)):
        with pytest.raises(TypeError):
            convert(x)
    with pytest.raises(TypeError, match="Only numpy.ndarray"):
        x.set([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(TypeError, match="Unsupported type"):
        x[:2] = np.ones(2, np.float32)


def test_set_takes_only_the_same_type_and_shape(cupy):
    x = cupy.zeros(4, np.float32)
    with pytest.raises(TypeError, match="float64 array cannot be set to float32 array"):
        x.set(np.zeros(4))
    with pytest.raises(ValueError, match="Shape mismatch"):
        x.set(np.zeros((2, 2), np.float32))


def test_views_share_memory(cupy):
    x = cupy.asarray(np.arange(24, dtype=np.int32))
    view = x.reshape(2, 3, 4)[1, :, 1:3]
    assert view.shape == (3, 2)
    view[0] = 100
    view[2, 1] = 200
    x.view(np.int16)[:2].fill(7)
    wanted = np.arange(24, dtype=np.int32)
    wanted[[13, 14]] = 100
    wanted[22] = 200
    wanted[0] = 7 * 0x10001
    assert (x.get() == wanted).all()
    assert x[5].shape == () and x[5].item() == 5
    with pytest.raises(NotImplementedError, match="indices that copy"):
        x[np.array([1, 2])]
    with pytest.raises(Exception, match="reshape would copy"):
        x.reshape(2, 3, 4)[:, :, 1:3].ravel()


def test_copies_have_memory_of_their_own(cupy):
    x = cupy.asarray(np.arange(4, dtype=np.float32))
    copy, halves = x.copy(), x.astype(np.float16)
    x.fill(9)
    assert copy.get().tolist() == halves.get().tolist() == [0, 1, 2, 3]
    assert halves.dtype == np.float16
    assert cupy.full((2, 2), 3, np.int8).get().tolist() == [[3, 3], [3, 3]]
    assert cupy.zeros_like(x, np.int16).dtype == np.int16
    assert cupy.ascontiguousarray(x.reshape(2, 2)[:, 0]).flags.c_contiguous


def test_fresh_memory_is_not_zero(cupy):
    assert np.isnan(cupy.empty(8, np.float16).get()).all()
    assert (cupy.empty(8, np.int32).get() == -1).all()


def test_memory_is_aligned_as_cupy_aligns_it(cupy):
    assert all(cupy.empty(size, np.uint8).data.ptr % 512 == 0 for size in (1, 100, 5000))


@pytest.fixture
def pool(cupy, monkeypatch):
    """Of a device with 64 MiB more than what other tests' arrays take."""
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    mib = (pool.used_bytes() >> 20) + 65
    monkeypatch.setenv("CUDA_ON_CPU_MEMORY_MIB", str(mib))
    yield pool
    pool.free_all_blocks()


def test_pool_keeps_memory_that_is_freed(cupy, pool):
    free, total = cupy.cuda.Device().mem_info
    x = cupy.empty(1000, np.uint8)
    assert free - cupy.cuda.runtime.memGetInfo()[0] == 1024
    used = pool.used_bytes()
    del x
    assert pool.used_bytes() == used - 1024
    assert pool.free_bytes() == 1024
    assert cupy.cuda.Device().mem_info == (free - 1024, total)
    pool.free_all_blocks()
    assert cupy.cuda.Device().mem_info == (free, total)


def test_memory_ends(cupy, pool):
    kept = cupy.empty(60 << 20, np.uint8)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="allocating 10,485,760 bytes"):
        cupy.empty(10 << 20, np.uint8)
    del kept
    cupy.empty(10 << 20, np.uint8)


def test_limit_of_the_pool_is_kept(cupy, pool):
    pool.set_limit(pool.used_bytes() + (1 << 20))
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            cupy.empty(2 << 20, np.uint8)
    finally:
        pool.set_limit(0)


def test_pinned_memory_is_a_buffer(cupy):
    import cupyx

    memory = cupy.cuda.alloc_pinned_memory(100)
    array = np.frombuffer(memory, np.uint8, 100)
    assert array.ctypes.data == memory.ptr
    assert cupyx.zeros_pinned((3, 5), np.int32).tolist() == [[0] * 5] * 3
