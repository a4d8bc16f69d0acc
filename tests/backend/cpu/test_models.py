"""The CPU backend against the reference backend: whole models, batches, drafts, failures."""

import ctypes
import dataclasses

import numpy as np
import pytest

from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
from tests.support.operations import LIMITS
from tests.support.operations import VOCAB
from tests.support.operations import random
from tests.support.operations import tensor
from tests.support.plans import Piece
from tests.support.plans import Run
from tests.support.plans import batch_of
from tests.support.plans import generate
from tests.support.plans import generate_from_drafts


def llama(type="Q8_0", hidden=64, heads=4, kv_heads=2, head_dim=16, inner=96, layers=3):
    """A program of the llama family, with weights that give logits of ordinary size."""
    frequencies = np.float32(100.0) ** -np.linspace(0, 1, head_dim // 2, dtype=np.float32)
    names = iter(range(10**6))

    def weight(rows, columns):
        name = f"w{next(names)}"
        return random_tensor(name, type, (rows, columns), int(name[1:]), size=0.15)

    def norm(out, x):
        name = f"w{next(names)}"
        return Norm(out, x, tensor(name, random(hidden, seed=int(name[1:]))), 1e-5)

    table = random_tensor("table", type, (VOCAB, hidden), seed=77)
    operations = [Embed("hidden", table)]
    kv = kv_heads * head_dim
    for layer in range(layers):
        qkv = weight(heads * head_dim, hidden), weight(kv, hidden), weight(kv, hidden)
        operations += [
            norm("normed", "hidden"),
            Linear("qkv", "normed", qkv),
            RopeAndStore("qkv", layer, frequencies, interleaved=True),
            Attention("attended", "qkv", layer, head_dim**-0.5),
            Linear("hidden", "attended", (weight(hidden, heads * head_dim),), accumulate=True),
            norm("normed", "hidden"),
            Linear("gate_up", "normed", (weight(inner, hidden), weight(inner, hidden))),
            GatedActivation("activated", "gate_up"),
            Linear("hidden", "activated", (weight(hidden, inner),), accumulate=True),
        ]
    operations += [
        SelectLogitRows("last", "hidden"),
        norm("last_normed", "last"),
        Linear("logits", "last_normed", (table,)),
    ]
    widths = {
        "hidden": hidden,
        "normed": hidden,
        "qkv": (heads + 2 * kv_heads) * head_dim,
        "attended": heads * head_dim,
        "gate_up": 2 * inner,
        "activated": inner,
        "last": hidden,
        "last_normed": hidden,
        "logits": VOCAB,
    }
    return Program(tuple(operations), widths, layers, heads, kv_heads, head_dim, VOCAB)


SHAPES = [
    {},
    {"type": "Q4_0", "heads": 2, "kv_heads": 1, "head_dim": 32},
    {"type": "F16", "hidden": 50, "heads": 5, "kv_heads": 5, "head_dim": 10, "inner": 33},
    {"type": "BF16", "hidden": 72, "head_dim": 8, "layers": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tiny_llama_gives_the_references_log_probabilities(cpu, shape):
    program = llama(**shape)
    parameters = SamplingParameters(temperature=0, num_logprobs=5)
    prompts = [np.random.default_rng(i).integers(0, VOCAB, 3 + 40 * i).tolist() for i in range(4)]
    results = []
    for backend in (cpu, ReferenceBackend()):
        plan = backend.compile(program, LIMITS, lambda: None)
        runs = [Run(prompt, 6, parameters) for prompt in prompts]
        generate(plan, runs, chunk=50)
        results.append(runs)
    for ours, theirs in zip(*results):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=0.01)


def logits_of(plan, run, chunk):
    """The logits of every step of a greedy run."""
    rows = []
    forward = plan.forward

    def noted(batch):
        forward(batch)
        rows.extend(plan.read("logits"))

    plan.forward = noted
    generate(plan, [run], chunk)
    plan.forward = forward
    return np.array(rows)


def test_logits_are_the_same_bits_alone_batched_and_in_chunks(cpu):
    check_logits_do_not_depend_on_the_batch(cpu)


def test_logits_with_eight_bits_do_not_depend_on_the_batch(cpu8):
    check_logits_do_not_depend_on_the_batch(cpu8)


def test_a_copied_block_gives_the_same_bits(cpu):
    check_a_copied_block_gives_the_same(cpu)


def test_a_copied_block_gives_the_same_in_the_reference():
    check_a_copied_block_gives_the_same(ReferenceBackend(), tolerance=1e-5)


def check_a_copied_block_gives_the_same(backend, tolerance=0):
    program = llama(heads=6, kv_heads=2, layers=2)
    plan = backend.compile(program, LIMITS, lambda: None)
    ids = np.random.default_rng(5).integers(0, VOCAB, 40).tolist()
    plan.forward(batch_of([Piece(ids, 0, [1, 2, 3])]))
    expected = plan.read("logits")[0]
    plan.forward(batch_of([Piece(ids[:30] + [5], 0, [4, 6])]))
    plan.copy_block(6, 7)
    plan.forward(batch_of([Piece(ids[30:], 30, [4, 7, 8])]))
    np.testing.assert_allclose(plan.read("logits")[0], expected, tolerance, tolerance)


def check_logits_do_not_depend_on_the_batch(backend):
    program = llama(heads=6, kv_heads=2, layers=2)
    prompt = np.random.default_rng(5).integers(0, VOCAB, 285).tolist()
    alone = logits_of(backend.compile(program, LIMITS, lambda: None), Run(prompt, 5), 300)
    for chunk in (1, 7, 29, 64, 256):
        plan = backend.compile(program, LIMITS, lambda: None)
        np.testing.assert_array_equal(logits_of(plan, Run(prompt, 5), chunk), alone)
    plan = backend.compile(program, LIMITS, lambda: None)
    others = [np.random.default_rng(i).integers(0, VOCAB, 11 * i + 1).tolist() for i in range(9)]
    runs = [Run(prompt, 5), *(Run(other, 12) for other in others)]
    seen = []
    forward = plan.forward

    def noted(batch):
        forward(batch)
        if 0 in batch.sequences[batch.logit_rows] and len(runs[0].ids) < 5:
            seen.append(plan.read("logits")[0])

    plan.forward = noted
    generate(plan, runs, chunk=20)
    np.testing.assert_array_equal(seen[-5:], alone)


SPECULATED = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.9, "top_p": 0.9, "seed": 11},
    {"temperature": 1.2, "presence_penalty": 1.0, "typical_p": 0.9, "seed": 12},
    {"temperature": 0.7, "min_tokens": 12, "end_ids": range(0, VOCAB, 2), "seed": 13},
]


@pytest.mark.parametrize("values", SPECULATED)
@pytest.mark.parametrize("is_reference", [False, True])
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(cpu, values, is_reference):
    backend = ReferenceBackend() if is_reference else cpu
    plan = backend.compile(llama(layers=1), LIMITS, lambda: None)
    plain, drafted = (Run([5, 3, 8, 1] * 5, 30, SamplingParameters(**values)) for _ in range(2))
    generate(plan, [plain])
    rng = np.random.default_rng(0)

    def propose(ids):
        """Some right ids, then some random ones."""
        right = plain.ids[len(ids) :][: rng.integers(5)]
        return [*right, *rng.integers(0, VOCAB, rng.integers(4)).tolist()]

    generate_from_drafts(plan, drafted, propose)
    assert drafted.ids == plain.ids


def test_each_operation_of_a_step_raises_the_heartbeat(cpu):
    heartbeat = ctypes.c_uint64()

    def tick():
        heartbeat.value += 1

    tick.address = ctypes.addressof(heartbeat)
    program = llama()
    plan = cpu.compile(program, LIMITS, tick)
    before = heartbeat.value
    plan.forward(batch_of([Piece([1, 2], 0, [1])]))
    assert heartbeat.value - before >= len(program.operations)


def test_a_row_of_nan_fails_alone(cpu):
    program = llama()
    plan = cpu.compile(program, LIMITS, lambda: None)
    table = program.operations[0].table
    packed = table.data.reshape(VOCAB, -1).copy()
    packed[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    broken = dataclasses.replace(table, data=packed.reshape(-1))
    first = dataclasses.replace(program.operations[0], table=broken)
    program = dataclasses.replace(program, operations=(first, *program.operations[1:]))
    plan = cpu.compile(program, LIMITS, lambda: None)
    for slot in range(2):
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    plan.forward(batch_of([Piece([1, 3], 0, [1]), Piece([1, 2], 0, [2])]))
    ids = plan.sample(np.arange(2, dtype=np.int32), np.zeros(2, np.int64)).ids
    assert ids[0] == -1 and ids[1] >= 0
