"""From CUDA C to C++, and the functions that ptx.cuh and emulated_ptx.h share."""

import importlib
import re

import numpy as np
import pytest

from llmsrv.backend.source import kernel_sources
from tests.support.cuda import CUDA_ON_CPU
from tests.support.cuda import launch
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

PREFIX = "(?:__device__ __forceinline__|EMU_FUNCTION)"
FUNCTION = re.compile(rf"{PREFIX} [\w ]+?(\w+)(?:<\w+>)?\(([^)]*)\)")
CODE = """
#define COUNT 8
#if USES_TWO
#define NAME two
#else
#define NAME one
#endif

template <int N> __device__ __forceinline__ float last(float x)
{
    __shared__ float values[N], others[N][2];
    values[threadIdx.x] = x;
    others[threadIdx.x][1] = x;
    __syncthreads();
    x = values[N - 1] + others[N - 1][1];
    __syncthreads();
    return x;
}

extern "C" __global__ void __launch_bounds__(COUNT * (1 + 1), 2) NAME(float *out, const float *x)
{
    extern __shared__ __align__(16) unsigned char bytes[];
    __shared__ union {
        struct { int a, b; } pair;
        float values[2][COUNT];
    } scratch;
    alignas(16) __shared__ float aligned[COUNT];
    float *dynamic = reinterpret_cast<float *>(bytes);
    dynamic[threadIdx.x] = x[threadIdx.x];
    scratch.values[1][threadIdx.x] = aligned[threadIdx.x] = 0.0f;
    out[threadIdx.x] = last<COUNT>(dynamic[threadIdx.x]) + last<COUNT>(1.0f);
}
"""


@pytest.mark.parametrize("is_checked", [False, True])
def test_forms_of_kernels_and_shared_memory(cupy, is_checked):
    with mode(is_checked=is_checked):
        out, x = cupy.zeros(8, np.float32), cupy.asarray(np.arange(8, dtype=np.float32))
        launch(CODE, "one", (out, x), block=8, shared_mem=32)
        assert (out.get() == 16).all()
        launch(CODE, "two", (out, x), block=8, shared_mem=32, options=("-DUSES_TWO=1",))
        with pytest.raises(Exception, match="__launch_bounds__"):
            launch(CODE, "one", (out, x), block=17, shared_mem=32)


def test_kernel_in_an_unknown_form_is_an_error(cupy):
    translate = importlib.import_module("cuda_on_cpu.translate").translate
    with pytest.raises(Exception, match="has a form that translate.py does not know"):
        translate("__global__ static int f() {}", "static")


def test_emulated_ptx_has_the_functions_of_ptx():
    ours = kernel_sources("cuda")["ptx.cuh"].decode()
    emulated = (CUDA_ON_CPU / "shim" / "include" / "emulated_ptx.h").read_text()
    assert functions(ours) == functions(emulated)


def functions(text):
    """name -> number of parameters, without the line that emulated ones may have last."""
    return {
        name: len([p for p in parameters.split(",") if p.strip() not in ("", "EMU_LINE")])
        for name, parameters in FUNCTION.findall(text)
    }
