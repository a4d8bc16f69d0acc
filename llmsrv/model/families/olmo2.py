"""OLMo 2: norms only after attention and feed-forward, and of q and k over all heads together.  In
GGUF files also OLMo 3, which has windows in three of four layers.

Source: OLMo 2 report, 2025, section 3.2.
"""

from llmsrv.model.architecture import Architecture

OLMO2 = Architecture(
    gguf="olmo2",
    model_types=("olmo2",),
    names={
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    has_pre_norms=False,
    has_post_norms=True,
    head_norms="all",
    local_rope_is_scaled=False,
)
