"""Hands a file's tensors to the architectures, each checked against what is expected of it."""

from collections.abc import Callable
from collections.abc import Mapping

import numpy as np

from llmsrv.backend.base import Array
from llmsrv.backend.base import Tensor
from llmsrv.backend.quants import TYPES
from llmsrv.backend.quants import dequantise
from llmsrv.errors import ModelError
from llmsrv.files.gguf import GGUFFile

# In old files; every reader computes rope's frequencies itself.
IGNORED = ".attn_rot_embd"


class Tensors:
    """The tensors of one file.  What was taken is remembered: what is left over is an error."""

    def __init__(self, gguf: GGUFFile, tick: Callable[[], None]) -> None:
        self.gguf = gguf
        self.tick = tick
        self.taken: set[str] = set()

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor that must be there, with this shape; ModelError when it is not."""
        tensor = self.maybe_take(name, *shape)
        if tensor is None:
            raise ModelError(f"{self.gguf.path}: tensor '{name}' is missing; expected {shape}")
        return tensor

    def maybe_take(self, name: str, *shape: int) -> Tensor | None:
        """A tensor that may be missing; ModelError when it is there and not as expected."""
        info = self.gguf.tensors.get(name)
        if info is None:
            return None
        where = f"{self.gguf.path}: tensor '{name}'"
        if info.shape != shape:
            raise ModelError(f"{where} has shape {info.shape}; expected {shape}")
        if info.type not in TYPES:
            known = ", ".join(TYPES)
            raise ModelError(f"{where} has type {info.type}; this version runs {known}")
        self.taken.add(name)
        self.tick()
        return Tensor(name, info.type, shape, np.frombuffer(self.gguf.data(info), np.uint8))

    def maybe_values(self, name: str, size: int) -> Array | None:
        """A small tensor's values as float32, all finite and above 0."""
        tensor = self.maybe_take(name, size)
        if tensor is None:
            return None
        values = np.empty(size, np.float32)
        dequantise(tensor.type, tensor.data, values)
        if not np.all((values > 0) & np.isfinite(values)):
            raise ModelError(f"{self.gguf.path}: tensor '{name}' must be finite and above 0")
        return values

    def linear(
        self, rows: Mapping[str, int], columns: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The weights NAME.weight [rows, columns] of a product, and NAME.bias [rows] of all or none
        of them."""
        weights = [self.take(f"{name}.weight", size, columns) for name, size in rows.items()]
        has_biases = any(f"{name}.bias" in self.gguf.tensors for name in rows)
        biases = [self.take(f"{name}.bias", size) for name, size in rows.items() if has_biases]
        return tuple(weights), tuple(biases)

    def check_all_taken(self, architecture: str) -> None:
        """A tensor that nobody asked for means that the model is not what its file says it is."""
        left = [n for n in self.gguf.tensors if n not in self.taken and IGNORED not in n]
        if left:
            raise ModelError(
                f"{self.gguf.path}: tensor '{left[0]}' is not part of a {architecture} as this "
                f"version knows it ({len(left)} such tensors)"
            )
