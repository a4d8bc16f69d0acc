"""Finds the models that the options name: their files, fetched if necessary, and their names."""

import os
import re
import sys
from pathlib import Path

from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.files.hub import PREFIX
from llmsrv.files.source import resolve_model
from llmsrv.registry.models import Model


def find_models(config: Config) -> list[Model]:
    """The models that the options name, each with its file, fetched if necessary.

    Raises StartupError if no model is named, a file is missing, two models share a name, or an
    option for a single model is used with several.
    """
    if not config.model:
        raise StartupError("--model names no model")
    single = config.served_model_name or config.chat_template or config.any_model_name
    if single and len(config.model) > 1:
        raise StartupError(
            "--served-model-name, --chat-template and --any-model-name are for one model, and "
            f"there are {len(config.model)}; several are named by --model NAME=PATH"
        )
    models = [_find_model(config, text) for text in config.model]
    names = [name for model in models for name in model.names]
    for name in names:
        if names.count(name) > 1:
            raise StartupError(f"two models are called {name!r}; name them by --model NAME=PATH")
    return models


def _find_model(config: Config, text: str) -> Model:
    name, equals, source = text.partition("=")
    if not equals or os.path.exists(text):
        name, source = name_of(text), text
    path = resolve_model(source, config.cache_dir, sys.stderr, config.hf_token)
    return Model(config.served_model_name or [name], path, _find_draft(config))


def _find_draft(config: Config) -> Path | None:
    num_wanted = int(config.speculative_mode == "small_draft")
    if len(config.additional_models) != num_wanted:
        raise StartupError(
            f"--speculative-mode {config.speculative_mode} takes {num_wanted} of "
            f"--additional-models, not {len(config.additional_models)}"
        )
    if not num_wanted:
        return None
    source = config.additional_models[0]
    return resolve_model(source, config.cache_dir, sys.stderr, config.hf_token)


def name_of(model: str) -> str:
    """The last part of a path or hub name, without the file's suffixes: "tiny" for
    models/tiny.gguf, hf:org/tiny and hf:org/repository:tiny-00001-of-00002.gguf."""
    if model.startswith(PREFIX):
        last = re.split("[/:]", model)[-1]
    else:
        last = os.path.basename(os.path.abspath(model))
    return re.sub(r"(-00001-of-\d{5})?\.gguf$", "", last)
