"""Which models are refused, with a message that names the file, the key or tensor, and why."""

import re
from math import nan

import numpy as np
import pytest

from llmsrv.backend.program import Embed
from llmsrv.backend.program import Linear
from llmsrv.backend.program import RopeAndStore
from llmsrv.errors import ModelError
from llmsrv.model.load import load_model
from tests.support.gguf_writer import Typed
from tests.support.gguf_writer import write_gguf
from tests.support.gguf_writer import write_tiny_llama

# Hidden size 64, 4 heads of 16, 2 kv heads of 16, intermediate size 128, 2 layers


def load(path):
    return load_model(path, lambda: None)


def refusal(tmp_path, **changes):
    """The message with which a tiny llama with these changes is refused."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ModelError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_model_loads_with_the_configuration_of_its_file(tmp_path):
    config = load(write_tiny_llama(tmp_path / "tiny.gguf", vocab_size=300)).config
    assert (config.architecture, config.context_length, config.vocab_size) == ("llama", 512, 300)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (64, 128, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    (rope,) = {layer.rope for layer in config.layers}
    np.testing.assert_allclose(rope.frequencies, 10000.0 ** -(np.arange(0, 16, 2) / 16), rtol=1e-7)
    assert config.norm_eps == np.float32(1e-5)


def test_the_program_of_the_default_model_is_the_llama_of_the_paper(smollm2):
    model = load(smollm2)
    operations, config = model.program.operations, model.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert len(operations) == 1 + 30 * 9 + 3
    embed, head = operations[0], operations[-1]
    assert isinstance(embed, Embed) and isinstance(head, Linear)
    assert head.weights == (embed.table,)
    assert {operation.out for operation in operations if hasattr(operation, "out")} | {"qkv"} == (
        set(model.program.buffers)
    )
    rope = next(o for o in operations if isinstance(o, RopeAndStore))
    expected = 100_000.0 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(rope.frequencies, expected, rtol=1e-7)


def test_loading_ticks_once_per_tensor(tmp_path):
    ticks = []
    load_model(write_tiny_llama(tmp_path / "tiny.gguf"), lambda: ticks.append(1))
    assert len(ticks) == 2 + 2 * 9


# ---- Keys


@pytest.mark.parametrize("value, found", [("gpt5", "is 'gpt5'"), ("\x1b[31m", r"is '\x1b[31m'")])
def test_the_error_for_an_unknown_architecture_lists_the_known_ones(tmp_path, value, found):
    message = refusal(tmp_path, metadata={"general.architecture": value})
    assert message == (
        f"key 'general.architecture' {found}; this version supports llama, smollm3, qwen2, qwen3, "
        "qwen3moe, gemma2, gemma3, phi3, olmo2, granite"
    )


def test_a_file_without_an_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "none.gguf", {"general.name": "x"})
    expected = "'general.architecture' is missing; this version supports"
    with pytest.raises(ModelError, match=expected):
        load(path)


ABSURD = [
    ("block_count", 0, "1 to 4096"),
    ("block_count", 4_000_000_000, "1 to 4096"),
    ("embedding_length", 0, "1 to 1048576"),
    ("embedding_length", Typed("UINT64", 1 << 63), "1 to 1048576"),
    ("embedding_length", Typed("INT32", -64), "1 to 1048576"),
    ("feed_forward_length", 0, "1 to"),
    ("context_length", 0, "1 to"),
    ("attention.head_count", 0, "1 to 16384"),
    ("attention.head_count", 6, "a divisor of the width 64"),
    ("attention.head_count", 128, "a divisor of the width 64"),
    ("attention.head_count_kv", 0, "1 to 4"),
    ("attention.head_count_kv", 3, "a divisor of 4 heads"),
    ("attention.head_count_kv", 8, "1 to 4"),
    ("attention.key_length", 0, "1 to"),
    ("attention.value_length", 8, "16, the head_dim of the keys"),
    ("attention.layer_norm_rms_epsilon", 0.0, "above 0 and at most 1"),
    ("attention.layer_norm_rms_epsilon", nan, "above 0 and at most 1"),
    ("rope.freq_base", 0.0, "above 0"),
    ("rope.freq_base", float("inf"), "above 0"),
    ("rope.dimension_count", 0, "1 to 16"),
    ("rope.dimension_count", 18, "1 to 16"),
    ("rope.dimension_count", 15, "an even number"),
    ("rope.scaling.type", "dynamic", "one of default, none, linear, "),
    ("rope.scaling.factor", 0.0, "above 0"),
    ("vocab_size", 0, "1 to"),
    ("vocab_size", 1000, "270, the length of tokenizer.ggml.tokens"),
]


@pytest.mark.parametrize("key, value, expected", ABSURD)
def test_the_error_for_an_absurd_number_names_its_key_and_value(tmp_path, key, value, expected):
    message = refusal(tmp_path, metadata={f"llama.{key}": value})
    number = value.value if isinstance(value, Typed) else value
    assert message.startswith(f"key 'llama.{key}' is ")
    assert str(number) in message and f"expected {expected}" in message


@pytest.mark.parametrize("value", ["64", True, 64.0, [64, 64]])
def test_a_number_of_the_wrong_type_is_refused(tmp_path, value):
    message = refusal(tmp_path, metadata={"llama.embedding_length": value})
    assert "llama.embedding_length" in message and "must be int" in message


REQUIRED = [
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_the_error_for_a_missing_number_names_its_key(tmp_path, key):
    numbers = dict.fromkeys(REQUIRED, 2)
    numbers |= {"embedding_length": 64, "attention.layer_norm_rms_epsilon": 1e-5}
    del numbers[key]
    metadata = {f"llama.{name}": value for name, value in numbers.items()}
    path = write_gguf(
        tmp_path / "short.gguf",
        {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"], **metadata},
    )
    with pytest.raises(ModelError, match=re.escape(f"key 'llama.{key}' is missing; expected ")):
        load(path)


@pytest.mark.parametrize("scaling", [{}, {"llama.rope.scaling.type": "none"}])
def test_rope_is_not_scaled_if_the_scaling_type_is_none(tmp_path, scaling):
    metadata = {"llama.rope.scaling.factor": 8.0, **scaling}
    config = load(write_tiny_llama(tmp_path / "tiny.gguf", metadata=metadata)).config
    assert config.layers[0].rope.frequencies[0] == (1.0 if scaling else 1 / 8)


# ---- Tensors


def zeros(*shape):
    return np.zeros(shape, np.float32)


def test_the_error_for_a_missing_tensor_names_it_and_its_shape(tmp_path):
    message = refusal(tmp_path, metadata={"llama.block_count": 3})
    assert message == "tensor 'blk.2.attn_norm.weight' is missing; expected (64,)"


@pytest.mark.parametrize("name, found, expected", [
    ("token_embd.weight", (270, 32), (270, 64)),
    ("blk.0.attn_k.weight", (64, 64), (32, 64)),
    ("blk.1.ffn_down.weight", (128, 64), (64, 128)),
    ("blk.1.ffn_norm.weight", (1, 64), (64,)),
    ("output_norm.weight", (63,), (64,)),
    ("output.weight", (271, 64), (270, 64)),
    ("blk.0.attn_output.bias", (32,), (64,)),
    ("rope_freqs.weight", (16,), (8,)),
])
def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path, name, found, expected):
    message = refusal(tmp_path, tensors={name: zeros(*found)})
    assert message == f"tensor '{name}' has shape {found}; expected {expected}"


def test_the_error_for_an_unsupported_tensor_type_lists_the_supported_ones(tmp_path):
    tensors = {"blk.0.ffn_down.weight": (24, (64, 128), bytes(64 * 128))}
    message = refusal(tmp_path, tensors=tensors)
    assert message.startswith(
        "tensor 'blk.0.ffn_down.weight' has type I8; this version supports F32, F16, BF16, "
    )


def test_a_bias_of_one_of_three_stacked_weights_requires_the_others(tmp_path):
    message = refusal(tmp_path, tensors={"blk.0.attn_k.bias": zeros(32)})
    assert message == "tensor 'blk.0.attn_q.bias' is missing; expected (64,)"


@pytest.mark.parametrize("bad", [0.0, -1.0, nan, float("inf")])
def test_rope_divisors_must_be_finite_and_positive(tmp_path, bad):
    divisors = np.float32([1, 1, 1, bad, 1, 1, 1, 1])
    message = refusal(tmp_path, tensors={"rope_freqs.weight": divisors})
    assert message == "tensor 'rope_freqs.weight' must be finite and above 0"


def test_a_tensor_that_is_not_part_of_a_llama_is_refused(tmp_path):
    message = refusal(tmp_path, tensors={"blk.0.attn_q_norm.weight": zeros(16)})
    assert message.startswith("tensor 'blk.0.attn_q_norm.weight' is not part of a llama")


def test_a_leftover_tensor_of_old_converters_is_ignored(tmp_path):
    load(write_tiny_llama(tmp_path / "t.gguf", tensors={"blk.0.attn_rot_embd.weight": zeros(8)}))
