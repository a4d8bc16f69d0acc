"""A small layer with weights of every format, on the kernels and on the reference backend.

Done at each start, in some milliseconds: a compiler or a CPU that makes something else of the
kernels is found before anybody is told nonsense.
"""

from collections.abc import Iterator

import numpy as np

from llmsrv.backend.base import Attention
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Embed
from llmsrv.backend.base import GatedActivation
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Linear
from llmsrv.backend.base import Norm
from llmsrv.backend.base import Operation
from llmsrv.backend.base import Program
from llmsrv.backend.base import RopeAndStore
from llmsrv.backend.base import SelectLogitRows
from llmsrv.backend.base import Tensor
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.reference.backend import ReferenceBackend

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 256, 4, 2, 24, 40
QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
NUM_ROWS = 9
LIMITS = Limits(max_rows=NUM_ROWS, max_logit_rows=1, max_slots=1, num_blocks=2)
# Mean error over mean size: several times what is measured on sound kernels.
ALLOWED = {16: 2e-3, 8: 5e-2}


def check_kernels(backend: Backend, tier: str, bits: int) -> None:
    """Raises CannotRun if the backend's results are not the reference's.

    bits: the fewest that it computes or keeps something with, at most 16.
    """
    program = Program(
        tuple(_operations()), _buffers(), 1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB
    )
    batches = _batch(0, NUM_ROWS), _batch(NUM_ROWS, 1)
    plans = [b.compile(program, LIMITS, lambda: None) for b in (backend, ReferenceBackend())]
    for batch in batches:
        for plan in plans:
            plan.forward(batch)
        for name, width in program.buffers.items():
            theirs = plans[1].buffers[name]  # type: ignore[attr-defined]
            ours = plans[0].buffers[name][: len(theirs), :width]  # type: ignore[attr-defined]
            error = np.abs(ours - theirs).mean() / np.abs(theirs).mean()
            if not error <= ALLOWED[bits]:
                raise CannotRun(
                    f"the {tier} kernels are not used: in '{name}' they are off by {error:.1%}"
                )


def _operations() -> Iterator[Operation]:
    frequencies = np.float32(100.0) ** -np.linspace(0, 1, HEAD_DIM // 2, dtype=np.float32)
    yield Embed("hidden", _tensor("table", "F32", VOCAB, HIDDEN))
    yield Norm("normed", "hidden", _tensor("norm", "F32", HIDDEN), 1e-5)
    for type in FORMATS:
        yield Linear(type, "normed", (_tensor(type, type, VOCAB, HIDDEN),))
    yield Linear("qkv", "normed", (_tensor("wqkv", "Q8_0", QKV, HIDDEN),), scale=0.01)
    yield RopeAndStore("qkv", 0, frequencies)
    yield Attention("attended", "qkv", 0, HEAD_DIM**-0.5)
    yield GatedActivation("activated", "attended")
    yield SelectLogitRows("last", "activated")


def _buffers() -> dict[str, int]:
    widths = {type: VOCAB for type in FORMATS}
    attended = NUM_HEADS * HEAD_DIM
    widths |= {"hidden": HIDDEN, "normed": HIDDEN, "qkv": QKV, "attended": attended}
    return widths | {"activated": attended // 2, "last": attended // 2}


def _tensor(name: str, type: str, *shape: int) -> Tensor:
    rng = np.random.default_rng(len(name))
    values = int(np.prod(shape))
    if type == "F32":
        return Tensor(name, type, shape, rng.normal(size=values).astype(np.float32).view(np.uint8))
    block = GGML_TYPES[type]
    # Without its second bit a float16 or bfloat16 is below 2 in size, and so are the scales.
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
