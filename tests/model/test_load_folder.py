"""Which keys in config.json are read, with old and new spellings, and which are refused."""

import json
from math import log
from math import nan
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from llmsrv.backend.program import Attention
from llmsrv.backend.program import RopeAndStore
from llmsrv.errors import ModelError
from llmsrv.model.load import load_model
from tests.support.hf_to_gguf import read_safetensors
from tests.support.hf_to_gguf import to_gguf
from tests.support.safetensors_writer import write_folder

TINY = Path(__file__).parents[1] / "data/golden/tiny"
# 3 layers, hidden size 64, 4 heads of 16, 2 kv heads


def changed_config(name, **changes):
    """config.json of a tiny model with changes; a key changed to ... is left out."""
    config = {**json.loads((TINY / name / "config.json").read_text()), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def changed_folder(tmp_path, name, tensors=None, **changes):
    weights = tensors or dict(read_safetensors(TINY / name / "model.safetensors"))
    return write_folder(tmp_path / "model", weights, config=changed_config(name, **changes))


def load(tmp_path, name, tensors=None, **changes):
    return load_model(changed_folder(tmp_path, name, tensors, **changes), lambda: None)


def refusal(tmp_path, name="llama", tensors=None, **changes):
    with pytest.raises(ModelError) as error:
        load(tmp_path, name, tensors, **changes)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "model"))
    return message


def layer_frequencies(config):
    return [layer.rope and layer.rope.frequencies for layer in config.layers]


def same(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- Older spellings


OLD_SPELLINGS = {
    "llama-linear": {
        "rope_parameters": ...,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama3-rope": {
        "rope_parameters": ...,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "gemma2": {
        "rope_parameters": ...,
        "rope_theta": 10000,
        "layer_types": ...,
        "hidden_activation": ...,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "rope_parameters": ...,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "layer_types": ...,
        "sliding_window_pattern": 3,
    },
    "smollm3-nope": {
        "no_rope_layers": ...,
        "rope_parameters": ...,
        "rope_theta": 2e6,
        "layer_types": ...,
    },
    "phi3-longrope": {
        "rope_parameters": ...,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35],
            "long_factor": [1.5, 1.8, 2.1, 2.4, 2.7, 3.0, 3.3, 3.6],
        },
    },
    "qwen3-moe": {"num_local_experts": ..., "num_experts": 8},
    "llama": {
        "rope_parameters": ...,
        "head_dim": ...,
        "tie_word_embeddings": ...,
        "architectures": ...,
    },
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_older_spellings_give_the_same_configuration(tmp_path, name):
    new = load_model(TINY / name, lambda: None).config
    old = load(tmp_path, name, **OLD_SPELLINGS[name]).config
    assert same(layer_frequencies(old), layer_frequencies(new))
    assert [layer.window for layer in old.layers] == [layer.window for layer in new.layers]
    for ours, theirs in zip(old.layers, new.layers):
        if theirs.rope and theirs.rope.long_frequencies is not None:
            assert np.array_equal(ours.rope.long_frequencies, theirs.rope.long_frequencies)
            assert ours.rope.magnitude == theirs.rope.magnitude
    assert (old.long_from, old.experts) == (new.long_from, new.experts)


# ---- Layers


def select_operations(model, kind):
    return [operation for operation in model.program.operations if isinstance(operation, kind)]


def test_layer_types_decide_which_layers_have_a_window(tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention"]
    changes = {"use_sliding_window": True, "sliding_window": 24, "layer_types": types}
    model = load(tmp_path, "qwen2", **changes)
    assert [each.window for each in select_operations(model, Attention)] == [None, 24, None]


@pytest.mark.parametrize("changes, windows", [
    ({"sliding_window": 8}, [8, 8, 8]),
    ({"sliding_window": None}, [None, None, None]),
    ({"sliding_window": 8, "use_sliding_window": False}, [None, None, None]),
    ({"sliding_window": 8, "max_window_layers": 2}, [None, None, 8]),
])
def test_without_layer_types_every_layer_has_the_window(tmp_path, changes, windows):
    model = load(tmp_path, "mistral-window", **changes)
    assert [each.window for each in select_operations(model, Attention)] == windows


def test_every_fourth_layer_of_a_smollm3_does_not_rotate_in_either_format(tmp_path):
    tensors = dict(read_safetensors(TINY / "smollm3-nope/model.safetensors"))
    copies = {name.replace(".1.", ".3."): tensors[name] for name in tensors if ".1." in name}
    changes = {"num_hidden_layers": 4, "no_rope_layers": ..., "no_rope_layer_interval": ...}
    changes["layer_types"] = None
    folder = changed_folder(tmp_path, "smollm3-nope", {**tensors, **copies}, **changes)
    for path in (folder, to_gguf(folder, tmp_path / "tiny.gguf")):
        ropes = select_operations(load_model(path, lambda: None), RopeAndStore)
        assert [rope.frequencies is None for rope in ropes] == [False, False, False, True]


def test_windowed_layers_of_a_gemma3_have_their_own_rope(tmp_path):
    linear = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    local = {"rope_theta": 1e4, "rope_type": "default"}
    ropes = {"full_attention": linear, "sliding_attention": local}
    model = load(tmp_path, "gemma3", rope_parameters=ropes)
    steps = np.arange(0, 16, 2) / 16
    expected = np.array([1e4**-steps, 1e4**-steps, 1e6**-steps / 8])
    np.testing.assert_allclose(layer_frequencies(model.config), expected, rtol=1e-6)


# ---- Scalings


def yarn(**more):
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, **more}


@pytest.mark.parametrize("more, magnitude", [
    ({}, 0.1 * log(4) + 1),
    ({"attention_factor": 1.5}, 1.5),
    ({"mscale": 0.5, "mscale_all_dim": 1.0}, (0.05 * log(4) + 1) / (0.1 * log(4) + 1)),
    ({"factor": 0.5}, 1.0),
])
def test_yarn_scales_attention(tmp_path, more, magnitude):
    parameters = yarn(original_max_position_embeddings=32) | more
    config = load(tmp_path, "llama-yarn", rope_parameters=parameters).config
    assert config.layers[0].rope.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("original, context", [(32, 256), (64, 256), (200, 800), (None, 1024)])
def test_yarn_extends_the_context(tmp_path, original, context):
    parameters = yarn(original_max_position_embeddings=original)
    config = load(tmp_path, "llama-yarn", rope_parameters=parameters).config
    assert config.context_length == context


def test_yarn_without_an_original_context_extends_the_full_context(tmp_path):
    ropes = []
    for original in (None, 256):
        parameters = yarn(original_max_position_embeddings=original)
        ropes += load(tmp_path, "llama-yarn", rope_parameters=parameters).config.layers[:1]
    np.testing.assert_array_equal(ropes[0].rope.frequencies, ropes[1].rope.frequencies)


@pytest.mark.parametrize("more, magnitude", [
    ({}, sqrt(1 + log(8) / log(32))),
    ({"factor": 2.0}, sqrt(1 + log(2) / log(32))),
    ({"factor": 1.0}, 1.0),
    ({"attention_factor": 1.25}, 1.25),
])
def test_longrope_scales_attention(tmp_path, more, magnitude):
    given = changed_config("phi3-longrope")["rope_parameters"]
    config = load(tmp_path, "phi3-longrope", rope_parameters=given | more).config
    assert config.layers[0].rope.magnitude == pytest.approx(magnitude)
    assert config.long_from == 32


def test_only_part_of_a_head_may_rotate(tmp_path):
    given = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.75}
    config = load(tmp_path, "phi3", rope_parameters=given).config
    assert [len(frequencies) for frequencies in layer_frequencies(config)] == [6, 6, 6]


# ---- Refusals


@pytest.mark.parametrize("changes, expected", [
    ({"model_type": "bert"}, "'model_type' is 'bert'; this version supports llama, mistral, mixt"),
    ({"model_type": ...}, "key 'model_type' is missing; this version supports llama"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "expected a class ...ForCausalLM"),
    ({"hidden_act": "relu"}, "'hidden_act' is 'relu'; expected silu"),
    ({"quantization_config": {"bits": 4}}, "expected weights in F32, F16 or BF16"),
    ({"hidden_size": ...}, "'hidden_size' is missing; expected 1 to"),
    ({"hidden_size": 10**400}, "expected 1 to 1048576"),
    ({"hidden_size": "64"}, "'hidden_size' must be int, but it is str"),
    ({"hidden_size": True}, "must be int, but it is bool"),
    ({"hidden_size": 64.0}, "must be int, but it is float"),
    ({"num_attention_heads": 6, "head_dim": None}, "a divisor of the width 64"),
    ({"num_key_value_heads": 3}, "a divisor of 4 heads"),
    ({"rms_norm_eps": nan}, "'rms_norm_eps' is nan; expected above 0"),
    ({"rms_norm_eps": 0}, "'rms_norm_eps' is 0; expected above 0"),
    ({"vocab_size": ...}, "'vocab_size' is missing"),
    ({"rope_parameters": 7}, "'rope_parameters' is 7; expected an object"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "'rope_parameters.rope_type' is 'dynamic'"),
    ({"rope_parameters": ..., "rope_scaling": {"type": "ntk"}}, "'rope_scaling.type' is 'ntk'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'rope_parameters.factor' is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "parameters.factor' is -1"),
    ({"rope_parameters": yarn(rope_theta=1)}, "rope_theta' is 1.0; expected above 1"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor' is missing"),
    (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 2,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        },
        "'rope_parameters.high_freq_factor' is 4.0; expected more than low_freq_factor, 4.0",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}},
        "'rope_parameters.short_factor' is missing; expected 8 numbers",
    ),
    ({"sliding_window": 8, "layer_types": ["full_attention"]}, "is ['full_attention']; expected 3"),
    ({"sliding_window": 8, "layer_types": ["chunked"] * 3}, "3 times full_attention or sliding"),
    ({"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
    ({"num_hidden_layers": 2}, "is not part of a llama"),
    ({"vocab_size": 513}, "embed_tokens.weight' has shape (512, 64); expected (513, 64)"),
    ({"num_local_experts": 4, "num_experts_per_tok": 5}, "per_tok' is 5; expected 1 to 4"),
])
def test_the_error_for_an_invalid_config_names_the_key(tmp_path, changes, expected):
    assert expected in refusal(tmp_path, **changes)


@pytest.mark.parametrize("factors", [[1.0] * 7, ["x"] * 8, [0] * 8, [nan] * 8, [True] * 8])
def test_longrope_divisors_must_be_finite_and_positive(tmp_path, factors):
    given = changed_config("phi3-longrope")["rope_parameters"] | {"long_factor": factors}
    message = refusal(tmp_path, "phi3-longrope", rope_parameters=given)
    assert "'rope_parameters.long_factor' is" in message


@pytest.mark.parametrize("flags", [[1, 0], [1, 0, 2], "101"])
def test_there_must_be_one_rope_flag_per_layer(tmp_path, flags):
    assert "no_rope_layers" in refusal(tmp_path, "smollm3-nope", no_rope_layers=flags)


def test_an_encoder_that_is_shaped_like_a_decoder_is_refused(tmp_path):
    message = refusal(tmp_path, "gemma3", use_bidirectional_attention=True)
    assert "'use_bidirectional_attention' is True; expected false" in message


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_models_with_experts_only_in_some_layers_are_refused(tmp_path, changes):
    assert next(iter(changes)) in refusal(tmp_path, "qwen3-moe", **changes)


# ---- Output weights


def test_output_weights_are_the_embedding_if_the_config_says_so(tmp_path):
    program = load(tmp_path, "llama", tie_word_embeddings=True).program
    assert program.operations[-1].weights == (program.operations[0].table,)


def test_output_weights_are_required_if_they_are_not_tied(tmp_path):
    message = refusal(tmp_path, "qwen2", tie_word_embeddings=False)
    assert "'lm_head.weight' is missing; expected (512, 64)" in message


def with_more(**further):
    return dict(read_safetensors(TINY / "llama" / "model.safetensors")) | further


def test_a_tensor_outside_the_layers_is_not_used_with_a_warning(tmp_path, caplog):
    num_operations = len(load(tmp_path, "llama").program.operations)
    assert caplog.text == ""
    ones = np.ones((2, 4), np.float32)
    tensors = with_more(**{"score.weight": ones, "vision_tower.patch.bias": ones})
    assert len(load(tmp_path, "llama", tensors).program.operations) == num_operations
    assert "tensor 'score.weight' is not used (2 such tensors)" in caplog.text


def test_a_further_tensor_in_a_layer_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    message = refusal(tmp_path, tensors=with_more(**{name: np.ones(4, np.float32)}))
    assert f"tensor '{name}' is not part of a llama" in message
