"""A captured graph: the operations, with the arguments that they had when they were captured."""

from typing import Any

from cupy.cuda.stream import Operation
from cupy.cuda.stream import Stream
from cupy.cuda.stream import get_current_stream

__all__ = ["Graph"]


class Graph:
    def __init__(self, *_: object) -> None:
        raise TypeError("a graph comes from Stream.end_capture")

    @classmethod
    def _captured(cls, operations: list[Operation]) -> "Graph":
        graph = object.__new__(cls)
        graph._operations = operations
        return graph

    _operations: list[Operation]

    def launch(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        for operation in self._operations:
            stream._enqueue(operation)

    def upload(self, stream: Any = None) -> None:
        """Prepares the first launch; nothing to do here."""
