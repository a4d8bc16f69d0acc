"""Checks that the C library can run a program."""

from llmsrv.backend.base import CannotRun
from llmsrv.backend.cpu.library import MAX_HEAD_DIM
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
from llmsrv.backend.quants.ggml_types import GGML_TYPES


def check_supported(program: Program) -> None:
    """Raises CannotRun if the kernels lack something that the program needs."""
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
    """All experts must have the same formats and shapes."""
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
