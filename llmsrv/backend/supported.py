"""Checks that the kernels of a backend can run a program."""

from collections.abc import Callable

from llmsrv.backend.base import CannotRun
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.program import Tensor
from llmsrv.backend.program import tensors_of
from llmsrv.backend.quants.ggml_types import GGML_TYPES


def check_supported(
    program: Program, backend: str, max_head_dim: int, format_of: Callable[[Tensor], str]
) -> None:
    """Raises CannotRun if the kernels lack something that the program needs.

    backend    its name
    format_of  the format that the kernels read the tensor in
    """
    known = Embed | Norm | Linear | RopeAndStore | Attention | GatedActivation
    known |= SelectLogitRows | Softcap | Pool | Experts
    is_first = True
    for operation in program.operations:
        if not isinstance(operation, known):
            name = type(operation).__name__
            raise CannotRun(
                f"the {backend} backend does not run {name} yet; use --backend reference"
            )
        if isinstance(operation, Experts):
            _check_experts(operation, backend, format_of)
        is_first &= isinstance(operation, Embed)
        if isinstance(operation, Embed) and not is_first:
            raise CannotRun(f"the {backend} backend expects Embed before all other operations")
        for tensor in tensors_of(operation):
            if tensor.type not in GGML_TYPES:
                raise CannotRun(
                    f"tensor '{tensor.name}' has type {tensor.type}; the {backend} backend runs "
                    + ", ".join(GGML_TYPES)
                )
    if program.head_dim > max_head_dim:
        raise CannotRun(
            f"heads of {program.head_dim} values are more than the {backend} backend's "
            f"{max_head_dim}"
        )


def _check_experts(
    experts: Experts, backend: str, format_of: Callable[[Tensor], str]
) -> None:
    """All experts must have the same formats and shapes."""
    stacks = [(*gate_up, down) for gate_up, down in zip(experts.gate_up, experts.down)]
    if len({tuple((format_of(t), t.shape) for t in stack) for stack in stacks}) > 1:
        raise CannotRun(f"the {backend} backend runs experts of one storage type only")
