"""Split GGUF files: NAME-00001-of-00003.gguf and its other parts open as one file."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmsrv.files.gguf import open_gguf
from llmsrv.files.open import open_model
from tests.support.gguf_writer import Typed
from tests.support.gguf_writer import write_gguf
from tests.support.refusals import refusal_message

ARRAYS = {
    "a": np.arange(4, dtype=np.float32),
    "b": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c": np.arange(100, dtype=np.float32),
}


def part(folder: Path, number: int, names: str, count: int = 3, **metadata: object) -> Path:
    """Writes one part of the model, as gguf-split does.

    names      one letter for each tensor of the part
    metadata   extra keys, with two underscores for each dot"""
    entries: dict[str, object] = {
        "split.no": Typed("UINT16", number - 1),
        "split.count": Typed("UINT16", count),
        "split.tensors.count": Typed("INT32", len(ARRAYS)),
    }
    if number == 1:
        entries |= {"general.architecture": "llama", "general.alignment": 64}
    entries |= {key.replace("__", "."): value for key, value in metadata.items()}
    tensors = {name: ARRAYS[name] for name in names}
    path = folder / f"model-{number:05d}-of-{count:05d}.gguf"
    return write_gguf(path, entries, tensors, alignment=64 if number == 1 else 32)


def split(folder: Path) -> Path:
    first = part(folder, 1, "a")
    part(folder, 2, "b")
    part(folder, 3, "c")
    return first


refusal = partial(refusal_message, open_gguf)


def test_the_parts_open_as_one_file(tmp_path):
    file = open_model(split(tmp_path))
    assert file.path == tmp_path / "model-00001-of-00003.gguf"
    assert file.metadata["general.architecture"] == "llama"
    assert list(file.tensors) == ["a", "b", "c"]
    for name, array in ARRAYS.items():
        assert file.tensors[name].shape == array.shape
        assert file.data(file.tensors[name]) == array.tobytes()


def test_the_first_part_may_have_no_tensors(tmp_path):
    first = part(tmp_path, 1, "")
    part(tmp_path, 2, "ab")
    part(tmp_path, 3, "c")
    assert list(open_gguf(first).tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_whose_parts_were_merged_is_one_file(tmp_path, count):
    merged = {"split.count": Typed("UINT16", count), "split.no": Typed("UINT16", 0)}
    assert list(open_gguf(write_gguf(tmp_path / "any name", merged, ARRAYS)).tensors) == [*"abc"]


def test_the_error_names_a_missing_part(tmp_path):
    first = split(tmp_path)
    missing = tmp_path / "model-00002-of-00003.gguf"
    missing.unlink()
    assert refusal(first, missing) == "cannot be read: No such file or directory"


def test_refuses_a_part_cut_off(tmp_path):
    first = split(tmp_path)
    last = tmp_path / "model-00003-of-00003.gguf"
    os.truncate(last, last.stat().st_size - 33)
    assert "is the download complete?" in refusal(first, last)


def test_refuses_a_part_that_is_not_the_first(tmp_path):
    split(tmp_path)
    second, first = (tmp_path / f"model-0000{i}-of-00003.gguf" for i in (2, 1))
    assert refusal(second, second) == f"is part 2 of 3; name the first, {first.name}"


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00002.gguf", "model-1-of-3.gguf"])
def test_refuses_file_names_that_do_not_identify_the_parts(tmp_path, name):
    renamed = split(tmp_path).rename(tmp_path / name)
    expected = "is one of 3 parts; they must be named NAME-00001-of-00003.gguf and so on"
    assert refusal(renamed, renamed) == expected


def test_refuses_a_part_with_the_wrong_number(tmp_path):
    first = split(tmp_path)
    second, third = (tmp_path / f"model-0000{i}-of-00003.gguf" for i in (2, 3))
    shutil.copy(third, second)
    assert refusal(first, second) == "key 'split.no' is 2; expected 1"


def test_refuses_a_part_with_the_wrong_count(tmp_path):
    first = split(tmp_path)
    second = part(tmp_path, 2, "b", split__count=4)
    assert refusal(first, second) == "key 'split.count' is 4; expected 3"


def test_refuses_a_part_that_is_a_complete_model(tmp_path):
    first = split(tmp_path)
    second = write_gguf(tmp_path / "model-00002-of-00003.gguf", {}, {"b": ARRAYS["b"]})
    assert refusal(first, second) == "key 'split.no' is None; expected 1"


def test_refuses_a_tensor_in_two_parts(tmp_path):
    first = split(tmp_path)
    second = part(tmp_path, 2, "ba")
    assert refusal(first, second) == "has tensor 'a', which an earlier part also has"


@pytest.mark.parametrize("total", [2, 4, -1, 0])
def test_refuses_a_tensor_count_that_does_not_match_the_parts(tmp_path, total):
    split(tmp_path)
    first = part(tmp_path, 1, "a", split__tensors__count=Typed("INT32", total))
    expected = f"key 'split.tensors.count' is {total}, but the parts have 3"
    assert refusal(first, first) == expected


@pytest.mark.parametrize("key", ["split__count", "split__no", "split__tensors__count"])
def test_refuses_split_keys_of_the_wrong_type(tmp_path, key):
    split(tmp_path)
    first = part(tmp_path, 1, "a", **{key: "3"})
    assert refusal(first, first) == f"key '{key.replace('__', '.')}' must be int, but it is str"


@pytest.mark.compat
def test_a_model_split_by_the_gguf_package_reads_as_one(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=1)
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "model-00001-of-00003.gguf")
    for name, array in ARRAYS.items():
        assert file.data(file.tensors[name]) == array.tobytes()
