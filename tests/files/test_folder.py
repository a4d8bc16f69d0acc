"""llmsrv.files.folder and llmsrv.files.open: which models they read, and which they refuse."""

import json
import os
import pickle
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.folder import open_folder
from llmsrv.files.gguf import GGUFFile
from llmsrv.files.open import open_model
from tests.support.gguf_writer import write_tiny_llama
from tests.support.refusals import refusal_message
from tests.support.safetensors_writer import write_folder
from tests.support.safetensors_writer import write_safetensors

TINY = Path(__file__).parent.parent / "data/golden/tiny"
A = {"a": np.arange(4, dtype=np.float32)}
B = {"b": np.arange(6, dtype=np.float16).reshape(2, 3)}


refusal = partial(refusal_message, open_folder)


# ---- Models they read


def test_a_folder_reads_back_as_written(tmp_path):
    folder = open_folder(write_folder(
        tmp_path / "model",
        A | B,
        config={"model_type": "llama", "hidden_size": 64},
        generation_config={"eos_token_id": [1, 2]},
        tokenizer_config={"bos_token": "<s>", "chat_template": "not this"},
        tokenizer={"model": {}},
        chat_template="{{ messages }} 東京",
    ))
    assert folder.path == tmp_path / "model"
    assert folder.config == {"model_type": "llama", "hidden_size": 64}
    assert folder.generation_config == {"eos_token_id": [1, 2]}
    assert folder.tokenizer_config["bos_token"] == "<s>"
    assert folder.tokenizer_json == tmp_path / "model/tokenizer.json"
    assert folder.chat_template == "{{ messages }} 東京"
    assert list(folder.tensors) == ["a", "b"]
    assert folder.data(folder.tensors["a"]) == A["a"].tobytes()
    assert folder.data(folder.tensors["b"]) == B["b"].tobytes()
    assert folder.data(folder.tensors["b"]).readonly


def test_optional_files_may_be_missing(tmp_path):
    folder = open_folder(write_folder(tmp_path / "model", A))
    assert folder.generation_config == folder.tokenizer_config == {}
    assert folder.chat_template is None and folder.tokenizer_json is None


def test_the_default_of_several_templates_is_used(tmp_path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    path = write_folder(tmp_path / "model", A, tokenizer_config={"chat_template": named})
    assert open_folder(path).chat_template == "yes"
    path = write_folder(tmp_path / "model", A, tokenizer_config={"chat_template": named[:1]})
    assert open_folder(path).chat_template is None


def test_shards_open_as_one_file(tmp_path):
    folder = open_folder(write_folder(tmp_path / "model", A, B))
    assert not (tmp_path / "model/model.safetensors").exists()
    assert list(folder.tensors) == ["a", "b"]
    assert folder.data(folder.tensors["a"]) == A["a"].tobytes()
    assert folder.data(folder.tensors["b"]) == B["b"].tobytes()


def test_a_view_of_a_tensor_outlives_the_folder_object(tmp_path):
    folder = open_folder(write_folder(tmp_path / "model", A))
    view = folder.data(folder.tensors["a"])
    del folder
    assert view == A["a"].tobytes()


def test_links_are_followed_as_in_a_download_cache(tmp_path):
    write_folder(tmp_path / "blobs", A)
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    assert list(open_folder(tmp_path / "model").tensors) == ["a"]


def test_every_golden_folder_opens():
    folders = sorted(TINY.iterdir())
    assert len(folders) == 16
    for path in folders:
        folder = open_folder(path)
        assert folder.config["model_type"] and folder.chat_template and folder.tokenizer_json
        assert {tensor.type for tensor in folder.tensors.values()} == {"BF16"}


def test_open_model_accepts_a_folder_or_a_file(tmp_path):
    assert isinstance(open_model(write_folder(tmp_path / "model", A)), ModelFolder)
    assert isinstance(open_model(write_tiny_llama(tmp_path / "m.gguf")), GGUFFile)


def test_open_model_asks_for_the_folder_of_a_safetensors_file(tmp_path):
    path = write_folder(tmp_path / "model", A) / "model.safetensors"
    with pytest.raises(ModelError, match="name the folder it is in"):
        open_model(path)


@pytest.mark.parametrize("name", ["missing", "null\0byte", "long" * 1000, "lone\ud800surrogate"])
def test_open_model_refuses_missing_files(tmp_path, name):
    with pytest.raises(ModelError, match="cannot be read"):
        open_model(tmp_path / name)


# ---- Models they refuse


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_without_opening_them(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = write_folder(tmp_path / "model", A)
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(Bomb()))
    assert f"has only pickled weights ('{name}')" in refusal(path, path)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}
    path = write_folder(tmp_path / "model", A, config=code)
    for name in ("modeling_x.py", "__init__.py", "setup.py", "json.py"):
        (path / name).write_text("import os; os.mkdir('exploded')")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert open_folder(path).config["auto_map"] == code["auto_map"]
    assert not (tmp_path / "exploded").exists()


def test_refuses_a_folder_without_weights(tmp_path):
    path = write_folder(tmp_path / "model", A)
    (path / "model.safetensors").unlink()
    assert refusal(path, path).startswith("has neither model.safetensors nor model.safetensors.ind")


def test_refuses_a_folder_without_config(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", A)
    at = tmp_path / "config.json"
    assert refusal(tmp_path, at) == "cannot be read: No such file or directory"


@pytest.mark.parametrize("content, message", [
    (b"", "is not JSON"),
    (b"[]", "is not a JSON object"),
    (b'"text"', "is not a JSON object"),
    (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
    (b"{'a': 1}", "is not JSON"),
    (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
    (b"[" * 200_000, "is JSON nested too deeply"),
    (b'{"a": [' + b"0," * (1 << 20) + b"0]}", "has more than 786432 values"),
    (b" " * (5 << 20) + b"{}", "has 5242882 bytes; the limit is 5242880"),
])
@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
def test_refuses_files_that_are_not_valid_json_objects(tmp_path, name, content, message):
    path = write_folder(tmp_path / "model", A)
    (path / f"{name}.json").write_bytes(content)
    assert message in refusal(path, path / f"{name}.json")


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_refuses_special_files(tmp_path, name):
    path = write_folder(tmp_path / "model", A, chat_template="")
    (path / name).unlink()
    os.mkfifo(path / name)
    assert "is not a regular file; expected a" in refusal(path, path / name)


@pytest.mark.parametrize("template", [7, {}, False, [{"name": "default", "template": {}}]])
def test_refuses_a_template_that_is_not_text(tmp_path, template):
    path = write_folder(tmp_path / "model", A, tokenizer_config={"chat_template": template})
    message = refusal(path, path / "tokenizer_config.json")
    assert message.startswith("key 'chat_template' must be text, got ")


# ---- Shards

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(path: Path, weight_map: object) -> Path:
    write_folder(path, A, B)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_refuses_a_missing_shard(tmp_path):
    path = write_folder(tmp_path / "model", A, B)
    (path / SECOND).unlink()
    assert refusal(path, path / SECOND) == "cannot be read: No such file or directory"


def test_refuses_a_shard_cut_off(tmp_path):
    path = write_folder(tmp_path / "model", A, B)
    os.truncate(path / SECOND, (path / SECOND).stat().st_size - 1)
    assert "is the download complete?" in refusal(path, path / SECOND)


def test_refuses_a_shard_that_lacks_a_tensor_of_the_index(tmp_path):
    path = sharded(tmp_path / "model", {"a": FIRST, "b": FIRST})
    assert refusal(path, path / FIRST) == "lacks tensor 'b', which its index lists"


def test_refuses_a_tensor_in_two_shards(tmp_path):
    path = write_folder(tmp_path / "model", A, B)
    write_safetensors(path / SECOND, A | B)
    assert refusal(path, path / SECOND) == "has tensor 'a', which an earlier file also has"


@pytest.mark.parametrize("name", [
    "../model-00001-of-00002.safetensors",
    "/etc/passwd",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "x\0.safetensors",
    "pytorch_model.bin",
    "",
    "..",
    7,
    None,
    ["x.safetensors"],
])
def test_refuses_an_index_with_a_name_outside_the_folder(tmp_path, name):
    path = sharded(tmp_path / "model", {"a": name})
    assert refusal(path, path / INDEX) == f"tensor 'a' is in {name!r}, not a file name"


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 7])
def test_refuses_an_index_without_a_weight_map(tmp_path, weight_map):
    path = sharded(tmp_path / "model", weight_map)
    assert refusal(path, path / INDEX).startswith("key 'weight_map' must map each tensor")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    weight_map=ANYTHING | st.dictionaries(
        st.sampled_from("abc"),
        st.sampled_from([FIRST, SECOND, ".", "a.safetensors", ".safetensors"]) | ANYTHING,
    ),
    tokenizer_config=ANYTHING | st.fixed_dictionaries({"chat_template": ANYTHING}),
)
def test_any_json_is_either_read_or_refused(tmp_path, weight_map, tokenizer_config):
    path = sharded(tmp_path / "model", weight_map)
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    try:
        assert set(open_folder(path).tensors) <= {"a", "b"}
    except ModelError:
        pass


def test_refuses_a_shard_in_another_format(tmp_path):
    path = write_folder(tmp_path / "model", A, B)
    (path / FIRST).write_bytes(b"GGUF" + struct.pack("<I", 3) + bytes(100))
    assert "is it a safetensors file?" in refusal(path, path / FIRST)
