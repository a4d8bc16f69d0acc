"""CUDA graphs of decode steps: all launches of a step as one, a tenth of their cost.

A graph holds the arguments of its launches by value, so there is one for each padded number of
rows.  What else changes from step to step is in device arrays, which are kept alive by the plan.
Source: CUDA Programming Guide, "CUDA Graphs".
"""

from collections.abc import Callable
from typing import Any

from llmsrv.backend.cuda.step import Step


class Graphs:
    """Runs steps, those that decode as graphs."""

    def __init__(self, stream: Any, run: Callable[[Step], None]) -> None:
        """run: launches all operations of a step on the current stream, which is `stream`."""
        self._stream = stream
        self._run = run
        self._graphs: dict[int, Any] = {}
        self._warm: set[int] = set()

    def __call__(self, step: Step) -> None:
        """The first step of a size is launched kernel by kernel: that loads the kernels, which may
        not happen while a graph is captured.  The second is captured."""
        size = step.num_rows
        if not step.is_decode or size not in self._warm:
            self._run(step)
            if step.is_decode:
                self._warm.add(size)
            return
        if size not in self._graphs:
            self._graphs[size] = self._captured(step)
        self._graphs[size].launch(self._stream)

    def _captured(self, step: Step) -> Any:
        self._stream.begin_capture()
        try:
            self._run(step)
        finally:
            graph = self._stream.end_capture()
        return graph
