"""The numbers of a model, read from GGUF metadata and believed only once they make sense together.

Source of the keys: the GGUF specification (docs/gguf.md of the ggml project), section LLM.
"""

from dataclasses import dataclass
from typing import NoReturn
from typing import TypeVar

from llmsrv.errors import ModelError
from llmsrv.files.gguf import GGUFFile

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    context_length: int  # positions that the model was made for
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # values of a head that rope turns
    rope_theta: float
    rope_factor: float  # positions are divided by it: linear scaling
    norm_eps: float


def read_config(gguf: GGUFFile, architecture: str) -> ModelConfig:
    """The configuration of a transformer; ModelError names the key, its value, what was expected.

    The bounds are far above any model known; they keep products of two numbers in bounds too."""
    keys = _Keys(gguf, architecture)
    hidden_size = keys.integer("embedding_length", most=1 << 20)
    num_heads = keys.integer("attention.head_count", most=1 << 14)
    num_kv_heads = keys.integer("attention.head_count_kv", most=num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        keys.refuse("attention.head_count_kv", num_kv_heads, f"a divisor of {num_heads} heads")
    head_dim = _head_dim(keys, hidden_size, num_heads)
    rotary_dim = keys.integer("rope.dimension_count", most=head_dim, default=head_dim)
    if rotary_dim % 2:
        keys.refuse("rope.dimension_count", rotary_dim, "an even number")
    return ModelConfig(
        architecture=architecture,
        context_length=keys.integer("context_length", most=1 << 28),
        vocab_size=_vocab_size(keys),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length", most=1 << 22),
        num_layers=keys.integer("block_count", most=1 << 12),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=keys.real("rope.freq_base", most=1e12, default=10000.0),
        rope_factor=_rope_factor(keys),
        norm_eps=keys.real("attention.layer_norm_rms_epsilon", most=1.0),
    )


class _Keys:
    """The metadata keys of one architecture."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.gguf = gguf
        self.architecture = architecture

    def refuse(self, key: str, value: object, expected: str) -> NoReturn:
        found = "is missing" if value is None else f"is {value}"
        name = f"{self.architecture}.{key}"
        raise ModelError(f"{self.gguf.path}: key '{name}' {found}; expected {expected}")

    def get(self, key: str, kind: type[T]) -> T | None:
        return self.gguf.get(f"{self.architecture}.{key}", kind)

    def integer(self, key: str, most: int, default: int | None = None) -> int:
        value = self.get(key, int)
        value = default if value is None else value
        if value is None or not 1 <= value <= most:
            self.refuse(key, value, f"1 to {most}")
        return value

    def real(self, key: str, most: float, default: float | None = None) -> float:
        value = self.get(key, float)
        value = default if value is None else value
        if value is None or not 0 < value <= most:  # NaN is refused too
            self.refuse(key, value, f"above 0 and at most {most:g}")
        return value


def _head_dim(keys: _Keys, hidden_size: int, num_heads: int) -> int:
    if keys.get("attention.key_length", int) is None and hidden_size % num_heads:
        keys.refuse("attention.head_count", num_heads, f"a divisor of the width {hidden_size}")
    most = 1 << 12
    head_dim = keys.integer("attention.key_length", most, default=hidden_size // num_heads)
    value_length = keys.integer("attention.value_length", most, default=head_dim)
    if value_length != head_dim:
        keys.refuse("attention.value_length", value_length, f"{head_dim}, as that of the keys")
    return head_dim


def _vocab_size(keys: _Keys) -> int:
    """As the key says, or the tokenizer where there is no key; where both speak, they agree."""
    tokens = keys.gguf.get("tokenizer.ggml.tokens", list)
    num_tokens = None if tokens is None else len(tokens)
    vocab_size = keys.integer("vocab_size", most=1 << 24, default=num_tokens)
    if num_tokens not in (None, vocab_size):
        keys.refuse("vocab_size", vocab_size, f"{num_tokens}, as many as tokenizer.ggml.tokens")
    return vocab_size


def _rope_factor(keys: _Keys) -> float:
    scaling = keys.get("rope.scaling.type", str)
    if scaling not in (None, "none", "linear"):
        keys.refuse("rope.scaling.type", f"{scaling!r:.100}", "none or linear")
    if scaling == "none":
        return 1.0
    return keys.real("rope.scaling.factor", most=1e6, default=1.0)
