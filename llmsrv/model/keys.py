"""The keys of a model file, asked for by Hugging Face's names and answered from either format.

Every answer is checked, and a refusal names the file, the key as the file has it, and what was
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

# What a GGUF file can say; a key that is not here it leaves to the architecture.
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
# Other names that Hugging Face's own files have for the same.
ALIASES = {
    "num_experts": "num_local_experts",
    "hidden_activation": "hidden_act",
    "rope_type": "type",
}


class Keys(ABC):
    path: Path  # of the file that has the keys

    @abstractmethod
    def name(self, key: str) -> str:
        """What the file calls it."""

    @abstractmethod
    def get(self, key: str, kind: type[T]) -> T | None:
        """The value, None where there is none; ModelError when it is not a `kind`."""

    def refuse(self, key: str, value: object, expected: str) -> NoReturn:
        found = "is missing" if value is None else f"is {value!s:.100}"
        raise ModelError(f"{self.path}: key '{self.name(key)}' {found}; expected {expected}")

    def integer(self, key: str, most: int, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, int)
        value = default if value is None else value
        if value is None or not least <= value <= most:
            self.refuse(key, value, f"{least} to {most}")
        return value

    def real(self, key: str, most: float, default: float | None = None) -> float:
        value = self.maybe_real(key, most)
        value = default if value is None else value
        if value is None:
            self.refuse(key, value, f"above 0 and at most {most:g}")
        return value

    def maybe_real(self, key: str, most: float) -> float | None:
        value = self.get(key, float)
        if value is not None and not 0 < value <= most:  # NaN is refused too
            self.refuse(key, value, f"above 0 and at most {most:g}")
        return None if value is None else float(value)

    def reals(self, key: str, count: int, most: float) -> list[float]:
        values = self.get(key, list)
        if values is None or len(values) != count:
            self.refuse(key, None if values is None else f"of {len(values)}", f"{count} numbers")
        for value in values:
            if type(value) not in (int, float) or not 0 < value <= most:
                self.refuse(key, f"with {value!r}", f"numbers above 0 and at most {most:g}")
        return [float(value) for value in values]

    @abstractmethod
    def maybe_windowed(self, num_layers: int) -> list[bool] | None:
        """For each layer whether it has a window, where the file lists them."""

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, bool)
        return default if value is None else value


class GGUFKeys(Keys):
    """The metadata keys of one architecture."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.path = gguf.path
        self.gguf = gguf
        self.architecture = architecture

    def name(self, key: str) -> str:
        return f"{self.architecture}.{GGUF_KEYS.get(key, key)}"

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


class FolderKeys(Keys):
    """The keys of config.json, or of an object in it, which falls back on what is around it."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, object],
        section: str = "",
        around: "FolderKeys | None" = None,
    ) -> None:
        self.path = path
        self.values = values
        self.section = section
        self.around = around

    def name(self, key: str) -> str:
        return self.section + self._present(key)

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(self._present(key))
        if value is None:
            return self.around.get(key, kind) if self.around else None
        kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
        # bool is an int to Python; to a model file it is not.
        if isinstance(value, kinds) and (type(value) is bool) is (kind is bool):
            return value  # type: ignore[return-value]
        got, wanted = type(value).__name__, kind.__name__
        where = f"{self.path}: key '{self.name(key)}'"
        raise ModelError(f"{where} must be {wanted}, but it is {got}")

    def maybe_within(self, key: str) -> "FolderKeys | None":
        """The object under this key."""
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, dict):
            self.refuse(key, repr(values), "an object")
        return FolderKeys(self.path, values, f"{self.section}{key}.", self)

    def maybe_windowed(self, num_layers: int) -> list[bool] | None:
        types, known = self.get("layer_types", list), ("full_attention", "sliding_attention")
        if types is None:
            return None
        if len(types) != num_layers or any(type not in known for type in types):
            self.refuse("layer_types", types, f"{num_layers} times one of {', '.join(known)}")
        return [type == "sliding_attention" for type in types]

    def _present(self, key: str) -> str:
        """The name of the two that a key may have under which there is a value."""
        alias = ALIASES.get(key, key)
        return alias if alias in self.values and self.values.get(key) is None else key
