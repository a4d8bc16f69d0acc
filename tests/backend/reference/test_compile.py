"""Programs that the reference backend compiles, and refuses to compile."""

import numpy as np
import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.program import Tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.errors import StartupError
from tests.support.reference import compiled
from tests.support.reference import forward
from tests.support.reference import random
from tests.support.reference import tensor


def test_every_weight_and_every_operation_ticks():
    ticks = []
    weights = tensor("a", random(4, 8)), tensor("b", random(4, 8))
    plan = compiled(
        Embed("x", tensor("table", random(12, 8))),
        Linear("out", "x", weights),
        Linear("out", "x", weights),  # the same weights are prepared once
        tick=lambda: ticks.append(1),
    )
    assert len(ticks) == 2 and len(plan.weights) == 1
    forward(plan)
    assert len(ticks) == 5


@pytest.mark.parametrize("operation", [Embed, lambda out, w: Linear(out, "x", (w,))])
def test_an_unknown_type_is_refused_by_name(operation):
    weight = Tensor("blk.0.attn_q.weight", "Q8_K", (2, 256), np.zeros(584, np.uint8))
    with pytest.raises(StartupError, match="blk.0.attn_q.weight.* Q8_K.*Q4_0, Q4_1, Q5_0"):
        compiled(operation("out", weight))


def test_weights_larger_than_the_machine_are_refused_before_they_are_allocated():
    weight = Tensor("huge", "F32", (1 << 30, 1 << 14), np.zeros(0, np.uint8))
    with pytest.raises(StartupError, match="needs 67108864 MiB .* choose a smaller model"):
        compiled(Linear("out", "x", (weight,)))


def test_a_cache_larger_than_the_address_space_is_refused():
    program = Program((), {}, 1, 1, 1, 128, 12)
    with pytest.raises(StartupError, match="KV cache of 70368744177664 positions"):
        ReferenceBackend().compile(program, Limits(1, 1, 1, 1 << 42), lambda: None)
