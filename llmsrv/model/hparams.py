"""The hyperparameters in a model file, by Hugging Face name, for both file formats.

Every value is checked.  A refusal names the file, the key as the file spells it, and what was
expected.  Source of GGUF's names: docs/gguf.md of the ggml project and llama.cpp's constants.
"""

from abc import ABC
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn
from typing import TypeVar

from llmsrv.errors import ModelError
from llmsrv.files.gguf import GGUFFile

T = TypeVar("T")

# Hugging Face's keys -> GGUF's.  For other keys, GGUF files rely on the architecture.
GGUF_KEYS = {
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attention_multiplier": "attention.scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
    "rotary_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# Alternative names: in GGUF files of 2023, and in Hugging Face's own files.
GGUF_ALIASES = {"factor": "rope.scale_linear"}
ALIASES = {
    "num_experts": "num_local_experts",
    "hidden_activation": "hidden_act",
    "rope_type": "type",
}


class HParams(ABC):
    path: Path  # of the file with the keys

    @abstractmethod
    def name(self, key: str) -> str:
        """The key as the file spells it."""

    @abstractmethod
    def get(self, key: str, kind: type[T]) -> T | None:
        """Returns the value, None if missing; ModelError if it is not a `kind`."""

    def refuse(self, key: str, value: object, expected: str) -> NoReturn:
        found = "is missing" if value is None else f"is {value!s:.100}"
        raise ModelError(f"{self.path}: key '{self.name(key)}' {found}; expected {expected}")

    def integer(self, key: str, maximum: int, default: int | None = None, minimum: int = 1) -> int:
        value = self.get(key, int)
        value = default if value is None else value
        if value is None or not minimum <= value <= maximum:
            self.refuse(key, value, f"{minimum} to {maximum}")
        return value

    def real(self, key: str, maximum: float, default: float | None = None) -> float:
        value = self.maybe_real(key, maximum)
        value = default if value is None else value
        if value is None:
            self.refuse(key, value, f"above 0 and at most {maximum:g}")
        return value

    def maybe_real(self, key: str, maximum: float) -> float | None:
        value = self.get(key, float)
        if value is not None and not 0 < value <= maximum:  # NaN is refused too
            self.refuse(key, value, f"above 0 and at most {maximum:g}")
        return None if value is None else float(value)

    def reals(self, key: str, count: int, maximum: float) -> list[float]:
        values = self.get(key, list)
        if values is None or len(values) != count:
            self.refuse(key, None if values is None else f"of {len(values)}", f"{count} numbers")
        for value in values:
            if type(value) not in (int, float) or not 0 < value <= maximum:
                self.refuse(key, f"with {value!r}", f"numbers above 0 and at most {maximum:g}")
        return [float(value) for value in values]

    @abstractmethod
    def maybe_windowed(self, num_layers: int) -> list[bool] | None:
        """For each layer, whether it has a window; None if the file does not list them."""

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, bool)
        return default if value is None else value


class GGUFHParams(HParams):
    """The metadata keys of one architecture."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.path = gguf.path
        self.gguf = gguf
        self.architecture = architecture

    def name(self, key: str) -> str:
        name = f"{self.architecture}.{GGUF_KEYS.get(key, key)}"
        alias = f"{self.architecture}.{GGUF_ALIASES.get(key)}"
        return alias if alias in self.gguf.metadata and name not in self.gguf.metadata else name

    def get(self, key: str, kind: type[T]) -> T | None:
        return self.gguf.get(self.name(key), kind) if key in GGUF_KEYS else None

    def maybe_windowed(self, num_layers: int) -> list[bool] | None:
        key = "sliding_window_pattern"  # an interval, or a flag for each layer
        flags = self.gguf.metadata.get(self.name(key))
        if not isinstance(flags, list):
            return None
        if len(flags) != num_layers or any(type(flag) is not bool for flag in flags):
            self.refuse(key, flags, f"{num_layers} booleans")
        return flags


class FolderHParams(HParams):
    """The keys of config.json, or of an object in it; a missing key is looked up in the parent."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, object],
        section: str = "",
        parent: "FolderHParams | None" = None,
    ) -> None:
        self.path = path
        self.values = values
        self.section = section
        self.parent = parent

    def name(self, key: str) -> str:
        return self.section + self._key_in_file(key)

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(self._key_in_file(key))
        if value is None:
            return self.parent.get(key, kind) if self.parent else None
        kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
        # In Python a bool is an int; in a model file it is not.
        if isinstance(value, kinds) and (type(value) is bool) is (kind is bool):
            return value  # type: ignore[return-value]
        got, wanted = type(value).__name__, kind.__name__
        where = f"{self.path}: key '{self.name(key)}'"
        raise ModelError(f"{where} must be {wanted}, but it is {got}")

    def maybe_section(self, key: str) -> "FolderHParams | None":
        """The hyperparameters of the object under this key; None if missing."""
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, dict):
            self.refuse(key, repr(values), "an object")
        return FolderHParams(self.path, values, f"{self.section}{key}.", self)

    def maybe_windowed(self, num_layers: int) -> list[bool] | None:
        types, known = self.get("layer_types", list), ("full_attention", "sliding_attention")
        if types is None:
            return None
        if len(types) != num_layers or any(type not in known for type in types):
            self.refuse("layer_types", types, f"{num_layers} times {' or '.join(known)}")
        return [type == "sliding_attention" for type in types]

    def _key_in_file(self, key: str) -> str:
        """Of the key and its alias, the one that has a value."""
        alias = ALIASES.get(key, key)
        return alias if alias in self.values and self.values.get(key) is None else key
