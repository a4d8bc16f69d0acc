"""The reference backend: every operation in plain numpy and float32, one after the other.

The tests take its results as correct; it is fast only where that costs no clarity.  Weights become
float32 when a program is compiled.  A buffer is the array that an operation last stored under its
name.  It promises the same greedy tokens alone and in any batch, but not the same bits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any
from typing import Self

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.arrays import Floats
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.base import MemoryLimit
from llmsrv.backend.base import Plan
from llmsrv.backend.host_memory import host_memory
from llmsrv.backend.host_memory import machine_bytes
from llmsrv.backend.kv_blocks import read_blocks
from llmsrv.backend.kv_blocks import write_blocks
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
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.backend.reference.operations import attend
from llmsrv.backend.reference.operations import gated
from llmsrv.backend.reference.operations import norm
from llmsrv.backend.reference.operations import pooled
from llmsrv.backend.reference.operations import rotate_heads
from llmsrv.backend.reference.operations import route
from llmsrv.backend.reference.operations import softcapped
from llmsrv.backend.reference.operations import spans
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.errors import StartupError

# Up to this many rows OpenBLAS computes W @ x.T faster than x @ W.T, by a third at 8 rows (0.3.31,
# AVX-512, the shapes of SmolLM2-135M); beyond, both are equally fast.
FEW_ROWS = 32

Stack = tuple[Tensor, ...]


class ReferenceBackend(Backend):
    name = "reference"
    description = "numpy in float32"

    @classmethod
    def from_options(cls, options: Mapping[str, Any], cache_dir: Path) -> Self:
        return cls()

    def memory(self) -> MemoryLimit:
        return host_memory()

    def kv_position_bytes(self, program: Program) -> int:
        return 2 * program.num_layers * program.num_kv_heads * program.head_dim * 4

    def compile(self, program: Program, limits: Limits, tick: Callable[[], None]) -> Plan:
        _check_types(program)
        stacks = {_names(stack): stack for stack in _stacks(program)}
        size = 4 * sum(prod(tensor.shape) for stack in stacks.values() for tensor in stack)
        memory = machine_bytes()
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
        # All layers of a block are adjacent, and the zeros are not touched yet: the caches take up
        # memory only as blocks are used.
        shape = limits.num_blocks, program.num_layers, BLOCK_SIZE
        self.k_cache = np.zeros((*shape, program.num_kv_heads, program.head_dim), np.float32)
        self.v_cache = np.zeros((*shape, program.num_kv_heads, program.head_dim), np.float32)
        self._block_bytes = (
            self.k_cache.reshape(limits.num_blocks, -1).view(np.uint8),
            self.v_cache.reshape(limits.num_blocks, -1).view(np.uint8),
        )
        heads = f"{program.num_layers} layers, {program.num_kv_heads} heads of {program.head_dim}"
        self.kv_layout = f"reference: floats of 32 bits, {heads}, blocks of {BLOCK_SIZE}"
        self.sampling = SamplingTable(limits.max_slots, program.vocab_size)
        # The results of the last step.
        self.buffers: dict[str, Floats] = {}
        self.sampled = np.zeros(limits.max_logit_rows, np.int32)

    @np.errstate(all="ignore")  # an overflow stays in its row, and sampling reports it
    def forward(self, batch: Batch) -> None:
        for operation in self.program.operations:
            self._run(operation, batch)
            self.tick()

    def sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> Samples:
        logits, table = self.buffers["logits"], self.sampling
        samples = sample(logits, table, slots, output_positions, targets, drafts)
        self.sampled[: len(samples.ids)] = np.maximum(samples.ids, 0)
        return samples

    def read(self, name: str) -> Array:
        return self.buffers[name].copy()

    def copy_block(self, source: int, target: int) -> None:
        for array in (self.k_cache, self.v_cache):
            array[target] = array[source]

    def read_blocks(self, blocks: Sequence[int]) -> Array:
        return read_blocks(*self._block_bytes, blocks)

    def write_blocks(self, blocks: Sequence[int], data: Array) -> None:
        write_blocks(*self._block_bytes, blocks, data)

    def _run(self, operation: Operation, batch: Batch) -> None:
        buffers = self.buffers
        match operation:
            case Embed():
                ids = _resolved(batch.ids, self.sampled)
                scale = np.float32(operation.scale)
                buffers[operation.out] = _embedded(ids, operation.table) * scale
            case Norm():
                weight = self.weights[_names((operation.weight,))]
                normed = norm(buffers[operation.x], weight, operation.eps)
                self._put(operation.out, normed, operation.accumulate)
            case Linear():
                self._put(operation.out, self._linear(operation), operation.accumulate)
            case RopeAndStore():
                self._rope_and_store(operation, batch)
            case Attention():
                buffers[operation.out] = self._attention(operation, batch)
            case GatedActivation():
                buffers[operation.out] = gated(buffers[operation.x], operation.function)
            case Experts():
                self._put(operation.out, self._experts(operation), accumulate=True)
            case SelectLogitRows():
                buffers[operation.out] = buffers[operation.x][batch.logit_rows]
            case Softcap():
                buffers[operation.x] = softcapped(buffers[operation.x], operation.cap)
            case Pool():
                buffers[operation.out] = pooled(buffers[operation.x], batch, operation.kind)

    def _put(self, out: str, values: Floats, accumulate: bool) -> None:
        if accumulate:
            values += self.buffers[out]
        self.buffers[out] = values

    def _linear(self, operation: Linear) -> Floats:
        product = self._product(self.buffers[operation.x], operation.weights)
        if operation.biases:
            product += self.weights[_names(operation.biases)]
        if operation.scale != 1:
            product *= np.float32(operation.scale)
        return product

    def _product(self, x: Floats, stack: Stack) -> Floats:
        w = self.weights[_names(stack)]
        product: Floats = np.ascontiguousarray((w @ x.T).T) if len(x) <= FEW_ROWS else x @ w.T
        return product

    def _rope_and_store(self, operation: RopeAndStore, batch: Batch) -> None:
        num_heads, num_kv_heads = self.program.num_heads, self.program.num_kv_heads
        heads = self.buffers[operation.qkv].reshape(len(batch.ids), -1, self.program.head_dim)
        k_end = num_heads + num_kv_heads
        self._norm_heads(heads[:, :num_heads], operation.q_norm, operation.eps)
        self._norm_heads(heads[:, num_heads:k_end], operation.k_norm, operation.eps)
        rotate_heads(heads[:, :k_end], operation, batch)
        block, offset = np.divmod(batch.slot_mapping, BLOCK_SIZE)
        self.k_cache[block, operation.layer, offset] = heads[:, num_heads:k_end]
        self.v_cache[block, operation.layer, offset] = heads[:, k_end:]

    def _norm_heads(self, heads: Floats, weight: Tensor | None, eps: float) -> None:
        """Normalizes in place: each head separately, or all heads together, as `weight` is long."""
        if weight is not None:
            values = self.weights[_names((weight,))]
            x = heads.reshape(len(heads), -1, len(values))
            heads[...] = norm(x, values, eps).reshape(heads.shape)

    def _attention(self, operation: Attention, batch: Batch) -> Floats:
        program = self.program
        heads = self.buffers[operation.qkv].reshape(len(batch.ids), -1, program.head_dim)
        out = np.empty((len(batch.ids), program.num_heads, program.head_dim), np.float32)
        for span in spans(batch, operation.window, BLOCK_SIZE):
            k = self.k_cache[span.blocks, operation.layer]  # [blocks, BLOCK_SIZE, kv heads, dim]
            v = self.v_cache[span.blocks, operation.layer]
            out[span.rows] = attend(
                heads[span.rows, : program.num_heads],
                k.reshape(-1, *k.shape[2:])[: span.end - span.first],
                v.reshape(-1, *v.shape[2:])[: span.end - span.first],
                batch.positions[span.rows],
                span.first,
                operation,
            )
        return out.reshape(len(batch.ids), -1)

    def _experts(self, operation: Experts) -> Floats:
        x = self.buffers[operation.x]
        logits = self._product(x, (operation.router,))
        chosen, weights = route(logits, operation.num_chosen, operation.normalise)
        total = np.zeros((len(x), operation.down[0].shape[0]), np.float32)
        for rank in range(operation.num_chosen):  # best first: the contract defines the order
            for expert in np.unique(chosen[:, rank]).tolist():
                rows = np.flatnonzero(chosen[:, rank] == expert)
                gate_up = self._product(x[rows], operation.gate_up[expert])
                activated = gated(gate_up, operation.function)
                product = self._product(activated, (operation.down[expert],))
                total[rows] += weights[rows, rank, None] * product
        return total * np.float32(operation.scale)


def _resolved(ids: Array, sampled: Array) -> Array:
    """ids with each -1 - r replaced by the id that logit row r sampled in the previous step."""
    return np.where(ids < 0, sampled[np.maximum(-1 - ids, 0)], ids)


def _embedded(ids: Array, table: Tensor) -> Floats:
    """Rows of the table in float32; only these are dequantized, since the table may be large."""
    packed = table.data.reshape(table.shape[0], -1)[ids]
    rows = np.empty((len(ids), table.shape[1]), np.float32)
    dequantize(table.type, packed.reshape(-1), rows)
    return rows


# ---- Weights


def _stacks(program: Program) -> Iterator[Stack]:
    """Every group of tensors that an operation uses as one stacked array."""
    for operation in program.operations:
        match operation:
            case Norm():
                yield (operation.weight,)
            case Linear():
                yield operation.weights
                if operation.biases:
                    yield operation.biases
            case RopeAndStore():
                yield from ((weight,) for weight in (operation.q_norm, operation.k_norm) if weight)
            case Experts():
                yield (operation.router,)
                yield from operation.gate_up
                yield from ((weight,) for weight in operation.down)


def _names(stack: Stack) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in stack)


def _check_types(program: Program) -> None:
    tables = [operation.table for operation in program.operations if isinstance(operation, Embed)]
    for tensor in [*tables, *(tensor for stack in _stacks(program) for tensor in stack)]:
        if tensor.type not in GGML_TYPES:
            raise CannotRun(
                f"tensor '{tensor.name}' has type {tensor.type}; the reference backend runs "
                + ", ".join(GGML_TYPES)
            )


def _stacked(stack: Stack, tick: Callable[[], None]) -> Floats:
    """The tensors in float32, stacked by rows."""
    shape = sum(tensor.shape[0] for tensor in stack), *stack[0].shape[1:]
    out = np.empty(shape, np.float32)
    start = 0
    for tensor in stack:
        stop = start + tensor.shape[0]
        dequantize(tensor.type, tensor.data, out[start:stop])
        start = stop
        tick()
    return out
