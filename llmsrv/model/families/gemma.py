"""Gemma 2 and 3: norms before and after, windowed layers between global ones, scaled embeddings.

The norms compute x * (1 + weight); converters to GGUF add the 1.  Sources: Gemma 2 and Gemma 3
technical reports, 2024 and 2025.
"""

from llmsrv.model.architecture import Architecture

NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA2 = Architecture(
    gguf_name="gemma2",
    model_types=("gemma2",),
    tensor_names=NAMES,
    has_post_norms=True,
    activation="gelu",
    norm_offset=1.0,
    embedding_is_scaled=True,
    default_sliding_window=4096,
    sliding_window_pattern=2,
    num_layers_with_wide_scale=46,  # 27B
)
GEMMA3 = Architecture(
    gguf_name="gemma3",
    model_types=("gemma3_text",),
    tensor_names=NAMES,
    has_post_norms=True,
    qk_norms="per_head",
    activation="gelu",
    norm_offset=1.0,
    embedding_is_scaled=True,
    sliding_window_pattern=6,
    local_rope_is_scaled=False,
    local_rope_theta=10000.0,
    num_layers_with_wide_scale=62,  # 27B
)
