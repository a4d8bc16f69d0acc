"""Reads the configuration of a model and checks that its numbers are consistent."""

import math
from dataclasses import dataclass

from llmsrv.model.architecture import Architecture
from llmsrv.model.hparams import FolderHParams
from llmsrv.model.hparams import GGUFHParams
from llmsrv.model.hparams import HParams
from llmsrv.model.rope import MAX_FACTOR
from llmsrv.model.rope import MAX_POSITIONS
from llmsrv.model.rope import Rope
from llmsrv.model.rope import original_context
from llmsrv.model.rope import read_local_rope
from llmsrv.model.rope import read_rope
from llmsrv.model.tensors import Tensors

MAX_SCALE = 1e6
ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}  # ours -> Hugging Face's


@dataclass(frozen=True)
class LayerConfig:
    window: int | None  # positions a row attends to, including its own; None: all
    rope: Rope | None  # None: positions are not rotated


@dataclass(frozen=True)
class ExpertsConfig:
    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalise: bool  # the weights of the chosen experts sum to 1


@dataclass(frozen=True)
class ModelConfig:
    architecture: str  # as in the file
    context_length: int  # in positions
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
    is_tied: bool | None  # output weights are the embedding; None: if the file has no others

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def read_config(
    hparams: HParams, name: str, architecture: Architecture, tensors: Tensors
) -> ModelConfig:
    """Reads the configuration of a decoder.

    Raises ModelError, which names the key, its value and what was expected.  The limits are far
    above any known model; they also bound the products of two numbers."""
    _refuse_unsupported(hparams, architecture)
    hidden_size = hparams.integer("hidden_size", maximum=1 << 20)
    num_heads = hparams.integer("num_attention_heads", maximum=1 << 14)
    num_kv_heads = hparams.integer("num_key_value_heads", maximum=num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        hparams.refuse("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads")
    head_dim = _head_dim(hparams, hidden_size, num_heads)
    intermediate_size = hparams.integer("intermediate_size", maximum=1 << 22)
    num_layers = hparams.integer("num_hidden_layers", maximum=1 << 12)
    rope, layers = _layers(hparams, architecture, tensors, num_layers, head_dim)
    embedding_scale = math.sqrt(hidden_size) if architecture.embedding_is_scaled else 1.0
    is_wide = num_layers == architecture.num_layers_with_wide_scale
    return ModelConfig(
        architecture=name,
        context_length=_context_length(hparams),
        vocab_size=_vocab_size(hparams),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=hparams.real("rms_norm_eps", maximum=1.0),
        layers=layers,
        long_from=rope.long_from,
        rope_is_interleaved=isinstance(hparams, GGUFHParams) and architecture.rope_is_permuted,
        experts=_experts(hparams, intermediate_size),
        attention_scale=_attention_scale(hparams, hidden_size / num_heads if is_wide else head_dim),
        attention_softcap=hparams.maybe_real("attn_logit_softcapping", MAX_SCALE),
        embedding_scale=hparams.real("embedding_multiplier", MAX_SCALE, embedding_scale),
        residual_scale=hparams.real("residual_multiplier", MAX_SCALE, 1.0),
        logit_scale=1 / hparams.real("logits_scaling", MAX_SCALE, 1.0),
        logit_softcap=hparams.maybe_real("final_logit_softcapping", MAX_SCALE),
        is_tied=hparams.get("tie_word_embeddings", bool),
    )


def _refuse_unsupported(hparams: HParams, architecture: Architecture) -> None:
    """Refuses keys of config.json that require a computation we do not implement."""
    activation = hparams.get("hidden_activation", str)
    expected = ACTIVATIONS[architecture.activation]
    if activation not in (None, expected):
        hparams.refuse("hidden_activation", repr(activation), expected)
    if hparams.get("use_bidirectional_attention", bool):
        hparams.refuse("use_bidirectional_attention", True, "false: encoders are not supported")
    if hparams.get("quantization_config", dict):
        hparams.refuse("quantization_config", "present", "weights in F32, F16 or BF16")
    if hparams.get("mlp_only_layers", list):
        hparams.refuse("mlp_only_layers", "not empty", "experts in every layer")
    hparams.integer("decoder_sparse_step", maximum=1, default=1)


def _head_dim(hparams: HParams, hidden_size: int, num_heads: int) -> int:
    if hparams.get("head_dim", int) is None and hidden_size % num_heads:
        hparams.refuse("num_attention_heads", num_heads, f"a divisor of the width {hidden_size}")
    maximum = 1 << 12
    head_dim = hparams.integer("head_dim", maximum, default=hidden_size // num_heads)
    v_head_dim = hparams.integer("v_head_dim", maximum, default=head_dim)
    if v_head_dim != head_dim:
        hparams.refuse("v_head_dim", v_head_dim, f"{head_dim}, the head_dim of the keys")
    return head_dim


def _vocab_size(hparams: HParams) -> int:
    """From the key, else from GGUF's tokenizer; if both are there, they must agree."""
    num_tokens = None
    if isinstance(hparams, GGUFHParams):
        tokens = hparams.gguf.get("tokenizer.ggml.tokens", list)
        num_tokens = None if tokens is None else len(tokens)
    vocab_size = hparams.integer("vocab_size", maximum=1 << 24, default=num_tokens)
    if num_tokens not in (None, vocab_size):
        expected = f"{num_tokens}, the length of tokenizer.ggml.tokens"
        hparams.refuse("vocab_size", vocab_size, expected)
    return vocab_size


def _experts(hparams: HParams, intermediate_size: int) -> ExpertsConfig | None:
    num_experts = hparams.integer("num_experts", maximum=1 << 12, default=0, minimum=0)
    if not num_experts:
        return None
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=hparams.integer("num_experts_per_tok", maximum=num_experts),
        intermediate_size=hparams.integer("moe_intermediate_size", 1 << 22, intermediate_size),
        normalise=hparams.flag("norm_topk_prob", default=True),
    )


def _attention_scale(hparams: HParams, default_scalar: float) -> float:
    scalar = hparams.real("query_pre_attn_scalar", MAX_SCALE, default_scalar)
    return hparams.real("attention_multiplier", MAX_SCALE, scalar**-0.5)


# ---- Positions


def _context_length(hparams: HParams) -> int:
    """Positions that the model was trained for, or that yarn extends it to."""
    context_length = hparams.integer("max_position_embeddings", MAX_POSITIONS)
    rope = _rope_hparams(hparams)
    if rope.get("rope_type", str) != "yarn":
        return context_length
    return max(context_length, int(original_context(rope) * rope.real("factor", MAX_FACTOR)))


def _rope_hparams(hparams: HParams) -> HParams:
    """The rope hyperparameters, of the global layers if they differ by layer type.

    In config.json they are in an object of their own."""
    if not isinstance(hparams, FolderHParams):
        return hparams
    section = hparams.maybe_section("rope_parameters") or hparams.maybe_section("rope_scaling")
    return _maybe_layer_type_rope(hparams, "full_attention") or section or hparams


def _maybe_layer_type_rope(hparams: HParams, layer_type: str) -> HParams | None:
    """Since transformers 5, config.json may have a rope object for each layer type."""
    if not isinstance(hparams, FolderHParams):
        return None
    section = hparams.maybe_section("rope_parameters")
    return section and section.maybe_section(layer_type)


def _layers(
    hparams: HParams,
    architecture: Architecture,
    tensors: Tensors,
    num_layers: int,
    head_dim: int,
) -> tuple[Rope, tuple[LayerConfig, ...]]:
    """Returns the rope of the model, and the window and rope of each layer."""
    rope = local_rope = read_rope(_rope_hparams(hparams), tensors, head_dim)
    local_hparams = _maybe_layer_type_rope(hparams, "sliding_attention")
    if local_hparams is not None:
        local_rope = read_rope(local_hparams, tensors, head_dim)
    elif not architecture.local_rope_is_scaled:
        local_rope = read_local_rope(hparams, head_dim, architecture.local_rope_theta)
    default = architecture.default_sliding_window
    window = hparams.integer("sliding_window", MAX_POSITIONS, default, minimum=0)
    is_windowed = _windowed_layers(hparams, architecture, num_layers, bool(window))
    rotates = _rotating_layers(hparams, architecture, num_layers)
    layers = [
        LayerConfig(window if local else None, (local_rope if local else rope) if turns else None)
        for local, turns in zip(is_windowed, rotates, strict=True)
    ]
    return rope, tuple(layers)


def _windowed_layers(
    hparams: HParams, architecture: Architecture, num_layers: int, has_window: bool
) -> list[bool]:
    """For each layer, whether it has the window."""
    if not has_window or not hparams.flag("use_sliding_window", default=True):
        return [False] * num_layers
    windowed = hparams.maybe_windowed(num_layers)
    if windowed is not None:
        return windowed
    first = hparams.integer("max_window_layers", maximum=1 << 12, default=0, minimum=0)
    interval = architecture.sliding_window_pattern
    if interval is not None:
        interval = hparams.integer("sliding_window_pattern", maximum=1 << 12, default=interval)
    return [
        layer >= first and (interval is None or (layer + 1) % interval != 0)
        for layer in range(num_layers)
    ]


def _rotating_layers(hparams: HParams, architecture: Architecture, num_layers: int) -> list[bool]:
    if architecture.no_rope_layer_interval is None:
        return [True] * num_layers
    flags = hparams.get("no_rope_layers", list)  # 1 for a layer that rotates
    if flags is not None:
        if len(flags) != num_layers or any(flag not in (0, 1) for flag in flags):
            hparams.refuse("no_rope_layers", flags, f"{num_layers} flags of 0 or 1")
        return [flag == 1 for flag in flags]
    default = architecture.no_rope_layer_interval
    interval = hparams.integer("no_rope_layer_interval", maximum=1 << 12, default=default)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]
