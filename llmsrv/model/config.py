"""The numbers of a model, believed only once they make sense together."""

import math
from dataclasses import dataclass

from llmsrv.model.architecture import Architecture
from llmsrv.model.keys import FolderKeys
from llmsrv.model.keys import GGUFKeys
from llmsrv.model.keys import Keys
from llmsrv.model.rope import MOST_FACTOR
from llmsrv.model.rope import MOST_POSITIONS
from llmsrv.model.rope import Rope
from llmsrv.model.rope import original_context
from llmsrv.model.rope import read_local_rope
from llmsrv.model.rope import read_rope
from llmsrv.model.tensors import Tensors

MOST_SCALE = 1e6
ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}  # ours -> Hugging Face's


@dataclass(frozen=True)
class LayerConfig:
    window: int | None  # positions that a row attends to, its own included; None: all
    rope: Rope | None  # None: positions are not rotated


@dataclass(frozen=True)
class ExpertsConfig:
    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalise: bool  # weights of the chosen experts add up to 1


@dataclass(frozen=True)
class ModelConfig:
    architecture: str  # as the file has it
    context_length: int  # positions that the model was made for
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    long_from: int | None  # as in Program
    rope_is_interleaved: bool  # as in RopeAndStore
    experts: ExpertsConfig | None
    attention_scale: float
    attention_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float | None
    is_tied: bool | None  # output weights are the embedding; None: where there are no others

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def read_config(
    keys: Keys, name: str, architecture: Architecture, tensors: Tensors
) -> ModelConfig:
    """The configuration of a decoder; ModelError names the key, its value, what was expected.

    The bounds are far above any model known; they keep products of two numbers in bounds too."""
    _check_what_is_computed(keys, architecture)
    hidden_size = keys.integer("hidden_size", most=1 << 20)
    num_heads = keys.integer("num_attention_heads", most=1 << 14)
    num_kv_heads = keys.integer("num_key_value_heads", most=num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        keys.refuse("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads")
    head_dim = _head_dim(keys, hidden_size, num_heads)
    intermediate_size = keys.integer("intermediate_size", most=1 << 22)
    num_layers = keys.integer("num_hidden_layers", most=1 << 12)
    rope, layers = _layers(keys, architecture, tensors, num_layers, head_dim)
    embedding_scale = math.sqrt(hidden_size) if architecture.embedding_is_scaled else 1.0
    is_wide = num_layers == architecture.num_layers_of_wide_scale
    return ModelConfig(
        architecture=name,
        context_length=_context_length(keys),
        vocab_size=_vocab_size(keys),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=keys.real("rms_norm_eps", most=1.0),
        layers=layers,
        long_from=rope.long_from,
        rope_is_interleaved=isinstance(keys, GGUFKeys) and architecture.rope_is_permuted,
        experts=_experts(keys, intermediate_size),
        attention_scale=_attention_scale(keys, hidden_size / num_heads if is_wide else head_dim),
        attention_softcap=keys.maybe_real("attn_logit_softcapping", MOST_SCALE),
        embedding_scale=keys.real("embedding_multiplier", MOST_SCALE, embedding_scale),
        residual_scale=keys.real("residual_multiplier", MOST_SCALE, 1.0),
        logit_scale=1 / keys.real("logits_scaling", MOST_SCALE, 1.0),
        logit_softcap=keys.maybe_real("final_logit_softcapping", MOST_SCALE),
        is_tied=keys.get("tie_word_embeddings", bool),
    )


def _check_what_is_computed(keys: Keys, architecture: Architecture) -> None:
    """Keys of config.json that would ask for another computation than ours."""
    activation = keys.get("hidden_activation", str)
    expected = ACTIVATIONS[architecture.function]
    if activation not in (None, expected):
        keys.refuse("hidden_activation", repr(activation), expected)
    if keys.get("use_bidirectional_attention", bool):
        keys.refuse("use_bidirectional_attention", True, "false: encoders are not run")
    if keys.get("quantization_config", dict):
        keys.refuse("quantization_config", "there", "weights in F32, F16 or BF16")
    if keys.get("mlp_only_layers", list):
        keys.refuse("mlp_only_layers", "not empty", "experts in every layer")
    keys.integer("decoder_sparse_step", most=1, default=1)


def _head_dim(keys: Keys, hidden_size: int, num_heads: int) -> int:
    if keys.get("head_dim", int) is None and hidden_size % num_heads:
        keys.refuse("num_attention_heads", num_heads, f"a divisor of the width {hidden_size}")
    most = 1 << 12
    head_dim = keys.integer("head_dim", most, default=hidden_size // num_heads)
    value_length = keys.integer("v_head_dim", most, default=head_dim)
    if value_length != head_dim:
        keys.refuse("v_head_dim", value_length, f"{head_dim}, as that of the keys")
    return head_dim


def _vocab_size(keys: Keys) -> int:
    """As the key says, or GGUF's tokenizer where there is none; where both speak, they agree."""
    tokens = keys.gguf.get("tokenizer.ggml.tokens", list) if isinstance(keys, GGUFKeys) else None
    num_tokens = None if tokens is None else len(tokens)
    vocab_size = keys.integer("vocab_size", most=1 << 24, default=num_tokens)
    if num_tokens not in (None, vocab_size):
        keys.refuse("vocab_size", vocab_size, f"{num_tokens}, as many as tokenizer.ggml.tokens")
    return vocab_size


def _experts(keys: Keys, intermediate_size: int) -> ExpertsConfig | None:
    num_experts = keys.integer("num_experts", most=1 << 12, default=0, least=0)
    if not num_experts:
        return None
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=keys.integer("num_experts_per_tok", most=num_experts),
        intermediate_size=keys.integer("moe_intermediate_size", 1 << 22, intermediate_size),
        normalise=keys.flag("norm_topk_prob", default=True),
    )


def _attention_scale(keys: Keys, usual: float) -> float:
    scalar = keys.real("query_pre_attn_scalar", MOST_SCALE, usual)
    return keys.real("attention_multiplier", MOST_SCALE, scalar**-0.5)


# ---- Positions


def _context_length(keys: Keys) -> int:
    """Positions that the model was trained for, or that yarn extends it to."""
    context_length = keys.integer("max_position_embeddings", MOST_POSITIONS)
    rope = _rope_keys(keys)
    if rope.get("rope_type", str) != "yarn":
        return context_length
    return max(context_length, int(original_context(rope) * rope.real("factor", MOST_FACTOR)))


def _rope_keys(keys: Keys) -> Keys:
    """The keys of rope, or of the global layers' rope: in config.json an object."""
    if not isinstance(keys, FolderKeys):
        return keys
    section = keys.maybe_within("rope_parameters") or keys.maybe_within("rope_scaling")
    return _maybe_rope_keys_of(keys, "full_attention") or section or keys


def _maybe_rope_keys_of(keys: Keys, layer_type: str) -> Keys | None:
    """Since transformers 5 there may be an object for each type of layer."""
    section = keys.maybe_within("rope_parameters") if isinstance(keys, FolderKeys) else None
    return section and section.maybe_within(layer_type)


def _layers(
    keys: Keys,
    architecture: Architecture,
    tensors: Tensors,
    num_layers: int,
    head_dim: int,
) -> tuple[Rope, tuple[LayerConfig, ...]]:
    """The rope of the model, and what each layer does with positions."""
    rope = local_rope = read_rope(_rope_keys(keys), tensors, head_dim)
    local_keys = _maybe_rope_keys_of(keys, "sliding_attention")
    if local_keys is not None:
        local_rope = read_rope(local_keys, tensors, head_dim)
    elif not architecture.local_rope_is_scaled:
        local_rope = read_local_rope(keys, head_dim, architecture.local_theta)
    window = keys.integer("sliding_window", MOST_POSITIONS, architecture.default_window, least=0)
    is_local = _local_layers(keys, architecture, num_layers, bool(window))
    rotates = _rotating_layers(keys, architecture, num_layers)
    layers = [
        LayerConfig(window if local else None, (local_rope if local else rope) if turns else None)
        for local, turns in zip(is_local, rotates, strict=True)
    ]
    return rope, tuple(layers)


def _local_layers(
    keys: Keys, architecture: Architecture, num_layers: int, has_window: bool
) -> list[bool]:
    """Which layers attend to no more than the window."""
    if not has_window or not keys.flag("use_sliding_window", default=True):
        return [False] * num_layers
    windowed = keys.maybe_windowed(num_layers)
    if windowed is not None:
        return windowed
    first = keys.integer("max_window_layers", most=1 << 12, default=0, least=0)
    interval = architecture.global_interval
    if interval is not None:
        interval = keys.integer("sliding_window_pattern", most=1 << 12, default=interval)
    return [
        layer >= first and (interval is None or (layer + 1) % interval != 0)
        for layer in range(num_layers)
    ]


def _rotating_layers(keys: Keys, architecture: Architecture, num_layers: int) -> list[bool]:
    if architecture.rope_interval is None:
        return [True] * num_layers
    flags = keys.get("no_rope_layers", list)  # 1 where a layer does rotate
    if flags is not None:
        if len(flags) != num_layers or any(flag not in (0, 1) for flag in flags):
            keys.refuse("no_rope_layers", flags, f"{num_layers} times 0 or 1")
        return [flag == 1 for flag in flags]
    default = architecture.rope_interval
    interval = keys.integer("no_rope_layer_interval", most=1 << 12, default=default)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]
