"""Chooses how many sequences an engine runs at once, how long they may be, and the size of its KV
cache, from the mode, the options, the model and the memory.

Names and modes are those of MLC LLM's engine configuration.
"""

from dataclasses import dataclass

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import MemoryLimit
from llmsrv.backend.program import Program
from llmsrv.config import EngineConfig
from llmsrv.config import MODES
from llmsrv.errors import StartupError

MIN_CACHE_TOKENS = 512  # with memory for less, an engine is of no use and refuses to start


@dataclass(frozen=True)
class MemoryBudget:
    """The memory there is, and what the programs take of it.

    limit           the backend's memory
    weight_bytes    the weights of the model and of its draft model
    position_bytes  one position of the KV cache: keys and values in every layer of both models
    """

    limit: MemoryLimit
    weight_bytes: int
    position_bytes: int


def memory_budget(programs: list[Program], backend: Backend) -> MemoryBudget:
    """The budget of a model and its draft model; each has a KV cache for the same positions."""
    position_bytes = sum(map(backend.kv_position_bytes, programs))
    return MemoryBudget(backend.memory(), sum(map(backend.weight_bytes, programs)), position_bytes)


@dataclass(frozen=True)
class Sizes:
    max_num_sequence: int
    num_blocks: int
    context_length: int
    reason: str  # one line for the log


def choose_sizes(config: EngineConfig, trained_context: int, memory: MemoryBudget) -> Sizes:
    """Raises StartupError, with the values, if the options contradict each other or do not fit."""
    mode = MODES[config.mode]
    num_sequences = config.max_num_sequence or mode.max_num_sequence
    context = _context(config, trained_context)
    weights = memory.weight_bytes + config.other_weight_bytes
    left = int(config.gpu_memory_utilization * memory.limit.num_bytes) - weights
    fitting = max(0, left // config.num_engines - memory.limit.overhead_bytes)
    fitting //= memory.position_bytes
    if config.max_total_seq_length:
        total, why = config.max_total_seq_length, "as requested"
        _check_total(config, total, fitting, memory)
    else:
        wanted = num_sequences * min(context, mode.tokens_per_sequence or context)
        total, why = max(wanted, config.context_window_size), f"mode {config.mode}"
        if total > fitting:
            total, why = fitting, f"all that fits in {_memory_share(memory, config)}"
            _check_fitting(config, fitting, memory)
    num_blocks = -(-total // BLOCK_SIZE)
    context = min(context, num_blocks * BLOCK_SIZE)
    beyond = f" (the model was trained for {trained_context})" if context > trained_context else ""
    num_tokens = num_blocks * BLOCK_SIZE
    cache = f"{num_tokens} tokens, {_mb(num_tokens * memory.position_bytes)}"
    reason = (
        f"up to {num_sequences} sequences at once, each of at most {context} tokens{beyond}; "
        f"KV cache of {cache} ({why})"
    )
    return Sizes(num_sequences, num_blocks, context, reason)


def _context(config: EngineConfig, trained: int) -> int:
    asked = config.context_window_size
    if asked > trained and not config.extend_context:
        raise StartupError(
            f"--context-window-size {asked} is beyond the {trained} tokens that the model was "
            "trained for; add --extend-context to try it anyway"
        )
    return asked or trained


def _check_total(config: EngineConfig, total: int, fitting: int, memory: MemoryBudget) -> None:
    if total > fitting:
        raise StartupError(
            f"--max-total-seq-length {total} needs {_mb(total * memory.position_bytes)} for the KV "
            f"cache, but only {fitting} tokens fit in {_memory_share(memory, config)}"
        )
    if config.context_window_size > total:
        raise StartupError(
            f"--context-window-size {config.context_window_size} does not fit in "
            f"--max-total-seq-length {total}, which all sequences share"
        )


def _check_fitting(config: EngineConfig, fitting: int, memory: MemoryBudget) -> None:
    needed = max(MIN_CACHE_TOKENS, config.context_window_size)
    if fitting < needed:
        raise StartupError(
            f"too little memory: a KV cache of {needed} tokens takes "
            f"{_mb(needed * memory.position_bytes)}, but only {fitting} tokens fit in "
            f"{_memory_share(memory, config)}; use a smaller model, a smaller "
            "--context-window-size or a larger --gpu-memory-utilization"
        )


def _memory_share(memory: MemoryBudget, config: EngineConfig) -> str:
    weights = _mb(memory.weight_bytes + config.other_weight_bytes)
    shared = f", shared by {config.num_engines} models" if config.num_engines > 1 else ""
    return (
        f"{config.gpu_memory_utilization:.0%} of the {_mb(memory.limit.num_bytes)} of "
        f"{memory.limit.whose}, next to {weights} of weights{shared}"
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
