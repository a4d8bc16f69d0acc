"""An engine process on the backend that it falls back to."""

from pathlib import Path

import pytest

from llmsrv.backend.host_memory import host_memory
from llmsrv.config import EngineConfig
from llmsrv.engine.client import EngineClient
from llmsrv.engine.messages import Ready
from tests.support.engines import in_loop
from tests.support.gguf_writer import write_tiny_llama

SPARE_BYTES = 2 << 20  # for the weights and the KV cache


async def ready_on(backend: str, model: Path, cache_dir: Path) -> Ready:
    """What an engine reports that has little memory for its KV cache."""
    limit = host_memory()
    config = EngineConfig(
        str(model),
        backend=backend,
        cache_dir=str(cache_dir),
        gpu_memory_utilization=1.0,
        other_weight_bytes=limit.num_bytes - limit.overhead_bytes - SPARE_BYTES,
    )
    client = EngineClient(config)
    await client.start()
    await client.wait_ready()
    await client.stop()
    assert client.ready
    return client.ready


@in_loop
async def test_the_sizes_are_those_of_the_backend_that_auto_falls_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the 16-bit KV cache that the CPU backend would have had."""
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    monkeypatch.setenv("CC", "no-such-compiler")
    fallback = await ready_on("auto", model, tmp_path)
    asked_for = await ready_on("reference", model, tmp_path)
    assert fallback.backend == "reference"
    assert fallback.num_blocks == asked_for.num_blocks < 16384 // fallback.block_size
