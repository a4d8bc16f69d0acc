"""Kernels that are broken on purpose, each in one way: some mode of the emulation notices it."""

from dataclasses import dataclass

import pytest

from tests.support.broken_kernels import SCENARIOS
from tests.support.broken_kernels import changed_kernels
from tests.support.cuda import MODES
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation

pytestmark = [needs_emulation, pytest.mark.slow]

WRONG = "Mismatch|mismatch|not equal"  # a result that differs from the reference


@dataclass(frozen=True)
class Broken:
    """A change to a kernel's source.

    name      what is wrong
    scenario  runs the kernel
    file      in kernels/cuda, where `old` becomes `new`
    mode      notices it
    message   that it gives
    """

    name: str
    scenario: str
    file: str
    old: str
    new: str
    mode: str
    message: str


BROKEN = [
    Broken(
        "block_sum does not wait for all warps",
        "rows",
        "common.cuh",
        "        scratch[warp] = value;\n    __syncthreads();\n",
        "        scratch[warp] = value;\n",
        "checked",
        "race",
    ),
    Broken(
        "block_sum lets its scratch be used again too early",
        "experts",
        "common.cuh",
        "scratch[lane] : T(0));\n    __syncthreads();\n",
        "scratch[lane] : T(0));\n",
        "checked",
        "race",
    ),
    Broken(
        "a lane is missing from the mask of a shuffle",
        "rows",
        "common.cuh",
        "#define ALL_LANES 0xffffffffu",
        "#define ALL_LANES 0x7fffffffu",
        "in order",
        "mask lacks the calling lane|does not take part",
    ),
    Broken(
        "some threads leave before a barrier",
        "rows",
        "norm.cu",
        "    float sum = 0.0f;\n    for (int i = threadIdx.x; i < width;",
        "    float sum = 0.0f;\n    if (threadIdx.x >= width)\n        return 0.0f;\n"
        "    for (int i = threadIdx.x; i < width;",
        "in order",
        "divergent barrier|deadlock",
    ),
    Broken(
        "a row is written one column too far",
        "rows",
        "activation.cu",
        "    if (column >= out_stride)",
        "    if (column > out_stride)",
        "checked",
        "out of bounds|race",
    ),
    Broken(
        "linear: sums of warps are read before they are written",
        "few rows",
        "linear.cu",
        "            __syncthreads();\n            finish(",
        "            finish(",
        "checked",
        "race|uninitialised",
    ),
    Broken(
        "linear: the next tile's sums overwrite those that are read",
        "few rows",
        "linear.cu",
        "first_row, num_rows);\n            __syncthreads();\n",
        "first_row, num_rows);\n",
        "checked",
        "race",
    ),
    Broken(
        "linear: a row of x too many is read",
        "few rows",
        "linear.cu",
        "min(8 * n + group, num_rows - 1)",
        "min(8 * n + group, num_rows)",
        "checked",
        "out of bounds|uninitialised",
    ),
    Broken(
        "linear: x is used before all of it has arrived",
        "few rows",
        "linear.cu",
        "    cp_async_wait<0>();\n",
        "",
        "checked",
        "not waited for",
    ),
    Broken(
        "linear: a row is normalized before all warps have added its squares",
        "few rows",
        "linear.cu",
        "            squares[row][warp] = sum;\n    }\n    __syncthreads();\n",
        "            squares[row][warp] = sum;\n    }\n",
        "checked",
        "race|uninitialised",
    ),
    Broken(
        "linear_mma: one group of copies too few is waited for",
        "many rows",
        "linear_mma.cu",
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        "checked",
        "not waited for",
    ),
    Broken(
        "linear_mma: no barrier between the use of a stage and its next copy",
        "many rows",
        "linear_mma.cu",
        "all have used the stage before it. */\n        __syncthreads();\n",
        "all have used the stage before it. */\n",
        "checked",
        "race",
    ),
    Broken(
        "linear_mma: a row too many is written",
        "many rows",
        "linear_mma.cu",
        "row < num_rows; row += THREADS",
        "row <= num_rows; row += THREADS",
        "checked",
        "out of bounds|uninitialised",
    ),
    Broken(
        "linear_mma: sums overwrite a stage that is still used",
        "many rows",
        "linear_mma.cu",
        "(float *)dynamic_shared;\n    __syncthreads();\n",
        "(float *)dynamic_shared;\n",
        "checked",
        "race",
    ),
    Broken(
        "decode: the warps' sums are merged before all are there",
        "decode",
        "attention.cu",
        "        store_warp(&scratch, &softmax);\n        __syncthreads();\n",
        "        store_warp(&scratch, &softmax);\n",
        "checked",
        "race|uninitialised",
    ),
    Broken(
        "decode: the next unit overwrites what is being read",
        "decode",
        "attention.cu",
        "        __syncthreads(); /* before the next unit overwrites scratch */\n",
        "",
        "checked",
        "race",
    ),
    Broken(
        "decode: a split arrives before its result is visible",
        "decode",
        "attention_merge.cuh",
        "        __threadfence(); /* the block's partial result is visible before it arrives */\n",
        "",
        "checked",
        "race",
    ),
    Broken(
        "decode: the splits' results may be read before they arrive",
        "decode",
        "attention_merge.cuh",
        "        __threadfence(); /* and the others' results are read after they arrived */\n",
        "",
        "checked",
        "race",
    ),
    Broken(
        "decode: arrivals are not cleared for the next step",
        "decode",
        "attention_merge.cuh",
        "            *arrivals = 0;",
        "            ;",
        "in order",
        WRONG,
    ),
    Broken(
        "decode: the position after the row's own is not masked",
        "decode",
        "attention.cu",
        "if (position < first || position >= end)\n            weights",
        "if (position < first || position > end)\n            weights",
        "in order",
        WRONG,
    ),
    Broken(
        "prefill: the position after a row's own is not masked",
        "prefill",
        "attention_mma.cu",
        "if (position < first || position >= end)\n                scores",
        "if (position < first || position > end)\n                scores",
        "in order",
        WRONG,
    ),
    Broken(
        "prefill: the copy of the tile is not waited for",
        "prefill",
        "attention_mma.cu",
        "        cp_async_wait<0>();\n        __syncthreads(); /* this",
        "        cp_async_wait<1>();\n        __syncthreads(); /* this",
        "in order",
        "exits without waiting for its cp.async",
    ),
    Broken(
        "prefill: other threads' copies are read without a barrier",
        "prefill",
        "attention_mma.cu",
        "        __syncthreads(); /* this tile",
        "        /* this tile",
        "checked",
        "race",
    ),
    Broken(
        "prefill: the copy of a tile overwrites the one that is read",
        "prefill",
        "attention_mma.cu",
        "shared_keys + TILE_KEYS - stage, shared_values + TILE_KEYS - stage",
        "shared_keys + stage, shared_values + stage",
        "reversed",
        WRONG,
    ),
    Broken(
        "prefill: the copy of a tile has a chunk too many",
        "prefill",
        "attention_mma.cu",
        "i >= BLOCK_SIZE * CHUNKS)",
        "i > BLOCK_SIZE * CHUNKS)",
        "checked",
        "out of bounds|race",
    ),
    Broken(
        "prefill: values are not transposed",
        "prefill",
        "attention_mma.cu",
        "ldmatrix_x4<true>(b, &values",
        "ldmatrix_x4<false>(b, &values",
        "in order",
        WRONG,
    ),
    Broken(
        "decode: queries are loaded from an address between two of 16 bytes",
        "decode",
        "attention.cu",
        "(heads + g * PADDED_DIM + dim)",
        "(heads + g * PADDED_DIM + dim + 1)",
        "checked",
        "misaligned",
    ),
    Broken(
        "rope: heads of the cache are a wrong distance apart",
        "prefill",
        "rope.cu",
        "(slot / BLOCK_SIZE * num_layers + layer) * NUM_KV_HEADS;",
        "(slot / BLOCK_SIZE * num_layers + layer) * (NUM_KV_HEADS + 1);",
        "checked",
        WRONG,
    ),
    Broken(
        "experts: choices are counted without atomics",
        "experts",
        "experts.cu",
        "atomicAdd(&counts[topk_ids[c]], 1);",
        "counts[topk_ids[c]] += 1;",
        "checked",
        "race",
    ),
    Broken(
        "experts: counts are not cleared",
        "experts",
        "experts.cu",
        "        counts[e] = 0;\n",
        "        ;\n",
        "checked",
        "uninitialised",
    ),
    Broken(
        "experts: lanes read what lane 0 has just written",
        "experts",
        "experts.cu",
        "    __syncwarp();\n",
        "",
        "checked",
        "race",
    ),
    Broken(
        "sampling: a histogram is not cleared between digits",
        "sampling",
        "sample_block.cuh",
        "            clear_histogram(shared);\n            __syncthreads();\n",
        "            __syncthreads();\n",
        "in order",
        WRONG,
    ),
    Broken(
        "sampling: masses of warps are overwritten while they are read",
        "sampling",
        "sample_block.cuh",
        "        sum += shared.warp_masses[i];\n    }\n    __syncthreads();\n",
        "        sum += shared.warp_masses[i];\n    }\n",
        "checked",
        "race",
    ),
    Broken(
        "sampling: the last block reads without a fence",
        "sampling",
        "sample_block.cuh",
        "== gridDim.x - 1;\n        __threadfence();\n",
        "== gridDim.x - 1;\n",
        "checked",
        "race",
    ),
]


@pytest.mark.parametrize("name", ["in order", "reversed", "checked"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_intact_kernels_pass(scenario, name):
    with mode(**MODES[name]):
        SCENARIOS[scenario]()


@pytest.mark.parametrize("scenario", ["prefill", "few rows", "many rows"])
def test_intact_kernels_pass_without_cp_async(scenario, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "75")
    with mode(is_checked=True):
        SCENARIOS[scenario]()


@pytest.mark.parametrize("scenario", ["decode", "experts"])
def test_intact_kernels_pass_when_two_workers_share_the_blocks(scenario):
    with mode(workers=2):
        SCENARIOS[scenario]()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_kernel_is_noticed(broken):
    with changed_kernels({broken.file: (broken.old, broken.new)}), mode(**MODES[broken.mode]):
        with pytest.raises(Exception, match=broken.message):
            SCENARIOS[broken.scenario]()
