"""What the CUDA backend launches for a program, recorded instead of compiled and run.

The stand-in for cupy provides the arrays.  So the launches are those of the product, for any
architecture and any size of model.
"""

import contextlib
import os
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Plan
from llmsrv.backend.cuda import backend as cuda_backend
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.layout import Layout
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.source import Macro
from llmsrv.backend.cuda.source import compile_options
from llmsrv.backend.cuda.weights import _Stack
from llmsrv.backend.program import Operation
from llmsrv.backend.sampling.table import SamplingParameters
from tests.support.cuda import install_stand_in
from tests.support.nvrtc import ARCHITECTURES

MEMORY_MIB = 1 << 20  # as if any model fits; what no kernel writes takes no memory


@dataclass(frozen=True)
class Module:
    """A file of kernels, compiled with its options."""

    stem: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """
    shared_bytes  dynamic shared memory
    operation     of the program, fused; None: it belongs to none, as conversions and sampling
    """

    module: Module
    function: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    operation: Operation | None = field(default=None, compare=False, repr=False)

    @property
    def num_threads(self) -> int:
        """Of a block."""
        count = 1
        for size in self.block:
            count *= size
        return count


@dataclass
class Record:
    """launches: so far; operation: the one that is being launched"""

    launches: list[Launch] = field(default_factory=list)
    operation: Operation | None = None


class RecordingKernels(Kernels):
    """Kernels that only write down how they are launched."""

    def __init__(self, record: Record, **macros: Macro) -> None:
        super().__init__(None, **macros)
        self._record = record

    def get(self, stem: str, function: str, **macros: Macro) -> Any:
        module = Module(stem, compile_options(self._macros | macros))
        return RecordingKernel(self._record, module, function)


class RecordingKernel:
    max_dynamic_shared_size_bytes = 0

    def __init__(self, record: Record, module: Module, function: str) -> None:
        self._record = record
        self._module = module
        self._function = function

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
    ) -> None:
        launch = Launch(
            self._module,
            self._function,
            tuple(map(int, grid)),
            tuple(map(int, block)),
            int(shared_mem),
            self._record.operation,
        )
        self._record.launches.append(launch)


@contextlib.contextmanager
def recording(
    capability: int,
    num_multiprocessors: int = 108,
    dtype: str = "float16",
    packs_weights: bool = True,
) -> Iterator[tuple[CUDABackend, Record]]:
    """A backend for a device of this architecture, and what it launches.

    packs_weights  False: weights are only allocated, which takes no memory and no time
    """
    record = Record()
    device = Device(
        cp=install_stand_in(),
        index=0,
        name=f"sm_{capability}",
        capability=capability,
        num_multiprocessors=num_multiprocessors,
        max_shared_bytes=ARCHITECTURES[capability].max_shared_bytes,
    )
    launch_of, upload = Layout._launch, _Stack.upload

    def tagged(layout: Layout, operation: Operation) -> Any:
        launch = launch_of(layout, operation)

        def run(step: Any) -> None:
            record.operation = operation
            launch(step)
            record.operation = None

        return run

    with (
        mock.patch.dict(os.environ, CUDA_ON_CPU_MEMORY_MIB=str(MEMORY_MIB)),
        mock.patch.object(cuda_backend, "open_device", lambda *_: device),
        mock.patch.object(
            cuda_backend, "Kernels", lambda cp, **macros: RecordingKernels(record, **macros)
        ),
        mock.patch.object(Layout, "_launch", tagged),
        mock.patch.object(_Stack, "upload", upload if packs_weights else lambda *_: None),
    ):
        yield CUDABackend(CUDAOptions(Path(), dtype=dtype, warms_up=False)), record


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one row."""
    return len(batch.ids) == len(batch.block_tables)


def step_launches(
    plan: Plan, record: Record, batch: Batch, samplings: Sequence[SamplingParameters] = ()
) -> list[Launch]:
    """What a step launches; its logit rows are sampled with each of `samplings` in turn."""
    record.launches.clear()
    plan.forward(batch)
    slots = np.arange(len(batch.logit_rows), dtype=np.int32)
    for parameters in samplings:
        for slot in slots.tolist():
            plan.sampling.set(slot, parameters)
        plan.enqueue_sample(slots, np.zeros(len(slots), np.int64))
    return list(record.launches)
