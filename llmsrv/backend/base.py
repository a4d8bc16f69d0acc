"""The contract between models and backends: the operations, and what a backend promises.

A model is a Program: a short list of the operations below over named buffers.  A buffer is a
float32 matrix with one row for each row of the batch.  A Backend compiles the program once into a
Plan, which holds weights, buffers and KV cache; nothing moves after that.  A step runs the plan on
a Batch, a flat list of rows.  A row is one token of one sequence; prefill, decode, draft and
fast-forward rows are all alike.

Shapes: T rows in the batch, R of them logit rows (rows that are sampled), S sequences.
"""

from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Literal
from typing import Self

import numpy.typing as npt

from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.errors import StartupError

BLOCK_SIZE = 16  # positions in one block of the KV cache

Array = npt.NDArray[Any]


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


def output_of(operation: Operation) -> str:
    """The name of the buffer that the operation writes."""
    match operation:
        case Softcap():
            return operation.x
        case RopeAndStore():
            return operation.qkv
        case _:
            return operation.out


@dataclass(frozen=True)
class Limits:
    """The largest step that a plan can run; it allocates memory for exactly this much."""

    max_rows: int  # the most T
    max_logit_rows: int  # the most R: one for each running sequence and each draft token
    max_slots: int  # sampling slots, one for each running sequence
    num_blocks: int  # blocks of BLOCK_SIZE positions in the KV cache; block 0 is never allocated


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    ids           [T] int32, token ids; -1 - r stands for the id that logit row r of the previous
                  step sampled, or for id 0 if that row failed
    positions     [T] int32, the row's position in its sequence
    sequences     [T] int32, the row's sequence, an index into block_tables; ascending, and the rows
                  of one sequence are in order of their positions
    slot_mapping  [T] int64, block * BLOCK_SIZE + offset: where the row's k and v are stored
    block_tables  [S, max_blocks] int32, padded with 0
    is_long       [S] bool, the same in every step of a sequence (Program.long_from)
    logit_rows    [R] int32, the rows to compute logits for, ascending
    """

    ids: Array
    positions: Array
    sequences: Array
    slot_mapping: Array
    block_tables: Array
    is_long: Array
    logit_rows: Array


class Plan(ABC):
    """A compiled program with its weights, buffers, KV cache and sampling table.

    sampling   parameters of each slot; written between steps
    kv_layout  how a block of the KV cache is stored.  Plans with equal kv_layout can exchange
               blocks by read_blocks and write_blocks.
    """

    sampling: SamplingTable
    kv_layout: str

    @abstractmethod
    def forward(self, batch: Batch) -> None:
        """Runs every operation on the batch.  Its logits are valid until the next forward."""

    @abstractmethod
    def sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> Samples:
        """Samples an id for each logit row of the last forward, with the parameters of its slot.

        slots             [R] int32, index into `sampling`, in the order of logit_rows; rows of the
                          same slot are adjacent
        output_positions  [R] int64, the number of tokens in the sequence's output before this row's
        targets           [R] int32, an id to report the log-probability of instead of sampling, as
                          for the tokens of a prompt, or -1; None: every row is sampled
        drafts            [R] int32, the draft token that is the row's input, or -1 if its input is
                          not a draft; None: there are no drafts

        Speculation.  A sequence whose last token is t, with draft tokens d1 .. dk, has the rows
        t, d1 .. dk in the batch.  All are logit rows, so it takes k of max_logit_rows besides its
        own.  Here they share its slot, have output positions p .. p + k and drafts -1, d1 .. dk.
        An id comes back for each row.  ids[0] is the next token; ids[i] is the one after as long as
        ids[i - 1] == di.  These accepted tokens are exactly those of plain decoding, and only they
        count for penalties.  The ids after the first rejected draft mean nothing, and the KV cache
        slots of their rows must be written again before they are read.  Under a grammar,
        set_grammar takes one mask for each row.

        A row that cannot be sampled gets the id FAILED (sampling/samples.py); no other row suffers.
        """

    @abstractmethod
    def read(self, name: str) -> Array:
        """A copy of the buffer `name` as the last forward left it, for checks and tests.

        Returns [rows, width] float32, with R rows for Program.logit_row_buffers and T for others.
        A backend may fuse operations; then the buffers between them hold nothing of use.
        Raises KeyError if the program has no such buffer.
        """

    @abstractmethod
    def copy_block(self, source: int, target: int) -> None:
        """Copies the keys and values of one block of the KV cache to another, in all layers."""

    @abstractmethod
    def read_blocks(self, blocks: Sequence[int]) -> Array:
        """A copy of some blocks of the KV cache, as opaque bytes: the inverse of write_blocks.

        Returns [len(blocks), bytes of a block] uint8: keys and values of all layers, in the
        backend's own layout.
        """

    @abstractmethod
    def write_blocks(self, blocks: Sequence[int], data: Array) -> None:
        """Writes blocks that read_blocks returned, of this plan or of one with equal kv_layout.

        data  [len(blocks), bytes of a block] uint8
        Raises ValueError, naming both, if shape or dtype of `data` is not the expected one.
        """


class CannotRun(StartupError):
    """The backend cannot run on this machine, or cannot run this program; another backend might.

    Whatever another backend would not solve, such as too little memory, is a plain StartupError.
    """


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that holds a backend's weights and KV cache: the host's, or a device's.

    num_bytes       all of it, used or free
    whose           who sets this limit, for messages: "the machine", "the cgroup"
    overhead_bytes  what an engine needs besides weights and KV cache
    """

    num_bytes: int
    whose: str
    overhead_bytes: int


class Backend(ABC):
    """Runs programs.  It brings its name, its options and its memory; choose.py lists all backends.

    An engine makes the backend, chooses the size of the KV cache from `memory` and
    `kv_position_bytes`, and compiles its programs with that size.
    """

    name: str  # the value of --backend

    @classmethod
    @abstractmethod
    def from_options(cls, options: Mapping[str, Any], cache_dir: Path) -> Self:
        """Makes a backend that is ready to compile programs.

        options    this backend's own options, by the names of their fields in config.Config; an
                   option that is missing takes its default
        cache_dir  where compiled kernels are cached
        Raises CannotRun, with the reason, if the backend cannot run on this machine.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """What it computes with, as a clause for the log: "AVX2, 2 threads, 16-bit activations"."""

    @abstractmethod
    def memory(self) -> MemoryLimit:
        """The memory that weights and KV caches must fit in."""

    @abstractmethod
    def kv_position_bytes(self, program: Program) -> int:
        """Bytes that one position of a sequence takes in the KV cache: k and v of all layers."""

    @abstractmethod
    def compile(self, program: Program, limits: Limits, tick: Callable[[], None]) -> Plan:
        """Lays the program out in memory.

        tick  called at least once per weight here and once per operation in forward, so that a
              supervisor can tell long work from a hang
        Raises CannotRun if the backend does not support one of the operations, shapes or weight
        types, and StartupError if memory does not suffice.
        """
