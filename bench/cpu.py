"""Decode and prefill speed of the CPU backend on the default model, and the machine's limits.

python -m bench.cpu [--runs N] [--bits 16|8] [--threads N] [--model PATH]

Each run measures the machine (bytes read per second, from an array as large as the weights, and
products of bytes per second).  It also measures decode of 1, 8 and 32 sequences, of one with a long
context, and prefill of 1,000 tokens.  Figures are medians over the runs; shares compare figures of
the same run.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from bench.machine import describe
from bench.machine import pss_mb
from bench.reference import batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.source import load_library
from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.files.source import resolve_model
from llmsrv.model.load import load_model

LIMITS = Limits(max_rows=256, max_logit_rows=32, max_slots=32, num_blocks=1025)
PROMPT_TOKENS = 131
LONG_CONTEXT_TOKENS = 7000
ROOFS_FLAGS = "-O2", "-pthread", "-Wno-psabi"
MULTIPLY_PASSES = 2_000_000
MATRIX_PASSES = 500_000
READ_PASSES = 40


class Roofs:
    """The machine's limits, measured by roofs.c with the backend's instructions and threads.

    They are the roofs of the roofline model (Williams et al. 2009).
    """

    def __init__(self, backend: CPUBackend, num_bytes: int) -> None:
        source = Path(__file__).with_name("roofs.c").read_bytes()
        flags = ROOFS_FLAGS + backend.tier.flags
        self._library = load_library({"roofs.c": source}, flags, default_cache_dir())
        self._library.read_rate.restype = ctypes.c_double
        self._library.read_rate.argtypes = (
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int
        )
        self._library.multiply_rate.restype = ctypes.c_double
        self._library.amx_rate.restype = ctypes.c_double
        self._num_threads = backend.num_threads
        self._bytes = np.ones(num_bytes, np.uint8)

    def bytes_per_s(self) -> float:
        address, size = self._bytes.ctypes.data, len(self._bytes)
        rate: float = self._library.read_rate(address, size, READ_PASSES, self._num_threads)
        return rate

    def products_per_s(self) -> float:
        """8-bit multiplications with vector instructions."""
        rate: float = self._library.multiply_rate(MULTIPLY_PASSES, self._num_threads)
        return rate

    def matrix_products_per_s(self) -> float:
        """8-bit multiplications in AMX tiles; 0 without AMX."""
        rate: float = self._library.amx_rate(MATRIX_PASSES, self._num_threads)
        return rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    path = arguments.model or resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)
    start_s = time.perf_counter()
    options = CPUOptions(default_cache_dir(), arguments.threads, arguments.bits)
    backend = CPUBackend(options)
    program = load_model(path, lambda: None).program
    plan = backend.compile(program, LIMITS, lambda: None)
    load_s = time.perf_counter() - start_s
    print(describe())
    print(f"{backend.tier.name}, {backend.num_threads} threads, {arguments.bits} bits")
    weights = [weight for op in program.operations for weight in getattr(op, "weights", ())]
    weight_bytes = sum(weight.data.nbytes for weight in weights)
    num_products = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    num_products -= program.vocab_size * program.buffers["hidden"]
    weight_mb, memory_mb = weight_bytes / 1e6, pss_mb(os.getpid())
    roofs = Roofs(backend, weight_bytes)
    results = [measure(plan, roofs, weight_bytes, num_products) for _ in range(arguments.runs)]
    print(f"load {load_s:.2f} s, {memory_mb:.0f} MB resident, {weight_mb:.1f} MB of weights")
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"{name:42}{statistics.median(values):10.3g}   best {max(values):.4g}")


def measure(plan: Plan, roofs: Roofs, weight_bytes: int, num_products: int) -> dict[str, float]:
    """num_products: multiplications of the layers for one token, without those for its logits."""
    decode(plan, 1, 4)
    read = roofs.bytes_per_s()
    one = decode(plan, 1, 64)
    eight = decode(plan, 8, 32)
    thirty_two = decode(plan, 32, 16)
    long_context = decode(plan, 1, 64, LONG_CONTEXT_TOKENS)
    multiply = roofs.products_per_s()
    prompt_s = prefill(plan)
    return {
        "read, GB/s": read / 1e9,
        "multiply, GMAC/s": multiply / 1e9,
        "1 stream, tokens/s": one,
        "    of the bandwidth": one * weight_bytes / read,
        "8 streams, tokens/s": eight,
        "32 streams, tokens/s": thirty_two,
        f"1 stream after {LONG_CONTEXT_TOKENS}, tokens/s": long_context,
        "prompt of 1000, tokens/s": 1000 / prompt_s,
        "    layers' products of the 8-bit peak": 1000 / prompt_s * num_products / multiply,
        "first token of 1000, s": prompt_s,
    }


def prefill(plan: Plan) -> float:
    """Seconds from a prompt of 1,000 tokens, in chunks of LIMITS.max_rows, to its first token."""
    plan.sampling.set(0, SamplingParameters(temperature=0))
    start_s = time.perf_counter()
    for start in range(0, 1000, LIMITS.max_rows):
        plan.forward(batch(1, range(start, min(start + LIMITS.max_rows, 1000)), 1024))
    plan.sample(np.zeros(1, np.int32), np.zeros(1, np.int64))
    return time.perf_counter() - start_s


def decode(
    plan: Plan, num_sequences: int, num_tokens: int, prompt_tokens: int = PROMPT_TOKENS
) -> float:
    """Tokens/s of greedy decoding, all sequences together, after prompts of prompt_tokens."""
    length = prompt_tokens + num_tokens
    slots = np.arange(num_sequences, dtype=np.int32)
    for slot in slots.tolist():
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    chunk = LIMITS.max_rows // num_sequences
    for start in range(0, prompt_tokens, chunk):
        end = min(start + chunk, prompt_tokens)
        plan.forward(batch(num_sequences, range(start, end), length))
    start_s = time.perf_counter()
    for step in range(num_tokens):
        plan.sample(slots, np.full(num_sequences, step))
        position = prompt_tokens + step
        plan.forward(batch(num_sequences, range(position, position + 1), length))
    return num_tokens * num_sequences / (time.perf_counter() - start_s)


if __name__ == "__main__":
    main()
