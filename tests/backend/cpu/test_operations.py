"""Backends against the reference backend: operations other than Linear and Attention."""

import numpy as np
import pytest

from llmsrv.backend.cpu.library import FLOATS
from llmsrv.backend.cuda.pack import FORMATS
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Softcap
from llmsrv.backend.quants.random_tensors import random_tensor
from tests.support.operations import KERNEL_TYPES
from tests.support.operations import OTHER_TYPES
from tests.support.operations import VOCAB
from tests.support.operations import error_of
from tests.support.operations import one_prompt
from tests.support.operations import random
from tests.support.operations import run_both
from tests.support.operations import tensor
from tests.support.plans import Piece


@pytest.mark.parametrize("type", [*KERNEL_TYPES, *OTHER_TYPES])
def test_embed_takes_rows_of_every_type(backend, type):
    width = 50 if type in FLOATS else 512
    embed = Embed("out", random_tensor("table", type, (VOCAB, width)), scale=0.3)
    ids = [0, 5, VOCAB - 1, 5]
    ours, theirs = run_both(backend, [embed], {"out": width}, [Piece(ids, 0, [1])])["out"]
    is_rounded = backend.name == "cuda" and type not in (*FORMATS, "F16")
    np.testing.assert_allclose(ours, theirs, rtol=1e-3 if is_rounded else 0)


@pytest.mark.parametrize("width", [1, 16, 37, 96])
@pytest.mark.parametrize("accumulate", [False, True])
def test_norm_and_activation_of_any_width(backend, width, accumulate):
    operations = [
        GatedActivation("gelu", "gate_up", "gelu"),
        GatedActivation("silu", "gate_up"),
        Norm("out", "silu", tensor("w", random(width)), 1e-5, accumulate),
        Softcap("gelu", 2.0),
    ]
    widths = {"gate_up": 2 * width, "silu": width, "gelu": width, "out": width}
    values = {"gate_up": random(7, 2 * width) * 5, "out": random(7, width, seed=1)}
    for ours, theirs in run_both(backend, operations, widths, one_prompt(7), **values).values():
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_pool_takes_each_sequences_rows(backend, kind):
    pieces = [Piece([0] * 5, 0, [1]), Piece([0], 0, [2]), Piece([0] * 20, 0, [3, 4])]
    pool = Pool("out", "x", kind)
    ours, theirs = run_both(backend, [pool], {"x": 40, "out": 40}, pieces, x=random(26, 40))["out"]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("type", ["BF16", "Q8_0", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("num_rows", [1, 21])
def test_experts_are_chosen_weighted_and_summed(backend, type, normalise, num_rows):
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
    ours, theirs = run_both(backend, [experts], widths, one_prompt(num_rows), **values)["out"]
    error = error_of(backend, 1e-3) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)
