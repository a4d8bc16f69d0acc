"""The buffers of a program on the device.

A buffer is float32 [rows, stride].  An operand is a buffer that only products read, and that is
written by operations that can write 16 bits; it is float16 or bfloat16.  So is the output of a
product with a fused activation, even if nothing reads it.  Strides are multiples of 32, and the
columns beyond a buffer's width are zero.  If a product reads a float32 buffer, it reads a copy of
it in 16 bits (OPERAND_OF).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.fusion import FusedLinear
from llmsrv.backend.cuda.fusion import inputs_of
from llmsrv.backend.cuda.fusion import outputs_of
from llmsrv.backend.cuda.step import logit_row_capacity
from llmsrv.backend.cuda.step import row_capacity
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import output_of

COLUMN_UNIT = 32
OPERAND_OF = "operand of "
DTYPES = {"float16": np.float16, "bfloat16": np.uint16}  # CuPy has no bfloat16


def stride_of(width: int) -> int:
    return -(-width // COLUMN_UNIT) * COLUMN_UNIT


def padded_head_dim(program: Program) -> int:
    return -(-program.head_dim // 16) * 16


class Buffers:
    """arrays: name -> array on the device, of every buffer that a kernel reads or writes."""

    def __init__(
        self,
        cp: Any,
        program: Program,
        operations: Sequence[Operation],
        limits: Limits,
        dtype: str,
    ) -> None:
        """operations: of the program, fused; dtype: of operands, "float16" or "bfloat16"."""
        self._program = program
        self._logit_row_buffers = _only_logit_rows(operations)
        self._rows = row_capacity(limits)
        self._logit_rows = logit_row_capacity(limits)
        self._cp = cp
        self._dtype = dtype
        self.arrays: dict[str, Any] = {}
        used = {name for each in operations for name in (*_reads(each), *outputs_of(each))}
        operands = operand_names(operations)
        # A buffer that no operation uses holds what a test writes to it.
        for name in program.buffers.keys() & used | _unwritten(program):
            self.arrays[name] = self._new(name, name in operands)
        for each in operations:
            for name in operand_inputs(each):
                if name not in operands and OPERAND_OF + name not in self.arrays:
                    self.arrays[OPERAND_OF + name] = self._new(name, is_operand=True)

    def operand(self, name: str) -> Any:
        """The buffer in 16 bits: itself, or its copy."""
        return self.arrays.get(OPERAND_OF + name, self.arrays[name])

    def read(self, name: str, num_rows: int) -> Array:
        """The first rows as float32; zeros if operations were fused and nothing wrote the buffer.

        Waits for the device.  Raises KeyError if the program has no such buffer.
        """
        width = self._program.buffers[name]
        if name not in self.arrays:
            return np.zeros((num_rows, width), np.float32)
        values: Array = self.arrays[name][:num_rows].get()[:, :width]
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def _new(self, name: str, is_operand: bool) -> Any:
        rows = self._logit_rows if name in self._logit_row_buffers else self._rows
        dtype = DTYPES[self._dtype] if is_operand else np.float32
        return self._cp.zeros((rows, stride_of(self._program.buffers[name])), dtype)


def operand_names(operations: Sequence[Operation]) -> set[str]:
    """The buffers that are operands."""
    written = {name for each in operations for name in outputs_of(each)}
    written_as_floats = {output_of(each) for each in operations if not _can_write_operand(each)}
    read_by_products = {name for each in operations for name in operand_inputs(each)}
    read_as_floats = {
        name for each in operations for name in inputs_of(each) if name not in operand_inputs(each)
    }
    gated = {each.out for each in operations if isinstance(each, FusedLinear) and each.gated}
    return (written & (read_by_products | gated)) - written_as_floats - read_as_floats


def operand_inputs(operation: Operation) -> list[str]:
    """The buffer that the operation reads as an operand, if it is a product.

    A product that is fused with a norm reads float32 in small steps; in others, the norm is
    computed first, and its output is the product's operand.
    """
    return [operation.x] if isinstance(operation, FusedLinear | Experts) else []


def _reads(operation: Operation) -> list[str]:
    return [*inputs_of(operation), *operand_inputs(operation)]


def _can_write_operand(operation: Operation) -> bool:
    match operation:
        case Norm(accumulate=accumulate):
            return not accumulate
        case FusedLinear(gated=gated):
            return gated is not None
    return isinstance(operation, Attention | GatedActivation | SelectLogitRows)


def _unwritten(program: Program) -> set[str]:
    return program.buffers.keys() - {output_of(each) for each in program.operations}


def _only_logit_rows(operations: Sequence[Operation]) -> set[str]:
    """The buffers that only ever hold logit rows."""
    before: set[str] = set()
    after: set[str] = set()
    written = before
    for operation in operations:
        if isinstance(operation, SelectLogitRows | Pool):
            written = after
        written.update(outputs_of(operation))
    return after - before
