"""Gives the decoder a model's tensors by their GGUF names, for both file formats, and checks the
shape and type of each.
"""

import logging
from collections.abc import Callable
from collections.abc import Mapping
from math import prod

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.gguf import GGUFFile
from llmsrv.files.mapped import short_repr

log = logging.getLogger("llmsrv.engine")

# GGUF's names -> Hugging Face's; names in a layer without blk.N. and model.layers.N.
FOLDER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
# Rope frequencies in files of old converters; every reader computes them itself.
IGNORED = (".attn_rot_embd.", ".rotary_emb.inv_freq")


class Tensors:
    """The tensors of one GGUF file.  Remembers which were taken, since leftovers are an error."""

    def __init__(self, file: GGUFFile | ModelFolder, tick: Callable[[], None]) -> None:
        self.file = file
        self.tick = tick
        self.taken: set[str] = set()

    def name(self, name: str) -> str:
        """The tensor's name in the file."""
        return name

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns a required tensor of this shape; ModelError if it is missing or differs."""
        tensor = self.maybe_take(name, *shape)
        if tensor is None:
            own = self.name(name)
            raise ModelError(f"{self.file.path}: tensor '{own}' is missing; expected {shape}")
        return tensor

    def maybe_take(self, name: str, *shape: int) -> Tensor | None:
        """Returns an optional tensor, None if missing; ModelError if its shape or type differs."""
        info = self.file.tensors.get(self.name(name))
        if info is None:
            return None
        where = f"{self.file.path}: tensor '{info.name}'"
        if info.shape != shape:
            raise ModelError(f"{where} has shape {info.shape}; expected {shape}")
        if info.type not in GGML_TYPES:
            known = ", ".join(GGML_TYPES)
            raise ModelError(f"{where} has type {info.type}; this version supports {known}")
        self.taken.add(info.name)
        self.tick()
        return Tensor(info.name, info.type, shape, np.frombuffer(self.file.data(info), np.uint8))

    def maybe_values(self, name: str, size: int) -> Array | None:
        """Values of a small optional tensor as float32; they must be finite and above 0."""
        tensor = self.maybe_take(name, size)
        if tensor is None:
            return None
        values = _dequantized(tensor)
        if not np.all((values > 0) & np.isfinite(values)):
            raise ModelError(f"{self.file.path}: tensor '{tensor.name}' must be finite and above 0")
        return values

    def norm(self, name: str, size: int) -> Tensor:
        """The weights of a norm."""
        return self.take(f"{name}.weight", size)

    def linear(
        self, rows: Mapping[str, int], columns: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns the weights NAME.weight [rows, columns] of a product, and the biases NAME.bias
        [rows], which all or none of them have."""
        weights = [self.take(f"{name}.weight", size, columns) for name, size in rows.items()]
        has_biases = any(self.name(f"{name}.bias") in self.file.tensors for name in rows)
        biases = [self.take(f"{name}.bias", size) for name, size in rows.items() if has_biases]
        return tuple(weights), tuple(biases)

    def experts(self, name: str, num_experts: int, rows: int, columns: int) -> list[Tensor]:
        """Each expert's [rows, columns] of NAME.weight [num_experts, rows, columns]."""
        stacked = self.take(f"{name}.weight", num_experts, rows, columns)
        parts = stacked.data.reshape(num_experts, -1)
        return [
            Tensor(f"{stacked.name}[{expert}]", stacked.type, (rows, columns), part)
            for expert, part in enumerate(parts)
        ]

    def ignore(self, name: str) -> None:
        self.taken.add(self.name(name))

    def check_all_taken(self, architecture: str) -> None:
        """Refuses leftover tensors: they mean that the model is not what its file says."""
        left = self._left()
        if left:
            raise ModelError(
                f"{self.file.path}: tensor '{left[0]}' is not part of a {architecture}, as this "
                f"version supports it ({len(left)} such tensors)"
            )

    def _left(self) -> list[str]:
        names = [name for name in self.file.tensors if name not in self.taken]
        return [name for name in names if not any(part in name for part in IGNORED)]


class FolderTensors(Tensors):
    """The tensors of one Hugging Face folder.

    names        Architecture.tensor_names
    norm_offset  added to the weights of norms
    """

    def __init__(
        self,
        folder: ModelFolder,
        tick: Callable[[], None],
        names: Mapping[str, str],
        norm_offset: float,
    ) -> None:
        super().__init__(folder, tick)
        self.names = {**FOLDER_NAMES, **names}
        self.norm_offset = norm_offset

    def name(self, name: str) -> str:
        """blk.3.ffn_up.weight -> model.layers.3.mlp.up_proj.weight; other names stay."""
        stem, _, suffix = name.rpartition(".")
        if not stem.startswith("blk."):
            return f"{self.names.get(stem, stem)}.{suffix}"
        _, layer, stem = stem.split(".")
        return f"model.layers.{layer}.{self.names.get(stem, stem)}.{suffix}"

    def check_all_taken(self, architecture: str) -> None:
        """Folders also hold what generation does not need, as heads for training or an encoder for
        images.  Only a tensor in a layer would change what is computed here."""
        outside = [name for name in self._left() if not name.startswith("model.layers.")]
        self.taken.update(outside)
        if outside:
            what, count = f"tensor {short_repr(outside[0])}", len(outside)
            log.warning("%s: %s is not used (%d such tensors)", self.file.path, what, count)
        super().check_all_taken(architecture)

    def norm(self, name: str, size: int) -> Tensor:
        tensor = super().norm(name, size)
        if not self.norm_offset:
            return tensor
        values = _dequantized(tensor) + np.float32(self.norm_offset)
        return Tensor(tensor.name, "F32", tensor.shape, values.view(np.uint8))

    def experts(self, name: str, num_experts: int, rows: int, columns: int) -> list[Tensor]:
        own = self.name(f"{name}.weight")
        names = [own.format(expert=expert) for expert in range(num_experts)]
        return [self.take(name, rows, columns) for name in names]


def _dequantized(tensor: Tensor) -> Array:
    values = np.empty(prod(tensor.shape), np.float32)
    dequantize(tensor.type, tensor.data, values)
    return values
