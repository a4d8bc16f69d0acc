"""Every option of the server, with its default and its help text.  Flags, environment variables and
--help are all generated from this one table.

An option's value comes from its flag, else from LLMSRV_NAME in the environment, else its default.
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
# As in backend/choose.py, which the server process does not import, since it needs numpy.
BACKENDS = ("auto", "cuda", "cpu", "reference")
DEFAULT_MAX_STEP_MS = 50  # 20 tokens a second, faster than anyone reads
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
    """The options of one engine process, as plain values that can be sent to it."""

    model_path: str
    draft_model_path: str = ""
    backend: str = "auto"
    mode: str = "local"
    max_num_sequence: int = 0  # sequences that run at once; 0: the mode's
    max_total_seq_length: int = 0  # tokens in the KV cache; 0: the mode's, or what fits
    prefill_chunk_size: int = 0  # rows in one step; 0: the backend's
    max_step_ms: int = DEFAULT_MAX_STEP_MS  # of a step that computes both streams and prompts
    context_window_size: int = 0  # tokens in one sequence; 0: what the model was trained for
    extend_context: bool = False  # allow more tokens than the model was trained for
    gpu_memory_utilization: float = 0.85  # share of the backend's memory to use
    num_engines: int = 1  # engines that divide this share among them
    other_weight_bytes: int = 0  # weights of the other engines' models
    speculative_mode: str = "ngram"
    spec_draft_length: int = 0  # draft tokens in one step; 0: chosen while running
    # Backend -> its own options by name; a missing one has the backend's default.
    backend_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    cache_dir: str = field(default_factory=lambda: str(default_cache_dir()))
    log_level: str = "info"


class Mode(NamedTuple):
    """How many sequences run at once, and how many tokens of KV cache each of them gets if memory
    allows; 0: as many as the context length."""

    max_num_sequence: int
    tokens_per_sequence: int


MODES = {"local": Mode(32, 8192), "interactive": Mode(1, 0), "server": Mode(128, 0)}


def option(default: Any, group: str, help: str, **metadata: Any) -> Any:
    """A field of Config.

    metadata  choices: the allowed values
              metavar: the placeholder for the value in --help
              least, most: a number's bounds
              many: True if the flag may be repeated, or takes a JSON list or commas
              overrides: True if --overrides may set it
              backend: the name of the backend that it is an option of
    """
    keep = {"group": group, "help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=keep)
    return field(default=default, metadata=keep)


@dataclass(frozen=True)
class Config:
    """The options of a server.  The field `api_key` is the flag --api-key and LLMSRV_API_KEY."""

    model: list[str] = option(
        [DEFAULT_MODEL],
        "Model",
        "the model to serve: a GGUF file, a Hugging Face folder, hf:org/name[:file], or the name "
        "of a cached model; repeat it to serve several models, each under the NAME that clients "
        f"use (default: {DEFAULT_MODEL})",
        metavar="[NAME=]PATH",
        many=True,
    )
    max_loaded_models: int = option(
        0,
        "Model",
        "how many of several models to keep in memory; 0 keeps all.  POST /models/load loads "
        "another one in place of the least recently used",
        least=0,
    )
    any_model_name: bool = option(
        False, "Model", "accept any model name in requests and answer with the one model served"
    )
    served_model_name: list[str] = option(
        [], "Model", "the model's id for clients, then its aliases", metavar="NAME", many=True
    )
    chat_template: str | None = option(
        None, "Model", "a Jinja chat template to use instead of the model's own", metavar="FILE"
    )
    hf_token: str | None = option(
        None,
        "Model",
        "an access token for the Hugging Face Hub; prefer the environment variable HF_TOKEN, since "
        "flags are visible in the process list",
        metavar="TOKEN",
    )
    mode: str = option(
        "local",
        "Engine",
        "what to size the engine for: local runs up to 32 requests at once, with a KV cache for "
        "8192 tokens each; interactive runs one, server up to 128, with a KV cache for their "
        "longest answers; all within what memory allows",
        choices=tuple(MODES),
    )
    max_num_sequence: int = option(
        0,
        "Engine",
        "maximum number of requests to run at once; 0 uses the mode's",
        least=0,
        most=1024,
        overrides=True,
    )
    max_total_seq_length: int = option(
        0,
        "Engine",
        "size of the KV cache in tokens, shared by all requests; 0 uses the mode's, or what fits",
        least=0,
        overrides=True,
    )
    prefill_chunk_size: int = option(
        0,
        "Engine",
        "maximum number of prompt tokens in one step; 0 uses 256, or 2048 on a GPU",
        least=0,
        most=65536,
        overrides=True,
    )
    max_step_ms: int = option(
        DEFAULT_MAX_STEP_MS,
        "Engine",
        "how many milliseconds a step may last that computes prompts next to running answers: with "
        "more, prompts are computed faster; with less, answers flow more evenly",
        least=1,
        most=10000,
    )
    backend: str = option(
        "auto",
        "Engine",
        "what runs the model: auto picks the fastest that works on this machine",
        choices=BACKENDS,
    )
    device: str = option(
        "cuda:0", "Engine", "the GPU that runs the model", metavar="cuda:N", backend="cuda"
    )
    dtype: str = option(
        "auto",
        "Engine",
        "precision of activations and KV cache on the GPU: auto takes bfloat16 for models in "
        "bfloat16 if the GPU has it, else float16",
        choices=("auto", "float16", "bfloat16"),
        backend="cuda",
    )
    batch_invariant: bool = option(
        False,
        "Engine",
        "compute exactly the same answer on the GPU alone and next to other requests, which is "
        "slower for few requests; the CPU always does",
        backend="cuda",
    )
    threads: int = option(
        0,
        "Engine",
        "CPU threads that run the model; 0 uses one for each available physical core",
        least=0,
        most=1024,
        backend="cpu",
    )
    activation_bits: int = option(
        16,
        "Engine",
        "precision of activations in matrix products on the CPU: 8 is faster and less exact; AMX "
        "always uses 16",
        choices=(16, 8),
        backend="cpu",
    )
    kv_cache_bits: int = option(
        16,
        "Engine",
        "bits for each value in the KV cache on the CPU: 8 halves its memory and is less exact",
        choices=(16, 8, 32),
        backend="cpu",
    )
    context_window_size: int = option(
        0,
        "Engine",
        "maximum length of prompt and answer together, in tokens; 0 uses what the model was "
        "trained for",
        least=0,
        overrides=True,
    )
    extend_context: bool = option(
        False, "Engine", "allow a --context-window-size beyond what the model was trained for"
    )
    speculative_mode: str = option(
        "ngram",
        "Engine",
        "speculative decoding, which speeds up answers and never changes them: ngram drafts tokens "
        "from earlier text, small_draft with the model of --additional-models",
        choices=SPECULATIVE_MODES,
    )
    additional_models: list[str] = option(
        [],
        "Engine",
        "a small draft model with the same vocabulary, named as for --model",
        metavar="PATH|NAME",
        many=True,
    )
    spec_draft_length: int = option(
        0,
        "Engine",
        "number of draft tokens in each step; 0 adapts it to what speeds up the answers",
        least=0,
        most=16,
        overrides=True,
    )
    gpu_memory_utilization: float = option(
        0.85,
        "Engine",
        "share of the memory to use for weights and KV cache; without a GPU, of the memory of the "
        "machine or its cgroup",
        least=0.05,
        most=1.0,
        overrides=True,
    )
    overrides: str = option(
        "",
        "Engine",
        "sets several of the options above at once, by their names in MLC LLM",
        metavar="K=V;K=V",
    )
    max_queue: int = option(
        512, "Engine", "maximum number of waiting requests; further ones get 503", least=1
    )
    max_queue_tokens: int = option(
        262144,
        "Engine",
        "maximum number of prompt tokens of waiting requests; further requests get 503",
        least=1,
    )
    request_timeout_s: int = option(
        0, "Engine", "seconds after which a request fails; 0 sets no limit", least=0
    )
    default_max_tokens: int = option(
        0,
        "Answers",
        "maximum number of tokens in a chat answer whose request sets no limit; 0 allows as many "
        "as fit in the context",
        least=0,
    )
    tool_call_parser: str = option(
        "auto",
        "Answers",
        "the format in which the model writes tool calls; auto detects it from the chat template",
        choices=(
            *("auto", "hermes", "llama3", "mistral", "json", "granite", "phi4", "functools"),
            *("nemotron", "minimax_m1", "apriel", "cohere", "apertus", "qwen3_coder", "seed"),
            *("minimax_m2", "deepseek_v32", "deepseek_v4", "glm", "deepseek_v3", "deepseek_v31"),
            *("kimi_k2", "functionary", "pythonic", "lfm2", "olmo3", "functiongemma", "gemma4"),
        ),
    )
    reasoning_parser: str = option(
        "auto",
        "Answers",
        "whether to return text between think tags as reasoning; auto detects it from the chat "
        "template",
        choices=("auto", "think", "none"),
    )
    strict_fields: bool = option(
        False, "Answers", "reject requests with unknown fields instead of ignoring the fields"
    )
    enable_force_include_usage: bool = option(
        False, "Answers", "send usage in every stream, as if stream_options asked for it"
    )
    enable_debug: bool = option(
        False, "Answers", "accept MLC LLM's debug_config and report its figures in usage.extra"
    )
    host: str = option("127.0.0.1", "Network", "the address to listen on", metavar="ADDRESS")
    port: int = option(
        8000, "Network", "the port to listen on; 0 picks a free one", least=0, most=65535
    )
    allowed_hosts: list[str] = option(
        [],
        "Network",
        "more host names that requests may use while the server listens on loopback",
        metavar="NAME",
        many=True,
    )
    body_limit_mb: int = option(8, "Network", "maximum size of a request body, in MiB", least=1)
    drain_timeout_s: int = option(
        30, "Network", "seconds that running requests have to finish after SIGTERM", least=0
    )
    api_key: list[str] = option(
        [],
        "Access",
        "a key that clients must send; prefer --api-key-file, since flags are visible in the "
        "process list",
        metavar="KEY",
        many=True,
    )
    api_key_file: str | None = option(
        None, "Access", "a file with one key per line; SIGHUP reloads it", metavar="FILE"
    )
    allow_origins: list[str] = option(
        [],
        "Browsers (CORS)",
        "allowed origins; by default any if a key is set, else loopback origins only",
        metavar="LIST",
        many=True,
    )
    allow_methods: list[str] = option(
        ["*"], "Browsers (CORS)", "allowed methods", metavar="LIST", many=True
    )
    allow_headers: list[str] = option(
        ["*"], "Browsers (CORS)", "allowed request headers", metavar="LIST", many=True
    )
    allow_credentials: bool = option(
        False, "Browsers (CORS)", "allow browsers to send credentials"
    )
    cache_dir: Path = option(
        default_cache_dir(),
        "Files and logs",
        "where to keep downloaded models and compiled kernels",
        metavar="DIR",
    )
    log_level: str = option(
        "info", "Files and logs", "the least severe messages to log", choices=LOG_LEVELS
    )


def engine_config(
    config: Config,
    model_path: Path,
    draft_path: Path | None,
    num_engines: int = 1,
    other_weight_bytes: int = 0,
) -> EngineConfig:
    """The options that an engine needs for one of the models."""
    own: dict[str, Any] = {
        "model_path": str(model_path),
        "draft_model_path": str(draft_path or ""),
        "backend_options": _backend_options(config),
        "cache_dir": str(config.cache_dir),
        "num_engines": num_engines,
        "other_weight_bytes": other_weight_bytes,
    }
    names = {field.name for field in fields(EngineConfig)} - own.keys()
    return EngineConfig(**own, **{name: getattr(config, name) for name in names})


def _backend_options(config: Config) -> dict[str, dict[str, Any]]:
    """Backend -> the options that are its own, by name."""
    options: dict[str, dict[str, Any]] = {}
    for each in fields(config):
        if backend := each.metadata.get("backend"):
            options.setdefault(backend, {})[each.name] = getattr(config, each.name)
    return options
