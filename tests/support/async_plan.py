"""A FakePlan that behaves like an asynchronous device: samples exist when they are read."""

import dataclasses

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.sampling.samples import Samples
from tests.support.fake_plan import FakePlan

NO_ROWS = Samples(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), [])


class AsyncFakePlan(FakePlan):
    """events  "enqueue" for each step, "read" for each result, in the order in which they happened;
    "enqueue ahead" for a step with an id that the host did not know
    """

    is_asynchronous = True

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.events: list[str] = []
        self._sampled = np.zeros(0, np.int32)  # by the step before
        self._num_unread = 0

    @property
    def num_ahead(self) -> int:
        return self.events.count("enqueue ahead")

    def forward(self, batch: Batch) -> None:
        is_unknown = batch.ids < 0
        self.events.append("enqueue ahead" if is_unknown.any() else "enqueue")
        ids = batch.ids.copy()
        ids[is_unknown] = np.maximum(self._sampled, 0)[-1 - ids[is_unknown]]
        super().forward(dataclasses.replace(batch, ids=ids))

    def enqueue_sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> PendingSamples:
        samples = NO_ROWS
        if len(slots):
            samples = self.sample(slots, output_positions, targets, drafts)
        self._sampled = samples.ids
        self._num_unread += 1
        assert self._num_unread <= 2
        number = self.events.count("enqueue") + self.num_ahead

        def read() -> Samples:
            self.events.append("read")
            self._num_unread -= 1
            assert self.events.count("read") == number, "results are read in order, once"
            return samples

        return PendingSamples(read)
