"""What a model's files say beside its vocabulary: its chat template, and how it likes to be
sampled."""

import logging

from llmsrv.files.folder import ModelFolder
from llmsrv.files.gguf import GGUFFile

log = logging.getLogger(__name__)

# Parameter -> its key in GGUF metadata, and the least and most that it can be.
PARAMETERS: dict[str, tuple[str, float, float]] = {
    "temperature": ("general.sampling.temp", 0.0, 2.0),
    "top_k": ("general.sampling.top_k", -1, 2**31 - 1),
    "top_p": ("general.sampling.top_p", 0.0, 1.0),
    "min_p": ("general.sampling.min_p", 0.0, 1.0),
    "repetition_penalty": ("general.sampling.penalty_repeat", 0.01, 100.0),
}


def read_chat_template(model: GGUFFile | ModelFolder) -> str | None:
    """The model's own template, None where it has none."""
    if isinstance(model, ModelFolder):
        return model.chat_template
    template = model.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def sampling_defaults(model: GGUFFile | ModelFolder) -> dict[str, float]:
    """What holds for a request that does not say: those of temperature, top_k, top_p, min_p and
    repetition_penalty that the model's files recommend; {} where they recommend not to sample.
    A value that cannot be is ignored with a warning."""
    if isinstance(model, ModelFolder) and model.generation_config.get("do_sample") is False:
        return {}
    found: dict[str, float] = {}
    for name, (key, least, most) in PARAMETERS.items():
        if isinstance(model, ModelFolder):
            value = model.generation_config.get(name)
        else:
            value = model.metadata.get(key)
        kinds = int if name == "top_k" else (int, float)
        if isinstance(value, kinds) and type(value) is not bool and least <= value <= most:
            found[name] = value
        elif value is not None:
            log.warning("%s: recommends %s %r, which cannot be", model.path, name, value)
    return found
