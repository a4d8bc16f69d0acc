"""Lays out a program for the device: its operations become a list of launches.

A launch is a call that enqueues one or a few kernels on the current stream.  It reads the arrays of
the step and writes buffers, none of which ever move, so a step can be captured in a CUDA graph.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any
from typing import NamedTuple

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.cuda.attention import AttentionKernels
from llmsrv.backend.cuda.attention import RopeWeights
from llmsrv.backend.cuda.buffers import Buffers
from llmsrv.backend.cuda.buffers import operand_inputs
from llmsrv.backend.cuda.experts import ExpertKernels
from llmsrv.backend.cuda.fusion import FusedLinear
from llmsrv.backend.cuda.fusion import outputs_of
from llmsrv.backend.cuda.linear import LinearKernels
from llmsrv.backend.cuda.linear import NormWeight
from llmsrv.backend.cuda.step import Step
from llmsrv.backend.cuda.weights import Weights
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Pool
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.program import Tensor
from llmsrv.backend.program import output_of
from llmsrv.backend.quants.ggml_types import dequantize

Launch = Callable[[Step], None]


class Stack(NamedTuple):
    """The weights of a product, stacked along rows; is_paired: gate and up, see weights.pack."""

    tensors: tuple[Tensor, ...]
    is_paired: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        return *names_of(self.tensors), self.is_paired


@dataclass(frozen=True)
class Memory:
    """The arrays on the device that launches use, besides those of the step.

    weights      of a stack, by its key
    q            [rows, num_heads, padded_dim] 16 bits: rotated q heads of one layer
    keys         [num_blocks, num_layers, num_kv_heads, BLOCK_SIZE, padded_dim] 16 bits
    values       like keys
    sampled_ids  int32, what each logit row of the step before sampled
    """

    buffers: Buffers
    weights: dict[tuple[object, ...], Weights]
    q: Any
    keys: Any
    values: Any
    sampled_ids: Any


@dataclass(frozen=True)
class Launchers:
    linear: LinearKernels
    experts: ExpertKernels
    attention: AttentionKernels


class Layout:
    """
    launches            of a step, in order
    logit_row_launches  those after the others, if the step has logit rows
    """

    def __init__(
        self,
        cp: Any,
        operations: list[Operation],
        widths: Mapping[str, int],
        memory: Memory,
        launchers: Launchers,
        tick: Callable[[], None],
    ) -> None:
        """operations: of the program, fused; widths: of its buffers"""
        self._tick = tick
        self._cp = cp
        self._widths = widths
        self._memory = memory
        self._linear, self._attention = launchers.linear, launchers.attention
        self._experts = launchers.experts
        self._vectors: dict[tuple[str, ...], Any] = {}
        self._is_selected = False
        self._converted: set[str] = set()  # operands that are up to date
        self.launches: list[Launch] = []
        self.logit_row_launches: list[Launch] = []
        for operation in operations:
            self._add(operation)

    def _add(self, operation: Operation) -> None:
        if isinstance(operation, SelectLogitRows | Pool):
            self._is_selected = True
        has_norm = isinstance(operation, FusedLinear) and operation.norm is not None
        for name in operand_inputs(operation):
            if not has_norm and self._buffer(name) is not self._operand(name):
                self._add_conversion(name)
        self._append(self._launch(operation))
        self._converted -= set(outputs_of(operation))

    def _add_conversion(self, name: str) -> None:
        if name not in self._converted:
            self._converted.add(name)
            out, x, num_rows = self._operand(name), self._buffer(name), self._num_rows()
            width = self._widths[name]
            self._append(lambda step: self._linear.convert(out, x, width, num_rows(step)))

    def _append(self, launch: Launch) -> None:
        (self.logit_row_launches if self._is_selected else self.launches).append(launch)

    def _launch(self, operation: Operation) -> Launch:
        match operation:
            case Embed():
                return self._embed(operation)
            case Norm():
                return self._norm(operation)
            case FusedLinear():
                return self._product(operation)
            case Experts():
                return self._grouped_products(operation)
            case RopeAndStore():
                return self._rope(operation)
            case Attention():
                return self._attend(operation)
            case GatedActivation() | Softcap() | SelectLogitRows() | Pool():
                return self._of_columns(operation)
        raise AssertionError(f"check_supported lets {operation} pass")

    # ---- One operation each

    def _embed(self, embed: Embed) -> Launch:
        table, out = self._memory.weights[stack_of(embed).key], self._buffer(embed.out)
        sampled_ids, embed_rows = self._memory.sampled_ids, self._linear.embed

        def launch(step: Step) -> None:
            embed_rows(out, table, step.device["ids"], sampled_ids, step.num_rows, embed.scale)

        return launch

    def _norm(self, norm: Norm) -> Launch:
        out, x, num_rows = self._buffer(norm.out), self._buffer(norm.x), self._num_rows()
        weight = self._vector(norm.weight)
        return lambda step: self._linear.norm(
            out, x, weight, norm.eps, num_rows(step), norm.accumulate
        )

    def _product(self, linear: FusedLinear) -> Launch:
        weights, num_rows = self._memory.weights[stack_of(linear).key], self._num_rows()
        out, norm = self._buffer(linear.out), linear.norm
        x = self._operand(linear.x) if norm is None else self._buffer(norm.x)
        options: dict[str, Any] = {
            "bias": self._vector(*linear.biases) if linear.biases else None,
            "scale": linear.scale,
            "accumulate": linear.accumulate,
            "gated": linear.gated,
            "softcap": linear.softcap,
            "norm": None,
        }
        if norm is not None:
            weight, normed = self._vector(norm.weight), self._operand(norm.out)
            options["norm"] = NormWeight(weight, norm.eps, normed)
        return lambda step: self._linear.linear(out, x, weights, num_rows(step), **options)

    def _grouped_products(self, experts: Experts) -> Launch:
        out, x, num_rows = self._buffer(experts.out), self._operand(experts.x), self._num_rows()
        packed = self._experts.pack(experts, self._tick)
        return lambda step: self._experts.experts(out, x, packed, num_rows(step))

    def _rope(self, rope: RopeAndStore) -> Launch:
        memory, qkv = self._memory, self._buffer(rope.qkv)
        weights = RopeWeights(
            self._floats(rope.frequencies),
            self._floats(rope.long_frequencies),
            None if rope.q_norm is None else self._vector(rope.q_norm),
            None if rope.k_norm is None else self._vector(rope.k_norm),
        )
        return lambda step: self._attention.rope_and_store(
            rope, weights, qkv, memory.q, memory.keys, memory.values, step
        )

    def _attend(self, attention: Attention) -> Launch:
        memory, out = self._memory, self._buffer(attention.out)
        return lambda step: self._attention.attention(
            attention, memory.q, out, memory.keys, memory.values, step
        )

    def _of_columns(self, operation: GatedActivation | Softcap | SelectLogitRows | Pool) -> Launch:
        kernels, num_rows = self._attention, self._num_rows()
        name = output_of(operation)
        x, out, width = self._buffer(operation.x), self._buffer(name), self._widths[name]
        match operation:
            case GatedActivation(function=function):
                return lambda step: kernels.gated_activation(
                    x, out, width, function, num_rows(step)
                )
            case Softcap(cap=cap):
                return lambda step: kernels.softcap(x, width, cap, num_rows(step))
            case Pool(kind="mean"):
                return lambda step: kernels.pool_mean(x, out, width, step)
        return lambda step: kernels.select(x, out, width, step)

    # ---- Arrays

    def _num_rows(self) -> Callable[[Step], int]:
        """The number of rows that an operation here computes."""
        if self._is_selected:
            return lambda step: step.num_logit_rows
        return lambda step: step.num_rows

    def _buffer(self, name: str) -> Any:
        return self._memory.buffers.arrays[name]

    def _operand(self, name: str) -> Any:
        return self._memory.buffers.operand(name)

    def _floats(self, values: Array | None) -> Any:
        return None if values is None else self._cp.asarray(values.astype(np.float32))

    def _vector(self, *tensors: Tensor) -> Any:
        """The tensors' values as float32, concatenated."""
        key = names_of(tensors)
        if key not in self._vectors:
            sizes = [prod(tensor.shape) for tensor in tensors]
            values = np.empty(sum(sizes), np.float32)
            parts = np.split(values, np.cumsum(sizes)[:-1])
            for tensor, part in zip(tensors, parts, strict=True):
                dequantize(tensor.type, tensor.data, part)
            self._vectors[key] = self._cp.asarray(values)
        return self._vectors[key]


def names_of(tensors: tuple[Tensor, ...]) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in tensors)


def stack_of(operation: Embed | FusedLinear) -> Stack:
    if isinstance(operation, Embed):
        return Stack((operation.table,))
    return Stack(operation.weights, operation.gated is not None)


def stacks_of(operations: Iterable[Operation]) -> list[Stack]:
    """The weights of embeddings and of products but those of experts, each once."""
    stacks = [stack_of(each) for each in operations if isinstance(each, Embed | FusedLinear)]
    return list({stack.key: stack for stack in stacks}.values())
