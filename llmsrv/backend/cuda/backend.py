"""The CUDA backend: a plan's operations as kernels (kernels/cuda) on an NVIDIA GPU.

Matrix products, keys and values are in 16 bits, float16 or bfloat16, with sums in float32; the
residual stream is float32.  Weights keep the formats of their files.
"""

import logging
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Self

import numpy as np

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import CannotRun
from llmsrv.backend.base import Limits
from llmsrv.backend.base import MemoryLimit
from llmsrv.backend.base import Plan
from llmsrv.backend.cuda.attention import AttentionKernels
from llmsrv.backend.cuda.attention import MAX_HEAD_DIM
from llmsrv.backend.cuda.buffers import Buffers
from llmsrv.backend.cuda.buffers import COLUMN_UNIT
from llmsrv.backend.cuda.buffers import DTYPES
from llmsrv.backend.cuda.buffers import padded_head_dim
from llmsrv.backend.cuda.device import first_line
from llmsrv.backend.cuda.device import open_device
from llmsrv.backend.cuda.experts import ExpertKernels
from llmsrv.backend.cuda.fusion import fuse
from llmsrv.backend.cuda.layout import Launchers
from llmsrv.backend.cuda.layout import Layout
from llmsrv.backend.cuda.layout import Memory
from llmsrv.backend.cuda.layout import stacks_of
from llmsrv.backend.cuda.linear import LinearKernels
from llmsrv.backend.cuda.pack import format_of
from llmsrv.backend.cuda.plan import CUDAPlan
from llmsrv.backend.cuda.plan import plan_staging
from llmsrv.backend.cuda.sampling import Sampler
from llmsrv.backend.cuda.sampling_table import CUDASamplingTable
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.step import row_capacity
from llmsrv.backend.cuda.weights import pack
from llmsrv.backend.cuda.weights import packed_bytes
from llmsrv.backend.program import Experts
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.supported import check_supported
from llmsrv.errors import StartupError

log = logging.getLogger("llmsrv.backend")

# Besides weights and KV cache: CUDA's context, loaded kernels, the buffers of a step.
OVERHEAD_BYTES = 1 << 30


@dataclass(frozen=True)
class CUDAOptions:
    """The backend's options, by their names in config.Config.

    cache_dir        where compiled kernels are cached
    device           cuda:N
    dtype            of operands and KV cache: float16, bfloat16, or auto: bfloat16 if the model's
                     weights are bfloat16 and the GPU has it
    batch_invariant  a sequence gets exactly the same logits alone and in any batch
    warms_up         run steps of every kind when a program is compiled
    """

    cache_dir: Path
    device: str = "cuda:0"
    dtype: str = "auto"
    batch_invariant: bool = False
    warms_up: bool = True


class CUDABackend(Backend):
    name = "cuda"
    prefill_chunk_size = 2048

    @classmethod
    def from_options(cls, options: Mapping[str, Any], cache_dir: Path) -> Self:
        return cls(CUDAOptions(cache_dir, **options))

    def __init__(self, options: CUDAOptions) -> None:
        self.device = open_device(options.device, options.cache_dir)
        self._options = options
        self._cp = self.device.cp
        if options.dtype == "bfloat16" and not self.device.has_bfloat16:
            raise CannotRun(f"the {self.device.name} has no bfloat16; use --dtype float16")

    @property
    def description(self) -> str:
        device = self.device
        capability = f"{device.capability // 10}.{device.capability % 10}"
        return f"{device.name} (cuda:{device.index}, compute capability {capability})"

    def memory(self) -> MemoryLimit:
        _, total = self.device.memory_bytes()
        return MemoryLimit(total, "the GPU", OVERHEAD_BYTES)

    def weight_bytes(self, program: Program) -> int:
        operations = list(fuse(program))
        experts = [each for each in operations if isinstance(each, Experts)]
        num_bytes: int = sum(map(ExpertKernels.packed_bytes, experts))
        return num_bytes + sum(packed_bytes(*stack) for stack in stacks_of(operations))

    def kv_position_bytes(self, program: Program) -> int:
        return 2 * program.num_layers * program.num_kv_heads * padded_head_dim(program) * 2

    def compile(self, program: Program, limits: Limits, tick: Callable[[], None]) -> Plan:
        check_supported(program, self.name, MAX_HEAD_DIM, format_of)
        dtype, pool = self._dtype(program), self._cp.get_default_memory_pool()
        used_before = pool.used_bytes()
        try:
            plan = self._compile(program, limits, dtype, tick)
        except self._cp.cuda.memory.OutOfMemoryError as error:
            raise StartupError(self._out_of_memory(program, limits)) from error
        except self._device_errors() as error:
            name = self.device.name
            raise CannotRun(f"the kernels fail on the {name}: {first_line(error)}") from error
        pool.free_all_blocks()
        self._log_memory(program, limits, dtype, pool.used_bytes() - used_before)
        return plan

    def _log_memory(self, program: Program, limits: Limits, dtype: str, used: int) -> None:
        weights, kv_cache = self.weight_bytes(program), self._kv_bytes(program, limits)
        free, total = self.device.memory_bytes()
        log.info(
            "%s on cuda:%d: %s of weights, %s of KV cache, %s of buffers; %s of %s are free",
            dtype,
            self.device.index,
            *map(_gb, (weights, kv_cache, used - weights - kv_cache, free, total)),
        )

    def _device_errors(self) -> tuple[type[Exception], ...]:
        cuda = self._cp.cuda
        failed_launch = cuda.driver.CUDADriverError, cuda.runtime.CUDARuntimeError
        return cuda.compiler.CompileException, *failed_launch

    def _dtype(self, program: Program) -> str:
        """float16 or bfloat16."""
        if self._options.dtype != "auto":
            return self._options.dtype
        types = {
            weight.type
            for each in program.operations
            if isinstance(each, Linear)
            for weight in each.weights
        }
        return "bfloat16" if "BF16" in types and self.device.has_bfloat16 else "float16"

    def _compile(
        self, program: Program, limits: Limits, dtype: str, tick: Callable[[], None]
    ) -> CUDAPlan:
        cp, is_batch_invariant = self._cp, self._options.batch_invariant
        operations = list(fuse(program))
        macros = {"BFLOAT16": 1} if dtype == "bfloat16" else {}
        kernels = Kernels(cp, **macros)
        weights = {
            stack.key: pack(cp, stack.tensors, dtype, tick, stack.is_paired)
            for stack in stacks_of(operations)
        }
        linear = LinearKernels(kernels, self.device, is_batch_invariant)
        launchers = Launchers(
            linear,
            ExpertKernels(cp, kernels, linear, program, limits, dtype),
            AttentionKernels(kernels, self.device, program, limits, is_batch_invariant),
        )
        buffers = Buffers(cp, program, operations, limits, dtype)
        table = CUDASamplingTable(limits.max_slots, program.vocab_size)
        logits = buffers.arrays.get("logits")
        if logits is None:  # a program for embeddings
            logits = cp.zeros((1, COLUMN_UNIT), np.float32)
        sampler = Sampler(kernels, self.device, logits, limits, table)
        padded_dim = padded_head_dim(program)
        q = row_capacity(limits), program.num_heads, padded_dim
        blocks = limits.num_blocks, program.num_layers, program.num_kv_heads, BLOCK_SIZE, padded_dim
        q, keys, values = (cp.zeros(shape, DTYPES[dtype]) for shape in (q, blocks, blocks))
        memory = Memory(buffers, weights, q, keys, values, sampler.ids)
        layout = Layout(cp, operations, program.buffers, memory, launchers, tick)
        plan = CUDAPlan(
            cp,
            program,
            limits,
            memory,
            layout,
            launchers.attention,
            sampler,
            table,
            plan_staging(cp, limits, launchers.attention),
            _kv_layout(program, dtype),
            tick,
        )
        # Arrays were filled on another stream than the plan's.
        cp.cuda.runtime.deviceSynchronize()
        if self._options.warms_up:
            plan.warm_up()
        return plan

    def _kv_bytes(self, program: Program, limits: Limits) -> int:
        return limits.num_blocks * BLOCK_SIZE * self.kv_position_bytes(program)

    def _out_of_memory(self, program: Program, limits: Limits) -> str:
        free, total = self.device.memory_bytes()
        needed = self.weight_bytes(program) + self._kv_bytes(program, limits)
        used = total - free - self._cp.get_default_memory_pool().total_bytes()
        return (
            f"the GPU has too little free memory: weights and KV cache take {_gb(needed)}, and "
            f"{_gb(used)} of its {_gb(total)} were in use before; end other programs that use it, "
            "or choose a smaller --gpu-memory-utilization, --max-total-seq-length or model"
        )


def _kv_layout(program: Program, dtype: str) -> str:
    """Everything that the bytes of a block depend on."""
    heads = f"{program.num_kv_heads} heads of {padded_head_dim(program)}"
    return f"cuda: {dtype}, {program.num_layers} layers, {heads}, blocks of {BLOCK_SIZE}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
