"""Every option of the server: name, default, help.  The command line, the environment and --help
are all made from this one table.

An option is taken from its flag, then from LLMSRV_NAME in the environment, then from its default.
"""

import os
import sys
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
MODES = ("local", "interactive", "server")
BACKENDS = ("auto", "reference")
LOG_LEVELS = ("debug", "info", "warning", "error")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of Config.  metadata: group, metavar, choices, and `many` for options that may repeat
    or take a list."""
    return field(default=default, metadata={"help": help, **metadata})


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/llmsrv, else ~/.cache/llmsrv, on macOS ~/Library/Caches/llmsrv."""
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "llmsrv"
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "llmsrv"


@dataclass(frozen=True)
class EngineConfig:
    """What an engine process is started with; plain values, since it crosses to a spawned process."""

    model_path: str
    backend: str = "auto"
    max_num_sequence: int = 32  # sequences that are in steps at once
    max_total_tokens: int = 16384  # positions in the KV cache, all sequences together
    prefill_chunk_size: int = 512  # rows of one step


# MLC's modes, with our figures: sequences at once, and KV positions for all of them together.
ENGINE_OF_MODE = {
    "local": dict(max_num_sequence=32, max_total_tokens=16384),
    "interactive": dict(max_num_sequence=1, max_total_tokens=8192),
    "server": dict(max_num_sequence=128, max_total_tokens=131072),
}
