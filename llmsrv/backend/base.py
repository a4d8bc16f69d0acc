"""The operation contract: what a model's program may ask of a backend, and what a backend promises.

A program is a short list of the operations below over named buffers.  Each buffer is a float32
matrix with one line a row of the batch; a backend lays program, weights and buffers out once as a
Plan, and nothing moves after that.  A batch is a flat list of rows: a row is one token of one
sequence, and prefill, decode, draft and fast-forward rows are the same thing.

Shapes: T rows in the batch, R of them sampled (logit rows), S sequences in the batch.
"""

from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
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
    """A weight exactly as its file has it.

    name   the file's name for it, for messages
    type   ggml's name of the storage type, as Q4_1 (quants/ggml_types.py)
    shape  (rows, columns) or (columns,); a matrix is row-major, quantised in blocks along columns
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
    """out = x / sqrt(mean(x ** 2) + eps) * weight over each row, or out += when `accumulate`.

    Source: Zhang & Sennrich 2019.
    """

    out: str
    x: str
    weight: Tensor
    eps: float
    accumulate: bool = False


@dataclass(frozen=True)
class Linear:
    """out = (x @ W.T + bias) * scale, or out += when `accumulate`.

    W is `weights` stacked by rows (q, k and v are one product); `biases` is empty or one a weight.
    """

    out: str
    x: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()
    scale: float = 1.0
    accumulate: bool = False


@dataclass(frozen=True)
class RopeAndStore:
    """Norms and rotates q and k of `qkv` in place, then stores k and v in the KV cache.

    qkv          buffer [T, (num_heads + 2 * num_kv_heads) * head_dim]: q heads, k heads, v heads
    frequencies  [rotary_dim / 2] float32, radians a position, every scaling of the context applied;
                 None for a layer that does not rotate
    long_frequencies  instead of them for long sequences (batch.is_long); None: the same (longrope)
    magnitude    factor of cos and sin (yarn and longrope), else 1
    interleaved  True: pairs (0, 1), (2, 3), ...; False: pairs (i, i + rotary_dim / 2)
    q_norm       None, or the weights of a Norm with `eps` before the rotation: [head_dim], of each
                 head by itself, or [num_heads * head_dim], of all heads together; k_norm likewise
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
    window   the row's own position and so many - 1 before it are attended to; None: all before it
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
    """out = f(gate) * up, where x is [gate, up] side by side; f is `silu`, or `gelu` by tanh"""

    out: str
    x: str
    function: Literal["silu", "gelu"] = "silu"


@dataclass(frozen=True)
class Experts:
    """out += scale * sum of w_e * down_e(f(gate_e(x)) * up_e(x)) over the num_chosen experts e.

    router   [num_experts, hidden]: the experts with the largest logits x @ router.T are chosen, the
             lowest first among equals, and summed in descending order of logits
    w        softmax over the chosen logits when `normalise`, else over all of them
    gate_up  for each expert its gate and up weights [intermediate, hidden]
    down     for each expert [hidden, intermediate]
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
    """x = cap * tanh(x / cap), in place (the logits of Gemma 2)"""

    x: str
    cap: float


@dataclass(frozen=True)
class SelectLogitRows:
    """out = x[logit_rows], R rows: every operation after this one runs for them alone"""

    out: str
    x: str


@dataclass(frozen=True)
class Pool:
    """out = one row for each logit row: of the rows of its sequence in the batch up to itself, the
    `last` or the `mean`.  A sequence that is pooled is computed in one step."""

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
    """An architecture with its weights, as the list of operations of one step.

    buffers    name -> width in float32 values; one is called `logits` and has vocab_size columns
    long_from  sequences that may become longer than this are long ones (longrope); None: none are
    """

    operations: tuple[Operation, ...]
    buffers: dict[str, int]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    long_from: int | None = None


@dataclass(frozen=True)
class Limits:
    """What a plan is laid out for: it allocates for these numbers and for no more."""

    max_rows: int  # T at most
    max_logit_rows: int  # R at most: one a running sequence, and one a drafted token
    max_slots: int  # sampling slots, one a running sequence
    num_blocks: int  # blocks of BLOCK_SIZE positions in the KV cache; block 0 is never handed out


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    ids           [T] int32; an id, or -1 - r for 'what logit row r of the step before sampled',
                  which is id 0 where that row failed
    positions     [T] int32, the row's position in its sequence
    sequences     [T] int32, index into block_tables; the rows of a sequence lie together, ascending
    slot_mapping  [T] int64, block * BLOCK_SIZE + offset: where the row's k and v are stored
    block_tables  [S, max_blocks] int32, padded with 0
    is_long       [S] bool, the same in every step of a sequence (Program.long_from)
    logit_rows    [R] int32, the rows whose logits are wanted, ascending
    """

    ids: Array
    positions: Array
    sequences: Array
    slot_mapping: Array
    block_tables: Array
    is_long: Array
    logit_rows: Array


class Plan(ABC):
    """A program laid out on a backend: buffers, weights, KV cache and sampling table in place."""

    sampling: SamplingTable

    @abstractmethod
    def forward(self, batch: Batch) -> None:
        """Runs every operation for the batch; the logits stay until the next forward."""

    @abstractmethod
    def copy_block(self, source: int, target: int) -> None:
        """Gives a block of the KV cache the keys and values of another, in all layers."""

    @abstractmethod
    def sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> Samples:
        """Samples each logit row of the last forward by the parameters in its slot.

        slots             [R] int32, index into `sampling`, in the order of logit_rows; the rows of
                          a slot lie side by side
        output_positions  [R] int64, how many tokens the sequence has already put out at that row
        targets           [R] int32, an id whose log-probability is wanted instead of a draw (the
                          prompt's own next token), or -1; None: all are drawn
        drafts            [R] int32, for rows that draw one after the other of one sequence: the id
                          that the row stands on, where it is a draft and the row before it is to
                          draw that very id; else -1; None: there are none

        Speculation: a sequence with tokens up to t and drafts d1 .. dk has rows t, d1 .. dk in the
        batch, all of them logit rows: k of max_logit_rows beside its own.  Here they have its slot,
        output positions p .. p + k and drafts -1, d1 .. dk, and ids come back for all of them.
        ids[0] is the next token; as long as ids[i - 1] == di, ids[i] is the one after.  These are
        the tokens of plain decoding, and they are counted for penalties; the ids behind the first
        draft that was not drawn mean nothing, and what their rows stored in the KV cache is to be
        written again before it is read.  Where a grammar holds, set_grammar takes a mask a row.

        A row that cannot be sampled has id FAILED (sampling/samples.py) and harms no other.
        """


class CannotRun(StartupError):
    """A backend cannot run here, or cannot run this program; another backend may.

    Anything else that keeps an engine from starting, such as too little memory, is a plain
    StartupError: another backend would not help.
    """


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that a backend keeps weights and KV cache in.

    num_bytes       all of it, whether in use or free
    whose           what sets the limit, for messages: "the machine", "the cgroup"
    overhead_bytes  what an engine needs of it besides weights and KV cache
    """

    num_bytes: int
    whose: str
    overhead_bytes: int


class Backend(ABC):
    """Something that runs programs: it has a name, options of its own, and memory.

    An engine makes the backend first, chooses the size of its KV cache from `memory` and
    `kv_position_bytes`, and then compiles its programs.  choose.py lists the backends.
    """

    name: str  # as --backend has it

    @classmethod
    @abstractmethod
    def from_options(cls, options: Mapping[str, Any], cache_dir: Path) -> Self:
        """Makes the backend ready to compile programs.

        options    the backend's own options by the names of their fields in config.Config;
                   an option that is missing has its default
        cache_dir  where compiled kernels are kept
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
        """The bytes of one position in the KV cache: its keys and values in every layer."""

    @abstractmethod
    def compile(self, program: Program, limits: Limits, tick: Callable[[], None]) -> Plan:
        """Lays the program out.

        tick  called at least once a weight here and once an operation in forward, so that a
              supervisor can tell long work from a hang
        Raises CannotRun if the backend does not support an operation, a shape or a weight's type,
        and StartupError if memory does not suffice.
        """
