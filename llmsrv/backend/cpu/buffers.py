"""Which buffers and stacked weights the operations of a program need."""

from collections.abc import Iterable
from collections.abc import Iterator

from llmsrv.backend.cpu.fusion import GatedLinear
from llmsrv.backend.cpu.library import FLOATS
from llmsrv.backend.cpu.weights import Stack
from llmsrv.backend.cpu.weights import format_of
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Tensor
from llmsrv.backend.program import output_of

# Buffers of experts: the router's logits, and those with a row for each choice (experts.h).
LOGITS = "experts.logits"
CHOICES = "choices."
GATE_UP, ACTIVATED, DOWN = CHOICES + "gate_up", CHOICES + "activated", CHOICES + "down"


def linears(operations: list[Operation]) -> Iterator[Linear]:
    """All products that process every row, including routers."""
    for operation in operations:
        if isinstance(operation, Linear):
            yield operation
        elif isinstance(operation, Experts):
            yield Linear(LOGITS, operation.x, (operation.router,))


def stack_of(linear: Linear) -> Stack:
    return Stack(linear.weights, isinstance(linear, GatedLinear))


def stacks(operations: list[Operation]) -> Iterator[Stack]:
    """All stacked weights, in order of execution."""
    for operation in operations:
        if isinstance(operation, Linear):
            yield stack_of(operation)
        elif isinstance(operation, Experts):
            yield Stack((operation.router,))
            yield from map(Stack, operation.gate_up)
            yield from (Stack((down,)) for down in operation.down)


def expert_buffers(program: Program) -> dict[str, int]:
    widths: dict[str, int] = {}
    for operation in program.operations:
        if isinstance(operation, Experts):
            hidden, inner = operation.down[0].shape
            widths = {GATE_UP: 2 * inner, ACTIVATED: inner, DOWN: hidden}
            widths[LOGITS] = len(operation.down)
    return widths


def tiled_buffers(linears: Iterable[Linear]) -> set[str]:
    """The buffers that products with quantized weights read."""
    return {linear.x for linear in linears if not are_floats(linear.weights)}


def are_floats(stack: tuple[Tensor, ...]) -> bool:
    return all(format_of(weight) in FLOATS for weight in stack)


def prefilled_buffers(program: Program) -> set[str]:
    """The buffers that hold values before C runs: outputs of Embed, and those that no operation
    writes."""
    embedded = {op.out for op in program.operations if isinstance(op, Embed)}
    written = {output_of(op) for op in program.operations if not isinstance(op, Embed)}
    return embedded | (program.buffers.keys() - written)


def logit_row_buffers(program: Program) -> set[str]:
    """The buffers that only ever hold logit rows."""
    before: set[str] = set()
    after: set[str] = set()
    written = before
    for operation in program.operations:
        if isinstance(operation, SelectLogitRows | Pool):
            written = after
        written.add(output_of(operation))
    return after - before
