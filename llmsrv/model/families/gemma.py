"""Gemma 2 and 3: norms before and after, local layers between global ones, scaled embeddings.

The norms compute x * (1 + weight): converters to GGUF add the 1.  Sources: Gemma 2 and Gemma 3
technical reports, 2024 and 2025.
"""

from llmsrv.model.architecture import Architecture

NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA2 = Architecture(
    gguf="gemma2",
    model_types=("gemma2",),
    names=NAMES,
    has_post_norms=True,
    function="gelu",
    norm_offset=1.0,
    embedding_is_scaled=True,
    default_window=4096,
    global_interval=2,
    num_layers_of_wide_scale=46,  # 27B
)
GEMMA3 = Architecture(
    gguf="gemma3",
    model_types=("gemma3_text",),
    names=NAMES,
    has_post_norms=True,
    head_norms="each",
    function="gelu",
    norm_offset=1.0,
    embedding_is_scaled=True,
    global_interval=6,
    local_rope_is_scaled=False,
    local_theta=10000.0,
    num_layers_of_wide_scale=62,  # 27B
)
