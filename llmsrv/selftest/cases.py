"""Programs of a few operations that together use every kernel of a backend, in awkward shapes.

Their inputs come from Embed, since every backend has it.  A table of bfloat16 values is exact in
every 16-bit type, so the errors are those of the kernels that follow.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.random_tensors import float_bytes
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.selftest.batches import Piece
from llmsrv.selftest.batches import batch_of
from llmsrv.selftest.batches import prompt

LIMITS = Limits(max_rows=320, max_logit_rows=48, max_slots=48, num_blocks=80)
VOCAB = 400  # at least as many ids as a case has rows in all its steps
OPERAND_ERROR = 1e-2  # twice what rounding the inputs of a product to bfloat16 costs
ATTENTION_ERROR = 2e-2  # large scores amplify what rounding the keys costs
ROUNDING_ERROR = 4e-3  # of one value to bfloat16

FLOATS = "F32", "F16", "BF16"
BLOCK_TYPES = "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"
DEQUANTIZED_TYPES = "Q2_K", "IQ4_NL"  # representatives of types without kernels
GEMV_ROWS = 1, 2, 3, 4, 5, 6, 7, 8
GEMM_ROWS = 9, 13, 64, 300


@dataclass(frozen=True)
class Case:
    """A program and its steps, to run on a backend and on the reference backend.

    kernel     the row of the report
    outputs    the buffers to compare after each step
    max_error  the largest absolute error allowed, over the largest absolute value
    """

    kernel: str
    program: Program
    steps: tuple[Batch, ...]
    outputs: tuple[str, ...] = ("out",)
    max_error: float = OPERAND_ERROR


def kernel_cases() -> Iterator[Case]:
    yield from _embed_cases()
    yield from _row_cases()
    yield from _linear_cases()
    yield from _gated_cases()
    yield from _expert_cases()
    yield from _attention_cases()
    yield from _pool_cases()


def _embed_cases() -> Iterator[Case]:
    for type in (*FLOATS, *BLOCK_TYPES, *DEQUANTIZED_TYPES):
        width = 50 if type in FLOATS else 512
        embed = Embed("out", random_tensor("table", type, (VOCAB, width)), scale=0.3)
        step = batch_of([Piece([0, 5, VOCAB - 1, 5], 0, [1])])
        yield Case("Embed", _program([embed], {"out": width}), (step,), max_error=ROUNDING_ERROR)


def _row_cases() -> Iterator[Case]:
    """Norm, activations and soft cap, whose widths need not be multiples of anything."""
    for width in (1, 16, 37, 96, 4096):
        for accumulate in (False, True):
            operations = [
                _input("both", 2 * width, seed=1, scale=5.0),
                _input("out", width, seed=2),
                GatedActivation("gelu", "both", "gelu"),
                GatedActivation("silu", "both"),
                Norm("out", "silu", _vector("w", width), 1e-5, accumulate),
                Softcap("gelu", 2.0),
            ]
            widths = {"both": 2 * width, "silu": width, "gelu": width, "out": width}
            program = _program(operations, widths)
            outputs = "out", "gelu"
            yield Case("Norm, activation, soft cap", program, (batch_of(prompt(7)),), outputs)


def _linear_cases() -> Iterator[Case]:
    """Each type in three sizes; then several of them stacked, with biases and accumulation."""
    for type in (*FLOATS, *BLOCK_TYPES, *DEQUANTIZED_TYPES):
        for rows in (GEMV_ROWS, GEMM_ROWS):
            yield _linear_case(type, rows)
    yield _stacked_case()


def _linear_case(type: str, rows: tuple[int, ...]) -> Case:
    unit = 32 if type in FLOATS else GGML_TYPES[type].block_values
    operations: list[Operation] = []
    widths: dict[str, int] = {}
    for index, (size, units) in enumerate(((45, 3), (100, 7), (288, 1))):
        columns = units * unit
        x, out = f"x{index}", f"out{index}"
        weight = _weight(f"w{index}", type, size, columns)
        operations += [_input(x, columns, seed=index, outlier=20.0), Linear(out, x, (weight,))]
        widths |= {x: columns, out: size}
    kernel = f"Linear {type}, {rows[0]} to {rows[-1]} rows"
    return Case(kernel, _program(operations, widths), _steps(*rows), ("out0", "out1", "out2"))


def _stacked_case() -> Case:
    types = "Q8_0", "BF16", "Q4_K", "Q4_1"
    sizes = 17, 64, 5, 33
    weights = tuple(_weight(type, type, size, 256) for type, size in zip(types, sizes))
    biases = tuple(_vector(f"b{size}", size) for size in sizes)
    operations = [
        _input("x", 256),
        _input("out", sum(sizes), seed=1),
        Linear("out", "x", weights, biases, scale=0.5, accumulate=True),
    ]
    program = _program(operations, {"x": 256, "out": sum(sizes)})
    return Case("Linear, stacked", program, _steps(1, 5, 40))


def _gated_cases() -> Iterator[Case]:
    functions: tuple[Literal["silu", "gelu"], ...] = "silu", "gelu"
    for type in ("Q4_1", "Q8_0", "F16", "Q4_K"):
        columns = 256 if type == "Q4_K" else 96
        for function in functions:
            weights = tuple(_weight(name, type, 80, columns) for name in ("gate", "up"))
            biases = tuple(_vector(name, 80) for name in ("gate_bias", "up_bias"))
            operations = [
                _input("x", columns),
                Linear("both", "x", weights, biases, scale=0.1),
                GatedActivation("out", "both", function),
            ]
            widths = {"x": columns, "both": 160, "out": 80}
            yield Case("Linear, gated", _program(operations, widths), _steps(1, 5, 40))


def _expert_cases() -> Iterator[Case]:
    for type in ("BF16", "Q8_0", "Q4_1", "Q6_K"):
        size = 256 if type == "Q6_K" else 64
        for normalise in (False, True):

            def weights(name: str) -> tuple[Tensor, ...]:
                return tuple(_weight(f"{name}{expert}", type, size, size) for expert in range(5))

            experts = Experts(
                "out",
                "x",
                random_tensor("router", "F32", (5, size), 9),
                tuple(zip(weights("gate"), weights("up"))),
                weights("down"),
                num_chosen=2,
                normalise=normalise,
                scale=0.5,
            )
            operations = [_input("x", size), _input("out", size, seed=1), experts]
            yield Case("Experts", _program(operations, {"x": size, "out": size}), _steps(1, 21))


def _attention_cases() -> Iterator[Case]:
    shapes = (
        # heads, kv heads, head_dim, window, soft cap
        (4, 2, 16, None, None),
        (9, 3, 64, None, None),
        (1, 1, 8, 20, None),
        (6, 2, 24, 260, 30.0),
        (16, 1, 32, 1, 5.0),
        (32, 8, 128, None, None),
        (4, 4, 256, None, None),
    )
    for heads, kv_heads, head_dim, window, softcap in shapes:
        for interleaved in (False, True):
            frequencies = np.float32(100.0) ** -np.linspace(0, 1, head_dim // 2, dtype=np.float32)
            norm = _vector("norm", head_dim)
            width = (heads + 2 * kv_heads) * head_dim
            operations = [
                _input("qkv", width),
                RopeAndStore("qkv", 0, frequencies, None, 1.1, interleaved, norm, norm, 1e-6),
                Attention("out", "qkv", 0, head_dim**-0.5, window, softcap),
            ]
            widths = {"qkv": width, "out": heads * head_dim}
            program = _program(operations, widths, (heads, kv_heads, head_dim))
            kernel = f"Attention, head_dim {head_dim}"
            yield Case(kernel, program, _attention_steps(), max_error=ATTENTION_ERROR)


def _attention_steps() -> tuple[Batch, ...]:
    """A prompt; more rows of it; a decode row and two prompts; then only decode rows."""
    blocks = [int(block) for block in np.random.default_rng(0).permutation(40) + 1]
    steps = (
        [Piece(range(290), 0, blocks[:20])],
        [Piece(range(7), 290, blocks[:20])],
        [Piece([7], 297, blocks[:20]), Piece(range(17), 0, blocks[20:22]), Piece([3], 0, [50])],
        [Piece([8], 298, blocks[:20]), Piece([9], 17, blocks[20:22]), Piece([4], 1, [50])],
    )
    return tuple(map(batch_of, steps))


def _pool_cases() -> Iterator[Case]:
    pieces = [Piece(range(5), 0, [1]), Piece([9], 0, [2]), Piece(range(20), 0, [3, 4])]
    kinds: tuple[Literal["last", "mean"], ...] = "last", "mean"
    for kind in kinds:
        operations = [_input("x", 40), Pool("out", "x", kind)]
        program = _program(operations, {"x": 40, "out": 40})
        yield Case("Pool, select", program, (batch_of(pieces),), max_error=ROUNDING_ERROR)
    program = _program([_input("x", 40), SelectLogitRows("out", "x")], {"x": 40, "out": 40})
    yield Case("Pool, select", program, (batch_of(pieces),), max_error=ROUNDING_ERROR)


# ---- Parts of programs


def _program(
    operations: Sequence[Operation],
    widths: dict[str, int],
    heads: tuple[int, int, int] = (4, 2, 16),
) -> Program:
    """Backends expect Embed before all other operations."""
    in_order = sorted(operations, key=lambda operation: not isinstance(operation, Embed))
    return Program(tuple(in_order), widths, 1, *heads, vocab_size=VOCAB)


def _steps(*row_counts: int) -> tuple[Batch, ...]:
    return tuple(batch_of(prompt(count)) for count in row_counts)


def _input(
    out: str, width: int, seed: int = 0, scale: float = 1.0, outlier: float = 1.0
) -> Operation:
    """Fills a buffer with a row for each id; an outlier, as in real activations, in one column."""
    values = _random((VOCAB, width), seed)
    values[:, width // 2] *= outlier
    return Embed(out, Tensor(out, "BF16", (VOCAB, width), float_bytes("BF16", values)), scale)


def _vector(name: str, size: int) -> Tensor:
    return Tensor(name, "F32", (size,), float_bytes("F32", _random((size,), sum(name.encode()))))


def _weight(name: str, type: str, rows: int, columns: int) -> Tensor:
    return random_tensor(name, type, (rows, columns), sum(name.encode()), size=0.2)


def _random(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
