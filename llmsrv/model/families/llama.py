"""Llama 1 to 3.2, Mistral, SmolLM 1 and 2, Mixtral, and whoever else is shaped like them.

Sources: Touvron et al. 2023, section 2.2; Jiang et al. 2023 (window) and 2024 (experts).
"""

from llmsrv.model.architecture import Architecture

LLAMA = Architecture(
    gguf="llama",
    model_types=("llama", "mistral"),
    rope_is_permuted=True,
)
MIXTRAL = Architecture(
    gguf="",  # a llama with experts
    model_types=("mixtral",),
    names={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    },
)
