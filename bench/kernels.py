"""Measures each kernel of the CPU backend against its roofline: bytes or multiplications a second.

python -m bench.kernels [--bits 16|8] [--threads N] [--rounds N] [--only NAME]

Each kernel runs as its own program, with the shapes of Llama 3.2 1B and weights of WORK_BYTES.
Each round measures the machine, then the kernel; shares are medians over the rounds.
Multiplications are int8, in AMX tiles if the CPU has them (roofs.c).  A share of the bytes above 1
means that caches served some of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bench.cpu import LIMITS
from bench.cpu import Roofs
from bench.machine import describe
from bench.reference import batch
from llmsrv.backend.base import Plan
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.backend import CPUPlan
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.program import Attention
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.config import default_cache_dir

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 8192, 32, 8, 64, 128256
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
WIDTHS = {
    "hidden": HIDDEN,
    "normed": HIDDEN,
    "qkv": QKV,
    "gate_up": 2 * INNER,
    "activated": INNER,
    "logits": VOCAB,
}
LAYERS = 4
WORK_BYTES = 64 << 20
ROWS = 1, 8, 32, LIMITS.max_rows
MIN_S = 0.05  # duration of one measurement


class Kernel(NamedTuple):
    """run reads num_bytes and does num_products multiplications."""

    name: str
    rows: int
    operations: list[Operation]
    run: Callable[[Plan], object]
    num_bytes: int
    num_products: int = 0


def kernels() -> Iterator[Kernel]:
    for type in FORMATS:
        yield from (linear(type, rows) for rows in ROWS)
    yield from (attention(rows, 1, 1023 + rows) for rows in (1, LIMITS.max_rows))
    yield attention(8, 8, 1024)
    yield from (row_by_row(rows) for rows in (8, LIMITS.max_rows))
    yield sampling("greedy", SamplingParameters(temperature=0))
    yield sampling("top_p 0.9", SamplingParameters(temperature=0.8, top_p=0.9))


def linear(type: str, rows: int) -> Kernel:
    weight = random_tensor("w", type, (HIDDEN, HIDDEN))
    copies = WORK_BYTES // weight.data.nbytes
    operations: list[Operation] = [
        Linear("hidden", "normed", (replace(weight, name=f"w{i}"),)) for i in range(copies)
    ]
    products = rows * HIDDEN * HIDDEN * copies
    return Kernel(
        f"Linear {type}", rows, operations, forward(rows), weight.data.nbytes * copies, products
    )


def attention(rows: int, num_sequences: int, length: int) -> Kernel:
    """Attention of the last rows of sequences with `length` positions."""
    operations: list[Operation] = [
        Attention("hidden", "qkv", layer, HEAD_DIM**-0.5) for layer in range(LAYERS)
    ]
    each = rows // num_sequences
    positions = range(length - each, length)
    num_bytes = LAYERS * num_sequences * length * 2 * KV_HEADS * HEAD_DIM * 2
    products = LAYERS * num_sequences * sum(positions) * 2 * HEADS * HEAD_DIM
    steps = batch(num_sequences, positions, length)
    return Kernel(
        "Attention", rows, operations, lambda plan: plan.forward(steps), num_bytes, products
    )


def row_by_row(rows: int) -> Kernel:
    """Norm, RopeAndStore and GatedActivation: what runs between the products of a layer."""
    frequencies = np.ones(HEAD_DIM // 2, np.float32)
    operations: list[Operation] = []
    for layer in range(LAYERS):
        norm = random_tensor(f"norm{layer}", "F32", (HIDDEN,))
        operations += [
            Norm("normed", "hidden", norm, 1e-5),
            RopeAndStore("qkv", layer, frequencies),
            Norm("normed", "hidden", norm, 1e-5),
            GatedActivation("activated", "gate_up"),
        ]
    num_bytes = LAYERS * rows * 4 * (2 * HIDDEN + QKV + 2 * INNER)
    return Kernel("Norms, rope, activation", rows, operations, forward(rows), num_bytes)


def sampling(name: str, parameters: SamplingParameters) -> Kernel:
    rows = LIMITS.max_logit_rows
    slots, positions = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int64)
    logits = np.random.default_rng(0).normal(scale=3, size=(rows, VOCAB)).astype(np.float32)

    def run(plan: Plan) -> None:
        assert isinstance(plan, CPUPlan)
        if not plan.buffers["logits"].any():
            plan.buffers["logits"][:rows, :VOCAB] = logits
            for slot in slots.tolist():
                plan.sampling.set(slot, parameters)
        plan.sample(slots, positions)

    return Kernel(f"sample, {name}", rows, [], run, rows * VOCAB * 4)


def forward(rows: int) -> Callable[[Plan], object]:
    steps = batch(1, range(rows), rows)
    return lambda plan: plan.forward(steps)


def measure(backend: CPUBackend, roofs: Roofs, kernel: Kernel, rounds: int) -> str:
    """One line of the table: medians over the rounds."""
    program = Program(tuple(kernel.operations), WIDTHS, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB)
    plan = backend.compile(program, LIMITS, lambda: None)
    seconds(kernel, plan)
    found = []
    for _ in range(rounds):
        read = roofs.bytes_per_s()
        multiply = max(roofs.products_per_s(), roofs.matrix_products_per_s())
        took_s = seconds(kernel, plan)
        bytes_s, products_s = kernel.num_bytes / took_s, kernel.num_products / took_s
        found.append((took_s, bytes_s, bytes_s / read, products_s, products_s / multiply))
    took_s, bytes_s, of_read, products_s, of_multiply = map(statistics.median, zip(*found))
    line = f"{kernel.name:24}{kernel.rows:6}{1e3 * took_s:10.3f}"
    line += f"{bytes_s / 1e9:9.1f}{of_read:8.2f}"
    return line + f"{products_s / 1e9:9.0f}{of_multiply:8.2f}" * bool(kernel.num_products)


def seconds(kernel: Kernel, plan: Plan) -> float:
    """Seconds for one run, averaged over MIN_S."""
    start_s, runs = time.perf_counter(), 0
    while (took_s := time.perf_counter() - start_s) < MIN_S:
        kernel.run(plan)
        runs += 1
    return took_s / runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="measure only kernels whose name contains this")
    options = parser.parse_args()
    backend = CPUBackend(CPUOptions(default_cache_dir(), options.threads, options.bits))
    roofs = Roofs(backend, WORK_BYTES)
    print(describe())
    print(f"{backend.tier.name}, {backend.num_threads} threads, {backend.activation_bits} bits")
    print(f"{'kernel':24}{'rows':>6}{'ms':>10}{'GB/s':>9}{'of it':>8}{'GMAC/s':>9}{'of it':>8}")
    for kernel in kernels():
        if options.only in kernel.name:
            print(measure(backend, roofs, kernel, options.rounds), flush=True)


if __name__ == "__main__":
    main()
