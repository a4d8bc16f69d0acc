"""Random steps to sample, for any backend's sampler, and a check against the reference."""

from collections.abc import Callable
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np
from hypothesis import strategies as st

from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cuda.sampling import Sampler
from llmsrv.backend.cuda.sampling_table import CUDASamplingTable
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of

NUM_SLOTS = 4
LIMITS = Limits(max_rows=40, max_logit_rows=40, max_slots=NUM_SLOTS, num_blocks=3)
PROMPT_IDS, OUTPUT_IDS = [3, 5, 5], [1, 1, 1, 3, 60]


class BackendSampling(Protocol):
    """A backend's sampler, on logits that the test gives it."""

    table: SamplingTable

    def enqueue(
        self, logits: Any, slots: Any, output_positions: Any, targets: Any, drafts: Any
    ) -> PendingSamples: ...

    def counts(self, slot: int) -> Any:
        """The output ids of the slot counted so far; None without penalties."""


MakeSampling = Callable[[int], BackendSampling]  # of a vocabulary size


class CPUSampling:
    def __init__(self, backend: CPUBackend, vocab_size: int) -> None:
        program = Program((), {"logits": vocab_size}, 1, 1, 1, 16, vocab_size)
        self._plan = backend.compile(program, LIMITS, lambda: None)
        self.table = self._plan.sampling

    def enqueue(
        self, logits: Any, slots: Any, output_positions: Any, targets: Any, drafts: Any
    ) -> PendingSamples:
        self._plan.buffers["logits"][: len(logits), : logits.shape[1]] = logits
        return self._plan.enqueue_sample(slots, output_positions, targets, drafts)

    def counts(self, slot: int) -> Any:
        return self.table.extras[slot].counts


class CUDASampling:
    def __init__(self, cp: Any, vocab_size: int) -> None:
        self.table = CUDASamplingTable(NUM_SLOTS, vocab_size)
        # Whatever is in the padding must not matter.
        padded = -(-vocab_size // 32) * 32
        self._logits = cp.full((LIMITS.max_logit_rows, padded), np.nan, np.float32)
        self._cp = cp
        device: Any = SimpleNamespace(cp=cp)
        self._sampler = Sampler(Kernels(cp), device, self._logits, LIMITS, self.table)
        self.ids = self._sampler.ids

    def enqueue(
        self, logits: Any, slots: Any, output_positions: Any, targets: Any, drafts: Any
    ) -> PendingSamples:
        for row, values in enumerate(logits):
            self._logits[row, : logits.shape[1]].set(values)
        return self._sampler.enqueue(slots, output_positions, targets, drafts)

    def counts(self, slot: int) -> Any:
        return self._sampler.counts(slot)


def cpu_sampling(backend: CPUBackend) -> MakeSampling:
    return cache(lambda vocab_size: CPUSampling(backend, vocab_size))


def cuda_sampling(cp: Any) -> MakeSampling:
    return cache(lambda vocab_size: CUDASampling(cp, vocab_size))


class Step(NamedTuple):
    """A step to sample.

    parameters, masks  one for each slot
    """

    logits: Any
    slots: Any
    parameters: Sequence[SamplingParameters]
    drafts: Any = None
    targets: Any = None
    masks: Sequence[Any] = ()


def random_logits(
    seed: int,
    num_rows: int,
    vocab_size: int,
    has_ties: bool = False,
    bad: Sequence[float] = (),
) -> Any:
    """Random logits; the last rows each get one of the bad values."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(num_rows, vocab_size)).astype(np.float32)
    if has_ties:
        logits = np.round(logits)  # gives both 0 and -0
    for row, value in enumerate(bad[:num_rows]):
        logits[-1 - row, rng.integers(vocab_size)] = value
    return logits


def check_step(make_sampling: MakeSampling, step: Step) -> Samples:
    """Samples the step on new slots, and compares with the reference, bit for bit."""
    sampling = make_sampling(step.logits.shape[1])
    table = SamplingTable(NUM_SLOTS, step.logits.shape[1])
    for each in (sampling.table, table):
        set_slots(each, step)
    where = np.array(step.slots, np.int32), np.arange(len(step.slots), dtype=np.int64) * 2**33
    samples = sampling.enqueue(step.logits, *where, step.targets, step.drafts).read()
    check_samples(samples, sample(step.logits, table, *where, step.targets, step.drafts))
    check_counts(sampling, table)
    return samples


def set_slots(table: SamplingTable, step: Step) -> None:
    for slot, values in enumerate(step.parameters):
        table.set(slot, values, PROMPT_IDS, OUTPUT_IDS)
    for slot, mask in enumerate(step.masks):
        table.set_grammar(slot, mask)


def check_samples(ours: Samples, theirs: Samples) -> None:
    assert ours.ids.tolist() == theirs.ids.tolist()
    np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    assert ours.ranks.tolist() == theirs.ranks.tolist()
    for mine, yours in zip(ours.alternatives, theirs.alternatives, strict=True):
        np.testing.assert_array_equal(mine[0], yours[0])
        np.testing.assert_array_equal(mine[1], yours[1])


def check_counts(sampling: BackendSampling, table: SamplingTable) -> None:
    for slot, extras in table.extras.items():
        np.testing.assert_array_equal(sampling.counts(slot), extras.counts)


def parameters_of(vocab_size: int) -> Any:
    ids = st.integers(0, vocab_size - 1)
    return st.builds(
        SamplingParameters,
        seed=st.integers(0, 2**64 - 1),
        choice=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0, 40.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 40, 3000]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01, 1e-6]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0]),
        typical_p=st.sampled_from([1.0, 1.0, 0.9, 0.2, 1e-6]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 1000.0]),
        presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
        num_logprobs=st.sampled_from([-1, 0, 1, 20, 1000]),
        logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=5),
        allowed=st.none() | st.lists(ids, max_size=30).map(lambda ids: mask_of(ids, vocab_size)),
        min_tokens=st.sampled_from([0, 0, 1, 2**31 - 1]),
        end_ids=st.lists(ids, max_size=4),
    )


@st.composite
def steps(draw: Any, vocab_sizes: Sequence[int] = (61, 97, 128, 1000, 4099)) -> Step:
    vocab_size = draw(st.sampled_from(vocab_sizes))
    num_slots = draw(st.integers(1, NUM_SLOTS))
    num_rows = [draw(st.integers(1, 4)) for _ in range(num_slots)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = np.repeat(rng.permutation(num_slots), num_rows)
    logits = random_logits(
        draw(st.integers(0, 2**32)),
        len(slots),
        vocab_size,
        draw(st.booleans()),
        draw(st.lists(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 1e30, 3e38]), max_size=2)),
    )
    is_first = np.diff(slots, prepend=-1) != 0
    likely = np.where(np.isfinite(logits), logits, 0).argmax(axis=1)[:-1]
    drafts = np.where(rng.random(len(likely)) < 0.7, likely, rng.integers(0, vocab_size))
    drafts = np.where(is_first, -1, np.append(0, drafts)).astype(np.int32)
    targets = np.where(is_first & (rng.random(len(slots)) < 0.2), 7, -1).astype(np.int32)
    drafts[1:][targets[:-1] >= 0] = -1
    masks = [
        None if draw(st.booleans()) else ~mask_of(rng.integers(0, vocab_size, 40), vocab_size)
        for _ in range(num_slots)
    ]
    if masks[0] is not None:
        masks[0] = np.stack([masks[0], ~masks[0]])
    parameters = [draw(parameters_of(vocab_size)) for _ in range(num_slots)]
    return Step(logits, slots, parameters, drafts, targets, masks)
