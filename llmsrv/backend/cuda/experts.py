"""Launches the operation Experts: routing on the device, then products grouped by expert.

A choice is one expert of one row.  Choices are sorted by expert and cut into groups of at most as
many rows as a block multiplies, so a step reads the weights of a chosen expert once or a few times.
The host knows only how many groups there can be, and launches blocks for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.buffers import DTYPES
from llmsrv.backend.cuda.buffers import stride_of
from llmsrv.backend.cuda.linear import Groups
from llmsrv.backend.cuda.linear import LinearKernels
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.step import row_capacity
from llmsrv.backend.cuda.weights import Weights
from llmsrv.backend.cuda.weights import pack
from llmsrv.backend.cuda.weights import pack_experts
from llmsrv.backend.cuda.weights import packed_bytes
from llmsrv.backend.cuda.weights import packed_experts_bytes
from llmsrv.backend.program import Experts
from llmsrv.backend.program import Program

WARP = 32
THREADS = 256  # of a block, in group_choices and sum_choices


@dataclass(frozen=True)
class PackedExperts:
    operation: Experts
    router: Weights
    gate_up: Weights
    down: Weights


@dataclass(frozen=True)
class _Work:
    """Arrays between the kernels, large enough for the largest step of every operation.

    logits        [rows, experts] float32
    topk_ids      [choices] int32
    topk_weights  [choices] float32
    activated     operand [choices, intermediate]
    down          [choices, hidden] float32
    """

    logits: Any
    topk_ids: Any
    topk_weights: Any
    sorted_choices: Any
    groups: Any
    num_groups: Any
    activated: Any
    down: Any


class ExpertKernels:
    def __init__(
        self,
        cp: Any,
        kernels: Kernels,
        linear: LinearKernels,
        program: Program,
        limits: Limits,
        dtype: str,
    ) -> None:
        self._cp = cp
        self._kernels = kernels
        self._linear = linear
        self._dtype = dtype
        self._work = self._new_work(program, row_capacity(limits))

    def _new_work(self, program: Program, num_rows: int) -> _Work | None:
        operations = [each for each in program.operations if isinstance(each, Experts)]
        if not operations:
            return None
        num_experts = max(len(each.down) for each in operations)
        num_choices = num_rows * max(each.num_chosen for each in operations)
        hidden, intermediate = (
            max(each.down[0].shape[axis] for each in operations) for axis in (0, 1)
        )
        zeros = self._cp.zeros
        return _Work(
            logits=zeros((num_rows, stride_of(num_experts)), np.float32),
            topk_ids=zeros(num_choices, np.int32),
            topk_weights=zeros(num_choices, np.float32),
            sorted_choices=zeros(num_choices, np.int32),
            groups=zeros((num_choices, 4), np.int32),
            num_groups=zeros(1, np.int32),
            activated=zeros((num_choices, stride_of(intermediate)), DTYPES[self._dtype]),
            down=zeros((num_choices, stride_of(hidden)), np.float32),
        )

    @staticmethod
    def packed_bytes(operation: Experts) -> int:
        """What pack() allocates."""
        down = [(weight,) for weight in operation.down]
        return (
            packed_bytes((operation.router,))
            + packed_experts_bytes(operation.gate_up, is_paired=True)
            + packed_experts_bytes(down)
        )

    def pack(self, operation: Experts, tick: Callable[[], None]) -> PackedExperts:
        down = [(weight,) for weight in operation.down]
        return PackedExperts(
            operation,
            pack(self._cp, (operation.router,), self._dtype, tick),
            pack_experts(self._cp, operation.gate_up, self._dtype, tick, is_paired=True),
            pack_experts(self._cp, down, self._dtype, tick),
        )

    def experts(self, out: Any, x: Any, packed: PackedExperts, num_rows: int) -> None:
        """out += what the chosen experts return.

        out  float32
        x    operand
        """
        operation, work = packed.operation, self._work
        assert work is not None
        num_chosen = operation.num_chosen
        self._linear.linear(work.logits, x, packed.router, num_rows)
        self._route(operation, work, num_rows)
        groups = self._group(operation, work, num_rows)
        self._linear.grouped(
            work.activated, x, packed.gate_up, groups, num_chosen, gated=operation.function
        )
        self._linear.grouped(work.down, work.activated, packed.down, groups, 1)
        width = operation.down[0].shape[0]
        self._kernels.get("experts", "sum_choices")(
            (-(-width // THREADS), num_rows),
            (THREADS,),
            (
                out,
                np.int64(out.shape[1]),
                work.down,
                np.int64(work.down.shape[1]),
                work.topk_weights,
                np.int32(width),
                np.int32(num_chosen),
                np.float32(operation.scale),
            ),
        )

    def _route(self, operation: Experts, work: _Work, num_rows: int) -> None:
        self._kernels.get("experts", "route")(
            (num_rows,),
            (WARP,),
            (
                work.topk_ids,
                work.topk_weights,
                work.logits,
                np.int64(work.logits.shape[1]),
                np.int32(len(operation.down)),
                np.int32(operation.num_chosen),
                np.int32(operation.normalise),
            ),
        )

    def _group(self, operation: Experts, work: _Work, num_rows: int) -> Groups:
        num_experts, num_choices = len(operation.down), num_rows * operation.num_chosen
        group_rows = self._linear.group_rows(num_choices, num_experts)
        self._kernels.get("experts", "group_choices")(
            (num_experts,),
            (THREADS,),
            (
                work.sorted_choices,
                work.groups,
                work.num_groups,
                work.topk_ids,
                np.int32(num_choices),
                np.int32(num_experts),
                np.int32(group_rows),
            ),
            shared_mem=4 * num_experts,
        )
        # Each expert's last group may have a single choice.
        max_groups = min(num_choices, num_experts + num_choices // group_rows)
        return Groups(work.groups, work.num_groups, work.sorted_choices, group_rows, max_groups)
