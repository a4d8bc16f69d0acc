"""Phi 3, 3.5 and 4: a llama with fused projections, and longrope for long contexts.

Sources: Phi-3 technical report, 2024; Ding et al. 2024 (LongRoPE).
"""

from llmsrv.model.architecture import Architecture

PHI3 = Architecture(
    gguf_name="phi3",
    model_types=("phi3",),
    tensor_names={"ffn_up": "mlp.gate_up_proj"},  # as in GGUF, ffn_up holds both
    has_fused_projections=True,
)
