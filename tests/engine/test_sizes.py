"""The sizes of an engine, from its mode, the options, the model and the memory."""

import pytest

from llmsrv.backend.base import MemoryLimit
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.config import EngineConfig
from llmsrv.engine.sizes import MemoryBudget
from llmsrv.engine.sizes import choose_sizes
from llmsrv.engine.sizes import memory_budget
from llmsrv.errors import StartupError

GB = 10**9
OVERHEAD_BYTES = 160 << 20


def memory(num_tokens: int = 10**7) -> MemoryBudget:
    """Room for `num_tokens` tokens of 20 KB when 85 % of the memory may be used."""
    left = num_tokens * 20_000
    total = round((left + GB + OVERHEAD_BYTES) / 0.85) + 1
    return MemoryBudget(MemoryLimit(total, "the machine", OVERHEAD_BYTES), GB, 20_000)


def config(**fields: object) -> EngineConfig:
    return EngineConfig("model.gguf", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields, trained, fitting, wanted",
    [
        # sequences, tokens in the cache, context
        ({}, 8192, 10**7, (32, 32 * 8192, 8192)),
        ({}, 131072, 10**7, (32, 32 * 8192, 131072)),
        ({}, 256, 10**7, (32, 8192, 256)),
        ({}, 8192, 4000, (32, 4000, 4000)),
        ({"mode": "interactive"}, 8192, 10**7, (1, 8192, 8192)),
        ({"mode": "interactive"}, 131072, 10**7, (1, 131072, 131072)),
        ({"mode": "interactive"}, 131072, 50_000, (1, 50_000, 50_000)),
        ({"mode": "server"}, 8192, 10**7, (128, 128 * 8192, 8192)),
        ({"mode": "server"}, 8192, 100_000, (128, 100_000, 8192)),
        ({"max_num_sequence": 4}, 2048, 10**7, (4, 8192, 2048)),
        ({"max_total_seq_length": 100_000}, 8192, 10**6, (32, 100_000, 8192)),
        ({"max_total_seq_length": 1000}, 8192, 10**6, (32, 1008, 1008)),
        ({"context_window_size": 1024}, 8192, 10**6, (32, 32 * 1024, 1024)),
        ({"context_window_size": 32768}, 131072, 10**6, (32, 32 * 8192, 32768)),
        ({"context_window_size": 9000, "extend_context": True}, 8192, 10**6, (32, 32 * 8192, 9000)),
    ],
)
def test_sizes_follow_mode_options_model_and_memory(
    fields: dict[str, object], trained: int, fitting: int, wanted: tuple[int, int, int]
) -> None:
    sizes = choose_sizes(config(**fields), trained, memory(fitting))
    assert (sizes.max_num_sequence, sizes.num_blocks * 16, sizes.context_length) == wanted
    assert f"{wanted[0]} sequences" in sizes.reason and f"{wanted[1]} tokens" in sizes.reason


@pytest.mark.parametrize(
    "fields, fitting, named",
    [
        ({"max_total_seq_length": 50_000}, 49_000, ["--max-total-seq-length 50000", "1.00 GB"]),
        (
            {"max_total_seq_length": 1000, "context_window_size": 2000},
            10**6,
            ["--context-window-size 2000", "--max-total-seq-length 1000"],
        ),
        ({"context_window_size": 9000}, 10**6, ["--context-window-size 9000", "--extend-context"]),
        ({"context_window_size": 4000}, 3000, ["4000 tokens", "only 3000", "the machine"]),
        ({}, 500, ["512 tokens", "only 500 tokens", "1.00 GB of weights", "85%"]),
        ({}, 0, ["only 0 tokens"]),
    ],
)
def test_options_that_conflict_or_do_not_fit_are_refused_with_their_values(
    fields: dict[str, object], fitting: int, named: list[str]
) -> None:
    with pytest.raises(StartupError) as error:
        choose_sizes(config(**fields), 8192, memory(fitting))
    for text in named:
        assert text in str(error.value)


def test_a_larger_share_of_the_memory_holds_more_tokens() -> None:
    sizes = choose_sizes(
        config(mode="server", gpu_memory_utilization=1.0), 10**6, memory(100_000)
    )
    assert sizes.num_blocks * 16 > 125_000


def test_engines_divide_the_memory_that_all_their_weights_leave() -> None:
    both = config(mode="server", num_engines=2, other_weight_bytes=400_000 * 20_000)
    sizes = choose_sizes(both, 10**6, memory(10**6))
    assert 0.98 * 300_000 < sizes.num_blocks * 16 <= 300_000
    assert "9.00 GB of weights, shared by 2 models" in sizes.reason


def test_a_shared_weight_counts_once_and_each_program_has_its_own_cache() -> None:
    table, other = (random_tensor(name, "F32", (4, 8)) for name in ("table", "other"))
    operations = Embed("x", table), Linear("logits", "x", (table, other))
    program = Program(operations, {}, 3, 8, 2, 64, vocab_size=100)
    num_bytes, backend = table.data.nbytes + other.data.nbytes, ReferenceBackend()
    for num in (1, 2):
        position_bytes = num * backend.kv_position_bytes(program)
        wanted = MemoryBudget(backend.memory(), num * num_bytes, position_bytes)
        assert memory_budget([program] * num, backend) == wanted
