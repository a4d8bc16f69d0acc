"""The reference backend: every operation in plain numpy and float32, one after the other.

What the tests believe; fast only where that costs no clarity.  Weights become float32 when the
program is laid out; a buffer is whatever array the operation before left under its name.  Promises
the same greedy tokens alone and in any batch, not the same bits.
"""

import os
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Array
from llmsrv.backend.base import Attention
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Embed
from llmsrv.backend.base import GatedActivation
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Linear
from llmsrv.backend.base import Norm
from llmsrv.backend.base import Operation
from llmsrv.backend.base import Plan
from llmsrv.backend.base import Program
from llmsrv.backend.base import RopeAndStore
from llmsrv.backend.base import SelectLogitRows
from llmsrv.backend.base import Tensor
from llmsrv.backend.quants import TYPES
from llmsrv.backend.quants import Floats
from llmsrv.backend.quants import dequantise
from llmsrv.backend.sampling import Samples
from llmsrv.backend.sampling import SamplingTable
from llmsrv.backend.sampling import sample
from llmsrv.errors import StartupError

# Up to here OpenBLAS is faster at W @ x.T than at x @ W.T, by a third at 8 rows (0.3.31, AVX-512,
# the shapes of SmolLM2-135M); above they are equal.
FEW_ROWS = 32

# Rows of a long chunk that attend together: few, since none looks beyond the last of them and their
# scores should stay in the cache; not too few, since k and v are gathered for each span.
SPAN_ROWS = 128

Stack = tuple[Tensor, ...]


class ReferenceBackend(Backend):
    name = "reference"

    def compile(self, program: Program, limits: Limits, tick: Callable[[], None]) -> Plan:
        _check_types(program)
        stacks = {_names(stack): stack for stack in _stacks(program)}
        size = 4 * sum(prod(tensor.shape) for stack in stacks.values() for tensor in stack)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        positions = limits.num_blocks * BLOCK_SIZE
        cannot = StartupError(
            f"the reference backend needs {size >> 20} MiB for float32 weights, and a KV cache of "
            f"{positions} positions; this machine has {memory >> 20} MiB: choose a smaller model"
        )
        if size > memory:
            raise cannot
        try:
            return ReferencePlan(program, limits, tick)
        except MemoryError:
            raise cannot from None


class ReferencePlan(Plan):
    """A program with its weights as float32, its KV cache and its sampling table."""

    def __init__(self, program: Program, limits: Limits, tick: Callable[[], None]) -> None:
        self.program = program
        self.tick = tick
        self.weights: dict[tuple[str, ...], Floats] = {}
        for stack in _stacks(program):
            if _names(stack) not in self.weights:
                self.weights[_names(stack)] = _stacked(stack, tick)
        # All layers of a block lie together, and the zeros are not touched yet: the caches take
        # memory as blocks come into use.
        shape = limits.num_blocks, program.num_layers, BLOCK_SIZE
        self.k_cache = np.zeros((*shape, program.num_kv_heads, program.head_dim), np.float32)
        self.v_cache = np.zeros((*shape, program.num_kv_heads, program.head_dim), np.float32)
        self.sampling = SamplingTable(limits.max_slots, program.vocab_size)
        # Of the last step.
        self.buffers: dict[str, Floats] = {}
        self.sampled = np.zeros(limits.max_logit_rows, np.int32)

    @np.errstate(all="ignore")  # what overflows stays in its row, and sampling reports it
    def forward(self, batch: Batch) -> None:
        for operation in self.program.operations:
            self._run(operation, batch)
            self.tick()

    def sample(self, slots: Array, output_positions: Array) -> Samples:
        samples = sample(self.buffers["logits"], self.sampling, slots, output_positions)
        self.sampled[: len(samples.ids)] = np.maximum(samples.ids, 0)
        return samples

    def _run(self, operation: Operation, batch: Batch) -> None:
        buffers = self.buffers
        match operation:
            case Embed():
                ids = _resolved(batch.ids, self.sampled)
                buffers[operation.out] = _embedded(ids, operation.table) * operation.scale
            case Norm():
                weight = self.weights[_names((operation.weight,))]
                buffers[operation.out] = _norm(buffers[operation.x], weight, operation.eps)
            case Linear():
                product = self._linear(operation)
                if operation.accumulate:
                    product += buffers[operation.out]
                buffers[operation.out] = product
            case RopeAndStore():
                self._rope_and_store(operation, batch)
            case Attention():
                buffers[operation.out] = self._attention(operation, batch)
            case GatedActivation():
                gate, up = np.split(buffers[operation.x], 2, axis=1)
                buffers[operation.out] = gate / (1 + np.exp(-gate)) * up
            case SelectLogitRows():
                buffers[operation.out] = buffers[operation.x][batch.logit_rows]

    def _linear(self, operation: Linear) -> Floats:
        x = self.buffers[operation.x]
        w = self.weights[_names(operation.weights)]
        product = np.ascontiguousarray((w @ x.T).T) if len(x) <= FEW_ROWS else x @ w.T
        if operation.biases:
            product += self.weights[_names(operation.biases)]
        return product

    def _rope_and_store(self, operation: RopeAndStore, batch: Batch) -> None:
        num_heads, num_kv_heads = self.program.num_heads, self.program.num_kv_heads
        heads = self.buffers[operation.qkv].reshape(len(batch.ids), -1, self.program.head_dim)
        k_end = num_heads + num_kv_heads
        angles = batch.positions[:, None].astype(np.float32) * operation.frequencies
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # [T, 1, rotary_dim / 2]
        magnitude = np.float32(operation.magnitude)
        _rotate(heads[:, :k_end], cos * magnitude, sin * magnitude, operation.interleaved)
        block, offset = np.divmod(batch.slot_mapping, BLOCK_SIZE)
        self.k_cache[block, operation.layer, offset] = heads[:, num_heads:k_end]
        self.v_cache[block, operation.layer, offset] = heads[:, k_end:]

    def _attention(self, operation: Attention, batch: Batch) -> Floats:
        program = self.program
        heads = self.buffers[operation.qkv].reshape(len(batch.ids), -1, program.head_dim)
        out = np.empty((len(batch.ids), program.num_heads, program.head_dim), np.float32)
        for span in _spans(batch):
            k = self.k_cache[span.blocks, operation.layer]  # [blocks, BLOCK_SIZE, kv heads, dim]
            v = self.v_cache[span.blocks, operation.layer]
            out[span.rows] = attend(
                heads[span.rows, : program.num_heads],
                k.reshape(-1, *k.shape[2:])[: span.length],
                v.reshape(-1, *v.shape[2:])[: span.length],
                batch.positions[span.rows],
                operation.scale,
            )
        return out.reshape(len(batch.ids), -1)


@dataclass(frozen=True)
class Span:
    """Some rows of one sequence: its blocks, and how many positions the last of them sees."""

    rows: slice
    blocks: Array
    length: int


def _spans(batch: Batch) -> Iterator[Span]:
    starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(batch.sequences)]):
        for first in range(start, end, SPAN_ROWS):
            stop = min(first + SPAN_ROWS, end)
            length = int(batch.positions[stop - 1]) + 1
            blocks = batch.block_tables[batch.sequences[start], : -(-length // BLOCK_SIZE)]
            yield Span(slice(first, stop), blocks, length)


def attend(q: Floats, k: Floats, v: Floats, positions: Array, scale: float) -> Floats:
    """Causal attention of some rows of one sequence over its positions 0 .. C - 1.

    q  [T, num_heads, head_dim];  k, v  [C, num_kv_heads, head_dim];  positions  [T], below C
    Returns [T, num_heads, head_dim].  Head h reads kv head h // (num_heads / num_kv_heads).
    """
    num_rows, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = k.shape
    q = q.reshape(num_rows, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    q = q.reshape(num_kv_heads, -1, head_dim)  # [kv heads, group * T, dim]
    scores: Floats = q @ k.transpose(1, 2, 0)  # [kv heads, group * T, C]
    scores *= np.float32(scale)
    future = np.arange(length) > positions[:, None]  # [T, C]
    np.copyto(scores.reshape(num_kv_heads, -1, num_rows, length), -np.inf, where=future)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    out: Floats = scores @ v.transpose(1, 0, 2)
    out = out.reshape(num_kv_heads, -1, num_rows, head_dim).transpose(2, 0, 1, 3)
    return out.reshape(num_rows, num_heads, head_dim)


def _norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return normed


def _rotate(x: Floats, cos: Floats, sin: Floats, interleaved: bool) -> None:
    """Turns the pairs of x [T, heads, head_dim] in place; cos, sin [T, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = first * cos - second * sin
    second[...] = second * cos + first * sin
    first[...] = turned


def _resolved(ids: Array, sampled: Array) -> Array:
    """ids with each -1 - r replaced by what logit row r of the step before sampled."""
    return np.where(ids < 0, sampled[np.maximum(-1 - ids, 0)], ids)


def _embedded(ids: Array, table: Tensor) -> Floats:
    """Rows of the table, made float32 one by one: no second copy of a large table."""
    packed = table.data.reshape(table.shape[0], -1)[ids]
    rows = np.empty((len(ids), table.shape[1]), np.float32)
    dequantise(table.type, packed.reshape(-1), rows)
    return rows


# ---- Weights


def _stacks(program: Program) -> Iterator[Stack]:
    """Every group of tensors that an operation uses as one array."""
    for operation in program.operations:
        match operation:
            case Norm():
                yield (operation.weight,)
            case Linear():
                yield operation.weights
                if operation.biases:
                    yield operation.biases


def _names(stack: Stack) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in stack)


def _check_types(program: Program) -> None:
    tables = [operation.table for operation in program.operations if isinstance(operation, Embed)]
    for tensor in [*tables, *(tensor for stack in _stacks(program) for tensor in stack)]:
        if tensor.type not in TYPES:
            raise StartupError(
                f"tensor '{tensor.name}' has type {tensor.type}; the reference backend runs "
                + ", ".join(TYPES)
            )


def _stacked(stack: Stack, tick: Callable[[], None]) -> Floats:
    """The tensors as float32, one below the other."""
    shape = sum(tensor.shape[0] for tensor in stack), *stack[0].shape[1:]
    out = np.empty(shape, np.float32)
    start = 0
    for tensor in stack:
        stop = start + tensor.shape[0]
        dequantise(tensor.type, tensor.data, out[start:stop])
        start = stop
        tick()
    return out
