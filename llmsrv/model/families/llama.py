"""Llama 1 to 3.2, Mistral, SmolLM 1 and 2, Mixtral, and other models of the same shape.

Sources: Touvron et al. 2023, section 2.2; Jiang et al. 2023 (window) and 2024 (experts).
"""

from llmsrv.model.architecture import Architecture

LLAMA = Architecture(
    gguf_name="llama",
    model_types=("llama", "mistral"),
    rope_is_permuted=True,
)
MIXTRAL = Architecture(
    gguf_name="",  # such files say llama
    model_types=("mixtral",),
    tensor_names={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    },
)
