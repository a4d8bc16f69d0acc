"""Launches the grouped products of experts."""

from collections.abc import Callable
from typing import Any

from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.program import Experts
from llmsrv.backend.program import Program


class ExpertKernels:
    def __init__(
        self, kernels: Kernels, device: Device, program: Program, limits: Limits, dtype: str
    ) -> None:
        pass

    @staticmethod
    def packed_bytes(operation: Experts) -> int:
        return 0

    def pack(self, operation: Experts, tick: Callable[[], None]) -> Any:
        raise CannotRun("the cuda backend does not run Experts yet")

    def experts(self, out: Any, x: Any, packed: Any, num_rows: int) -> None:
        pass
