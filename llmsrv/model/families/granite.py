"""Granite 3: a llama with multipliers on embeddings, attention, residuals and logits.  The
multipliers are in its configuration.

Source: Granite 3.0 language models, 2024.
"""

from llmsrv.model.architecture import Architecture

GRANITE = Architecture(
    gguf_name="granite",
    model_types=("granite",),
    rope_is_permuted=True,
)
