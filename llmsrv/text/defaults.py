"""Reads a model's chat template and its recommended sampling parameters from its files."""

import logging

from llmsrv.files.folder import ModelFolder
from llmsrv.files.gguf import GGUFFile

log = logging.getLogger(__name__)

# Parameter -> its key in GGUF metadata, its minimum and its maximum.
PARAMETERS: dict[str, tuple[str, float, float]] = {
    "temperature": ("general.sampling.temp", 0.0, 2.0),
    "top_k": ("general.sampling.top_k", -1, 2**31 - 1),
    "top_p": ("general.sampling.top_p", 0.0, 1.0),
    "min_p": ("general.sampling.min_p", 0.0, 1.0),
    "repetition_penalty": ("general.sampling.penalty_repeat", 0.01, 100.0),
}


def read_chat_template(model: GGUFFile | ModelFolder) -> str | None:
    """The model's own template, or None."""
    if isinstance(model, ModelFolder):
        return model.chat_template
    template = model.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def sampling_defaults(model: GGUFFile | ModelFolder) -> dict[str, float]:
    """Defaults for requests that do not set a parameter.

    Returns what the model's files recommend for temperature, top_k, top_p, min_p and
    repetition_penalty; {} if they recommend not to sample.  Ignores an invalid value with a
    warning."""
    if isinstance(model, ModelFolder) and model.generation_config.get("do_sample") is False:
        return {}
    found: dict[str, float] = {}
    for name, (key, minimum, maximum) in PARAMETERS.items():
        if isinstance(model, ModelFolder):
            value = model.generation_config.get(name)
        else:
            value = model.metadata.get(key)
        types = int if name == "top_k" else (int, float)
        if isinstance(value, types) and type(value) is not bool and minimum <= value <= maximum:
            found[name] = value
        elif value is not None:
            log.warning("%s: ignoring the invalid recommendation %s %r", model.path, name, value)
    return found
