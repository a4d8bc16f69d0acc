"""Runs one small layer with weights of every type on a backend and on the reference backend.

Done at each start, in a few milliseconds: it finds a compiler or a CPU that gets the kernels wrong
before a client sees a wrong answer.
"""

from collections.abc import Iterable
from collections.abc import Iterator

import numpy as np

from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.reference.backend import ReferenceBackend

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 256, 4, 2, 24, 40
QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
NUM_ROWS = 9
LIMITS = Limits(max_rows=NUM_ROWS, max_logit_rows=1, max_slots=1, num_blocks=2)


def check_backend(backend: Backend, kernels: str, types: Iterable[str], max_error: float) -> None:
    """Raises CannotRun if the backend's results differ from the reference's.

    kernels    what is checked, for the message: "the AVX2 kernels"
    types      the types of weights to check, of GGML_TYPES
    max_error  the error allowed in each buffer: mean absolute error over mean absolute value
    """
    types = tuple(types)
    program = Program(
        tuple(_operations(types)), _buffers(types), 1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB
    )
    plans = [each.compile(program, LIMITS, lambda: None) for each in (backend, ReferenceBackend())]
    for batch in (_batch(0, NUM_ROWS), _batch(NUM_ROWS, 1)):
        for plan in plans:
            plan.forward(batch)
        for buffer in program.buffers:
            ours, wanted = (plan.read(buffer) for plan in plans)
            error = np.abs(ours - wanted).mean() / np.abs(wanted).mean()
            if not error <= max_error:  # also when it is NaN
                raise CannotRun(
                    f"{kernels} are not used: in '{buffer}' they are off by {error:.1%}"
                )


def _operations(types: Iterable[str]) -> Iterator[Operation]:
    frequencies = np.float32(100.0) ** -np.linspace(0, 1, HEAD_DIM // 2, dtype=np.float32)
    yield Embed("hidden", _tensor("table", "F32", VOCAB, HIDDEN))
    yield Norm("normed", "hidden", _tensor("norm", "F32", HIDDEN), 1e-5)
    for type in types:
        yield Linear(type, "normed", (_tensor(type, type, VOCAB, HIDDEN),))
    yield Linear("qkv", "normed", (_tensor("wqkv", "Q8_0", QKV, HIDDEN),), scale=0.01)
    yield RopeAndStore("qkv", 0, frequencies)
    yield Attention("attended", "qkv", 0, HEAD_DIM**-0.5)
    yield GatedActivation("activated", "attended")
    yield SelectLogitRows("last", "activated")


def _buffers(types: Iterable[str]) -> dict[str, int]:
    widths = {type: VOCAB for type in types}
    attended = NUM_HEADS * HEAD_DIM
    widths |= {"hidden": HIDDEN, "normed": HIDDEN, "qkv": QKV, "attended": attended}
    return widths | {"activated": attended // 2, "last": attended // 2}


def _tensor(name: str, type: str, *shape: int) -> Tensor:
    rng = np.random.default_rng(len(name))
    values = int(np.prod(shape))
    if type == "F32":
        return Tensor(name, type, shape, rng.normal(size=values).astype(np.float32).view(np.uint8))
    block = GGML_TYPES[type]
    # 0xBF clears the top bit of the exponents: values and scales of 16 bits stay below 2.
    data = rng.integers(0, 256, values // block.block_values * block.block_bytes, np.uint8) & 0xBF
    return Tensor(name, type, shape, data)


def _batch(start: int, count: int) -> Batch:
    positions = np.arange(start, start + count)
    return Batch(
        ids=positions.astype(np.int32) % VOCAB,
        positions=positions.astype(np.int32),
        sequences=np.zeros(count, np.int32),
        slot_mapping=16 + positions,
        block_tables=np.ones((1, 1), np.int32),
        is_long=np.zeros(1, np.bool_),
        logit_rows=np.array([count - 1], np.int32),
    )
