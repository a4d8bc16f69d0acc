"""Loads a model: finds its architecture, reads its configuration and builds its program."""

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmsrv.backend.program import Program
from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.gguf import GGUFFile
from llmsrv.files.open import open_model
from llmsrv.model.architecture import Architecture
from llmsrv.model.config import ModelConfig
from llmsrv.model.config import read_config
from llmsrv.model.decoder import build_program
from llmsrv.model.families.gemma import GEMMA2
from llmsrv.model.families.gemma import GEMMA3
from llmsrv.model.families.granite import GRANITE
from llmsrv.model.families.llama import LLAMA
from llmsrv.model.families.llama import MIXTRAL
from llmsrv.model.families.olmo2 import OLMO2
from llmsrv.model.families.phi3 import PHI3
from llmsrv.model.families.qwen import QWEN2
from llmsrv.model.families.qwen import QWEN3
from llmsrv.model.families.qwen import QWEN3_MOE
from llmsrv.model.families.smollm3 import SMOLLM3
from llmsrv.model.hparams import FolderHParams
from llmsrv.model.hparams import GGUFHParams
from llmsrv.model.hparams import HParams
from llmsrv.model.tensors import FolderTensors
from llmsrv.model.tensors import Tensors

ARCHITECTURES = (
    LLAMA,
    MIXTRAL,
    SMOLLM3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    GRANITE,
)
BY_GGUF = {each.gguf_name: each for each in ARCHITECTURES if each.gguf_name}
BY_MODEL_TYPE = {name: each for each in ARCHITECTURES for name in each.model_types}


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    program: Program  # its tensors are views of the mapped files


def load_model(path: Path, tick: Callable[[], None]) -> Model:
    """Opens a GGUF file or a Hugging Face folder and builds its program.

    tick  called once per tensor
    Raises ModelError, which names the file and the key or tensor at fault."""
    file = open_model(path)
    parts = _gguf_parts(file, tick) if isinstance(file, GGUFFile) else _folder_parts(file, tick)
    name, architecture, hparams, tensors = parts
    config = read_config(hparams, name, architecture, tensors)
    program = build_program(config, architecture, tensors)
    tensors.check_all_taken(name)
    return Model(config, program)


Parts = tuple[str, Architecture, HParams, Tensors]


def _gguf_parts(gguf: GGUFFile, tick: Callable[[], None]) -> Parts:
    name = gguf.get("general.architecture", str)
    if name not in BY_GGUF:
        raise _unknown_architecture(gguf.path, "general.architecture", name, BY_GGUF)
    return name, BY_GGUF[name], GGUFHParams(gguf, name), Tensors(gguf, tick)


def _folder_parts(folder: ModelFolder, tick: Callable[[], None]) -> Parts:
    hparams = FolderHParams(folder.path / "config.json", folder.config)
    name = hparams.get("model_type", str)
    if name not in BY_MODEL_TYPE:
        raise _unknown_architecture(hparams.path, "model_type", name, BY_MODEL_TYPE)
    classes = hparams.get("architectures", list) or []
    if classes and not str(classes[0]).endswith("ForCausalLM"):
        hparams.refuse("architectures", classes, "a class ...ForCausalLM, which generates text")
    architecture = BY_MODEL_TYPE[name]
    tensors = FolderTensors(folder, tick, architecture.tensor_names, architecture.norm_offset)
    return name, architecture, hparams, tensors


def _unknown_architecture(
    path: Path, key: str, value: str | None, known: Iterable[str]
) -> ModelError:
    found = "is missing" if value is None else f"is {value!r:.100}"
    return ModelError(f"{path}: key '{key}' {found}; this version supports {', '.join(known)}")
