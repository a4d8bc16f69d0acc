"""Where the host does not wait for the device although it must, lazy mode notices."""

import numpy as np
import pytest

from llmsrv.backend.cuda.staging import Staging
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.table import SamplingParameters
from tests.support.attention import attention_program
from tests.support.broken_kernels import new_backend
from tests.support.cuda import install_stand_in
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.operations import LIMITS
from tests.support.operations import random
from tests.support.operations import tensor
from tests.support.operations import write_buffer
from tests.support.plans import Piece
from tests.support.plans import batch_of

pytestmark = [needs_emulation, pytest.mark.slow]
VOCAB = 64


def sampled_ids():
    """Of a model that answers id i with i + 1.  A step is enqueued before the last one is read."""
    eye = np.eye(VOCAB, dtype=np.float32)
    operations = (
        Embed("x", tensor("table", eye)),
        Linear("logits", "x", (tensor("head", np.roll(eye, 1, axis=0)),)),
    )
    widths = {"x": VOCAB, "logits": VOCAB}
    program = Program(operations, widths, 1, 4, 2, 16, vocab_size=VOCAB)
    plan = new_backend().compile(program, LIMITS, lambda: None)
    plan.sampling.set(0, SamplingParameters(temperature=0), [])
    pending, ids = [], []
    for step in range(6):
        plan.forward(batch_of([Piece([7 * step], step, [1])]))
        pending.append(plan.enqueue_sample(np.zeros(1, np.int32), np.array([step], np.int64)))
        if len(pending) == 2:
            ids += pending.pop(0).read().ids.tolist()
    return ids + pending[0].read().ids.tolist()


def attention_of_chunks():
    """Of a prompt whose chunks are all enqueued before anything is read."""
    program = attention_program(2, 1, 16, None, None)
    plan = new_backend().compile(program, LIMITS, lambda: None)
    write_buffer(plan, "qkv", random(20, program.buffers["qkv"]))
    for start in range(0, 100, 20):
        plan.forward(batch_of([Piece([0] * 20, start, list(range(1, 8)))]))
    return plan.read("out")


def test_a_step_that_is_read_before_it_is_done_is_noticed(monkeypatch):
    cupy, correct = install_stand_in(), [1, 8, 15, 22, 29, 36]
    for is_lazy in (False, True):
        with mode(is_lazy=is_lazy):
            assert sampled_ids() == correct
    monkeypatch.setattr(cupy.cuda.Event, "synchronize", lambda event: None)
    assert sampled_ids() == correct
    with mode(is_lazy=True):
        assert sampled_ids() != correct


def test_staged_arrays_that_are_overwritten_before_they_are_copied_are_noticed(monkeypatch):
    def begin_without_waiting(staging):
        staging._turn = (staging._turn + 1) % 2
        staging.host = staging._sets[staging._turn]

    correct = attention_of_chunks().tobytes()
    with mode(is_lazy=True):
        assert attention_of_chunks().tobytes() == correct
    monkeypatch.setattr(Staging, "begin", begin_without_waiting)
    assert attention_of_chunks().tobytes() == correct
    with mode(is_lazy=True):
        assert attention_of_chunks().tobytes() != correct
