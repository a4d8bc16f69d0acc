"""OLMo 2: norms only after attention and feed-forward, and norms of q and k over all heads.  GGUF
files of OLMo 3, which has windows in three of four layers, use the same name.

Source: OLMo 2 report, 2025, section 3.2.
"""

from llmsrv.model.architecture import Architecture

OLMO2 = Architecture(
    gguf_name="olmo2",
    model_types=("olmo2",),
    tensor_names={
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    has_pre_norms=False,
    has_post_norms=True,
    qk_norms="all_heads",
    local_rope_is_scaled=False,
)
