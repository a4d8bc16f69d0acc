"""The CPU backend against the reference backend: operations, types, whole models."""

import ctypes
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.cpu.tiers import Tier
from llmsrv.backend.cpu.library import FLOATS
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.source import load_library
from llmsrv.config import default_cache_dir
from tests.support.parameters import slow_but
from tests.support.plans import Piece
from tests.support.plans import Run
from tests.support.plans import batch_of
from tests.support.plans import generate
from tests.support.plans import generate_from_drafts
from tests.support.tensors import HALVES
from tests.support.tensors import random_tensor

LIMITS = Limits(max_rows=300, max_logit_rows=40, max_slots=40, num_blocks=80)
VOCAB = 97
PACKED = [type for type in FORMATS if type in GGML_TYPES]
OTHERS = [type for type in GGML_TYPES if type in HALVES and type not in FORMATS]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(name, values):
    values = np.asarray(values, np.float32)
    return dataclasses.replace(
        random_tensor(name, "F32", values.shape), data=values.reshape(-1).view(np.uint8)
    )


def both(backend, operations, widths, pieces, heads=(4, 2, 16), **inputs):
    """The buffers that the operations leave on the backend and on the reference backend."""
    program = Program(tuple(operations), widths, 1, *heads, vocab_size=VOCAB)
    plans = [b.compile(program, LIMITS, lambda: None) for b in (backend, ReferenceBackend())]
    batch = batch_of(pieces)
    for plan in plans:
        for name, values in inputs.items():
            if isinstance(plan.buffers.get(name), np.ndarray):
                plan.buffers[name][: len(values), : values.shape[1]] = values
            else:
                plan.buffers[name] = values.copy()
        plan.forward(batch)
    ours, theirs = plans
    return {name: (ours.read(name), theirs.read(name)) for name in widths if name in theirs.buffers}


def rows(count):
    return [Piece([0] * count, 0, list(range(1, 2 + count // 16)))]


# ---- Operations


@pytest.mark.parametrize("type", [*PACKED, *OTHERS])
def test_embed_takes_rows_of_every_type(cpu, type):
    width = 50 if type in FLOATS else 512
    embed = Embed("out", random_tensor("table", type, (VOCAB, width)), scale=0.3)
    ids = [0, 5, VOCAB - 1, 5]
    ours, theirs = both(cpu, [embed], {"out": width}, [Piece(ids, 0, [1])])["out"]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("type", PACKED)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7, 13, 300])
def test_linear_multiplies_weights_of_every_type(cpu, type, num_rows):
    columns = 512 if type.endswith("_K") else 96
    x = random(num_rows, columns)
    x[:, 5] *= 20  # an outlier, as activations have them
    weight = random_tensor("w", type, (45, columns))
    linear = Linear("out", "x", (weight,))
    ours, theirs = both(cpu, [linear], {"x": columns, "out": 45}, rows(num_rows), x=x)["out"]
    size = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-4 * size)


@pytest.mark.parametrize("type", PACKED)
@pytest.mark.parametrize("columns", slow_but([32, 256, 768, 1568], 32, 1568))
def test_a_row_has_the_same_bits_however_many_there_are(cpu, type, columns):
    if type.endswith("_K") and columns % 256:
        columns = 256 * (columns // 256 + 1)
    weight = random_tensor("w", type, (100, columns))
    operations = (Linear("out", "x", (weight,)),)
    program = Program(operations, {"x": columns, "out": 100}, 1, 4, 2, 16, vocab_size=VOCAB)
    plan = cpu.compile(program, LIMITS, lambda: None)
    x = random(50, columns) * np.exp2(np.arange(50, dtype=np.float32) * 4 - 100)[:, None]
    x[7], x[8, 3], x[9] = 0, 1e30, np.abs(x[9])

    def multiplied(some):
        plan.buffers["x"][: len(some), :columns] = some
        plan.forward(batch_of(rows(len(some))))
        return plan.read("out").tobytes()

    alone = b"".join(multiplied(x[i : i + 1]) for i in range(50))
    for count in (2, 3, 4, 5, 17, 33, 50):
        parts = [multiplied(x[i : i + count]) for i in range(0, 50, count)]
        assert b"".join(parts) == alone, count


@pytest.mark.parametrize("type", PACKED)
def test_linear_with_eight_bits_is_as_near_as_eight_bits_are(cpu8, type):
    columns = 512 if type.endswith("_K") else 96
    x = random(20, columns)
    linear = Linear("out", "x", (random_tensor("w", type, (45, columns)),))
    ours, theirs = both(cpu8, [linear], {"x": columns, "out": 45}, rows(20), x=x)["out"]
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(theirs).mean()


@pytest.mark.parametrize("type", OTHERS)
def test_types_without_products_of_their_own_become_floats(cpu, type):
    linear = Linear("out", "x", (random_tensor("w", type, (20, 512)),))
    ours, theirs = both(cpu, [linear], {"x": 512, "out": 20}, rows(3), x=random(3, 512))["out"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(PACKED), st.integers(1, 70)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_linear_stacks_weights_of_several_types(cpu, stack, num_rows, has_biases, accumulate):
    weights = tuple(
        random_tensor(f"w{i}", type, (size, 256), seed=i) for i, (type, size) in enumerate(stack)
    )
    biases = tuple(tensor(f"b{i}", random(size, seed=i)) for i, (_, size) in enumerate(stack))
    linear = Linear("out", "x", weights, biases if has_biases else (), 0.5, accumulate)
    width = sum(size for _, size in stack)
    before = random(num_rows, width, seed=9)
    ours, theirs = both(
        cpu, [linear], {"x": 256, "out": width}, rows(num_rows), x=random(num_rows, 256), out=before
    )["out"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("type", ["Q4_1", "Q8_0", "F16"])
@pytest.mark.parametrize("function", ["silu", "gelu"])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_gate_and_up_in_one_are_activated_as_one_after_the_other(cpu, type, function, num_rows):
    weights = tuple(random_tensor(name, type, (80, 96), seed=i) for i, name in enumerate("gu"))
    biases = tuple(tensor(f"b{name}", random(80, seed=i)) for i, name in enumerate("gu"))
    operations = [
        Linear("both", "x", weights, biases, 0.01),
        GatedActivation("out", "both", function),
    ]
    widths = {"x": 96, "both": 160, "out": 80}
    ours, theirs = both(cpu, operations, widths, rows(num_rows), x=random(num_rows, 96))["out"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("width", [1, 16, 37, 96])
@pytest.mark.parametrize("accumulate", [False, True])
def test_norm_and_activation_of_any_width(cpu, width, accumulate):
    operations = [
        GatedActivation("gelu", "gate_up", "gelu"),
        GatedActivation("silu", "gate_up"),
        Norm("out", "silu", tensor("w", random(width)), 1e-5, accumulate),
        Softcap("gelu", 2.0),
    ]
    widths = {"gate_up": 2 * width, "silu": width, "gelu": width, "out": width}
    values = {"gate_up": random(7, 2 * width) * 5, "out": random(7, width, seed=1)}
    for ours, theirs in both(cpu, operations, widths, rows(7), **values).values():
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_pool_takes_each_sequences_rows(cpu, kind):
    pieces = [Piece([0] * 5, 0, [1]), Piece([0], 0, [2]), Piece([0] * 20, 0, [3, 4])]
    results = both(cpu, [Pool("out", "x", kind)], {"x": 40, "out": 40}, pieces, x=random(26, 40))
    ours, theirs = results["out"]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("type", ["BF16", "Q8_0", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("num_rows", [1, 21])
def test_experts_are_chosen_weighted_and_summed(cpu, type, normalise, num_rows):
    hidden = inner = 256 if type.endswith("_K") else 64

    def weights(name, rows, columns):
        return tuple(random_tensor(f"{name}{e}", type, (rows, columns), e, 0.2) for e in range(5))

    gates, ups = weights("gate", inner, hidden), weights("up", inner, hidden)
    experts = Experts(
        "out",
        "x",
        random_tensor("router", "F32", (5, hidden), 9),
        tuple(zip(gates, ups)),
        weights("down", hidden, inner),
        num_chosen=2,
        normalise=normalise,
        scale=0.5,
    )
    values = {"x": random(num_rows, hidden), "out": random(num_rows, hidden, seed=1)}
    widths = {"x": hidden, "out": hidden}
    ours, theirs = both(cpu, [experts], widths, rows(num_rows), **values)["out"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())


ATTENTIONS = [
    # heads, kv heads, head_dim, window, softcap
    (4, 2, 16, None, None),
    (9, 3, 64, None, None),
    (1, 1, 8, 20, None),
    (6, 2, 24, 260, 30.0),
    (16, 1, 32, 1, 5.0),
    (4, 4, 256, None, None),
]


@pytest.mark.parametrize("heads, kv_heads, head_dim, window, softcap", ATTENTIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_over_the_cache(cpu, heads, kv_heads, head_dim, window, softcap, interleaved):
    errors = attention_errors(cpu, heads, kv_heads, head_dim, window, softcap, interleaved)
    # What is stored is rounded to float16, and large scores make much of that.
    assert errors.max() < 2e-2
    assert errors.mean() < 5e-4


def test_the_cache_takes_elements_of_eight_bits(cpu8):
    check_attention_errors(cpu8, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("bits, error", [(8, 2e-2), (32, 1e-5)])
def test_the_cache_takes_elements_of_more_or_fewer_bits(cpu, bits, error):
    backend = CPUBackend(CPUOptions(default_cache_dir(), 2, kv_cache_bits=bits, tiers=(cpu.tier,)))
    check_attention_errors(backend, error)


def check_attention_errors(backend, error):
    assert attention_errors(backend, 6, 2, 40, None, None, False).mean() < error
    assert attention_errors(backend, 4, 4, 64, 100, None, False).mean() < error


def attention_errors(backend, heads, kv_heads, head_dim, window, softcap, interleaved):
    """Beside the reference: of a prompt of 290 rows, then seven decoding rows and two short prompts
    in one batch."""
    errors = []
    width = (heads + 2 * kv_heads) * head_dim
    frequencies = np.float32(100.0) ** -np.linspace(0, 1, head_dim // 2, dtype=np.float32)
    norm = tensor("norm", random(head_dim, seed=3))
    operations = (
        RopeAndStore("qkv", 0, frequencies, None, 1.1, interleaved, norm, norm, 1e-6),
        Attention("out", "qkv", 0, head_dim**-0.5, window, softcap),
    )
    widths = {"qkv": width, "out": heads * head_dim}
    program = Program(operations, widths, 1, heads, kv_heads, head_dim, VOCAB)
    plans = [b.compile(program, LIMITS, lambda: None) for b in (backend, ReferenceBackend())]
    blocks = list(np.random.default_rng(0).permutation(40) + 1)
    steps = [
        [Piece([0] * 290, 0, blocks[:20])],
        [Piece([0] * 7, 290, blocks[:20])],
        [Piece([0], 297, blocks[:20]), Piece([0] * 17, 0, blocks[20:22]), Piece([0], 0, [50])],
    ]
    for seed, pieces in enumerate(steps):
        batch = batch_of(pieces)
        qkv = random(len(batch.ids), width, seed=seed)
        plans[0].buffers["qkv"][: len(qkv), :width] = qkv
        plans[1].buffers["qkv"] = qkv.copy()
        for plan in plans:
            plan.forward(batch)
        ours, theirs = (plan.read("out") for plan in plans)
        errors.append(np.abs(ours - theirs).ravel())
    return np.concatenate(errors)


# ---- Whole models


def llama(type="Q8_0", hidden=64, heads=4, kv_heads=2, head_dim=16, inner=96, layers=3):
    """A program as the llama family has it, with weights that make logits of ordinary size."""
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


def test_with_eight_bits_too_logits_do_not_depend_on_the_batch(cpu8):
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
def test_tokens_from_drafts_are_those_of_plain_decoding(cpu, values, is_reference):
    backend = ReferenceBackend() if is_reference else cpu
    plan = backend.compile(llama(layers=1), LIMITS, lambda: None)
    plain, drafted = (Run([5, 3, 8, 1] * 5, 30, SamplingParameters(**values)) for _ in range(2))
    generate(plan, [plain])
    rng = np.random.default_rng(0)

    def propose(ids):
        """Some right, then some by chance."""
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


def test_a_row_that_is_not_a_number_fails_alone(cpu):
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


@pytest.mark.slow  # compiles everything once more
def test_kernels_that_disagree_with_the_reference_are_refused(monkeypatch, caplog):
    def load_some_wrong(sources, flags, cache_dir):
        if "-DWRONG" in flags:
            wrong = sources["activation.h"].replace(b"(1) +", b"(2) +")
            sources = sources | {"activation.h": wrong}
        return load_library(sources, flags, cache_dir)

    monkeypatch.setattr("llmsrv.backend.cpu.backend.load_library", load_some_wrong)
    tiers = Tier("wrong", frozenset(), ("-DWRONG",)), *TIERS
    backend = CPUBackend(CPUOptions(default_cache_dir(), threads=1, tiers=tiers))
    assert backend.tier.name != "wrong"
    assert "the wrong kernels are not used: in 'activated' they are off by" in caplog.text
