"""The contract between models and backends: what a backend promises.

A Backend compiles a model's program (program.py) once into a Plan, which holds weights, buffers and
KV cache; nothing moves after that.  A step runs the plan on a Batch, a flat list of rows.  A row is
one token of one sequence; prefill, decode, draft and fast-forward rows are all alike.

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
from typing import Self

from llmsrv.backend.arrays import Array
from llmsrv.backend.program import Program
from llmsrv.backend.program import tensors_of
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.errors import StartupError

BLOCK_SIZE = 16  # positions in one block of the KV cache


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


@dataclass(frozen=True)
class PendingSamples:
    """Samples that the device may still be computing.

    read  waits for them and returns them; call it once
    """

    read: Callable[[], Samples]


class Plan(ABC):
    """A compiled program with its weights, buffers, KV cache and sampling table.

    sampling         parameters of each slot; written between steps
    kv_layout        how a block of the KV cache is stored.  Plans with equal kv_layout can exchange
                     blocks by read_blocks and write_blocks.
    is_asynchronous  whether calls return before the device has finished.  If so, everything takes
                     effect in the order of the calls, including writes to `sampling`, and the host
                     waits only in PendingSamples.read.
    """

    sampling: SamplingTable
    kv_layout: str
    is_asynchronous: bool = False

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

    def enqueue_sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> PendingSamples:
        """Like sample(), but does not wait for the result.

        An asynchronous plan overrides this.  It must support two unread results at a time: the
        engine enqueues the next step before it reads this one.  Results are read in order.  It must
        also accept R = 0; then read() only waits for the forward pass.
        """
        samples = self.sample(slots, output_positions, targets, drafts)
        return PendingSamples(lambda: samples)

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

    is_ordinary  whether most machines are like this, so that "auto" need not warn
    """

    is_ordinary = False


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

    An engine makes the backend, chooses the size of the KV cache from `memory`, `weight_bytes` and
    `kv_position_bytes`, and compiles its programs with that size.

    name                the value of --backend
    prefill_chunk_size  the most rows of a step if --prefill-chunk-size does not say
    """

    name: str
    # With more rows, buffers outgrow the CPU's caches, which slows each row down.
    prefill_chunk_size: int = 256

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

    def weight_bytes(self, program: Program) -> int:
        """Bytes that the program's weights take in that memory; by default, as in their files."""
        return sum({each.name: each.data.nbytes for each in tensors_of(program)}.values())

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
