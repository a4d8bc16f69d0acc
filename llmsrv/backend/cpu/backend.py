"""The CPU backend: a plan's operations in C (kernels/cpu), one call for a whole step.

A sequence gets exactly the same logits alone and in any batch.  Linear reads each weight once for
all rows of a step.  Activations are quantized to 16-bit integers, or 8-bit ones if an option asks
for them, with one scale for each group.
"""

import ctypes
import logging
import weakref
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Self

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.base import MemoryLimit
from llmsrv.backend.base import Plan
from llmsrv.backend.check import check_backend
from llmsrv.backend.cpu.cache_memory import CacheMemory
from llmsrv.backend.cpu.cores import default_threads
from llmsrv.backend.cpu.embed import Embedding
from llmsrv.backend.cpu.layout import Layout
from llmsrv.backend.cpu.library import BatchStruct
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.cpu.library import KV_CHUNK
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import OperationStruct
from llmsrv.backend.cpu.library import PlanStruct
from llmsrv.backend.cpu.library import address_of
from llmsrv.backend.cpu.library import declare
from llmsrv.backend.cpu.sampling import CPUSamplingTable
from llmsrv.backend.cpu.sampling import Sampler
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.cpu.tiers import Tier
from llmsrv.backend.host_memory import host_memory
from llmsrv.backend.kv_blocks import read_blocks
from llmsrv.backend.kv_blocks import write_blocks
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.source import CompilerHangs
from llmsrv.backend.source import cpu_features
from llmsrv.backend.source import find_compiler
from llmsrv.backend.source import kernel_sources
from llmsrv.backend.source import load_library
from llmsrv.errors import StartupError

log = logging.getLogger("llmsrv.backend")

FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-pthread")
# Each takes half a second to three seconds in some tier; all others together take one.
SLOW_TO_COMPILE = (
    *("linear_madd.c", "linear_amx_gemv.c", "linear_amx_gemm.c", "linear_dot4.c"),
    *("linear_dot4_k.c", "attention_f32.c", "linear.c", "attention_dot4.c"),
)
# The error that the check allows, by the bits of activations or KV cache, whichever has fewer:
# several times that of correct kernels.
MAX_ERRORS = {16: 2e-3, 8: 5e-2}
NO_LOGITS = np.zeros((0, 1), np.float32)  # for programs without logits, as tests have them
# In steps of at most this many rows, threads may share the chunks of one row's attention.
MAX_SPLIT_ROWS = 32


@dataclass(frozen=True)
class CPUOptions:
    """The backend's options, by their names in config.Config.

    cache_dir        where compiled kernels are cached
    threads          0: one for each physical core
    activation_bits  16 or 8
    kv_cache_bits    8, 16 or 32: the size of one element of a key or a value in the KV cache
    tiers            the instruction sets to try, the fastest first
    """

    cache_dir: Path
    threads: int = 0
    activation_bits: int = 16
    kv_cache_bits: int = 16
    tiers: tuple[Tier, ...] = TIERS


class CPUBackend(Backend):
    name = "cpu"

    @classmethod
    def from_options(cls, options: Mapping[str, Any], cache_dir: Path) -> Self:
        return cls(CPUOptions(cache_dir, **options))

    def __init__(self, options: CPUOptions) -> None:
        """Loads the kernels of the fastest tier that works: this CPU and compiler support it, and
        its results agree with the reference backend's.  Raises CannotRun if there is none."""
        self.num_threads = options.threads or default_threads()
        self.kv_cache_bits = options.kv_cache_bits
        find_compiler()
        features = cpu_features()
        tiers = [tier for tier in options.tiers if tier.needs <= features]
        for self.tier in tiers:
            self.activation_bits = 16 if self.tier.always_16_bits else options.activation_bits
            try:
                self._library = self._load(options)
                bits = min(self.activation_bits, self.kv_cache_bits, 16)
                check_backend(self, f"the {self.tier.name} kernels", FORMATS, MAX_ERRORS[bits])
                return
            except CannotRun as error:
                if self.tier is tiers[-1] or isinstance(error, CompilerHangs):
                    raise
                log.warning("%s; trying the next slower ones", error)

    def _load(self, options: CPUOptions) -> ctypes.CDLL:
        bits = f"-DACTIVATION_BITS={self.activation_bits}", f"-DKV_BITS={options.kv_cache_bits}"
        flags = (*FLAGS, *bits, *self.tier.flags)
        sources = kernel_sources("cpu")
        library = declare(load_library(sources, flags, options.cache_dir, SLOW_TO_COMPILE))
        if library.llmsrv_prepare() != 0:
            raise CannotRun(f"the system does not allow this process to use {self.tier.name}")
        return library

    @property
    def description(self) -> str:
        threads = f"{self.num_threads} thread" + "s" * (self.num_threads > 1)
        return f"{self.tier.name}, {threads}, {self.activation_bits}-bit activations"

    def memory(self) -> MemoryLimit:
        return host_memory()

    def kv_position_bytes(self, program: Program) -> int:
        num_heads = 2 * program.num_layers * program.num_kv_heads  # of keys and values
        return num_heads * _kv_head_bytes(self._library, program) // BLOCK_SIZE

    def compile(self, program: Program, limits: Limits, tick: Callable[[], None]) -> Plan:
        layout = Layout(self._library, program, limits, self.num_threads, tick)
        plan = CPUPlan(self._library, layout, program, limits, self.num_threads, tick)
        plan.kv_layout = self._kv_layout(program)
        return plan

    def _kv_layout(self, program: Program) -> str:
        """Everything that the bytes of a block depend on (kernels/cpu/kv_cache.h)."""
        has_integers = self.tier.has_integer_cache and self.kv_cache_bits != 32
        elements = f"{'integers' if has_integers else 'floats'} of {self.kv_cache_bits} bits"
        heads = f"{program.num_kv_heads} heads of {_padded_dim(program)}"
        return f"cpu: {elements}, {program.num_layers} layers, {heads}, blocks of {BLOCK_SIZE}"


class CPUPlan(Plan):
    """A compiled program: its buffers and weights, threads, KV cache and sampling table."""

    def __init__(
        self,
        library: ctypes.CDLL,
        layout: Layout,
        program: Program,
        limits: Limits,
        num_threads: int,
        tick: Callable[[], None],
    ) -> None:
        self.program = program
        self.buffers = layout.buffers
        self._logit_row_buffers = program.logit_row_buffers()
        self.sampling = CPUSamplingTable(limits.max_slots, program.vocab_size)
        self._library = library
        self._layout = layout
        self._tick = tick
        self._memory = Memory(library)
        self._operations = (OperationStruct * len(layout.operations))(*layout.operations)
        self._ids, self._positions, self._sequences, self._logit_rows = self._memory.array(
            (4, limits.max_rows), np.int32
        )
        self._slot_mapping = self._memory.array((limits.max_rows,), np.int64)
        self._is_long = self._memory.array((limits.max_rows,), np.uint8)
        self._rows = BatchStruct(
            positions=address_of(self._positions),
            sequences=address_of(self._sequences),
            slot_mapping=address_of(self._slot_mapping),
            is_long=address_of(self._is_long),
            logit_rows=address_of(self._logit_rows),
        )
        self._struct = self._lay_out(limits, num_threads)
        self._at = ctypes.addressof(self._struct), ctypes.addressof(self._rows)
        self._forward = library.llmsrv_forward
        logits = self.buffers.get("logits", NO_LOGITS)
        self._sampler = Sampler(
            library, self._at[0], logits, num_threads, limits, self.sampling
        )
        self._embeddings = [
            Embedding(library, embed, self._ids, self._sampler.ids, self.buffers[embed.out])
            for embed in layout.embeds
        ]

    def forward(self, batch: Batch) -> None:
        num_rows, num_logit_rows = len(batch.ids), len(batch.logit_rows)
        self._ids[:num_rows] = batch.ids
        self._positions[:num_rows] = batch.positions
        self._sequences[:num_rows] = batch.sequences
        self._slot_mapping[:num_rows] = batch.slot_mapping
        self._logit_rows[:num_logit_rows] = batch.logit_rows
        block_tables = np.ascontiguousarray(batch.block_tables, np.int32)
        if self.program.long_from is not None:
            self._is_long[: len(batch.is_long)] = batch.is_long
        rows = self._rows
        rows.num_rows, rows.num_logit_rows = num_rows, num_logit_rows
        rows.num_sequences, rows.max_blocks = block_tables.shape
        rows.block_tables = address_of(block_tables)
        for embed in self._embeddings:
            embed(num_rows)
        self.cache.will_use(int(batch.slot_mapping.max(initial=0)) // BLOCK_SIZE)
        self._forward(*self._at)
        self._tick()

    def sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> Samples:
        return self._sampler.sample(slots, output_positions, targets, drafts)

    def read(self, name: str) -> Array:
        has_logit_rows = name in self._logit_row_buffers
        num_rows = self._rows.num_logit_rows if has_logit_rows else self._rows.num_rows
        return self.buffers[name][:num_rows, : self.program.buffers[name]].copy()

    def copy_block(self, source: int, target: int) -> None:
        self.cache.will_use(target)
        for array in (self.cache.keys, self.cache.values):
            array[target] = array[source]

    def read_blocks(self, blocks: Sequence[int]) -> Array:
        return read_blocks(*self._block_bytes(), blocks)

    def write_blocks(self, blocks: Sequence[int], data: Array) -> None:
        self.cache.will_use(max(blocks, default=0))
        write_blocks(*self._block_bytes(), blocks, data)

    def _block_bytes(self) -> tuple[Array, Array]:
        num_blocks = len(self.cache.keys)
        return self.cache.keys.reshape(num_blocks, -1), self.cache.values.reshape(num_blocks, -1)

    def _lay_out(self, limits: Limits, num_threads: int) -> PlanStruct:
        program, array = self.program, self._memory.array
        padded_dim = _padded_dim(program)
        head_bytes = _kv_head_bytes(self._library, program)
        cache = limits.num_blocks, program.num_layers, program.num_kv_heads, head_bytes
        self.cache = CacheMemory(self._library, self._memory, cache)
        max_kv_chunks = -(-limits.num_blocks * BLOCK_SIZE // KV_CHUNK)
        scratch_floats = self._library.llmsrv_scratch_floats(
            program.num_heads, program.num_kv_heads, padded_dim
        )
        split_rows = min(MAX_SPLIT_ROWS, limits.max_rows)
        self._kept = (
            array((split_rows * program.num_heads * max_kv_chunks, 2 + padded_dim), np.float32),
            array((num_threads, scratch_floats), np.float32),
            array((limits.max_rows, 2), np.int32),
        )
        partials, scratch, query_spans = map(address_of, self._kept)
        pool = self._library.llmsrv_start_threads(num_threads)
        if not pool:
            raise StartupError(f"{num_threads} threads cannot be started; use --threads 1")
        weakref.finalize(self, self._library.llmsrv_stop_threads, pool)
        return PlanStruct(
            num_operations=len(self._operations),
            num_layers=program.num_layers,
            num_heads=program.num_heads,
            num_kv_heads=program.num_kv_heads,
            head_dim=program.head_dim,
            padded_dim=padded_dim,
            max_rows=limits.max_rows,
            max_split_rows=split_rows,
            max_kv_chunks=max_kv_chunks,
            num_threads=num_threads,
            k_cache=address_of(self.cache.keys),
            v_cache=address_of(self.cache.values),
            partials=partials,
            scratch=scratch,
            scratch_floats=scratch_floats,
            query_spans=query_spans,
            heartbeat=getattr(self._tick, "address", None),
            operations=ctypes.addressof(self._operations),
            pool=pool,
        )


def _padded_dim(program: Program) -> int:
    return -(-program.head_dim // 16) * 16


def _kv_head_bytes(library: ctypes.CDLL, program: Program) -> int:
    """The bytes that a block of the KV cache takes for the keys of one head, or for its values."""
    num_bytes: int = library.llmsrv_kv_head_bytes(_padded_dim(program))
    return num_bytes
