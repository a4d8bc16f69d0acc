"""Opens a Hugging Face model folder: its JSON files, its chat template, and its safetensors
weights in one file or in shards.  Knows nothing of architectures or tokenizers.

Nothing in a folder is ever run or unpickled.  Python files next to the model are ignored, and a
folder that has only pickled weights (.bin, .pt) is refused.
Source: transformers' file names (utils/__init__.py) and order of preference (modeling_utils.py).
"""

from pathlib import Path

from llmsrv.errors import ModelError
from llmsrv.files.mapped import TensorInfo
from llmsrv.files.mapped import parse_object
from llmsrv.files.mapped import read_text
from llmsrv.files.mapped import short_repr
from llmsrv.files.safetensors import SafetensorsFile
from llmsrv.files.safetensors import open_safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt"}


class ModelFolder:
    """An open folder.  The mappings live as long as this object or any view from data().

    config              config.json
    generation_config   generation_config.json, {} if missing
    tokenizer_config    tokenizer_config.json, {} if missing
    chat_template       chat_template.jinja, else the default template of tokenizer_config
    tokenizer_json      path of tokenizer.json, None if missing
    tensors             of all shards, by Hugging Face name; types F32, F16 or BF16
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_object(path / "config.json")
        self.generation_config = _read_optional_object(path / "generation_config.json")
        self.tokenizer_config = _read_optional_object(path / "tokenizer_config.json")
        self.chat_template = _chat_template(path, self.tokenizer_config)
        tokenizer_json = path / "tokenizer.json"
        self.tokenizer_json = tokenizer_json if tokenizer_json.is_file() else None
        self.tensors: dict[str, TensorInfo] = {}
        self._views: dict[str, memoryview] = {}  # tensor name -> its whole file
        for file in _open_weights(path):
            twice = file.tensors.keys() & self.tensors.keys()
            if twice:
                name = short_repr(min(twice))
                raise ModelError(f"{file.path}: has tensor {name}, which an earlier file also has")
            self.tensors |= file.tensors
            self._views |= dict.fromkeys(file.tensors, file.view)

    def data(self, tensor: TensorInfo) -> memoryview:
        """The tensor's bytes, read-only, straight from the mapped file, with no alignment.

        If another process truncates the file, reading past its new end raises SIGBUS.  So only the
        engine process, which can be restarted, reads weights."""
        end = tensor.offset + tensor.size
        return self._views[tensor.name][tensor.offset:end]


def open_folder(path: Path) -> ModelFolder:
    """Opens and checks a folder; refuses it with ModelError and no other exception."""
    try:
        return ModelFolder(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _read_object(path: Path) -> dict[str, object]:
    return parse_object(path, read_text(path, "a JSON file"))


def _read_optional_object(path: Path) -> dict[str, object]:
    return _read_object(path) if path.exists() else {}


def _chat_template(path: Path, tokenizer_config: dict[str, object]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return read_text(file, "a template")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several templates with names
        named = [entry for entry in template if isinstance(entry, dict)]
        defaults = [entry.get("template") for entry in named if entry.get("name") == "default"]
        template = defaults[0] if defaults else None
    if template is not None and not isinstance(template, str):
        where = path / "tokenizer_config.json"
        raise ModelError(f"{where}: key 'chat_template' must be text, got {short_repr(template)}")
    return template


def _open_weights(path: Path) -> list[SafetensorsFile]:
    if (path / WEIGHTS).exists():
        return [open_safetensors(path / WEIGHTS)]
    if (path / INDEX).exists():
        return _open_shards(path / INDEX)
    found = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
    if found:
        raise ModelError(
            f"{path}: has only pickled weights ({short_repr(found[0])}), which can run code when "
            "opened; convert them to safetensors"
        )
    raise ModelError(f"{path}: has neither {WEIGHTS} nor {INDEX}")


def _open_shards(index: Path) -> list[SafetensorsFile]:
    """Opens the files of the index and checks that each has the tensors listed for it."""
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: key 'weight_map' must map each tensor to its file")
    shards: dict[str, SafetensorsFile] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_file_name(name):
            raise ModelError(
                f"{index}: tensor {short_repr(tensor)} is in {short_repr(name)}, not a file name"
            )
        if name not in shards:
            shards[name] = open_safetensors(index.with_name(name))
        if tensor not in shards[name].tensors:
            raise ModelError(
                f"{shards[name].path}: lacks tensor {short_repr(tensor)}, which its index lists"
            )
    return list(shards.values())


def _is_file_name(name: str) -> bool:
    """True if this names a safetensors file directly in the folder, on any system."""
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:")
