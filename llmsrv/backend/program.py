"""A model as a backend sees it: a short list of operations over named buffers.

A buffer is a float32 matrix with one row for each row of the batch (base.py).

Shapes: T rows in the batch, R of them logit rows (rows that are sampled).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmsrv.backend.arrays import Array


@dataclass(frozen=True)
class Tensor:
    """A weight, exactly as it is in its file.

    name   its name in the file, for messages
    type   ggml's name for how it is stored, such as Q4_1 (quants/ggml_types.py)
    shape  (rows, columns) or (columns,); a matrix is row-major, each row quantized in blocks
    data   uint8, one dimension, read-only: the mapped bytes
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: Array


@dataclass(frozen=True)
class Embed:
    """out = table[ids] * scale"""

    out: str
    table: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Norm:
    """RMSNorm of each row: out = x / sqrt(mean(x ** 2) + eps) * weight; out += if `accumulate`.

    Source: Zhang & Sennrich 2019.
    """

    out: str
    x: str
    weight: Tensor
    eps: float
    accumulate: bool = False


@dataclass(frozen=True)
class Linear:
    """out = (x @ W.T + bias) * scale; out += if `accumulate`.

    W is `weights` stacked by rows, so that q, k and v are one product.  `biases` is empty, or has
    one bias for each weight.
    """

    out: str
    x: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()
    scale: float = 1.0
    accumulate: bool = False


@dataclass(frozen=True)
class RopeAndStore:
    """Normalizes and rotates q and k of `qkv` in place, then stores k and v in the KV cache.

    qkv               buffer [T, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v heads
    frequencies       [rotary_dim / 2] float32, in radians per position, after any scaling for long
                      contexts; None for a layer without rotation
    long_frequencies  replace them for long sequences, those with batch.is_long (longrope); None if
                      long sequences use the same
    magnitude         factor of cos and sin (yarn and longrope), else 1
    interleaved       True: rotates pairs (0, 1), (2, 3), ...; False: (i, i + rotary_dim / 2)
    q_norm            weights of a Norm with `eps` before the rotation, or None: [head_dim] for each
                      head separately, [num_heads * head_dim] for all heads together; k_norm alike
    Source: Su et al. 2021, section 3.4.
    """

    qkv: str
    layer: int
    frequencies: Array | None
    long_frequencies: Array | None = None
    magnitude: float = 1.0
    interleaved: bool = False
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Attention:
    """out = softmax(cap(q @ K.T * scale), causal) @ V over the row's own sequence in the KV cache.

    qkv      buffer as RopeAndStore leaves it; only its q heads are read
    out      buffer [T, num_heads * head_dim]
    window   number of positions a row attends to: its own and the window - 1 before it; None: all
    softcap  cap(s) = softcap * tanh(s / softcap) (Gemma 2); None: no cap
    """

    out: str
    qkv: str
    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class GatedActivation:
    """out = f(gate) * up, where x is gate and up side by side; f is silu, or gelu by tanh."""

    out: str
    x: str
    function: Literal["silu", "gelu"] = "silu"


@dataclass(frozen=True)
class Experts:
    """out += scale * sum of w_e * down_e(f(gate_e(x)) * up_e(x)) over the num_chosen experts e.

    router   [num_experts, hidden]; the experts with the largest logits x @ router.T are chosen, on
             a tie the lower index first, and summed in descending order of their logits
    w        softmax over the chosen logits if `normalise`, else over all logits
    gate_up  each expert's gate and up weights, both [intermediate, hidden]
    down     each expert's down weight [hidden, intermediate]
    """

    out: str
    x: str
    router: Tensor
    gate_up: tuple[tuple[Tensor, Tensor], ...]
    down: tuple[Tensor, ...]
    num_chosen: int
    normalise: bool
    function: Literal["silu", "gelu"] = "silu"
    scale: float = 1.0


@dataclass(frozen=True)
class Softcap:
    """x = cap * tanh(x / cap), in place (the logits of Gemma 2)."""

    x: str
    cap: float


@dataclass(frozen=True)
class SelectLogitRows:
    """out = x[logit_rows], R rows; every operation after this one runs on these rows only."""

    out: str
    x: str


@dataclass(frozen=True)
class Pool:
    """out = one row for each logit row: the `last`, or the `mean`, of the batch's rows of the same
    sequence up to and including it.  A pooled sequence must be computed in a single step."""

    out: str
    x: str
    kind: Literal["last", "mean"]


Operation = (
    Embed
    | Norm
    | Linear
    | RopeAndStore
    | Attention
    | GatedActivation
    | Experts
    | SelectLogitRows
    | Softcap
    | Pool
)


@dataclass(frozen=True)
class Program:
    """An architecture with its weights: the operations of one step, in order.

    buffers    name -> width in float32 values; `logits` is one of them and has vocab_size columns
    long_from  a sequence that may grow longer than this many tokens is long (longrope); None: the
               model makes no difference
    """

    operations: tuple[Operation, ...]
    buffers: dict[str, int]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    long_from: int | None = None

    def logit_row_buffers(self) -> frozenset[str]:
        """The buffers that a step leaves with R rows; all others have T."""
        names = set()
        is_selected = False
        for operation in self.operations:
            is_selected |= isinstance(operation, SelectLogitRows | Pool)
            if is_selected:
                names.add(output_of(operation))
        return frozenset(names)


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in a program, an operation or a tuple of them; one may come more than once."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors_of(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


def output_of(operation: Operation) -> str:
    """The name of the buffer that the operation writes."""
    match operation:
        case Softcap():
            return operation.x
        case RopeAndStore():
            return operation.qkv
        case _:
            return operation.out
