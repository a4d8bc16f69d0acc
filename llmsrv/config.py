"""Every option of the server: name, default, help.  The command line, the environment and --help
are all made from this one table.

An option is taken from its flag, then from LLMSRV_NAME in the environment, then from its default.
"""

import os
import sys
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from pathlib import Path
from typing import Any
from typing import NamedTuple

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
BACKENDS = ("auto", "cpu", "reference")  # those of backend/choose.py, which imports numpy
SPECULATIVE_MODES = ("disable", "ngram", "small_draft")
LOG_LEVELS = ("debug", "info", "warning", "error")


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/llmsrv, else ~/.cache/llmsrv, on macOS ~/Library/Caches/llmsrv."""
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "llmsrv"
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "llmsrv"


@dataclass(frozen=True)
class EngineConfig:
    """What an engine process is started with; plain values, since they cross to it."""

    model_path: str
    draft_model_path: str = ""
    backend: str = "auto"
    mode: str = "local"
    max_num_sequence: int = 0  # sequences that are in steps at once; 0: by mode, as the next two
    max_total_seq_length: int = 0  # positions in the KV cache, all sequences together
    prefill_chunk_size: int = 0  # rows of one step
    context_window_size: int = 0  # positions of one sequence; 0: what the model was made for
    extend_context: bool = False  # or more than that
    gpu_memory_utilization: float = 0.85  # of the memory that there is
    num_engines: int = 1  # that divide it
    weights_beside_bytes: int = 0  # of the models of the others
    speculative_mode: str = "ngram"
    spec_draft_length: int = 0  # 0: what pays
    # Backend -> its own options by name; what is missing has the backend's default.
    backend_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    cache_dir: str = field(default_factory=lambda: str(default_cache_dir()))
    log_level: str = "info"


class Mode(NamedTuple):
    """How many sequences at once, and how many positions in the KV cache at most; 0: as many as
    these sequences can fill."""

    max_num_sequence: int
    max_total_seq_length: int


MODES = {"local": Mode(32, 16384), "interactive": Mode(1, 0), "server": Mode(128, 0)}


def option(default: Any, group: str, help: str, **metadata: Any) -> Any:
    """A field of Config.

    metadata  choices: the values allowed; metavar: the word in --help; least, most: a number's
              bounds; many: True when the flag may be repeated or take a JSON list or commas;
              overrides: True when --overrides may set it; backend: the one whose own option it is
    """
    keep = {"group": group, "help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=keep)
    return field(default=default, metadata=keep)


@dataclass(frozen=True)
class Config:
    """The options of one server; a field `api_key` is the flag --api-key and LLMSRV_API_KEY."""

    model: list[str] = option(
        [DEFAULT_MODEL],
        "Model",
        "a GGUF file, a Hugging Face folder, hf:org/name[:file], or the name of a cached model; "
        f"several, each named for clients by NAME=, are served at once (default: {DEFAULT_MODEL})",
        metavar="[NAME=]PATH",
        many=True,
    )
    max_loaded_models: int = option(
        0,
        "Model",
        "of several, how many are in memory at once; 0: all.  Further ones are loaded by POST "
        "/models/load, for which the least recently used one goes",
        least=0,
    )
    any_model_name: bool = option(
        False, "Model", "answer a request whatever model it names, with the one that is served"
    )
    served_model_name: list[str] = option(
        [], "Model", "the model's id for clients, and aliases of it", metavar="NAME", many=True
    )
    chat_template: str | None = option(
        None, "Model", "a Jinja template to use instead of the model's own", metavar="FILE"
    )
    hf_token: str | None = option(
        None,
        "Model",
        "a token for the Hugging Face hub; HF_TOKEN in the environment does not show in the "
        "process list",
        metavar="TOKEN",
    )
    mode: str = option(
        "local",
        "Engine",
        "how many requests at once, with how much memory: local 32 with 16384 tokens together, "
        "interactive 1 and server 128 with all that they can fill",
        choices=tuple(MODES),
    )
    max_num_sequence: int = option(
        0,
        "Engine",
        "requests in one step; 0 takes the mode's",
        least=0,
        most=1024,
        overrides=True,
    )
    max_total_seq_length: int = option(
        0,
        "Engine",
        "tokens in the KV cache, of all requests together; 0 takes the mode's, or what fits",
        least=0,
        overrides=True,
    )
    prefill_chunk_size: int = option(
        0,
        "Engine",
        "tokens of prompts in one step at most; 0 takes 256",
        least=0,
        most=65536,
        overrides=True,
    )
    backend: str = option(
        "auto", "Engine", "what computes: auto takes the fastest that runs here", choices=BACKENDS
    )
    threads: int = option(
        0,
        "Engine",
        "threads that compute; 0 takes one for each physical core it may use",
        least=0,
        most=1024,
        backend="cpu",
    )
    activation_bits: int = option(
        16,
        "Engine",
        "of what goes into products on the CPU: 8 is faster and less exact; always 16 with AMX",
        choices=(16, 8),
        least=8,
        backend="cpu",
    )
    kv_cache_bits: int = option(
        16,
        "Engine",
        "of a key's or value's element on the CPU: 8 takes half the memory and is less exact",
        choices=(16, 8, 32),
        least=8,
        backend="cpu",
    )
    context_window_size: int = option(
        0,
        "Engine",
        "tokens of prompt and answer together; 0 takes what the model was made for",
        least=0,
        overrides=True,
    )
    extend_context: bool = option(
        False, "Engine", "allow a --context-window-size beyond what the model was made for"
    )
    speculative_mode: str = option(
        "ngram",
        "Engine",
        "guess the next tokens where that pays, which changes no answer: ngram looks them up in "
        "what was said before, small_draft asks the model of --additional-models",
        choices=SPECULATIVE_MODES,
    )
    additional_models: list[str] = option(
        [],
        "Engine",
        "a small model that guesses, as --model names it, with the same vocabulary",
        metavar="PATH|NAME",
        many=True,
    )
    spec_draft_length: int = option(
        0,
        "Engine",
        "tokens to guess in one step; 0 takes what pays",
        least=0,
        most=16,
        overrides=True,
    )
    gpu_memory_utilization: float = option(
        0.85,
        "Engine",
        "share of the memory, without a GPU of the machine's or cgroup's, for model and KV cache",
        least=0.05,
        most=1.0,
        overrides=True,
    )
    overrides: str = option(
        "", "Engine", "some of the options above, by their names in MLC LLM", metavar="K=V;K=V"
    )
    max_queue: int = option(
        512, "Engine", "requests that may wait for a place; further ones get 503", least=1
    )
    max_queue_tokens: int = option(
        262144, "Engine", "tokens of prompts that may wait so; further requests get 503", least=1
    )
    request_timeout_s: int = option(
        0, "Engine", "seconds that one request may take before it fails; 0 for no limit", least=0
    )
    tool_call_parser: str = option(
        "auto",
        "Answers",
        "how the model writes tool calls; auto goes by its chat template",
        choices=("auto", "hermes", "llama3", "mistral", "json"),
    )
    reasoning_parser: str = option(
        "auto",
        "Answers",
        "whether text between think tags is told apart; auto goes by the chat template",
        choices=("auto", "think", "none"),
    )
    strict_fields: bool = option(
        False, "Answers", "refuse a request with unknown fields instead of ignoring them"
    )
    enable_debug: bool = option(
        False, "Answers", "take MLC LLM's debug_config, and tell its figures in usage.extra"
    )
    host: str = option("127.0.0.1", "Network", "the address to listen on", metavar="ADDRESS")
    port: int = option(
        8000, "Network", "the port to listen on; 0 takes a free one", least=0, most=65535
    )
    allowed_hosts: list[str] = option(
        [],
        "Network",
        "further names that a client may call this server by while it listens on loopback",
        metavar="NAME",
        many=True,
    )
    body_limit_mb: int = option(8, "Network", "the largest request body, in MiB", least=1)
    drain_timeout_s: int = option(
        30, "Network", "seconds that running requests get to finish after SIGTERM", least=0
    )
    api_key: list[str] = option(
        [],
        "Access",
        "a key that clients must send; it shows in the process list, a file does not",
        metavar="KEY",
        many=True,
    )
    api_key_file: str | None = option(
        None, "Access", "a file with one key a line; SIGHUP has it read again", metavar="FILE"
    )
    allow_origins: list[str] = option(
        [],
        "Browsers (CORS)",
        "origins allowed; default: loopback ones without a key, any with one",
        metavar="LIST",
        many=True,
    )
    allow_methods: list[str] = option(
        ["*"], "Browsers (CORS)", "methods allowed", metavar="LIST", many=True
    )
    allow_headers: list[str] = option(
        ["*"], "Browsers (CORS)", "request headers allowed", metavar="LIST", many=True
    )
    allow_credentials: bool = option(False, "Browsers (CORS)", "let browsers send credentials")
    cache_dir: Path = option(
        default_cache_dir(),
        "Files and logs",
        "where fetched models and compiled kernels are kept",
        metavar="DIR",
    )
    log_level: str = option("info", "Files and logs", "what is logged", choices=LOG_LEVELS)


def engine_config(
    config: Config,
    model_path: Path,
    draft_path: Path | None,
    num_engines: int = 1,
    weights_beside_bytes: int = 0,
) -> EngineConfig:
    """What an engine needs of the options, for one of the models."""
    own: dict[str, Any] = {
        "model_path": str(model_path),
        "draft_model_path": str(draft_path or ""),
        "backend_options": _backend_options(config),
        "cache_dir": str(config.cache_dir),
        "num_engines": num_engines,
        "weights_beside_bytes": weights_beside_bytes,
    }
    names = {field.name for field in fields(EngineConfig)} - own.keys()
    return EngineConfig(**own, **{name: getattr(config, name) for name in names})


def _backend_options(config: Config) -> dict[str, dict[str, Any]]:
    """The options that belong to one backend, by backend and name."""
    options: dict[str, dict[str, Any]] = {}
    for each in fields(config):
        if backend := each.metadata.get("backend"):
            options.setdefault(backend, {})[each.name] = getattr(config, each.name)
    return options
