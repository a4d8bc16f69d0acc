"""The CUDA backend against transformers in float32 (tests/data/golden), teacher-forced: tiny models
of every architecture, as prompts and decoded by graphs."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.reference_sampler import log_softmax
from llmsrv.config import default_cache_dir
from llmsrv.model.load import load_model
from tests.support.cuda import install_stand_in
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.golden import Step
from tests.support.golden import steps
from tests.support.parameters import slow_but
from tests.support.plans import Piece
from tests.support.plans import batch_of

pytestmark = needs_emulation

GOLDEN = Path(__file__).parents[2] / "data/golden/tiny"
TINY = [path.name for path in sorted(GOLDEN.iterdir())]
LIMITS = Limits(max_rows=256, max_logit_rows=100, max_slots=4, num_blocks=20)
MAX_ERROR, MAX_GAP = 0.02, 0.05


def decoded(plan: Plan, program: Program, case: dict[str, Any]) -> Iterator[Step]:
    """Every step of a golden case, each but the first a forward of its own."""
    prompt, greedy = case["prompt_ids"], case["greedy_ids"]
    is_long = program.long_from is not None and len(prompt) + len(greedy) > program.long_from
    blocks = list(range(1, 2 + (len(prompt) + len(greedy)) // BLOCK_SIZE))
    ids, start = prompt, 0
    for next_id, top in zip(greedy, case["top10_logprobs"], strict=True):
        plan.forward(batch_of([Piece(ids, start, blocks, is_long=is_long)]))
        [logits] = plan.read("logits")
        (best, logprob), (_, second) = top[:2]
        ours = float(log_softmax(logits, np.array([best]))[0])
        yield Step(int(logits.argmax()) == best, abs(ours - logprob), logprob - second)
        ids, start = [next_id], start + len(ids)


@pytest.mark.parametrize("name", slow_but(TINY, "gemma3"))
def test_tiny_models_of_every_architecture_agree_with_float32(name: str) -> None:
    install_stand_in()
    check_golden(name)


def check_golden(name: str) -> None:
    """The prompts of all cases, and one of them decoded, in float16."""
    backend = CUDABackend(CUDAOptions(default_cache_dir(), dtype="float16", warms_up=False))
    program = load_model(GOLDEN / name, lambda: None).program
    plan = backend.compile(program, LIMITS, lambda: None)
    cases = json.loads((GOLDEN / name / "golden.json").read_text())["cases"]
    prompts = [step for case in cases for step in steps(plan, program, case)]
    for results in (prompts, list(decoded(plan, program, cases[2]))):
        assert sum(step.error for step in results) / len(results) <= MAX_ERROR
        assert all(step.gap <= MAX_GAP for step in results if not step.agrees)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_no_kernel_of_a_model_races_or_leaves_its_arrays(name: str) -> None:
    with mode(is_checked=True):
        check_golden(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen3-moe"])
def test_a_gpu_without_asynchronous_copies_gives_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "75")
    install_stand_in()
    check_golden(name)


def test_a_step_gives_the_same_bits_as_a_graph_and_launch_by_launch(cuda16: CUDABackend) -> None:
    program = load_model(GOLDEN / "llama", lambda: None).program
    plans = [cuda16.compile(program, LIMITS, lambda: None) for _ in range(2)]
    plans[1]._graphs = plans[1]._launch_all  # type: ignore[attr-defined]
    with mode(is_lazy=True):
        for position in range(4):  # three sequences, padded to four rows
            pieces = [Piece([position * 7 + n], position, [n + 1]) for n in range(3)]
            for plan in plans:
                plan.forward(batch_of(pieces))
            ours, wanted = (plan.read("logits") for plan in plans)
            np.testing.assert_array_equal(ours, wanted)
    assert len(plans[0]._graphs._graphs) == 1  # type: ignore[attr-defined]


def test_a_step_reads_the_ids_that_the_step_before_it_sampled(cuda16: CUDABackend) -> None:
    program = load_model(GOLDEN / "qwen2", lambda: None).program
    ahead, plain = (cuda16.compile(program, LIMITS, lambda: None) for _ in range(2))
    slots, zero = np.zeros(1, np.int32), np.zeros(1, np.int64)
    prompt = batch_of([Piece([5, 6, 7], 0, [1])])
    with mode(is_lazy=True):
        plain.forward(prompt)
        ids = plain.sample(slots, zero).ids.tolist()
        ahead.forward(prompt)
        unread = [ahead.enqueue_sample(slots, zero)]
        for position in range(3, 6):
            plain.forward(batch_of([Piece([ids[-1]], position, [1])]))
            ids += plain.sample(slots, zero + position).ids.tolist()
            batch = batch_of([Piece([0], position, [1])])
            ahead.forward(dataclasses.replace(batch, ids=np.array([-1], np.int32)))
            unread.append(ahead.enqueue_sample(slots, zero + position))
            assert unread.pop(0).read().ids.tolist() == [ids[-2]]
        assert unread.pop().read().ids.tolist() == [ids[-1]]
