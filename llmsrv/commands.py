"""The commands on the model cache: pull, models and rm."""

import sys

from llmsrv.config import Config
from llmsrv.files import hub
from llmsrv.files.cache import cached_models
from llmsrv.files.cache import remove_model
from llmsrv.files.hub_fetch import fetch_from_hub
from llmsrv.files.progress import MEGABYTE
from llmsrv.files.source import resolve_model


def pull(config: Config) -> None:
    """Downloads a model and prints its path; a cached model from the hub is updated."""
    (model,) = config.model
    if model.startswith(hub.PREFIX):
        folder = config.cache_dir.absolute() / "hf"
        path = fetch_from_hub(model, folder, config.hf_token, sys.stderr)
    else:
        path = resolve_model(model, config.cache_dir, sys.stderr)
    print(path)


def models(config: Config) -> None:
    """Prints a line for each model: name, size and path."""
    found = cached_models(config.cache_dir)
    if not found:
        print(f"no models in {config.cache_dir}", file=sys.stderr)
    width = max((len(model.name) for model in found), default=0)
    for model in found:
        size = f"{model.size_bytes / MEGABYTE:,.0f} MB"
        print(f"{model.name:{width}}  {size:>10}  {model.path or 'incomplete: pull it again'}")


def rm(config: Config) -> None:
    """Removes a model and prints how much space it freed."""
    (model,) = config.model
    removed = remove_model(model, config.cache_dir)
    print(f"removed {removed.name}, {removed.size_bytes / MEGABYTE:,.0f} MB")
