"""The bytes that a launch must move and the products that it must compute, at least.

Each operand is read once and each result is written once.  Weights count as they are in the file,
and keys and values as in a cache of 16 bits.
"""

from dataclasses import dataclass
from math import prod

from llmsrv.backend.cuda.fusion import FusedLinear
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Norm
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.selftest.made_models import Shape
from tests.support.cuda_launches import Launch


@dataclass(frozen=True)
class Work:
    """what: the operation, in a few words; is_in_layer: every layer launches it"""

    what: str
    num_bytes: int
    flops: int
    is_in_layer: bool


def work_of(launch: Launch, num_rows: int, context: int, shape: Shape) -> Work:
    """num_rows: of the decode step; context: tokens that each of them attends to."""
    hidden, kv_size = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    q_size = shape.num_heads * shape.head_dim
    match launch.operation:
        case Embed(table=table):
            row_bytes = table.data.nbytes // table.shape[0]
            return Work("embedding", num_rows * (row_bytes + 4 * hidden), 0, False)
        case FusedLinear() as linear:
            return _linear(launch, linear, num_rows)
        case Norm():
            return Work("norm", num_rows * 6 * hidden, 0, True)
        case RopeAndStore():
            num_bytes = 4 * shape.qkv_size + 2 * q_size + 4 * kv_size
            return Work("rope", num_rows * num_bytes, 0, True)
        case Attention():
            num_bytes = context * 4 * kv_size + 4 * q_size
            return Work("attention", num_rows * num_bytes, num_rows * context * 4 * q_size, True)
        case GatedActivation():
            return Work("activation", num_rows * 10 * shape.intermediate_size, 0, True)
        case SelectLogitRows():
            return Work("select", num_rows * 8 * hidden, 0, False)
        case None if launch.module.stem.startswith("sample"):
            return Work("sampling", num_rows * 4 * shape.vocab_size, 0, False)
    raise ValueError(f"nothing is known of {launch}")


def _linear(launch: Launch, linear: FusedLinear, num_rows: int) -> Work:
    weights = linear.weights
    width, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    is_last = linear.out == "logits"
    if launch.function not in ("linear", "linear_mma"):  # a norm that is not fused
        return Work("norm", num_rows * 6 * columns, 0, not is_last)
    input_bytes = 4 if linear.norm else 2
    output_bytes = 1 if linear.gated else 8 if linear.accumulate else 4
    return Work(
        f"{linear.norm.x if linear.norm else linear.x} -> {linear.out}",
        sum(weight.data.nbytes for weight in weights)
        + num_rows * (input_bytes * columns + output_bytes * width),
        2 * num_rows * sum(prod(weight.shape) for weight in weights),
        not is_last,
    )
