"""SmolLM 3: a llama in which every fourth layer does not rotate.

Source: Yang et al. 2025, Rope to Nope and Back Again.
"""

from llmsrv.model.architecture import Architecture

SMOLLM3 = Architecture(
    gguf_name="smollm3",
    model_types=("smollm3",),
    rope_is_permuted=True,
    no_rope_layer_interval=4,
)
