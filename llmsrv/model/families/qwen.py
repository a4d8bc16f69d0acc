"""Qwen 2 and 2.5 (biases on q, k and v), Qwen 3 (norms of q and k), and Qwen 3 with experts.

Sources: Qwen2 and Qwen3 technical reports, 2024 and 2025.
"""

from llmsrv.model.architecture import Architecture

QWEN2 = Architecture(gguf_name="qwen2", model_types=("qwen2",))
QWEN3 = Architecture(gguf_name="qwen3", model_types=("qwen3",), qk_norms="per_head")
QWEN3_MOE = Architecture(gguf_name="qwen3moe", model_types=("qwen3_moe",), qk_norms="per_head")
