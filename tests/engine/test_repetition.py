"""Outputs that end because they repeat themselves."""

import random

import pytest

from llmsrv.engine.messages import RepetitionDetection
from llmsrv.engine.repetition import ends_with_repetition
from tests.support.async_plan import AsyncFakePlan
from tests.support.cores import Engine
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan


@pytest.mark.parametrize(
    "ids, max_size, min_size, count, is_repetition",
    [
        ([1, 2, 1, 2, 1, 2], 2, 1, 3, True),
        ([1, 2, 1, 2, 1, 2], 2, 1, 4, False),
        ([1, 2, 1, 2, 1, 2], 1, 0, 3, False),
        ([1, 2, 1, 2, 1, 2], 2, 0, 2, True),
        ([9, 2, 1, 2, 1, 2], 2, 0, 3, False),
        ([1, 2, 1, 2, 1, 2, 3], 2, 0, 3, False),
        ([5, 5, 5], 10, 0, 3, True),
        ([5, 5, 5], 10, 2, 3, False),
        ([5, 5, 5, 5, 5, 5], 10, 2, 3, True),
        ([4, 4, 1, 4, 4, 1], 3, 3, 2, True),
        ([], 10, 0, 2, False),
    ],
)
def test_a_pattern_counts_if_it_ends_the_output_often_enough(
    ids: list[int], max_size: int, min_size: int, count: int, is_repetition: bool
) -> None:
    detection = RepetitionDetection(max_size, min_size, count)
    assert ends_with_repetition(ids, detection) is is_repetition


def test_it_agrees_with_the_definition() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        ids = [rng.randrange(2) for _ in range(rng.randrange(20))]
        max_size, min_size, count = rng.randrange(1, 8), rng.randrange(4), rng.randrange(2, 5)
        expected = any(
            size * count <= len(ids) and ids[-size:] * count == ids[-size * count :]
            for size in range(max(1, min_size), max_size + 1)
        )
        detection = RepetitionDetection(max_size, min_size, count)
        assert ends_with_repetition(ids, detection) is expected, (ids, detection)


@pytest.mark.parametrize("make_plan", [FakePlan, AsyncFakePlan])
@pytest.mark.parametrize("draft_length", [None, 4])
def test_an_output_ends_with_its_first_repetition_but_not_before_min_tokens(
    make_plan: type[FakePlan], draft_length: int | None
) -> None:
    prompt = healthy_prompt(20, steps=300)
    detection = RepetitionDetection(max_pattern_size=10, min_count=3)
    engine = Engine(
        make_plan=make_plan, draft_length=draft_length, spare_logit_rows=8, blocks=200, context=400
    )
    engine.submit(0, prompt, max_tokens=300)
    engine.run()
    full = engine.outputs[0, 0]
    ends = [n for n in range(1, 300) if ends_with_repetition(full[:n], detection)]
    assert len(ends) > 1
    for request, min_tokens in ((1, 0), (2, ends[0]), (3, ends[0] + 1)):
        fields = {"repetition_detection": detection, "min_tokens": min_tokens}
        engine.submit(request, prompt, max_tokens=300, **fields)
        engine.run()
        end = min(n for n in ends if n >= min_tokens)
        assert engine.outputs[request, 0] == full[:end]
        assert engine.finished[request, 0].reason == "length"
    engine.assert_idle()
