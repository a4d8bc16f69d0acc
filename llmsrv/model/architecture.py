"""What tells one family of decoders from another: facts that no model file states."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """The defaults are those of a llama."""

    gguf: str  # general.architecture; "" when such models go by another family's name there
    model_types: tuple[str, ...]  # of config.json
    # Hugging Face's names of tensors, where they are not those of tensors.FOLDER_NAMES
    names: Mapping[str, str] = field(default_factory=dict)

    # A layer
    has_pre_norms: bool = True  # of what goes into attention and feed-forward
    has_post_norms: bool = False  # of what comes out, before the residual is added
    head_norms: Literal["none", "each", "all"] = "none"  # q and k: each head, or all together
    is_fused: bool = False  # one tensor for q, k and v, and one for gate and up
    function: Literal["silu", "gelu"] = "silu"
    rope_is_permuted: bool = False  # GGUF has the rows of q and k in the order of interleaved rope
    norm_offset: float = 0.0  # Hugging Face's files have the weights of norms less this

    # The model
    embedding_is_scaled: bool = False  # by the square root of hidden_size
    default_window: int = 0  # where the file does not say; 0: none
    global_interval: int | None = None  # one layer in so many attends beyond the window
    rope_interval: int | None = None  # one layer in so many does not rotate
    local_rope_is_scaled: bool = True  # in layers with a window, as in the others
    local_theta: float | None = None  # rope_theta of those layers; None: as in the others
    # GGUF does not say that a model of so many layers scales attention by hidden_size / num_heads
    # instead of head_dim.
    num_layers_of_wide_scale: int | None = None
