"""Fuses operations of a program that the C library can run as one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llmsrv.backend.cpu.library import GROUP_ROWS
from llmsrv.backend.cpu.weights import format_of
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Program
from llmsrv.backend.program import Tensor


@dataclass(frozen=True)
class GatedLinear(Linear):
    """out = function(gate) * up, where [gate, up] is the product of the two stacked weights."""

    function: str = "silu"


def fuse(program: Program) -> Iterator[Operation]:
    """The operations, with each product fused with a gated activation of its output if possible.

    Then gate's groups of weight rows alternate with up's.  No other operation may read the output
    of the product, because it is never written.
    """
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
            and _have_one_layout(operation.weights)
            and not operation.accumulate
        ):
            gated = {**vars(operation), "out": following.out, "function": following.function}
            yield GatedLinear(**gated)
            next(operations), next(after, None)
        else:
            yield operation


def _have_one_layout(weights: tuple[Tensor, ...]) -> bool:
    """True for two tensors of the same format and shape whose rows fill whole groups."""
    kinds = {(format_of(weight), weight.shape) for weight in weights}
    return len(weights) == 2 and len(kinds) == 1 and weights[0].shape[0] % GROUP_ROWS == 0
