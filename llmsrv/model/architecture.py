"""How one family of decoders differs from another, where model files do not say."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """Facts about one family.  The defaults are those of a llama."""

    gguf_name: str  # general.architecture; "" if GGUF files use the name of another family
    model_types: tuple[str, ...]  # model_type in config.json
    # Hugging Face's tensor names that differ from tensors.FOLDER_NAMES
    tensor_names: Mapping[str, str] = field(default_factory=dict)

    # Layers
    has_pre_norms: bool = True  # before attention and feed-forward
    has_post_norms: bool = False  # after them, before the residual is added
    # Norms of q and k: for each head separately, or over all heads together.
    qk_norms: Literal["none", "per_head", "all_heads"] = "none"
    has_fused_projections: bool = False  # one tensor for q, k and v, and one for gate and up
    activation: Literal["silu", "gelu"] = "silu"
    rope_is_permuted: bool = False  # GGUF orders the rows of q and k for interleaved rope
    norm_offset: float = 0.0  # Hugging Face's norm weights are stored minus this

    # The model
    embedding_is_scaled: bool = False  # by sqrt(hidden_size)
    default_sliding_window: int = 0  # if the file does not say; 0: no window
    sliding_window_pattern: int | None = None  # every n-th layer has no window; None: all have
    no_rope_layer_interval: int | None = None  # every n-th layer does not rotate
    local_rope_is_scaled: bool = True  # whether context scaling applies to windowed layers
    local_rope_theta: float | None = None  # of windowed layers; None: as in the others
    # A model with this many layers scales attention by hidden_size / num_heads instead of head_dim;
    # GGUF files do not say so.
    num_layers_with_wide_scale: int | None = None
