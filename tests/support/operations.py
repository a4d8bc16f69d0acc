"""Runs operations on a backend and on the reference backend, and returns what both wrote."""

import dataclasses
import sys

import numpy as np

from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.program import Program
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.random_tensors import HALVES
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.reference.backend import ReferencePlan
from tests.support.plans import Piece
from tests.support.plans import batch_of

LIMITS = Limits(max_rows=300, max_logit_rows=40, max_slots=40, num_blocks=80)
VOCAB = 97
KERNEL_TYPES = [type for type in FORMATS if type in GGML_TYPES]
OTHER_TYPES = [type for type in GGML_TYPES if type in HALVES and type not in FORMATS]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(name, values):
    values = np.asarray(values, np.float32)
    return dataclasses.replace(
        random_tensor(name, "F32", values.shape), data=values.reshape(-1).view(np.uint8)
    )


def run_both(backend, operations, widths, pieces, heads=(4, 2, 16), **inputs):
    """Buffer -> what the operations wrote to it on the backend and on the reference backend."""
    program = Program(tuple(operations), widths, 1, *heads, vocab_size=VOCAB)
    plans = [b.compile(program, LIMITS, lambda: None) for b in (backend, ReferenceBackend())]
    batch = batch_of(pieces)
    for plan in plans:
        for name, values in inputs.items():
            write_buffer(plan, name, values)
        plan.forward(batch)
    ours, theirs = plans
    return {name: (ours.read(name), theirs.read(name)) for name in widths if name in theirs.buffers}


def write_buffer(plan, name, values):
    """Writes float32 values [rows, width] to a buffer that no operation of the plan writes."""
    buffer = plan.buffers.get(name)
    if isinstance(plan, ReferencePlan):
        plan.buffers[name] = values.copy()
    elif isinstance(buffer, np.ndarray):
        buffer[: len(values), : values.shape[1]] = values
    else:  # on a device
        padded = np.zeros(buffer.shape, np.float32)
        padded[: len(values), : values.shape[1]] = values
        buffer.set(padded)
        sys.modules["cupy"].cuda.runtime.deviceSynchronize()  # the plan has a stream of its own


def error_of(backend, of_cpu):
    """The largest error to expect, relative to the largest value.

    of_cpu  the CPU backend's; CUDA rounds operands, and some weights, to float16"""
    return max(of_cpu, 1.5e-3) if backend.name == "cuda" else of_cpu


def one_prompt(count):
    return [Piece([0] * count, 0, list(range(1, 2 + count // 16)))]
