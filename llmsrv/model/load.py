"""Loads a model file: which architecture it is, its numbers, and its program."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmsrv.backend.base import Program
from llmsrv.errors import ModelError
from llmsrv.files.gguf import open_gguf
from llmsrv.model.config import ModelConfig
from llmsrv.model.config import read_config
from llmsrv.model.llama import llama
from llmsrv.model.tensors import Tensors

ARCHITECTURES: dict[str, Callable[[ModelConfig, Tensors], Program]] = {"llama": llama}


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    program: Program  # its tensors are views of the mapped file


def load_model(path: Path, tick: Callable[[], None]) -> Model:
    """Opens a GGUF file and lays out its program; `tick` is called once a tensor.

    Raises ModelError, with the file and the key or tensor at fault, when it is refused."""
    gguf = open_gguf(path)
    architecture = gguf.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        found = "is missing" if architecture is None else f"is {architecture!r:.100}"
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{path}: key 'general.architecture' {found}; this version runs {known}"
        )
    config = read_config(gguf, architecture)
    tensors = Tensors(gguf, tick)
    program = ARCHITECTURES[architecture](config, tensors)
    tensors.check_all_taken(architecture)
    return Model(config, program)
