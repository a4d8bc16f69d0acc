"""Running ahead: the core enqueues a step before it reads the tokens of the step before.

A device that computes asynchronously would be idle while the host reads tokens, ends sequences,
builds messages and schedules.  So the core keeps one step pending: enqueued, but not read.  The
next step decodes the pending step's sequences without knowing their tokens.  In a batch, the id
-1 - r stands for "what logit row r of the step before sampled" (backend/base.py, Batch.ids), and
that placeholder is appended to the sequence's output while the next step is scheduled:

    append_placeholders(pending)      output ids: 17, 4, -1 - r
    schedule and enqueue step n + 1   its rows contain the placeholders
    remove_placeholders(pending)      output ids: 17, 4
    read step n                       output ids: 17, 4, 32

Placeholders exist only within one call of EngineCore.step, so aborts and deadlines never meet one,
and the prefix cache never hashes one (Sequence.num_cacheable).  A sequence that turns out to have
ended in step n has wasted its row of step n + 1, whose result is dropped.  Its blocks and its slot
are released at once, because the device executes everything in the order in which it was enqueued.

The core cannot run ahead if the host must see the tokens before it can schedule (may_run_ahead).
Then it reads the pending step first.
"""

from dataclasses import dataclass

from llmsrv.backend.base import PendingSamples
from llmsrv.engine.logit_rows import LogitRow
from llmsrv.engine.logit_rows import NO_ID
from llmsrv.engine.scheduler import Scheduler
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.sequence import State
from llmsrv.engine.speculation import Speculation


@dataclass(frozen=True)
class PendingStep:
    """A step that is enqueued and not read yet.

    rows        its logit rows, in the order of `samples`
    samples     None if there are no rows and nothing to wait for
    drafts      sequences with a draft in the step: how many tokens each sequence had before it, and
                how many were drafted
    work        sum of Chunk.work
    enqueued_s  when the core began to enqueue it
    """

    rows: list[LogitRow]
    samples: PendingSamples | None
    drafts: list[tuple[Sequence, int, int]]
    work: int
    enqueued_s: float


def may_run_ahead(pending: PendingStep, scheduler: Scheduler, speculation: Speculation) -> bool:
    """Whether the next step can be scheduled before the pending step is read."""
    if speculation.is_enabled or not scheduler.can_grow_all():
        return False
    return not any(_needs_host(row) for row in pending.rows)


def _needs_host(row: LogitRow) -> bool:
    sequence = row.sequence
    if sequence.state is State.ENDED:
        return False  # the result is dropped
    # A grammar's next mask depends on the token, and so does what is left of a prompt to report.  A
    # preempted sequence will sample the token again, so this row must be dropped first.
    return (
        sequence.grammar is not None or row.target != NO_ID or sequence.state is State.WAITING
    )


def append_placeholders(pending: PendingStep) -> None:
    """Lets every sequence that the pending step samples decode in the next step.

    A sequence that reaches max_tokens with the pending token gets no placeholder.  So it has no
    uncomputed token, and is not scheduled.
    """
    for index, row in enumerate(pending.rows):
        sequence = row.sequence
        if sequence.state is State.RUNNING and len(sequence.output_ids) + 1 < sequence.max_tokens:
            sequence.output_ids.append(-1 - index)


def remove_placeholders(pending: PendingStep) -> None:
    for row in pending.rows:
        if row.sequence.has_placeholder:
            row.sequence.output_ids.pop()
