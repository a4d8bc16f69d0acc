"""What every backend's plans have in common: buffers that can be read, and blocks that can move."""

import numpy as np
import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.model.load import load_model
from tests.support.gguf_writer import write_tiny_llama
from tests.support.plans import Piece
from tests.support.plans import batch_of

LIMITS = Limits(max_rows=64, max_logit_rows=4, max_slots=4, num_blocks=12)
IDS = np.random.default_rng(0).integers(0, 250, 45).tolist()  # three blocks, the last not full


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    # Heads of 20 values: the CPU backend pads them.
    path = tmp_path_factory.mktemp("plan") / "tiny.gguf"
    return load_model(write_tiny_llama(path, hidden_size=80), lambda: None).program


def compiled(backend, program):
    return backend.compile(program, LIMITS, lambda: None)


def logits_of(plan, ids, start, blocks):
    plan.forward(batch_of([Piece(ids, start, blocks)]))
    return plan.read("logits")


def test_a_buffer_has_the_rows_of_the_last_forward(any_backend, program):
    plan = compiled(any_backend, program)
    for num_rows in (7, 2):
        pieces = Piece(IDS[:num_rows], 0, [1]), Piece(IDS[:3], 0, [2]), Piece([4], 0, [3], False)
        plan.forward(batch_of(pieces))
        hidden, logits = plan.read("hidden"), plan.read("logits")
        assert hidden.shape == (num_rows + 4, program.buffers["hidden"])
        assert logits.shape == (2, program.vocab_size)
        assert hidden.dtype == logits.dtype == np.float32


def test_what_is_read_is_a_copy(any_backend, program):
    plan = compiled(any_backend, program)
    first = logits_of(plan, IDS, 0, [1, 2, 3])
    kept = first.copy()
    second = logits_of(plan, [5], 45, [1, 2, 3])
    np.testing.assert_array_equal(first, kept)
    assert (first != second).any()


def test_an_unknown_buffer_is_a_key_error(any_backend, program):
    plan = compiled(any_backend, program)
    logits_of(plan, IDS, 0, [1, 2, 3])
    with pytest.raises(KeyError, match="no_such_buffer"):
        plan.read("no_such_buffer")


def test_decoding_continues_on_blocks_from_another_plan_with_the_same_bits(any_backend, program):
    source, target = (compiled(any_backend, program) for _ in range(2))
    assert source.kv_layout == target.kv_layout
    logits_of(source, IDS, 0, [3, 1, 7])
    target.write_blocks([2, 9, 4], source.read_blocks([3, 1, 7]))
    for position in range(45, 50):  # into a fourth block
        wanted = logits_of(source, [position], position, [3, 1, 7, 5])
        ours = logits_of(target, [position], position, [2, 9, 4, 11])
        np.testing.assert_array_equal(ours, wanted)


def test_written_blocks_are_read_back_and_no_others_change(any_backend, program):
    plan = compiled(any_backend, program)
    everything = list(range(LIMITS.num_blocks))
    before = plan.read_blocks(everything)
    assert before.dtype == np.uint8
    data = np.random.default_rng(1).integers(0, 256, (3, before.shape[1]), np.uint8)
    plan.write_blocks([8, 2, 5], data)
    np.testing.assert_array_equal(plan.read_blocks([2, 5, 8]), data[[1, 2, 0]])
    others = [block for block in everything if block not in (2, 5, 8)]
    np.testing.assert_array_equal(plan.read_blocks(others), before[others])
    assert plan.read_blocks([]).shape == (0, before.shape[1])
    plan.write_blocks([], data[:0])


def test_bytes_of_the_wrong_shape_or_type_are_refused_by_name(any_backend, program):
    plan = compiled(any_backend, program)
    data = plan.read_blocks([1, 2])
    num_bytes = data.shape[1]
    for wrong in (data[:1], data[:, :-1], data.astype(np.int8), data[0]):
        with pytest.raises(ValueError) as error:
            plan.write_blocks([1, 2], wrong)
        assert f"uint8 of shape (2, {num_bytes})" in str(error.value)
        assert f"got {wrong.dtype} of shape {wrong.shape}" in str(error.value)


def test_plans_that_store_blocks_in_other_ways_have_other_layouts(cpu, cpu8, program, tmp_path):
    shallow = load_model(write_tiny_llama(tmp_path / "m.gguf", layers=1), lambda: None).program
    plans = [compiled(each, program) for each in (ReferenceBackend(), cpu, cpu8)]
    plans += [compiled(each, shallow) for each in (ReferenceBackend(), cpu, cpu8)]
    assert len({plan.kv_layout for plan in plans}) == 6
