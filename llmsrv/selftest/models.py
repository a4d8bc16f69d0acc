"""Tiny models end to end on a backend, through the engine core.

A checkout has models of every architecture, whose answers transformers computed (tests/data).  An
installed package has none; there the models are made, and the reference backend answers.
"""

import json
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.program import Program
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.reference_sampler import log_softmax
from llmsrv.engine.core import EngineCore
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.model.load import load_model
from llmsrv.selftest.batches import Piece
from llmsrv.selftest.batches import batch_of
from llmsrv.selftest.made_models import Shape
from llmsrv.selftest.made_models import make_program

GOLDEN = Path(__file__).parents[2] / "tests/data/golden/tiny"
LIMITS = Limits(max_rows=512, max_logit_rows=128, max_slots=4, num_blocks=128)


@dataclass(frozen=True)
class Tolerance:
    """error: mean over all steps, of the log-probability of the best token; gap: between the best
    two log-probabilities where another token may win"""

    error: float
    gap: float


TOLERANCE = Tolerance(0.02, 0.05)
BFLOAT16_TOLERANCE = Tolerance(0.05, 0.25)  # it has 8 bits where float16 has 11
MADE_SHAPE = Shape("made", 2, 256, 512, 4, 2, 64, 512, is_tied=True, weight_size=0.1)
MADE_TYPES = "BF16", "Q8_0", "Q4_K"
GREEDY = Sampling(seed=0, temperature=0.0)


@dataclass(frozen=True)
class Expected:
    """What a model in float32 answers to a prompt, greedily.

    best, gaps  of each token: its log-probability, and how far the second best token is behind
    """

    prompt_ids: list[int]
    ids: list[int]
    best: list[float]
    gaps: list[float]


@dataclass(frozen=True)
class TinyModel:
    name: str
    program: Program
    context_length: int
    expected: list[Expected]


@dataclass(frozen=True)
class ModelOutcome:
    """What was found for one model.

    error          mean error of the log-probability of float32's best token, teacher-forced
    max_error      what is allowed
    agreement      share of steps whose best token is float32's
    disagreements  where it is not and float32's best two are not close, teacher-forced or in the
                   engine
    """

    name: str
    error: float
    max_error: float
    agreement: float
    disagreements: int

    @property
    def is_right(self) -> bool:
        return self.error <= self.max_error and self.disagreements == 0


def tiny_models() -> Iterator[TinyModel]:
    if not GOLDEN.is_dir():
        yield from map(_made, MADE_TYPES)
        return
    for folder in sorted(GOLDEN.iterdir()):
        model = load_model(folder, lambda: None)
        cases = json.loads((folder / "golden.json").read_text())["cases"]
        expected = list(map(_golden, cases))
        yield TinyModel(folder.name, model.program, model.config.context_length, expected)


def check_model(backend: Backend, model: TinyModel) -> ModelOutcome:
    plan = backend.compile(model.program, LIMITS, lambda: None)
    tolerance = BFLOAT16_TOLERANCE if "bfloat16" in plan.kv_layout else TOLERANCE
    errors: list[float] = []
    agrees: list[bool] = []
    disagreements = 0
    for expected in model.expected:
        logits = _teacher_forced(plan, model.program, expected)
        best = log_softmax_of(logits, expected.ids)
        errors += np.abs(best - expected.best).tolist()
        same = logits.argmax(axis=1) == expected.ids
        agrees += same.tolist()
        disagreements += int((~same & (np.array(expected.gaps) > tolerance.gap)).sum())
    disagreements += sum(_engine_disagreements(plan, model, tolerance.gap))
    return ModelOutcome(
        model.name,
        float(np.mean(errors)),
        tolerance.error,
        float(np.mean(agrees)),
        disagreements,
    )


def log_softmax_of(logits: Array, ids: Iterable[int]) -> Array:
    """The log-probability of one id of each row."""
    return np.array(
        [log_softmax(row, np.array([id]))[0] for row, id in zip(logits, ids, strict=True)]
    )


def _teacher_forced(plan: Plan, program: Program, expected: Expected) -> Array:
    """Logits of every step, from one forward pass: [len(expected.ids), vocab_size]."""
    ids = [*expected.prompt_ids, *expected.ids[:-1]]
    blocks = range(1, 2 + len(ids) // BLOCK_SIZE)
    num_tokens = len(ids) + 1
    is_long = program.long_from is not None and num_tokens > program.long_from
    plan.forward(batch_of([Piece(ids, 0, blocks, len(expected.ids), is_long)]))
    return plan.read("logits")


def _engine_disagreements(plan: Plan, model: TinyModel, max_gap: float) -> Iterator[bool]:
    """All prompts at once; for each, whether it leaves the expected answer at a clear choice."""
    numbers = model.context_length, model.program.vocab_size, model.program.long_from
    core = EngineCore(plan, LIMITS, *numbers)
    answers: list[list[int]] = [[] for _ in model.expected]
    for number, expected in enumerate(model.expected):
        core.submit(Submit(number, expected.prompt_ids, len(expected.ids), [], GREEDY))
    while core.has_work:
        step = core.step()
        for tokens in step.tokens:
            answers[tokens.request] += tokens.ids
    for answer, expected in zip(answers, model.expected):
        pairs = zip(answer, expected.ids)
        first = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        is_short = len(answer) != len(expected.ids)
        yield is_short or (first is not None and expected.gaps[first] > max_gap)


def _golden(case: dict[str, Any]) -> Expected:
    tops = case["top10_logprobs"]
    best = [top[0][1] for top in tops]
    gaps = [top[0][1] - top[1][1] for top in tops]
    return Expected(case["prompt_ids"], case["greedy_ids"], best, gaps)


# ---- Made models


def _made(type: str) -> TinyModel:
    program = make_program(MADE_SHAPE, type)
    plan = ReferenceBackend().compile(program, LIMITS, lambda: None)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, MADE_SHAPE.vocab_size, size).tolist() for size in (3, 17, 60)]
    expected = [_answer(plan, program, prompt) for prompt in prompts]
    return TinyModel(f"made, {type}", program, MADE_SHAPE.context_length, expected)


def _answer(plan: Plan, program: Program, prompt_ids: list[int], num_tokens: int = 24) -> Expected:
    answer = Expected(prompt_ids, [], [], [])
    while len(answer.ids) < num_tokens:
        longer = replace(answer, ids=[*answer.ids, 0])
        logits = _teacher_forced(plan, program, longer)[-1]
        best, second = np.argsort(-logits, kind="stable")[:2]
        answer.ids.append(int(best))
        answer.best.append(float(log_softmax(logits, np.array([best]))[0]))
        answer.gaps.append(float(logits[best] - logits[second]))
    return answer
