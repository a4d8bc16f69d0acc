"""How fast each kernel is, in the shapes of a model with 1 billion parameters, and how close to the
limits of the machine: the bandwidth of a large copy and the rate of a large matrix product.
"""

import gc
import itertools
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.selftest.batches import Piece
from llmsrv.selftest.batches import batch_of
from llmsrv.selftest.cases import BLOCK_TYPES

TYPES = "BF16", *BLOCK_TYPES
GRAPH_ROWS = 64  # steps with more rows are prompts
NUM_EXPERTS, NUM_CHOSEN = 8, 2
WEIGHT_SIZE = 0.02  # of a weight
COPY_BLOCKS = 8
MIN_S = 0.02  # duration of one measurement


@dataclass(frozen=True)
class Size:
    """How large the measured operations are.

    weight_bytes  of the weights of one measurement, larger than any cache
    repeats       how often a program runs its operations, so that starting it counts for little
    copy_layers   layers of the KV cache whose blocks are copied; 1 MiB of a block each
    """

    hidden: int = 2048
    inner: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 128256
    weight_bytes: int = 192 << 20
    repeats: int = 4
    context: int = 8192
    streams: int = 32
    copy_layers: int = 512
    prefill_rows: int = 512

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def limits(self) -> Limits:
        num_blocks = 2 + self.context // BLOCK_SIZE
        return Limits(self.prefill_rows, self.prefill_rows, self.streams, num_blocks)


@dataclass(frozen=True)
class Rates:
    """What the machine reaches at best: bytes per second, read plus written, and products of two
    16-bit values per second; None if not measured."""

    copy: float
    product: float | None = None


@dataclass(frozen=True)
class Speed:
    """One call of a kernel, which moves num_bytes and computes num_products."""

    name: str
    seconds: float
    num_bytes: int
    num_products: int

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds

    @property
    def products_per_s(self) -> float:
        return self.num_products / self.seconds


@dataclass(frozen=True)
class Load:
    """A program to measure.

    operations  after those that fill the buffers
    num_calls   of the kernel in one step
    step        the rows to measure with, of which each has a row of input
    earlier     steps that fill the KV cache
    sampling    for the rows of the step, if sampling is what is measured
    """

    name: str
    operations: list[Operation]
    num_calls: int
    num_bytes: int  # of one call, as num_products
    num_products: int
    step: Batch
    earlier: list[Batch] = field(default_factory=list)
    sampling: SamplingParameters | None = None


def measure(backend: Backend, size: Size) -> Iterator[Speed]:
    for loads in _loads(size):
        yield from _measured(backend, loads, size)
        gc.collect()  # plans refer to themselves, and hold memory of the device


def _measured(backend: Backend, loads: list[Load], size: Size) -> Iterator[Speed]:
    """The loads have the same operations, and share a plan."""
    plan = backend.compile(_program(loads[0], size), size.limits, lambda: None)
    for load in loads:
        for batch in (*load.earlier, load.step):
            plan.forward(batch)
        seconds = _seconds(_run(load, plan), lambda: plan.read("small"))
        yield Speed(load.name, seconds / load.num_calls, load.num_bytes, load.num_products)


def _run(load: Load, plan: Plan) -> Callable[[], object]:
    if load.sampling is None:
        return lambda: plan.forward(load.step)
    slots = np.arange(len(load.step.logit_rows), dtype=np.int32)
    for slot in slots.tolist():
        plan.sampling.set(slot, replace(load.sampling, seed=slot))
    return lambda: plan.sample(slots, np.zeros(len(slots), np.int64))


def measure_rates(backend: Backend, size: Size) -> Rates:
    """The bandwidth is that of copying blocks of a KV cache, which are made large for this."""
    small = Embed("small", random_tensor("small", "F32", (1, 16)))
    program = Program((small,), {"small": 16}, size.copy_layers, 32, 32, 256, vocab_size=16)
    plan = backend.compile(program, Limits(1, 1, 1, COPY_BLOCKS), lambda: None)
    plan.forward(_step(1, 1, 1))
    num_bytes = plan.read_blocks([1]).nbytes
    # All blocks in turn, so that no cache holds them.
    pairs = list(itertools.pairwise([*range(1, COPY_BLOCKS), 1]))

    def copy_all() -> None:
        for pair in pairs:
            plan.copy_block(*pair)

    seconds = _seconds(copy_all, lambda: plan.read("small"))
    return Rates(2 * num_bytes * len(pairs) / seconds, _product_rate(backend))


def _product_rate(backend: Any) -> float | None:
    if backend.name != "cuda":
        return None
    from llmsrv.backend.cuda.rates import product_rate

    return product_rate(backend.device)


def _seconds(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Seconds of one run, in the fastest of three measurements."""
    run()
    wait()
    found = []
    for _ in range(3):
        start_s, runs = time.perf_counter(), 0
        while time.perf_counter() - start_s < MIN_S:
            run()
            runs += 1
        wait()
        found.append((time.perf_counter() - start_s) / runs)
    return min(found)


# ---- What is measured


def _loads(size: Size) -> Iterator[list[Load]]:
    for type in TYPES:
        yield list(_linear(type, (1, 8, size.prefill_rows), size))
    yield list(_experts((1, size.prefill_rows), size))
    yield [
        _attention(1, 1, size.context, size),
        _attention(size.streams, 1, size.context // size.streams, size),
        _attention(1, size.prefill_rows, size.context, size),
    ]
    yield [_between(rows, size) for rows in (1, size.prefill_rows)]
    yield [
        _sampling("greedy", SamplingParameters(temperature=0), size),
        _sampling("top_p 0.9", SamplingParameters(temperature=0.8, top_p=0.9), size),
    ]


def _linear(type: str, row_counts: Iterable[int], size: Size) -> Iterator[Load]:
    weight = random_tensor("w", type, (size.inner, size.hidden), size=WEIGHT_SIZE)
    copies = max(1, size.weight_bytes // weight.data.nbytes)
    weights = [replace(weight, name=f"w{index}") for index in range(copies)]
    operations: list[Operation] = [Linear("wide", "hidden", (each,)) for each in weights]
    for rows in row_counts:
        yield Load(
            f"Linear {type}, {_count(rows, 'row')}",
            operations * size.repeats,
            len(operations) * size.repeats,
            weight.data.nbytes,
            rows * size.inner * size.hidden,
            _step(1, rows, rows),
        )


def _experts(row_counts: Iterable[int], size: Size) -> Iterator[Load]:
    weight = random_tensor("e", "Q4_K", (size.hidden, size.hidden), size=WEIGHT_SIZE)
    gates, ups, downs = (
        [replace(weight, name=f"{name}{expert}") for expert in range(NUM_EXPERTS)]
        for name in ("gate", "up", "down")
    )
    router = random_tensor("router", "F32", (NUM_EXPERTS, size.hidden))
    pairs = tuple(zip(gates, ups))
    experts = Experts("normed", "hidden", router, pairs, tuple(downs), NUM_CHOSEN, True)
    for rows in row_counts:
        num_read = min(NUM_EXPERTS, rows * NUM_CHOSEN)
        yield Load(
            f"Experts Q4_K, {NUM_CHOSEN} of {NUM_EXPERTS}, {_count(rows, 'row')}",
            [experts] * size.repeats,
            size.repeats,
            3 * num_read * weight.data.nbytes,
            3 * rows * NUM_CHOSEN * size.hidden**2,
            _step(1, rows, rows),
        )


def _attention(num_sequences: int, rows: int, length: int, size: Size) -> Load:
    """Attention of the last rows of each sequence of `length` positions."""
    operations: list[Operation] = [RopeAndStore("qkv", 0, _frequencies(size))]
    num_calls = 4 * size.repeats
    operations += [Attention("attended", "qkv", 0, size.head_dim**-0.5)] * num_calls
    chunk = size.prefill_rows // num_sequences
    ends = range(chunk, length, chunk)
    positions_read = num_sequences * sum(range(length - rows + 1, length + 1))
    return Load(
        f"Attention, {num_sequences} x {_count(rows, 'row')} of {length}",
        operations,
        num_calls,
        num_sequences * length * 2 * size.kv_heads * size.head_dim * 2,
        positions_read * 2 * size.heads * size.head_dim,
        _step(num_sequences, rows, length, length),
        [_step(num_sequences, chunk, end, length) for end in ends],
    )


def _between(rows: int, size: Size) -> Load:
    """What runs between the products of a layer."""
    norm = Norm("normed", "hidden", random_tensor("norm", "F32", (size.hidden,)), 1e-5)
    rope = RopeAndStore("qkv", 0, _frequencies(size))
    num_calls = 4 * size.repeats
    return Load(
        f"Norm, rope and activation, {_count(rows, 'row')}",
        [norm, rope, GatedActivation("activated", "wide")] * num_calls,
        num_calls,
        rows * 4 * (2 * size.hidden + 2 * size.qkv + 2 * size.inner),
        0,
        _step(1, rows, rows),
    )


def _sampling(name: str, parameters: SamplingParameters, size: Size) -> Load:
    rows = size.streams
    table = random_tensor("logits", "BF16", (rows, size.vocab), size=3.0)
    return Load(
        f"Sampling, {name}, {_count(rows, 'row')}",
        [Embed("logits", table)],
        1,
        rows * size.vocab * 4,
        0,
        _step(rows, 1, 1),
        sampling=parameters,
    )


def _step(num_sequences: int, rows: int, end: int, length: int = 0) -> Batch:
    """The last rows before position `end` of each sequence.

    length  positions that a sequence has at most
    All rows are logit rows if there are few, as in decoding.
    """
    num_blocks = -(-max(length, end) // BLOCK_SIZE)
    return batch_of(
        [
            Piece(
                range(rows * sequence, rows * (sequence + 1)),
                end - rows,
                range(1 + sequence * num_blocks, 1 + (sequence + 1) * num_blocks),
                rows if rows <= GRAPH_ROWS else 1,
            )
            for sequence in range(num_sequences)
        ]
    )


def _program(load: Load, size: Size) -> Program:
    """Fills the buffers that the operations read with random rows."""
    widths = {
        "hidden": size.hidden,
        "normed": size.hidden,
        "qkv": size.qkv,
        "attended": size.heads * size.head_dim,
        "wide": size.inner,
        "activated": size.inner // 2,
        "logits": size.vocab,
        "small": 16,
    }
    read = {getattr(operation, "x", "") for operation in load.operations}
    read |= {getattr(operation, "qkv", "") for operation in load.operations} | {"small"}
    inputs = [
        Embed(name, random_tensor(f"input of {name}", "BF16", (size.prefill_rows, widths[name])))
        for name in sorted(read - {""})
    ]
    heads = size.heads, size.kv_heads, size.head_dim
    return Program((*inputs, *load.operations), widths, 1, *heads, size.vocab)


def _frequencies(size: Size) -> Array:
    return np.ones(size.head_dim // 2, np.float32)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
