"""Small computations with the CUDA backend, checked against the reference, from kernels that a test
breaks on purpose."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping

import numpy as np
import pytest

from llmsrv.backend import source as backend_source
from llmsrv.backend.cuda import source as cuda_source
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Softcap
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.config import default_cache_dir
from tests.support.attention import attention_errors
from tests.support.cuda import install_stand_in
from tests.support.operations import one_prompt
from tests.support.operations import random
from tests.support.operations import run_both
from tests.support.operations import tensor
from tests.support.plans import Piece
from tests.support.sampling_steps import Step
from tests.support.sampling_steps import check_step
from tests.support.sampling_steps import cuda_sampling
from tests.support.sampling_steps import random_logits

BLOCKS = list(range(20, 0, -1))


@contextlib.contextmanager
def changed_kernels(changes: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """changes: file name -> what occurs in it once, and what stands there instead."""
    texts = {name: text.decode() for name, text in backend_source.kernel_sources("cuda").items()}
    for name, (old, new) in changes.items():
        assert texts[name].count(old) == 1, f"{name} must have this once: {old}"
        texts[name] = texts[name].replace(old, new)
    encoded = {name: text.encode() for name, text in texts.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_source, "kernel_sources", lambda folder: encoded)
        cuda_source.kernel_source.cache_clear()
        yield
    cuda_source.kernel_source.cache_clear()


def new_backend(**options: bool) -> CUDABackend:
    install_stand_in()
    return CUDABackend(
        CUDAOptions(default_cache_dir(), dtype="float16", warms_up=False, **options)
    )


def check_attention(steps: list[list[Piece]], window: int | None) -> None:
    errors = attention_errors(new_backend(), 3, 1, 24, window, None, steps=steps)
    assert errors.mean() < 6e-4, f"Mismatch of {errors.mean()}"


def check_prefill() -> None:
    """Three tiles of keys."""
    check_attention([[Piece([0] * 150, 0, BLOCKS)]], None)
    check_attention([[Piece([0] * 150, 0, BLOCKS)]], 70)


def check_decode() -> None:
    """Rows of five splits and rows of one, in two steps; more splits than blocks of threads.  After
    the rows' own positions, the cache holds values of other sequences."""
    ends = range(30, 43)
    steps = [[Piece([0] * 288, 0, BLOCKS)], [Piece([0] * 16, 0, [end]) for end in ends]]
    for step in range(2):
        long = [Piece([0], 288 + step, [*BLOCKS[:18], end]) for end in ends]
        steps.append([*long, Piece([0], step, [50])])
    check_attention(steps, None)
    check_attention(steps, 200)


def check_linear(num_rows: int, num_columns: int, height: int) -> None:
    """out = x @ W.T of weights of two types, and a gated activation fused with a product."""
    types = ("Q4_K", "F16") if num_columns % 256 == 0 else ("Q8_0", "F16")
    weights = [random_tensor(type, type, (height, num_columns)) for type in types]
    pair = weights[0], random_tensor("up", types[0], (height, num_columns), 1)
    operations = [
        Linear("out", "x", tuple(weights)),
        Linear("both", "x", pair, scale=0.01),
        GatedActivation("gated", "both", "silu"),
    ]
    widths = {"x": num_columns, "out": 2 * height, "both": 2 * height, "gated": height}
    x = random(num_rows, num_columns)
    outputs = run_both(new_backend(), operations, widths, one_prompt(num_rows), x=x)
    close(*outputs["out"])
    close(*outputs["gated"])


def check_few_rows() -> None:
    """Three rounds of eight warps over the columns; several tiles of a block; a fused norm."""
    check_linear(5, 2048, 45)
    check_linear(20, 96, 150)
    weight = random_tensor("w", "Q8_0", (45, 96))
    operations = [
        Norm("x", "residual", tensor("norm", random(96, seed=2)), 1e-6),
        Linear("out", "x", (weight,)),
    ]
    widths, residual = {"residual": 96, "x": 96, "out": 45}, random(5, 96)
    outputs = run_both(new_backend(), operations, widths, one_prompt(5), residual=residual)
    close(*outputs["out"])


def check_many_rows() -> None:
    """More tiles of columns than there are stages; more rows of x and of W than a block has.

    With 800 columns the last tile is in the first stage, where the sums go after it."""
    check_linear(75, 768, 45)
    check_linear(75, 800, 45)


def check_experts() -> None:
    def weights(name: str, rows: int, columns: int) -> tuple[object, ...]:
        return tuple(random_tensor(f"{name}{e}", "Q8_0", (rows, columns), e, 0.2) for e in range(5))

    pairs = tuple(zip(weights("gate", 64, 96), weights("up", 64, 96)))
    router = random_tensor("router", "F32", (5, 96), 9)
    down = weights("down", 96, 64)
    experts = Experts("out", "x", router, pairs, down, num_chosen=2, normalise=True, scale=0.5)
    values = {"x": random(40, 96), "out": random(40, 96, seed=1)}
    outputs = run_both(new_backend(), [experts], {"x": 96, "out": 96}, one_prompt(40), **values)
    close(*outputs["out"])


def check_rows() -> None:
    """Norms, activations and soft caps that are not fused with a product, of an odd width."""
    operations = [
        GatedActivation("out", "x", "gelu"),
        Norm("out", "out", tensor("norm", random(77, seed=2)), 1e-6),
        Softcap("out", 1.5),
    ]
    outputs = run_both(
        new_backend(), operations, {"x": 154, "out": 77}, one_prompt(3), x=random(3, 154)
    )
    close(*outputs["out"])


def check_sampling() -> None:
    """Three chunks of the vocabulary; every filter; twice, since states must be clear again."""
    parameters = [
        SamplingParameters(seed=1, temperature=0.8, top_k=60, top_p=0.9, typical_p=0.9),
        SamplingParameters(temperature=0, num_logprobs=5),
        SamplingParameters(seed=2, num_logprobs=0),
    ]
    make_sampling = cuda_sampling(install_stand_in())
    for seed in range(2):
        logits = random_logits(seed, 3, 4500, has_ties=True)
        check_step(make_sampling, Step(logits, [0, 1, 2], parameters))


def close(ours: object, theirs: object) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3 * np.abs(theirs).max())


SCENARIOS: dict[str, Callable[[], None]] = {
    "prefill": check_prefill,
    "decode": check_decode,
    "few rows": check_few_rows,
    "many rows": check_many_rows,
    "experts": check_experts,
    "rows": check_rows,
    "sampling": check_sampling,
}
