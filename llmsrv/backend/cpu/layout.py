"""From a program to the list of operations that the C library runs: buffers, tiles, weights.

Where products with quantised weights read a buffer, whatever writes it also leaves it as tiles of
integers (linear_tiles.h), or a QUANTIZE after it does.  Cosines and sines are made once a step for
each set of frequencies, not once a layer.
"""

import ctypes
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.library import ACTIVATE
from llmsrv.backend.cpu.library import ATTENTION
from llmsrv.backend.cpu.library import COMBINE
from llmsrv.backend.cpu.library import COS_SIN
from llmsrv.backend.cpu.library import EXPERTS
from llmsrv.backend.cpu.library import FLOATS
from llmsrv.backend.cpu.library import GROUP_ROWS
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
from llmsrv.backend.program import output_of
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.ggml_types import dequantize

LANES = 16
# Operations that write tiles beside their floats.
TILING = (NORM, ACTIVATE, SELECT, POOL)
# Buffers of experts: the router's logits, and what has a row for each choice of a row.
LOGITS = "experts.logits"
CHOICES = "choices."
GATE_UP, ACTIVATED, DOWN = CHOICES + "gate_up", CHOICES + "activated", CHOICES + "down"


class Layout:
    """The operations of a program in C's form, and all that they point at.

    embeds   the Embed operations, which come first and are left to the caller
    steps    the others
    buffers  name -> [rows, width padded] float32
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        program: Program,
        limits: Limits,
        num_threads: int,
        tick: Callable[[], None],
    ) -> None:
        _check(program)
        operations = list(_fused(program))
        self._program = program
        self._limits = limits
        self._memory = Memory(library)
        self._library = library
        self._widths = program.buffers | _expert_buffers(program)
        linears = list(_linears(operations))
        stacks = {stack.names: stack for stack in _stacks(operations)}
        self._weights = Weights(library, list(stacks.values()), num_threads, tick)
        self._kept: list[object] = []
        self._vectors: dict[tuple[str, ...], Array] = {}
        self._cos_sin: dict[tuple[object, ...], Array] = {}
        self._row_tiles: dict[str, Array] = {}
        self._is_selected = False
        self.steps: list[OperationStruct] = []
        self.embeds = [op for op in program.operations if isinstance(op, Embed)]
        self.buffers = {name: self._buffer(name) for name in self._widths}
        self._tiles = {name: self._tiles_of(name) for name in _tiled(linears)}
        for name in _given(program):
            self._split_if_tiled(name)
        for operation in operations:
            self._add(operation)

    def _buffer(self, name: str) -> Array:
        rows = self._limits.max_rows
        if name in _written_after_select(self._program):
            rows = min(rows, self._limits.max_logit_rows)
        if name.startswith(CHOICES):
            rows *= max(op.num_chosen for op in self._program.operations if isinstance(op, Experts))
        # An odd number of cache lines: a column of a row, over many rows, would else be in one set
        # of a cache, and push itself out.
        lines = -(-self._widths[name] // LANES) | 1
        return self._memory.array((rows, lines * LANES), np.float32)

    def _tiles_of(self, name: str) -> Array:
        words = self._library.llmsrv_tile_words(self._widths[name])
        return self._memory.array((len(self.buffers[name]), words), np.int32)

    # ---- Steps

    def _add(self, operation: Operation) -> None:
        match operation:
            case Norm():
                step = self._step(NORM, operation.x, operation.out)
                step.weight = self._vector(operation.weight)
                step.eps, step.accumulate = operation.eps, operation.accumulate
            case Linear():
                self._add_linear(operation)
            case RopeAndStore():
                self._add_rope(operation)
            case Attention():
                for kind in (ATTENTION, COMBINE):
                    step = self._step(kind, operation.qkv, operation.out)
                    step.layer, step.scale = operation.layer, operation.scale
                    step.window, step.softcap = operation.window or 0, operation.softcap or 0
            case GatedActivation():
                step = self._step(ACTIVATE, operation.x, operation.out)
                step.option = operation.function == "gelu"
            case Experts():
                self._add_experts(operation)
            case Softcap():
                self._step(SOFTCAP, operation.x, operation.x).softcap = operation.cap
            case SelectLogitRows():
                self._is_selected = True
                self._step(SELECT, operation.x, operation.out)
            case Pool():
                self._is_selected = True
                self._step(POOL, operation.x, operation.out).option = operation.kind == "mean"
        if not isinstance(operation, Embed):
            self._tile_what_was_written()

    def _step(self, kind: int, x: str, out: str) -> OperationStruct:
        step = OperationStruct(kind=kind, logit_rows_only=self._is_selected, scale=1)
        step.x, step.out = address_of(self.buffers[x]), address_of(self.buffers[out])
        step.x_stride, step.out_stride = self.buffers[x].shape[1], self.buffers[out].shape[1]
        of_x = kind in (LINEAR, QUANTIZE, EXPERTS)
        step.width = self._widths[x if of_x else out]
        self.steps.append(step)
        self._written = out
        return step

    def _tile_what_was_written(self) -> None:
        """Leaves what the last step wrote as tiles, where products want it so."""
        last = self.steps[-1]
        if self._written in self._tiles and last.kind in TILING:
            last.tiles = address_of(self._tiles[self._written])
        elif last.kind not in (ROPE, COS_SIN):
            self._split_if_tiled(self._written)

    def _split_if_tiled(self, name: str) -> None:
        if name in self._tiles:
            self._step(QUANTIZE, name, name).tiles = address_of(self._tiles[name])

    def _add_linear(self, linear: Linear) -> None:
        step = self._step(LINEAR, linear.x, linear.out)
        parts = self._weights.parts(_stack_of(linear))
        step.parts, step.num_parts = ctypes.addressof(parts), len(parts)
        step.accumulate, step.scale = linear.accumulate, linear.scale
        if isinstance(linear, GatedLinear):
            step.gated = 1 + (linear.function == "gelu")
        if linear.x in self._tiles:
            step.tiles = address_of(self._tiles[linear.x])
        if linear.biases:
            step.weight = self._vector(*linear.biases)

    def _add_experts(self, experts: Experts) -> None:
        """Router, choice, products of the chosen experts, activation, products, weighted sum."""
        num_experts, num_chosen = len(experts.down), experts.num_chosen
        max_choices = self._limits.max_rows * num_chosen
        choices = self._memory.array((3 * max_choices + 2 * num_experts + 2,), np.int32)
        self._kept.append(choices)

        def step(kind: int, x: str, out: str) -> OperationStruct:
            step = self._step(kind, x, out)
            step.num_experts, step.num_chosen = num_experts, num_chosen
            step.max_choices, step.choices = max_choices, address_of(choices)
            return step

        def tiles(step: OperationStruct, name: str, stack: tuple[Tensor, ...]) -> None:
            if not _are_floats(stack):
                if name not in self._row_tiles:
                    self._row_tiles[name] = self._tiles_of(name)
                step.one_row_tiles, step.tiles = 1, address_of(self._row_tiles[name])

        def products(x: str, out: str, stacks: list[tuple[Tensor, ...]]) -> OperationStruct:
            product = step(EXPERTS, x, out)
            parts = [part for stack in stacks for part in self._weights.parts(Stack(stack))]
            array = (WeightPart * len(parts))(*parts)
            self._kept.append(array)
            product.parts, product.num_parts = ctypes.addressof(array), len(parts) // num_experts
            tiles(product, x, stacks[0])
            return product

        self._add_linear(Linear(LOGITS, experts.x, (experts.router,)))
        step(ROUTE, LOGITS, LOGITS).option = experts.normalise
        tiles(step(QUANTIZE, experts.x, experts.x), experts.x, experts.gate_up[0])
        products(experts.x, GATE_UP, list(experts.gate_up)).option = 1
        activation = step(ACTIVATE, GATE_UP, ACTIVATED)
        activation.option = experts.function == "gelu"
        tiles(activation, ACTIVATED, experts.down[:1])
        products(ACTIVATED, DOWN, [(down,) for down in experts.down])
        step(SUM_EXPERTS, DOWN, experts.out).scale = experts.scale

    def _add_rope(self, rope: RopeAndStore) -> None:
        cos_sin = self._add_cos_sin(rope)
        step = self._step(ROPE, rope.qkv, rope.qkv)
        step.layer, step.option, step.eps = rope.layer, rope.interleaved, rope.eps
        if cos_sin is not None:
            assert rope.frequencies is not None
            step.cos_sin, step.half_rotary_dim = address_of(cos_sin), len(rope.frequencies)
        if rope.q_norm is not None:
            step.weight = self._vector(rope.q_norm)
            step.norms_across_heads |= rope.q_norm.shape[0] != self._program.head_dim
        if rope.k_norm is not None:
            step.second_weight = self._vector(rope.k_norm)
            step.norms_across_heads |= 2 * (rope.k_norm.shape[0] != self._program.head_dim)

    def _add_cos_sin(self, rope: RopeAndStore) -> Array | None:
        """The cosines and sines that the layer needs; a step that makes them, the first time."""
        if rope.frequencies is None:
            return None
        long = rope.long_frequencies
        key = rope.frequencies.tobytes(), long is not None and long.tobytes(), rope.magnitude
        if key not in self._cos_sin:
            half = len(rope.frequencies)
            cos_sin = self._memory.array((self._limits.max_rows, 2 * half), np.float32)
            step = self._step(COS_SIN, rope.qkv, rope.qkv)
            step.half_rotary_dim, step.magnitude, step.width = half, rope.magnitude, 16 * half
            step.cos_sin = address_of(cos_sin)
            step.weight = self._floats(rope.frequencies)
            if long is not None:
                step.second_weight = self._floats(long)
            self._cos_sin[key] = cos_sin
        return self._cos_sin[key]

    def _vector(self, *tensors: Tensor) -> int:
        """The address of the tensors' values as float32, one after the other."""
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


@dataclass(frozen=True)
class GatedLinear(Linear):
    """A product with the weights of gate and up, and function(gate) * up of its rows in out."""

    function: str = "silu"


def _fused(program: Program) -> Iterator[Operation]:
    """The operations, products and gated activations of what they wrote in one where they can be:
    all of a gate's groups of rows are then beside those of up, and nobody else reads what is left
    out."""
    reads = Counter(getattr(operation, "x", None) for operation in program.operations)
    writes = Counter(getattr(operation, "out", None) for operation in program.operations)
    operations = iter(program.operations)
    after = iter(program.operations[1:])
    for operation in operations:
        following = next(after, None)
        if (
            isinstance(operation, Linear)
            and isinstance(following, GatedActivation)
            and following.x == operation.out
            and reads[operation.out] == writes[operation.out]
            and _are_alike(operation.weights)
            and not operation.accumulate
        ):
            gated = {**vars(operation), "out": following.out, "function": following.function}
            yield GatedLinear(**gated)
            next(operations), next(after, None)
        else:
            yield operation


def _are_alike(weights: tuple[Tensor, ...]) -> bool:
    """Whether they are two of one format whose rows make whole groups."""
    kinds = {(format_of(weight), weight.shape) for weight in weights}
    return len(weights) == 2 and len(kinds) == 1 and weights[0].shape[0] % GROUP_ROWS == 0


def _linears(operations: list[Operation]) -> Iterator[Linear]:
    """All products that take every row, routers among them."""
    for operation in operations:
        if isinstance(operation, Linear):
            yield operation
        elif isinstance(operation, Experts):
            yield Linear(LOGITS, operation.x, (operation.router,))


def _stack_of(linear: Linear) -> Stack:
    return Stack(linear.weights, isinstance(linear, GatedLinear))


def _stacks(operations: list[Operation]) -> Iterator[Stack]:
    """All stacked weights, in the order of execution."""
    for operation in operations:
        if isinstance(operation, Linear):
            yield _stack_of(operation)
        elif isinstance(operation, Experts):
            yield Stack((operation.router,))
            yield from map(Stack, operation.gate_up)
            yield from (Stack((down,)) for down in operation.down)


def _expert_buffers(program: Program) -> dict[str, int]:
    widths: dict[str, int] = {}
    for operation in program.operations:
        if isinstance(operation, Experts):
            hidden, inner = operation.down[0].shape
            widths = {GATE_UP: 2 * inner, ACTIVATED: inner, DOWN: hidden}
            widths[LOGITS] = len(operation.down)
    return widths


def _tiled(linears: list[Linear]) -> set[str]:
    """The buffers that products with quantised weights read."""
    return {linear.x for linear in linears if not _are_floats(linear.weights)}


def _are_floats(stack: tuple[Tensor, ...]) -> bool:
    return all(format_of(weight) in FLOATS for weight in stack)


def _given(program: Program) -> set[str]:
    """The buffers that hold something before the first step: what is embedded, or written by no
    operation."""
    embedded = {op.out for op in program.operations if isinstance(op, Embed)}
    written = {output_of(op) for op in program.operations if not isinstance(op, Embed)}
    return embedded | (program.buffers.keys() - written)


def _written_after_select(program: Program) -> set[str]:
    """The buffers that hold logit rows and nothing else."""
    before: set[str] = set()
    after: set[str] = set()
    written = before
    for operation in program.operations:
        if isinstance(operation, SelectLogitRows | Pool):
            written = after
        written.add(output_of(operation))
    return after - before


def _check(program: Program) -> None:
    """Raises CannotRun for what the kernels do not do."""
    known = Embed | Norm | Linear | RopeAndStore | Attention | GatedActivation
    known |= SelectLogitRows | Softcap | Pool | Experts
    is_first = True
    for operation in program.operations:
        if not isinstance(operation, known):
            name = type(operation).__name__
            raise CannotRun(f"the cpu backend does not run {name} yet; use --backend reference")
        if isinstance(operation, Experts):
            _check_experts(operation)
        is_first &= isinstance(operation, Embed)
        if isinstance(operation, Embed) and not is_first:
            raise CannotRun("the cpu backend expects Embed before all other operations")
        for tensor in _tensors(operation):
            if tensor.type not in GGML_TYPES:
                raise CannotRun(
                    f"tensor '{tensor.name}' has type {tensor.type}; the cpu backend runs "
                    + ", ".join(GGML_TYPES)
                )
    if program.head_dim > MAX_HEAD_DIM:
        raise CannotRun(
            f"heads of {program.head_dim} values are more than the cpu backend's {MAX_HEAD_DIM}"
        )


def _check_experts(experts: Experts) -> None:
    """All experts must be laid out alike."""
    stacks = [(*gate_up, down) for gate_up, down in zip(experts.gate_up, experts.down)]
    if len({tuple((format_of(t), t.shape) for t in stack) for stack in stacks}) > 1:
        raise CannotRun("the cpu backend runs experts of one storage type only")


def _tensors(operation: Operation) -> list[Tensor]:
    match operation:
        case Embed():
            return [operation.table]
        case Norm():
            return [operation.weight]
        case Linear():
            return [*operation.weights, *operation.biases]
        case Experts():
            gate_up = [tensor for pair in operation.gate_up for tensor in pair]
            return [operation.router, *gate_up, *operation.down]
        case RopeAndStore():
            return [norm for norm in (operation.q_norm, operation.k_norm) if norm is not None]
    return []
