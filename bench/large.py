"""Decode and prefill speed of a larger model, as shares of the machine's limits in the same run.

python -m bench.large [--types Q4_K,Q6_K] [--bits 8|16] [--threads N] [--runs N]

The model has the shapes of Llama 3.2 1B and random weights, the same in every layer.  It is written
to a temporary file of 0.7 to 1 GB.  Decode reads every weight for each token, so its share is that
of the bytes that the machine can read per second.  Prefill's shares are those of the products of
bytes per second that vector instructions and AMX tiles can do (roofs.c); only the layers' products
count.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from bench.cpu import LIMITS
from bench.cpu import Roofs
from bench.cpu import decode
from bench.cpu import prefill
from bench.machine import describe
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.config import default_cache_dir
from llmsrv.model.load import load_model
from tests.support.gguf_writer import RawTensor
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 16, 2048, 8192, 32, 8, 64, 128256
GGML_TYPES = {"F32": 0, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
ENTRIES = {
    "general.architecture": "llama",
    "general.name": "random 1B",
    "llama.block_count": LAYERS,
    "llama.context_length": 131072,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
}
DECODE_TOKENS = 16


def write_model(path: Path, ggml_type: str) -> Path:
    """All layers share the arrays of one, so that writing needs the memory of one layer."""

    def matrix(rows: int, columns: int) -> RawTensor:
        tensor = random_tensor("", ggml_type, (rows, columns), size=0.05)
        return GGML_TYPES[ggml_type], tensor.shape, tensor.data.tobytes()

    norm = GGML_TYPES["F32"], (HIDDEN,), random_tensor("", "F32", (HIDDEN,)).data.tobytes()
    kv = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
    square, up = matrix(HIDDEN, HIDDEN), matrix(INNER, HIDDEN)
    layer = {
        "attn_norm": norm,
        "attn_q": square,
        "attn_k": kv,
        "attn_v": kv,
        "attn_output": square,
        "ffn_norm": norm,
        "ffn_gate": up,
        "ffn_up": up,
        "ffn_down": matrix(HIDDEN, INNER),
    }
    tensors: dict[str, RawTensor] = {"token_embd.weight": matrix(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        tensors |= {f"blk.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    tensors["output_norm.weight"] = norm
    return write_gguf(path, {**ENTRIES, **tiny_vocabulary(VOCAB)}, tensors)


def linears(program: Program) -> list[Linear]:
    return [op for op in program.operations if isinstance(op, Linear)]


def measure(ggml_type: str, backend: CPUBackend, path: Path, runs: int) -> str:
    """The report: medians over the runs."""
    program = load_model(write_model(path, ggml_type), lambda: None).program
    plan = backend.compile(program, LIMITS, lambda: None)
    weights = [weight for op in linears(program) for weight in op.weights]
    num_bytes = sum(weight.data.nbytes for weight in weights)
    num_products = sum(w.shape[0] * w.shape[1] for w in weights) - VOCAB * HIDDEN  # no logits
    roofs = Roofs(backend, 256 << 20)
    results = []
    for _ in range(runs):
        read, tokens = roofs.bytes_per_s(), decode(plan, 1, DECODE_TOKENS)
        multiply, matrix = roofs.products_per_s(), roofs.matrix_products_per_s()
        rows = 1000 / prefill(plan)
        of_matrix = rows * num_products / matrix if matrix else 0
        of_roofs = tokens * num_bytes / read, rows * num_products / multiply, of_matrix
        results.append((tokens, rows, *of_roofs))
    tokens, rows, of_read, of_multiply, of_matrix = map(statistics.median, zip(*results))
    return (
        f"{ggml_type}, {num_bytes / 1e6:.0f} MB of weights\n"
        f"  1 stream  {tokens:8.1f} tokens/s, {of_read:.2f} of the bytes read per second\n"
        f"  prompt    {rows:8.1f} tokens/s, {of_multiply:.2f} of the products in vectors, "
        f"{of_matrix:.2f} of those in AMX tiles"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default="Q4_K,Q6_K")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    backend = CPUBackend(CPUOptions(default_cache_dir(), options.threads, options.bits))
    print(describe())
    print(f"{backend.tier.name}, {backend.num_threads} threads, {backend.activation_bits} bits")
    for ggml_type in options.types.split(","):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            print(measure(ggml_type, backend, path, options.runs), flush=True)


if __name__ == "__main__":
    main()
