"""Every kernel of the CUDA backend compiles with NVRTC for every architecture, without spills where
it matters, and can be launched.

The kernels are those that the backend launches for the programs of the self-test.  COMPLETE names
the architectures and types for which all are compiled; for the others, those of a model.
"""

import dataclasses
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.source import kernel_source
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.source import kernel_sources
from llmsrv.selftest.batches import Piece
from llmsrv.selftest.batches import batch_of
from llmsrv.selftest.batches import prompt
from llmsrv.selftest.cases import Case
from llmsrv.selftest.cases import kernel_cases
from llmsrv.selftest.made_models import Shape
from llmsrv.selftest.made_models import make_program
from tests.support.cuda import needs_emulation

pytest.importorskip("nvidia", reason="needs '.[compat]'")

from tests.support.cuda_launches import Launch  # noqa: E402
from tests.support.cuda_launches import Module  # noqa: E402
from tests.support.cuda_launches import is_decode  # noqa: E402
from tests.support.cuda_launches import recording  # noqa: E402
from tests.support.cuda_launches import step_launches  # noqa: E402
from tests.support.nvrtc import ARCHITECTURES  # noqa: E402
from tests.support.nvrtc import Resources  # noqa: E402
from tests.support.nvrtc import compile_kernels  # noqa: E402

pytestmark = [pytest.mark.compat, needs_emulation]

COMPLETE = (75, "float16"), (90, "bfloat16")
# Cases of the self-test that launch what no model below does, and how many of them.
OTHER_KERNELS = {"Norm, activation, soft cap": 1, "Experts": 1, "Pool, select": 3}
NUM_PROCESSES = 2
LIMITS = Limits(max_rows=320, max_logit_rows=64, max_slots=64, num_blocks=80)
# The heads of real models, in layers that are otherwise small, and the type of the weights.
MODELS = {
    "float16": (Shape("SmolLM2-135M", 1, 512, 768, 9, 3, 64, 1000, is_tied=True), "Q4_K"),
    "bfloat16": (Shape("Llama-3.1-8B", 1, 512, 768, 32, 8, 128, 1000, is_tied=False), "BF16"),
}
DECODE_ROWS = 1, 32
PROMPT_ROWS = 300
SAMPLINGS = (
    SamplingParameters(temperature=0),
    SamplingParameters(top_p=0.9, repetition_penalty=1.1, num_logprobs=3),
)
# (capability, type of 16 bits, kernel) -> bytes that it spills, in kernels that do not decode.
SPILLS: dict[tuple[int, str, str], int] = {}
# (capability, kernel) that cannot be launched there.
NOT_LAUNCHABLE: set[tuple[int, str]] = set()


@dataclasses.dataclass(frozen=True)
class Use:
    """A kernel and how the backend uses it."""

    capability: int
    dtype: str
    launch: Launch
    decodes: bool
    resources: Resources

    @property
    def name(self) -> str:
        return f"{self.launch.function} {' '.join(self.launch.module.options)}"


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    """Compiles everything, each module once, while other launches are recorded."""
    found: list[tuple[int, str, Launch, bool]] = []
    results: dict[tuple[int, Module], Future[dict[str, Resources]]] = {}
    # Processes of their own: the stand-in's driver must not be loaded where NVRTC is.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_PROCESSES, context) as pool:
        for capability, architecture in ARCHITECTURES.items():
            for dtype in list(MODELS)[: 1 + architecture.has_bfloat16]:
                for launch, decodes in _launches(capability, dtype).items():
                    found.append((capability, dtype, launch, decodes))
                    module = launch.module
                    if (capability, module) not in results:
                        results[capability, module] = pool.submit(
                            compile_kernels, kernel_source(module.stem), module.options, capability
                        )
        compiled = {key: future.result() for key, future in results.items()}
    return [
        Use(*each, resources=compiled[each[0], each[2].module][each[2].function]) for each in found
    ]


def _launches(capability: int, dtype: str) -> dict[Launch, bool]:
    """Different launches -> whether one of them is part of a decode step.  Grids do not count."""
    found: dict[Launch, bool] = {}
    with recording(capability, dtype=dtype, packs_weights=False) as (backend, record):
        for program, batches in _programs(capability, dtype):
            plan = backend.compile(program, LIMITS, lambda: None)
            samplings = SAMPLINGS if "logits" in program.buffers else ()
            for batch in batches:
                for launch in step_launches(plan, record, batch, samplings):
                    launch = dataclasses.replace(launch, grid=())
                    found[launch] = found.get(launch, False) or is_decode(batch)
    return found


def _programs(capability: int, dtype: str) -> Iterator[tuple[Program, list[Batch]]]:
    """Programs and their steps."""
    seen: Counter[str] = Counter()
    for case in _cases():
        is_other = seen[case.kernel] < OTHER_KERNELS.get(case.kernel, 0)
        seen[case.kernel] += 1
        if is_other or (capability, dtype) in COMPLETE:
            yield case.program, list(case.steps)
    steps = [batch_of([Piece([0], 20, [1, 2])] * num_rows) for num_rows in DECODE_ROWS]
    yield make_program(*MODELS[dtype]), [*steps, batch_of(prompt(PROMPT_ROWS))]


@cache
def _cases() -> list[Case]:
    return list(kernel_cases())


def test_the_backend_launches_every_kernel_there_is(uses: list[Use]) -> None:
    compiled = {(use.launch.module.stem, use.launch.function) for use in uses}
    found = {
        (path.removesuffix(".cu"), name)
        for path, text in kernel_sources("cuda").items()
        for name in re.findall(r"__global__ void[^(]*(?:\([^)]*\)\s*)?\b(\w+)\(", text.decode())
    }
    assert compiled == found


def test_kernels_that_decode_do_not_spill(uses: list[Use]) -> None:
    spills = {
        (use.capability, use.dtype, use.name, use.resources)
        for use in uses
        if use.decodes and (use.resources.spill_bytes or use.resources.stack_bytes)
    }
    assert not spills


def test_no_other_kernels_spill_than_those_listed(uses: list[Use]) -> None:
    spills: dict[tuple[int, str, str], int] = {}
    for use in uses:
        if use.resources.spill_bytes and not use.decodes:
            key = use.capability, use.dtype, use.launch.function
            spills[key] = max(spills.get(key, 0), use.resources.spill_bytes)
    assert spills == SPILLS


def test_every_launch_fits_the_device(uses: list[Use]) -> None:
    too_large = {
        (use.capability, use.launch.function)
        for use in uses
        if not ARCHITECTURES[use.capability].occupancy(
            use.resources.registers,
            use.resources.shared_bytes + use.launch.shared_bytes,
            use.launch.num_threads,
        )
    }
    assert too_large == NOT_LAUNCHABLE
