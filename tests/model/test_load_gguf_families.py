"""Windows, ropes and scales in GGUF files of each family, and the defaults for missing keys."""

from pathlib import Path

import numpy as np
import pytest

from llmsrv.errors import ModelError
from llmsrv.model.load import load_model
from tests.support.gguf_writer import Typed
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf
from tests.support.hf_to_gguf import to_gguf

TINY = Path(__file__).parents[1] / "data/golden/tiny"
STEPS = np.arange(0, 16, 2) / 16  # of a head of 16


def read_config(tmp_path, name, **metadata):
    """The configuration of a tiny model of 3 layers with these keys of its architecture changed.

    In the names of keys, __ means a dot."""
    architecture = name.partition("-")[0]
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    path = to_gguf(TINY / name, tmp_path / "tiny.gguf", keys)
    return load_model(path, lambda: None).config


def windows(config):
    return [layer.window for layer in config.layers]


def thetas(config):
    """The theta of each layer's rope, computed from its second frequency."""
    return [round(float(layer.rope.frequencies[1]) ** -8) for layer in config.layers]


PATTERN = "attention__sliding_window_pattern"


@pytest.mark.parametrize("pattern, expected", [
    (None, [16, 16, 16]),  # every sixth layer is global
    (3, [16, 16, None]),
    (2, [16, None, 16]),
    ([False, True, False], [None, 16, None]),
])
def test_a_gemma3_has_global_layers_by_interval_or_list(tmp_path, pattern, expected):
    config = read_config(tmp_path, "gemma3", **{PATTERN: pattern})
    assert windows(config) == expected
    assert thetas(config) == [1_000_000 if window is None else 10_000 for window in expected]


@pytest.mark.parametrize("pattern", [[True], [1, 0, 1], 0, Typed("INT32", -2), "11"])
def test_an_invalid_sliding_window_pattern_is_refused(tmp_path, pattern):
    with pytest.raises(ModelError, match="key 'gemma3.attention.sliding_window_pattern' "):
        read_config(tmp_path, "gemma3", **{PATTERN: pattern})


def test_windowed_layers_of_a_gemma3_may_have_another_theta_and_are_not_scaled(tmp_path):
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    config = read_config(tmp_path, "gemma3", rope__freq_base_swa=500.0, **scaling)
    expected = np.array([500.0**-STEPS, 500.0**-STEPS, 1e6**-STEPS / 8])
    frequencies = [layer.rope.frequencies for layer in config.layers]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize("window, expected", [(None, [4096, None, 4096]), (0, [None, None, None])])
def test_a_gemma2_has_a_window_in_every_other_layer_by_default(tmp_path, window, expected):
    assert windows(read_config(tmp_path, "gemma2", attention__sliding_window=window)) == expected


def test_an_olmo3_is_an_olmo2_whose_windowed_layers_are_not_scaled(tmp_path):
    config = read_config(
        tmp_path,
        "olmo2",
        attention__sliding_window=8,
        attention__sliding_window_pattern=[True, False, True],
        rope__scaling__type="linear",
        rope__scaling__factor=2.0,
    )
    assert windows(config) == [8, None, 8]
    first = [float(layer.rope.frequencies[0]) for layer in config.layers]
    assert first == [1.0, 0.5, 1.0]


def test_the_multipliers_of_a_granite_are_read_or_have_defaults(tmp_path):
    config = read_config(tmp_path, "granite", attention__scale=None, residual_scale=None)
    assert config.attention_scale == 16**-0.5 and config.residual_scale == 1.0
    assert config.embedding_scale == 3.0 and config.logit_scale == 1 / 2.5


@pytest.mark.parametrize("key", ["embedding_scale", "residual_scale", "logit_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_multipliers_are_refused(tmp_path, key, value):
    with pytest.raises(ModelError, match=f"key 'granite.{key}' is {value}; expected above 0"):
        read_config(tmp_path, "granite", **{key: value})


@pytest.mark.parametrize("num_layers, scale", [(45, 2**-0.5), (46, 4**-0.5)])
def test_the_largest_gemma2_scales_attention_by_hidden_size_per_head(tmp_path, num_layers, scale):
    """2 heads of 2 with hidden_size 8; only the number of layers identifies the model."""
    shapes = {"attn_q": (4, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 4)}
    shapes |= {"ffn_gate": (8, 8), "ffn_up": (8, 8), "ffn_down": (8, 8)}
    shapes |= dict.fromkeys(["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"], (8,))
    tensors = {
        f"blk.{layer}.{name}.weight": np.zeros(shape, np.float32)
        for layer in range(num_layers)
        for name, shape in shapes.items()
    }
    tensors["token_embd.weight"] = np.zeros((512, 8), np.float32)
    tensors["output_norm.weight"] = np.zeros(8, np.float32)
    numbers = {
        "block_count": num_layers,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.key_length": 2,
        "attention.value_length": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    metadata = {**tiny_vocabulary(512), "general.architecture": "gemma2"}
    metadata |= {f"gemma2.{key}": value for key, value in numbers.items()}
    path = write_gguf(tmp_path / "large.gguf", metadata, tensors)
    assert load_model(path, lambda: None).config.attention_scale == scale
