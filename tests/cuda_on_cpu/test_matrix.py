"""mma and ldmatrix, against the PTX ISA's formulas for the element that each register holds."""

import numpy as np
import pytest

from tests.support.cuda import launch
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

CODE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <emulated_ptx.h>

extern "C" __global__ void mma(float *c, const unsigned *a, const unsigned *b)
{
    mma_m16n8k16<T16>(c + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}

extern "C" __global__ void ldmatrix(unsigned *out, const unsigned short *matrices, int offset)
{
    __shared__ __align__(16) unsigned short shared[32][24];
    for (int i = 0; i < 8; i++)
        shared[threadIdx.x][i] = matrices[8 * threadIdx.x + i];
    __syncwarp();
    ldmatrix_x4<false>(out + 4 * threadIdx.x, &shared[threadIdx.x][offset]);
    ldmatrix_x4<true>(out + 128 + 4 * threadIdx.x, &shared[threadIdx.x][offset]);
}

extern "C" __global__ void mma_in_a_branch(float *c, const unsigned *a, const unsigned *b)
{
    if (threadIdx.x < 16)
        mma_m16n8k16<T16>(c + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}
"""
HALF = ("-DT16=__half",)
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # groupID and threadID_in_group


def fragment_a(a):
    """[32, 8]: row = groupID for a_i where i in {0, 1, 4, 5}, else groupID + 8;
    column = threadID_in_group * 2 + (i & 1), plus 8 for i >= 4."""
    i = np.arange(8)
    rows = GROUP[:, None] + np.where((i < 2) | ((i >= 4) & (i < 6)), 0, 8)
    columns = MEMBER[:, None] * 2 + (i & 1) + np.where(i < 4, 0, 8)
    return a[rows, columns]


def fragment_b(b):
    """[32, 4]: row = threadID_in_group * 2 + (i & 1), plus 8 for i >= 2; column = groupID."""
    i = np.arange(4)
    rows = MEMBER[:, None] * 2 + (i & 1) + np.where(i < 2, 0, 8)
    return b[rows, GROUP[:, None] + 0 * i]


def fragment_c(c):
    """[32, 4]: row = groupID for i < 2, else groupID + 8;
    column = threadID_in_group * 2 + (i & 1)."""
    i = np.arange(4)
    return c[GROUP[:, None] + np.where(i < 2, 0, 8), MEMBER[:, None] * 2 + (i & 1)]


def bfloat16_bits(x):
    """x: small integers, which bfloat16 holds exactly."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("type_name", ["__half", "__nv_bfloat16"])
def test_mma_multiplies_matrices(cupy, type_name):
    draw = np.random.default_rng(0).integers
    a, b, c = draw(-8, 8, (16, 16)), draw(-8, 8, (16, 8)), draw(-8, 8, (16, 8))
    to_bits = {"__half": lambda x: x.astype(np.float16).view(np.uint16)}.get(
        type_name, bfloat16_bits
    )
    registers = [
        cupy.asarray(np.ascontiguousarray(to_bits(part)).view(np.uint32))
        for part in (fragment_a(a), fragment_b(b))
    ]
    out = cupy.asarray(fragment_c(c).astype(np.float32))
    launch(CODE, "mma", (out, *registers), options=(f"-DT16={type_name}",))
    assert (out.get() == fragment_c(a @ b + c)).all()


def test_ldmatrix_gives_two_elements_of_a_row_or_a_column(cupy):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = cupy.empty((2, 32, 4), np.uint32)
    launch(CODE, "ldmatrix", (out, cupy.asarray(matrices), np.int32(0)), options=HALF)
    plain, transposed = out.get().view(np.uint16).reshape(2, 32, 4, 2)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        assert (plain[lane] == matrices[:, row, column : column + 2]).all()
        assert (transposed[lane] == matrices[:, column : column + 2, row]).all()


def test_ldmatrix_of_an_unaligned_row_is_an_error(cupy):
    arguments = cupy.empty((2, 32, 4), np.uint32), cupy.zeros(256, np.uint16), np.int32(2)
    with pytest.raises(Exception, match="not aligned to 16 bytes at line 17"):
        launch(CODE, "ldmatrix", arguments, options=HALF)


def test_mma_without_all_lanes_is_an_error(cupy):
    arguments = (cupy.zeros(n, np.uint32) for n in (128, 128, 64))
    with pytest.raises(Exception, match="without all 32 lanes"):
        launch(CODE, "mma_in_a_branch", tuple(arguments), options=HALF)
