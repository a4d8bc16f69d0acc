"""Lays out a program for the C library: its list of operations, buffers, activation tiles, weights.

If a product with quantized weights reads a buffer, the operation that writes the buffer also
quantizes it to tiles (linear_tiles.h), or a QUANTIZE operation follows.  Cosines and sines are
computed once a step for each set of frequencies, not once a layer.
"""

import ctypes
from collections.abc import Callable
from math import prod

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.buffers import ACTIVATED
from llmsrv.backend.cpu.buffers import CHOICES
from llmsrv.backend.cpu.buffers import DOWN
from llmsrv.backend.cpu.buffers import GATE_UP
from llmsrv.backend.cpu.buffers import LOGITS
from llmsrv.backend.cpu.buffers import are_floats
from llmsrv.backend.cpu.buffers import expert_buffers
from llmsrv.backend.cpu.buffers import linears
from llmsrv.backend.cpu.buffers import logit_row_buffers
from llmsrv.backend.cpu.buffers import prefilled_buffers
from llmsrv.backend.cpu.buffers import stack_of
from llmsrv.backend.cpu.buffers import stacks
from llmsrv.backend.cpu.buffers import tiled_buffers
from llmsrv.backend.cpu.fusion import GatedLinear
from llmsrv.backend.cpu.fusion import fuse
from llmsrv.backend.cpu.library import ACTIVATE
from llmsrv.backend.cpu.library import ATTENTION
from llmsrv.backend.cpu.library import COMBINE
from llmsrv.backend.cpu.library import COS_SIN
from llmsrv.backend.cpu.library import EXPERTS
from llmsrv.backend.cpu.library import LINEAR
from llmsrv.backend.cpu.library import MAX_HEAD_DIM
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import NORM
from llmsrv.backend.cpu.library import OperationStruct
from llmsrv.backend.cpu.library import POOL
from llmsrv.backend.cpu.library import QUANTIZE
from llmsrv.backend.cpu.library import ROPE
from llmsrv.backend.cpu.library import ROUTE
from llmsrv.backend.cpu.library import SELECT
from llmsrv.backend.cpu.library import SOFTCAP
from llmsrv.backend.cpu.library import SUM_EXPERTS
from llmsrv.backend.cpu.library import WeightPart
from llmsrv.backend.cpu.library import address_of
from llmsrv.backend.cpu.library import drop_pages
from llmsrv.backend.cpu.weights import Stack
from llmsrv.backend.cpu.weights import Weights
from llmsrv.backend.cpu.weights import format_of
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
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.backend.supported import check_supported

LANES = 16
# Operations that can write tiles in addition to floats.
TILING = (NORM, ACTIVATE, SELECT, POOL)


class Layout:
    """The operations of a program as C structures, and owner of everything they point to.

    embeds      the Embed operations, which come first and are left to the caller
    operations  the others
    buffers     name -> [rows, padded width] float32
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        program: Program,
        limits: Limits,
        num_threads: int,
        tick: Callable[[], None],
    ) -> None:
        check_supported(program, "cpu", MAX_HEAD_DIM, format_of)
        operations = list(fuse(program))
        self._program = program
        self._limits = limits
        self._memory = Memory(library)
        self._library = library
        self._widths = program.buffers | expert_buffers(program)
        unique = {stack.names: stack for stack in stacks(operations)}
        self._weights = Weights(library, list(unique.values()), num_threads, tick)
        self._kept: list[object] = []
        self._vectors: dict[tuple[str, ...], Array] = {}
        self._cos_sin: dict[tuple[object, ...], Array] = {}
        self._row_tiles: dict[str, Array] = {}
        self._is_selected = False
        self.operations: list[OperationStruct] = []
        self.embeds = [op for op in program.operations if isinstance(op, Embed)]
        self.buffers = {name: self._new_buffer(name) for name in self._widths}
        self._tiles = {name: self._new_tiles(name) for name in tiled_buffers(linears(operations))}
        for name in prefilled_buffers(program):
            self._quantize_if_read_as_tiles(name)
        for operation in operations:
            self._add(operation)

    def _new_buffer(self, name: str) -> Array:
        rows = self._limits.max_rows
        if name in logit_row_buffers(self._program):
            rows = min(rows, self._limits.max_logit_rows)
        if name.startswith(CHOICES):
            rows *= max(op.num_chosen for op in self._program.operations if isinstance(op, Experts))
        # An odd number of cache lines: otherwise one column of many rows would fall into a single
        # set of the cache and evict itself.
        lines = -(-self._widths[name] // LANES) | 1
        return self._memory.array((rows, lines * LANES), np.float32)

    def _new_tiles(self, name: str) -> Array:
        words = self._library.llmsrv_tile_words(self._widths[name])
        return self._memory.array((len(self.buffers[name]), words), np.int32)

    # ---- Operations

    def _add(self, operation: Operation) -> None:
        match operation:
            case Norm():
                struct = self._append(NORM, operation.x, operation.out)
                struct.weight = self._vector(operation.weight)
                struct.eps, struct.accumulate = operation.eps, operation.accumulate
            case Linear():
                self._add_linear(operation)
            case RopeAndStore():
                self._add_rope(operation)
            case Attention():
                for kind in (ATTENTION, COMBINE):
                    struct = self._append(kind, operation.qkv, operation.out)
                    struct.layer, struct.scale = operation.layer, operation.scale
                    struct.window, struct.softcap = operation.window or 0, operation.softcap or 0
            case GatedActivation():
                struct = self._append(ACTIVATE, operation.x, operation.out)
                struct.option = operation.function == "gelu"
            case Experts():
                self._add_experts(operation)
            case Softcap():
                self._append(SOFTCAP, operation.x, operation.x).softcap = operation.cap
            case SelectLogitRows():
                self._is_selected = True
                self._append(SELECT, operation.x, operation.out)
            case Pool():
                self._is_selected = True
                self._append(POOL, operation.x, operation.out).option = operation.kind == "mean"
        if not isinstance(operation, Embed):
            self._quantize_output()

    def _append(self, kind: int, x: str, out: str) -> OperationStruct:
        struct = OperationStruct(kind=kind, logit_rows_only=self._is_selected, scale=1)
        struct.x, struct.out = address_of(self.buffers[x]), address_of(self.buffers[out])
        struct.x_stride, struct.out_stride = self.buffers[x].shape[1], self.buffers[out].shape[1]
        of_x = kind in (LINEAR, QUANTIZE, EXPERTS)
        struct.width = self._widths[x if of_x else out]
        self.operations.append(struct)
        self._written = out
        return struct

    def _quantize_output(self) -> None:
        """Also writes the last operation's output as tiles, if products read it."""
        last = self.operations[-1]
        if self._written in self._tiles and last.kind in TILING:
            last.tiles = address_of(self._tiles[self._written])
        elif last.kind not in (ROPE, COS_SIN):
            self._quantize_if_read_as_tiles(self._written)

    def _quantize_if_read_as_tiles(self, name: str) -> None:
        if name in self._tiles:
            self._append(QUANTIZE, name, name).tiles = address_of(self._tiles[name])

    def _add_linear(self, linear: Linear) -> None:
        struct = self._append(LINEAR, linear.x, linear.out)
        parts = self._weights.parts(stack_of(linear))
        struct.parts, struct.num_parts = ctypes.addressof(parts), len(parts)
        struct.accumulate, struct.scale = linear.accumulate, linear.scale
        if isinstance(linear, GatedLinear):
            struct.gated = 1 + (linear.function == "gelu")
        if linear.x in self._tiles:
            struct.tiles = address_of(self._tiles[linear.x])
        if linear.biases:
            struct.weight = self._vector(*linear.biases)

    def _add_experts(self, experts: Experts) -> None:
        """Router, top experts, their products, activation, products, weighted sum."""
        num_experts, num_chosen = len(experts.down), experts.num_chosen
        max_choices = self._limits.max_rows * num_chosen
        choices = self._memory.array((3 * max_choices + 2 * num_experts + 2,), np.int32)
        self._kept.append(choices)

        def append(kind: int, x: str, out: str) -> OperationStruct:
            struct = self._append(kind, x, out)
            struct.num_experts, struct.num_chosen = num_experts, num_chosen
            struct.max_choices, struct.choices = max_choices, address_of(choices)
            return struct

        def use_tiles(struct: OperationStruct, name: str, stack: tuple[Tensor, ...]) -> None:
            if not are_floats(stack):
                if name not in self._row_tiles:
                    self._row_tiles[name] = self._new_tiles(name)
                struct.one_row_tiles, struct.tiles = 1, address_of(self._row_tiles[name])

        def products(x: str, out: str, stacks: list[tuple[Tensor, ...]]) -> OperationStruct:
            product = append(EXPERTS, x, out)
            parts = [part for stack in stacks for part in self._weights.parts(Stack(stack))]
            array = (WeightPart * len(parts))(*parts)
            self._kept.append(array)
            product.parts, product.num_parts = ctypes.addressof(array), len(parts) // num_experts
            use_tiles(product, x, stacks[0])
            return product

        self._add_linear(Linear(LOGITS, experts.x, (experts.router,)))
        append(ROUTE, LOGITS, LOGITS).option = experts.normalise
        use_tiles(append(QUANTIZE, experts.x, experts.x), experts.x, experts.gate_up[0])
        products(experts.x, GATE_UP, list(experts.gate_up)).option = 1
        activation = append(ACTIVATE, GATE_UP, ACTIVATED)
        activation.option = experts.function == "gelu"
        use_tiles(activation, ACTIVATED, experts.down[:1])
        products(ACTIVATED, DOWN, [(down,) for down in experts.down])
        append(SUM_EXPERTS, DOWN, experts.out).scale = experts.scale

    def _add_rope(self, rope: RopeAndStore) -> None:
        cos_sin = self._add_cos_sin(rope)
        struct = self._append(ROPE, rope.qkv, rope.qkv)
        struct.layer, struct.option, struct.eps = rope.layer, rope.interleaved, rope.eps
        if cos_sin is not None:
            assert rope.frequencies is not None
            struct.cos_sin, struct.half_rotary_dim = address_of(cos_sin), len(rope.frequencies)
        if rope.q_norm is not None:
            struct.weight = self._vector(rope.q_norm)
            struct.norms_across_heads |= rope.q_norm.shape[0] != self._program.head_dim
        if rope.k_norm is not None:
            struct.second_weight = self._vector(rope.k_norm)
            struct.norms_across_heads |= 2 * (rope.k_norm.shape[0] != self._program.head_dim)

    def _add_cos_sin(self, rope: RopeAndStore) -> Array | None:
        """The cosines and sines of the layer; appends the operation that computes them once."""
        if rope.frequencies is None:
            return None
        long = rope.long_frequencies
        key = rope.frequencies.tobytes(), long is not None and long.tobytes(), rope.magnitude
        if key not in self._cos_sin:
            half = len(rope.frequencies)
            cos_sin = self._memory.array((self._limits.max_rows, 2 * half), np.float32)
            struct = self._append(COS_SIN, rope.qkv, rope.qkv)
            struct.half_rotary_dim, struct.magnitude, struct.width = half, rope.magnitude, 16 * half
            struct.cos_sin = address_of(cos_sin)
            struct.weight = self._floats(rope.frequencies)
            if long is not None:
                struct.second_weight = self._floats(long)
            self._cos_sin[key] = cos_sin
        return self._cos_sin[key]

    def _vector(self, *tensors: Tensor) -> int:
        """The address of the tensors' values as float32, concatenated."""
        key = tuple(tensor.name for tensor in tensors)
        if key not in self._vectors:
            values = np.empty(sum(prod(tensor.shape) for tensor in tensors), np.float32)
            start = 0
            for tensor in tensors:
                size = prod(tensor.shape)
                dequantize(tensor.type, tensor.data, values[start : start + size])
                drop_pages(tensor.data)
                start += size
            self._vectors[key] = values
        return address_of(self._vectors[key])

    def _floats(self, values: Array) -> int:
        kept = np.ascontiguousarray(values, np.float32)
        self._kept.append(kept)
        return address_of(kept)
