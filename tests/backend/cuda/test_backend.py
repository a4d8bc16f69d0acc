"""The CUDA backend as an engine sees it: memory, types, options, and one sentence if it fails."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.cuda.graphs import Graphs
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.step import Step
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.config import default_cache_dir
from llmsrv.errors import StartupError
from llmsrv.model.load import load_model
from tests.support.cuda import environment
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation
from tests.support.gguf_writer import write_tiny_llama
from tests.support.plans import Piece
from tests.support.plans import batch_of
from tests.support.server import run_server

pytestmark = needs_emulation

GOLDEN = Path(__file__).parents[2] / "data/golden/tiny"
LIMITS = Limits(max_rows=8, max_logit_rows=8, max_slots=4, num_blocks=9)


def backend(**options: Any) -> CUDABackend:
    install_stand_in()
    return CUDABackend(CUDAOptions(default_cache_dir(), warms_up=False, **options))


def program(path: Path) -> Any:
    return load_model(path, lambda: None).program


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


def test_the_estimate_of_weights_is_what_they_take(gguf: Path) -> None:
    for path in (gguf, GOLDEN / "llama", GOLDEN / "mixtral"):
        one, whole = backend(), program(path)
        plan = one.compile(whole, LIMITS, lambda: None)
        packed = plan._memory.weights.values()  # type: ignore[attr-defined]
        without_experts = sum(weights.num_bytes for weights in packed)
        assert one.weight_bytes(whole) >= without_experts
        if path != GOLDEN / "mixtral":
            assert one.weight_bytes(whole) == without_experts


def test_the_estimate_of_the_kv_cache_is_what_it_takes(gguf: Path) -> None:
    one, whole = backend(), program(gguf)
    plan = one.compile(whole, LIMITS, lambda: None)
    memory = plan._memory  # type: ignore[attr-defined]
    taken = memory.keys.nbytes + memory.values.nbytes
    assert taken == LIMITS.num_blocks * 16 * one.kv_position_bytes(whole)


def test_too_little_free_memory_is_an_error_that_says_what_to_change(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = backend()
    large = Limits(max_rows=8, max_logit_rows=8, max_slots=4, num_blocks=100_000)
    monkeypatch.setenv("CUDA_ON_CPU_MEMORY_MIB", "64")
    with pytest.raises(StartupError) as error:
        one.compile(program(gguf), large, lambda: None)
    assert not isinstance(error.value, CannotRun)
    assert "the GPU has too little free memory: weights and KV cache take" in str(error.value)
    assert "--gpu-memory-utilization, --max-total-seq-length" in str(error.value)


@pytest.mark.parametrize(
    "name, capability, dtype, wanted",
    [
        ("llama", "80", "auto", "bfloat16"),  # its weights are bfloat16
        ("llama", "80", "float16", "float16"),
        ("llama", "75", "auto", "float16"),
        ("gguf", "80", "auto", "float16"),
        ("gguf", "80", "bfloat16", "bfloat16"),
    ],
)
def test_the_type_of_activations_follows_weights_gpu_and_option(
    name: str,
    capability: str,
    dtype: str,
    wanted: str,
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", capability)
    path = gguf if name == "gguf" else GOLDEN / name
    with caplog.at_level(logging.INFO):
        plan = backend(dtype=dtype).compile(program(path), LIMITS, lambda: None)
    assert f"{wanted} on cuda:0: " in caplog.text and "of KV cache" in caplog.text
    assert wanted in plan.kv_layout


def test_kernels_that_do_not_compile_or_run_let_another_backend_try(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kernels: Kernels, stem: str, function: str, **macros: object) -> Any:
        return broken.get_function("broken") if stem == "norm" else get(kernels, stem, function)

    get = Kernels.get
    broken = install_stand_in().RawModule(code="extern \"C\" __global__ void broken() { error }")
    one = backend()
    plan_options = dataclasses.replace(one._options, warms_up=True)
    monkeypatch.setattr(one, "_options", plan_options)
    monkeypatch.setattr(Kernels, "get", fail)
    with pytest.raises(CannotRun, match="^the kernels fail on the Emulated: .*error"):
        one.compile(program(gguf), LIMITS, lambda: None)


def test_another_gpu_computes_if_asked_for(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_DEVICES", "2")
    try:
        assert "(cuda:1, compute capability 8.0)" in backend(device="cuda:1").description
        assert install_stand_in().cuda.runtime.getDevice() == 1
    finally:
        install_stand_in().cuda.Device(0).use()


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "75")
    with pytest.raises(CannotRun, match="^the Emulated.* has no bfloat16; use --dtype float16$"):
        backend(dtype="bfloat16")


def test_after_the_start_no_step_waits_for_the_compiler(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(max_rows=40, max_logit_rows=12, max_slots=4, num_blocks=9)
    options = CUDAOptions(default_cache_dir())
    install_stand_in()
    plan = CUDABackend(options).compile(program(gguf), limits, lambda: None)
    plan.sampling.set(1, SamplingParameters(temperature=1.0, num_logprobs=2))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(install_stand_in(), "RawModule", refuse)
    for pieces in ([Piece(range(40), 0, [1, 2, 3])], [Piece([1], 40, [1, 2, 3])] * 3):
        for _ in range(3):
            plan.forward(batch_of(pieces))
            slots = np.arange(len(pieces), dtype=np.int32)
            plan.sample(slots, slots.astype(np.int64))


def test_a_step_is_launched_once_before_it_is_captured() -> None:
    """Kernels may not be loaded while a graph is captured."""
    stream = install_stand_in().cuda.Stream(non_blocking=True)
    runs = []

    def run(step: Step) -> None:
        runs.append((step.num_rows, stream.is_capturing()))

    graphs = Graphs(stream, run)
    with stream:
        for num_rows, is_decode in [(1, True), (4, True), (9, False), (1, True), (1, True)]:
            graphs(Step({}, num_rows, num_rows, is_decode))
    assert runs == [(1, False), (4, False), (9, False), (1, True)]


# ---- What a person sees who starts a server


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine, options, sentence",
    [
        ({"init_result": 803}, (), "the NVIDIA driver does not work: "),
        ({"num_devices": 0}, (), "the NVIDIA driver finds no GPU"),
        ({"driver": 12040}, (), "the NVIDIA driver runs CUDA up to 12.4, but cupy-cuda13x needs"),
        ({"capability": 70}, (), "of compute capability 7.0; 7.5 or higher is needed"),
        ({}, ("--device", "cuda:1"), "there is no cuda:1; there is 1 GPU, cuda:0"),
        ({"memory_mib": 1100}, (), "of the 1.15 GB of the GPU"),
    ],
)
def test_a_server_that_cannot_use_the_gpu_says_why_in_one_line(
    gguf: Path, machine: dict[str, Any], options: tuple[str, ...], sentence: str
) -> None:
    install_stand_in()
    arguments = "--model", f"m={gguf}", "--backend", "cuda", *options
    with run_server(*arguments, environment=environment(**machine), wait=False) as server:
        assert server.process.wait(60) == 1
    [line] = [line for line in server.output.splitlines() if line.startswith("llmsrv: ")]
    assert sentence in line


@pytest.mark.slow
def test_auto_takes_the_gpu_and_falls_back_with_the_reason(gguf: Path) -> None:
    install_stand_in()
    arguments = "--model", f"m={gguf}", "--max-num-sequence", "1", "--prefill-chunk-size", "8"
    with run_server(*arguments, environment=environment(memory_mib=4096)) as server:
        assert "on the cuda backend (the fastest here: Emulated" in server.output
    with run_server(*arguments, environment=environment(driver=12040)) as server:
        assert "cupy-cuda13x needs 13.0" in server.output
        assert "the CPU computes instead" in server.output
        assert "on the cpu backend" in server.output
