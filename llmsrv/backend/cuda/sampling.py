"""Sampling for the CUDA backend: on the host, from the logits of the device."""

from typing import Any

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.table import SamplingTable


class CUDASamplingTable(SamplingTable):
    pass


class Sampler:
    def __init__(
        self, kernels: Kernels, device: Device, logits: Any, limits: Limits, table: SamplingTable
    ) -> None:
        self._logits, self._table = logits, table
        self.ids = device.cp.zeros(limits.max_logit_rows, np.int32)

    def enqueue(
        self, slots: Array, output_positions: Array, targets: Array | None, drafts: Array | None
    ) -> PendingSamples:
        logits = self._logits[: len(slots)].get()[:, : self._table.vocab_size]
        samples = sample(logits, self._table, slots, output_positions, targets, drafts)
        self.ids[: len(slots)].set(samples.ids)
        return PendingSamples(lambda: samples)
