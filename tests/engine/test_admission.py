"""How many sequences are admitted, so that few are preempted when they grow."""

import random

import pytest

from llmsrv.backend.base import Batch
from llmsrv.engine.messages import Abort
from llmsrv.engine.scheduler import INITIAL_OUTPUT_TOKENS
from llmsrv.engine.scheduler import NUM_RECENT_OUTPUTS
from tests.support.cores import Engine
from tests.support.cores import healthy_prompt

CONTEXT = 256


def new_engine(recent_output_tokens: int = INITIAL_OUTPUT_TOKENS) -> Engine:
    """A KV cache for two sequences of full length."""
    return Engine(
        max_sequences=16,
        blocks=2 * CONTEXT // 16,
        max_rows=64,
        context=CONTEXT,
        recent_output_tokens=recent_output_tokens,
    )


def run_until_ends(engine: Engine, lengths: list[int]) -> int:
    """Runs requests without a limit whose clients abort them at these lengths.

    Returns how many tokens were computed.
    """
    num_rows = 0
    forward = engine.plan.forward

    def counting(batch: Batch) -> None:
        nonlocal num_rows
        num_rows += len(batch.ids)
        forward(batch)

    engine.plan.forward = counting  # type: ignore[method-assign]
    for request, length in enumerate(lengths):
        engine.submit(request, healthy_prompt(9, request, steps=length + 1), max_tokens=1000)
    while engine.core.has_work:
        for tokens in engine.step().tokens:
            output = engine.outputs[tokens.request, 0]
            if len(output) >= lengths[tokens.request]:
                engine.core.abort(Abort(tokens.request))
    return num_rows


def a_quarter_runs_on(num_requests: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    longest = CONTEXT - 9
    return [rng.choice((longest, *rng.choices(range(5, 50), k=3))) for _ in range(num_requests)]


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([CONTEXT - 9] * 6, id="6 run on"),
        pytest.param([CONTEXT - 9] * 16, id="16 run on", marks=pytest.mark.slow),
        pytest.param(a_quarter_runs_on(64, 1), id="a quarter", marks=pytest.mark.slow),
        pytest.param(a_quarter_runs_on(64, 2), id="another quarter", marks=pytest.mark.slow),
        pytest.param(
            [20] * 64 + [CONTEXT - 9] * 6, id="short, then long", marks=pytest.mark.slow
        ),
        pytest.param([20] * 16 + [CONTEXT - 9] * 16 + [100] * 32, id="mixed"),
    ],
)
def test_less_than_a_fifth_of_the_computed_tokens_is_recomputed(lengths: list[int]) -> None:
    engine = new_engine()
    num_computed = run_until_ends(engine, lengths)
    assert engine.gauges.num_recomputed_tokens < 0.2 * num_computed
    assert len(engine.finished) == len(lengths)
    engine.assert_idle()


def test_recomputed_tokens_are_counted() -> None:
    engine = new_engine(recent_output_tokens=0)
    lengths = [100] * 12
    num_computed = run_until_ends(engine, lengths)
    assert engine.gauges.num_preemptions > 0
    needed = sum(9 + length - 1 for length in lengths)
    assert num_computed - needed == engine.gauges.num_recomputed_tokens > 0


@pytest.mark.parametrize(
    "recent_output_tokens, max_tokens, num_admitted",
    [
        (INITIAL_OUTPUT_TOKENS, 1000, 2),  # each may fill its context
        (INITIAL_OUTPUT_TOKENS, 55, 8),  # each may take 4 of 32 blocks
        (100, 1000, 4),  # each is expected to take 7 blocks
        (100, 55, 8),
        (20, 1000, 16),
    ],
)
def test_sequences_are_admitted_if_their_expected_output_fits(
    recent_output_tokens: int, max_tokens: int, num_admitted: int
) -> None:
    engine = new_engine(recent_output_tokens)
    for request in range(16):
        engine.submit(request, healthy_prompt(9, request, steps=3), max_tokens=max_tokens)
    for _ in range(3):
        engine.step()
    assert engine.gauges.running == num_admitted


def test_short_outputs_let_more_sequences_run_at_once() -> None:
    engine = new_engine()
    num_running = []
    for request in range(2 * NUM_RECENT_OUTPUTS):
        engine.submit(request, healthy_prompt(9, request, steps=5), max_tokens=1000)
    while engine.core.has_work:
        for tokens in engine.step().tokens:
            engine.core.abort(Abort(tokens.request))
        num_running.append(engine.gauges.running)
    assert num_running[0] == 2 and max(num_running) == 16
