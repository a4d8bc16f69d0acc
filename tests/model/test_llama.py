"""Tiny random llamas against a plain float64 forward pass without cache, batches or blocks."""

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.files.gguf import open_gguf
from llmsrv.model.load import load_model
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but
from tests.support.plans import Piece
from tests.support.plans import Run
from tests.support.plans import batch_of
from tests.support.plans import generate

PROMPTS = [[5, 9, 200], [7], list(range(3, 53)), [11] * 16, [250, 3] * 9 + [4]]


def compile_plan(path, num_blocks=40):
    limits = Limits(max_rows=512, max_logit_rows=8, max_slots=8, num_blocks=num_blocks)
    program = load_model(path, lambda: None).program
    return ReferenceBackend().compile(program, limits, lambda: None)


def last_logits(plan, ids):
    """The logits after the last id: [vocab_size]."""
    blocks = range(1, 2 + len(ids) // BLOCK_SIZE)
    plan.forward(batch_of([Piece(ids, 0, blocks)]))
    return plan.read("logits")[0]


class Llama64:
    """The forward pass as in the papers."""

    def __init__(self, path):
        self.gguf = open_gguf(path)
        self.tensors = {name: self.values(info) for name, info in self.gguf.tensors.items()}

    def values(self, info):
        out = np.empty(info.shape, np.float32)
        dequantize(info.type, np.frombuffer(self.gguf.data(info), np.uint8), out)
        return out.astype(np.float64)

    def number(self, key, default=None):
        return self.gguf.metadata.get("llama." + key, default)

    def linear(self, name, x):
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0)

    def norm(self, name, x):
        eps = self.number("attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * self.tensors[name + ".weight"]

    def rope(self, x):
        """x is [T, heads, dim] from position 0; pairs are adjacent values."""
        dim = self.number("rope.dimension_count")
        frequencies = self.number("rope.freq_base") ** (-np.arange(0, dim, 2) / dim)
        linear = self.number("rope.scale_linear", 1.0)  # in files of 2023
        frequencies = frequencies / self.number("rope.scaling.factor", linear)
        frequencies = frequencies / self.tensors.get("rope_freqs.weight", 1.0)
        turns = np.exp(1j * np.arange(len(x))[:, None] * frequencies)[:, None]
        pairs = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * turns
        out = x.copy()
        out[..., 0:dim:2], out[..., 1:dim:2] = pairs.real, pairs.imag
        return out

    def attention(self, name, x):
        num_heads, num_kv = self.number("attention.head_count"), self.number(
            "attention.head_count_kv"
        )
        q = self.rope(self.linear(name + "attn_q", x).reshape(len(x), num_heads, -1))
        k = self.rope(self.linear(name + "attn_k", x).reshape(len(x), num_kv, -1))
        v = self.linear(name + "attn_v", x).reshape(len(x), num_kv, -1)
        out = np.zeros_like(q)
        for head in range(num_heads):
            kv = head * num_kv // num_heads
            scores = q[:, head] @ k[:, kv].T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
        return self.linear(name + "attn_output", out.reshape(len(x), -1))

    def feed_forward(self, name, x):
        gate, up = self.linear(name + "ffn_gate", x), self.linear(name + "ffn_up", x)
        return self.linear(name + "ffn_down", gate / (1 + np.exp(-gate)) * up)

    def logits(self, ids):
        """The logits after the last id: [vocab_size]."""
        x = self.tensors["token_embd.weight"][ids]
        for layer in range(self.number("block_count")):
            name = f"blk.{layer}."
            x = x + self.attention(name, self.norm(name + "attn_norm", x))
            x = x + self.feed_forward(name, self.norm(name + "ffn_norm", x))
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm("output_norm", x[-1]) @ head.T

    def greedy(self, prompt_ids, max_tokens):
        ids = list(prompt_ids)
        for _ in range(max_tokens):
            ids.append(int(self.logits(ids).argmax()))
        return ids[len(prompt_ids):]


def random(*shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 0.3, shape).astype(np.float32)


# Hidden size 64, 4 heads of 16, 2 kv heads of 16, intermediate size 128
BIASES = {
    "blk.0.attn_q.bias": random(64),
    "blk.0.attn_k.bias": random(32, seed=1),
    "blk.0.attn_v.bias": random(32, seed=2),
    "blk.1.attn_output.bias": random(64, seed=3),
    "blk.1.ffn_gate.bias": random(128, seed=4),
    "blk.1.ffn_up.bias": random(128, seed=5),
    "blk.0.ffn_down.bias": random(64, seed=6),
}
WIDE_HEADS = {
    name: random(*shape)
    for layer in range(2)
    for name, shape in {
        f"blk.{layer}.attn_q.weight": (96, 64),
        f"blk.{layer}.attn_k.weight": (48, 64),
        f"blk.{layer}.attn_v.weight": (48, 64),
        f"blk.{layer}.attn_output.weight": (64, 96),
    }.items()
}
VARIANTS = {
    **{type: {"weight_type": type} for type in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")},
    "untied": {"tied": False},
    "one kv head": {"num_kv_heads": 1},
    "equally many kv heads": {"num_kv_heads": 4},
    "one layer": {"layers": 1},
    "linear scaling": {
        "metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    },
    "linear scaling under its first name": {"metadata": {"llama.rope.scale_linear": 4.0}},
    "half of each head rotated": {"metadata": {"llama.rope.dimension_count": 8}},
    "rope_freqs": {"tensors": {"rope_freqs.weight": np.float32([1, 1, 2, 3, 5, 8, 8, 8])}},
    "biases": {"tensors": BIASES},
    "heads wider than the hidden size": {
        "metadata": {
            "llama.attention.key_length": 24,
            "llama.attention.value_length": 24,
            "llama.rope.dimension_count": 24,
        },
        "tensors": WIDE_HEADS,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_the_plain_forward_pass(variant, tmp_path):
    path = write_tiny_llama(tmp_path / "tiny.gguf", **VARIANTS[variant])
    plan, oracle = compile_plan(path), Llama64(path)
    for prompt in PROMPTS:
        np.testing.assert_allclose(last_logits(plan, prompt), oracle.logits(prompt), atol=3e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", weight_type="Q8_0")


@pytest.fixture(scope="module")
def greedy(tiny):
    """The output of the plain forward pass for each of PROMPTS."""
    oracle = Llama64(tiny)
    return [oracle.greedy(prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", slow_but([1, 3, 16, 512], 3, 512))
def test_chunks_of_any_size_give_the_same_tokens(tiny, greedy, chunk):
    runs = [Run(prompt, 20) for prompt in PROMPTS]
    generate(compile_plan(tiny), runs, chunk)
    assert [run.ids for run in runs] == greedy


def test_sequences_alone_give_the_same_tokens_as_together(tiny, greedy):
    plan = compile_plan(tiny)
    for prompt, expected in zip(PROMPTS, greedy):
        run = Run(prompt, 20)
        generate(plan, [run], seed=len(prompt))
        assert run.ids == expected


def test_a_step_can_use_the_ids_that_the_previous_step_sampled(tiny, greedy):
    """Rows with id -1 - r: the host can prepare the next step without knowing the ids."""
    plan, ids = compile_plan(tiny), [[], []]
    for slot in range(2):
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    pieces = [Piece(PROMPTS[2], 0, [8, 2, 5, 7, 11]), Piece(PROMPTS[0], 0, [3, 1])]
    for step in range(20):
        plan.forward(batch_of(pieces))
        samples = plan.sample(np.arange(2, dtype=np.int32), np.full(2, step, np.int64))
        for each, id in zip(ids, samples.ids.tolist()):
            each.append(id)
        pieces = [
            Piece([-1], len(PROMPTS[2]) + step, [8, 2, 5, 7, 11]),
            Piece([-2], len(PROMPTS[0]) + step, [3, 1]),
        ]
    assert ids == [greedy[2], greedy[0]]


def test_a_nan_in_one_sequence_fails_only_that_sequence(tiny, greedy):
    plan = compile_plan(tiny)
    for slot in range(2):
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    plan.forward(batch_of([Piece(PROMPTS[0], 0, [1]), Piece(PROMPTS[1], 0, [2])]))
    plan.k_cache[1, 0, 1] = np.nan
    last = [Piece([5], len(PROMPTS[0]), [1]), Piece(greedy[1][:1], len(PROMPTS[1]), [2])]
    plan.forward(batch_of(last))
    samples = plan.sample(np.arange(2, dtype=np.int32), np.ones(2, np.int64))
    assert samples.ids.tolist() == [-1, greedy[1][1]]


def test_a_step_inside_a_prompt_computes_no_logits(tiny):
    plan = compile_plan(tiny)
    plan.forward(batch_of([Piece(PROMPTS[2], 0, [1, 2, 3, 4], wants_logits=False)]))
    assert plan.read("logits").shape[0] == 0
