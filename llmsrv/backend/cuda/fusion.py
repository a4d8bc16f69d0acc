"""Fuses operations of a program that one kernel can run.

    Norm, Linear                    the product normalizes its input
    Linear, GatedActivation         the product of gate and up weights writes function(gate) * up,
                                    in 16 bits, as products read it
    Linear, Softcap                 the product caps its output

The buffer between two fused operations is not written, so nothing else may read it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.cuda.pack import format_of
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import Softcap
from llmsrv.backend.program import Tensor
from llmsrv.backend.program import output_of


@dataclass(frozen=True)
class FusedLinear(Linear):
    """norm: of its input x; gated: function of the activation; softcap: of the output; or None"""

    norm: Norm | None = None
    gated: str | None = None
    softcap: float | None = None


def fuse(program: Program) -> Iterator[Operation]:
    """The operations, with every Linear as a FusedLinear."""
    operations = list(program.operations)
    reads = Counter(name for each in operations for name in inputs_of(each))
    writes = Counter(output_of(each) for each in operations)
    read_as_floats = {
        name
        for each in operations
        if not isinstance(each, Linear | Experts)
        for name in inputs_of(each)
    }

    def is_between(name: str) -> bool:
        """Whether each value of the buffer is read exactly once."""
        return reads[name] == writes[name]

    index = 0
    while index < len(operations):
        operation = operations[index]
        following = operations[index + 1] if index + 1 < len(operations) else None
        if _can_norm(operation, following) and is_between(output_of(operation)):
            assert isinstance(operation, Norm) and isinstance(following, Linear)
            norm, operation = operation, following
            index += 1
        else:
            norm = None
        index += 1
        if not isinstance(operation, Linear):
            yield operation
            continue
        fields = {**vars(operation), "norm": norm}
        following = operations[index] if index < len(operations) else None
        if not operation.accumulate:
            match following:
                case GatedActivation(out=out, x=operation.out, function=function):
                    pair = _gate_and_up(operation.weights)
                    can_be_operand = out not in read_as_floats
                    if is_between(operation.out) and _can_pair(pair) and can_be_operand:
                        fields |= {"out": out, "gated": function, "weights": pair}
                        index += 1
                case Softcap(x=operation.out, cap=cap):
                    fields["softcap"] = cap
                    index += 1
        yield FusedLinear(**fields)


def _can_norm(operation: Operation, following: Operation | None) -> bool:
    return (
        isinstance(operation, Norm)
        and isinstance(following, Linear)
        and following.x == operation.out
        and following.out != operation.x  # blocks would read what others have written
        and not operation.accumulate
    )


def _gate_and_up(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights of gate and up; a single tensor (Phi 3) holds them one above the other."""
    if len(weights) != 1 or weights[0].shape[0] % 2:
        return weights
    [both] = weights
    shape = both.shape[0] // 2, both.shape[1]
    halves = zip(("gate", "up"), np.split(both.data, 2), strict=True)
    return tuple(Tensor(f"{both.name}.{part}", both.type, shape, data) for part, data in halves)


def _can_pair(weights: tuple[Tensor, ...]) -> bool:
    """True for gate and up of the same format and shape, which the kernel reads side by side."""
    kinds = {(format_of(weight), weight.shape) for weight in weights}
    return len(weights) == 2 and len(kinds) == 1


def outputs_of(operation: Operation) -> list[str]:
    """The buffers that the operation may write."""
    norm = operation.norm if isinstance(operation, FusedLinear) else None
    return [output_of(operation)] + ([norm.out] if norm else [])


def inputs_of(operation: Operation) -> list[str]:
    """The buffers that the operation reads, besides one that it accumulates to."""
    match operation:
        case FusedLinear(norm=Norm(x=x)):
            return [x]
        case RopeAndStore() | Attention():
            return [operation.qkv]
        case Norm() | Linear() | GatedActivation():
            return [operation.x]
    return [operation.x] if hasattr(operation, "x") else []
