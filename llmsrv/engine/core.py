"""The engine without its process: takes requests, and computes one step after the other.

A step schedules rows, runs the model over them, samples the sequences whose rows are complete, and
reports all results in one message.  With an asynchronous backend the core runs one step ahead of
the tokens that it has read (pipeline.py).

An error that concerns one request fails that request.  An error in the model's own computation is
raised, and ends the engine.
"""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import Future
from concurrent.futures import wait
from heapq import heappop
from heapq import heappush

import numpy as np

from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.base import Plan
from llmsrv.backend.sampling.samples import Samples
from llmsrv.config import DEFAULT_MAX_STEP_MS
from llmsrv.engine.batch import build_batch
from llmsrv.engine.draft_model import DraftModel
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.kv_cache import BlockHashes
from llmsrv.engine.kv_cache import KVCache
from llmsrv.engine.logit_rows import LogitRow
from llmsrv.engine.logit_rows import NO_ID
from llmsrv.engine.logit_rows import logit_rows_of
from llmsrv.engine.logit_rows import tokens_of_row
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Admitted
from llmsrv.engine.messages import Failed
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens
from llmsrv.engine.pipeline import PendingStep
from llmsrv.engine.pipeline import append_placeholders
from llmsrv.engine.pipeline import may_run_ahead
from llmsrv.engine.pipeline import remove_placeholders
from llmsrv.engine.sampling import num_usable_masks
from llmsrv.engine.sampling import write_sampling
from llmsrv.engine.scheduler import Chunk
from llmsrv.engine.scheduler import Scheduler
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.sequence import State
from llmsrv.engine.speculation import Speculation
from llmsrv.engine.step_costs import StepCosts
from llmsrv.engine.validation import check_submit
from llmsrv.errors import ApiError

log = logging.getLogger("llmsrv.engine")

GRAMMAR_WAIT_S = 0.005  # when all requests wait for their grammars
TIMED_OUT = "The request was not finished within the time that this server gives to one."


class EngineCore:
    def __init__(
        self,
        plan: Plan,
        limits: Limits,
        context_length: int,
        vocab_size: int,
        long_from: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        compile_grammar: Callable[[str], Future[Grammar]] | None = None,
        uses_prompt_lookup: bool = False,
        draft_plan: Plan | None = None,
        draft_length: int = 0,
        is_pipelined: bool | None = None,
        max_step_s: float = DEFAULT_MAX_STEP_MS / 1000,
    ) -> None:
        """limits              of the compiled plan; its KV cache must hold a full context_length
        long_from           of the program; None: no sequence is long
        compile_grammar     returns at once; None: no request has a grammar
        uses_prompt_lookup, draft_length  see Speculation
        draft_plan          of the draft model, compiled for the same limits
        is_pipelined        whether to run ahead (pipeline.py); None: if the plan is asynchronous
        max_step_s          of a step that computes both streams and prompts
        """
        self._clock = clock
        self._plan = plan
        self._is_pipelined = is_pipelined if is_pipelined is not None else plan.is_asynchronous
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._long_from = context_length if long_from is None else long_from
        self._compile_grammar = compile_grammar
        self._kv_cache = KVCache(limits.num_blocks, limits.max_slots, context_length)
        self._costs = StepCosts()
        draft_model = None
        if draft_plan is not None:
            draft_model = DraftModel(draft_plan, limits.max_rows, self._kv_cache, clock)
        self._speculation = Speculation(self._costs, uses_prompt_lookup, draft_model, draft_length)
        self._scheduler = Scheduler(
            self._kv_cache,
            limits.max_slots,
            limits.max_rows,
            self._costs,
            self._speculation,
            max_step_s,
            limits.max_logit_rows - limits.max_slots,
        )
        self._sequences: dict[int, list[Sequence]] = {}  # by request, those that have not ended
        self._compiling: dict[int, Future[Grammar]] = {}  # by request, not queued yet
        self._deadlines: list[tuple[float, int]] = []  # a heap; may hold ended requests
        self._pending: PendingStep | None = None  # only if pipelined
        self._last_read_s = 0.0  # when the last step was read

        # Results since the last report
        self._admitted: list[Admitted] = []
        self._tokens: list[Tokens] = []
        self._finished: list[Finished] = []
        self._failed: list[Failed] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute, read or report anything."""
        return bool(self._sequences or self._finished or self._failed or self._pending)

    def submit(self, submit: Submit) -> None:
        """Queues a request, or fails it if it is invalid."""
        assert submit.request not in self._sequences, f"request {submit.request} is in use"
        now_s = self._clock()
        try:
            check_submit(submit, self._context_length, self._vocab_size)
            num_prompt, end_ids = len(submit.prompt_ids), frozenset(submit.end_ids)
            max_tokens = min(submit.max_tokens, self._context_length - num_prompt)
            is_long = num_prompt + max_tokens > self._long_from
            salt = submit.salt + bytes([is_long])
            sequences: list[Sequence] = []
            for choice in range(submit.n):
                leader = sequences[0] if sequences else None
                sequence = Sequence(submit, choice, max_tokens, end_ids, now_s, BlockHashes(salt))
                sequence.is_long, sequence.leader = is_long, leader
                sequences.append(sequence)
        except Exception as error:
            self._failed.append(_failed(submit.request, error))
            return
        self._sequences[submit.request] = sequences
        if submit.grammar:
            assert self._compile_grammar is not None
            self._compiling[submit.request] = self._compile_grammar(submit.grammar)
        else:
            for sequence in sequences:
                self._scheduler.add(sequence)
        if submit.deadline_s < math.inf:
            heappush(self._deadlines, (submit.deadline_s, submit.request))

    def abort(self, abort: Abort) -> None:
        """Ends one choice or all choices at once; the next step reports it."""
        for sequence in list(self._sequences.get(abort.request, ())):
            if abort.choice in (None, sequence.choice):
                self._finish(sequence, "abort")

    def step(self) -> Step:
        """Enqueues one step, reads one, and reports everything since the last report.

        Without pipelining they are the same step.
        """
        self._fail_overdue(self._clock())
        self._queue_compiled()
        if self._pending and not may_run_ahead(self._pending, self._scheduler, self._speculation):
            self._read(self._pending)
            self._pending = None
        pending = self._pending
        self._pending = self._schedule_and_enqueue(pending)
        if pending:
            remove_placeholders(pending)
            self._read(pending)
        if self._pending and not self._is_pipelined:
            self._read(self._pending)
            self._pending = None
        return self._report()

    def _schedule_and_enqueue(self, pending: PendingStep | None) -> PendingStep | None:
        """Enqueues the next step, ahead of the pending one's tokens; None if there is no work."""
        if pending:
            append_placeholders(pending)
        start_s = self._clock()
        chunks = self._scheduler.schedule()
        if not chunks and not pending and self._compiling:
            wait(self._compiling.values(), GRAMMAR_WAIT_S, FIRST_COMPLETED)
        for source, target in self._scheduler.copies:
            self._plan.copy_block(source, target)
        self._prepare_admitted(self._scheduler.admitted, start_s)
        return self._enqueue(chunks)

    def _queue_compiled(self) -> None:
        """Queues the requests whose grammars are ready."""
        for request in [r for r, compiled in self._compiling.items() if compiled.done()]:
            try:
                grammar = self._compiling[request].result()
            except Exception as error:
                self._fail(request, error)
                continue
            del self._compiling[request]
            for sequence in self._sequences[request]:
                sequence.grammar = grammar.copy()
                self._scheduler.add(sequence)

    def _fail_overdue(self, now_s: float) -> None:
        """Fails the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = heappop(self._deadlines)[1]
            if request in self._sequences:
                self._fail(request, ApiError(504, TIMED_OUT, code="request_timeout"))

    def _prepare_admitted(self, admitted: list[Sequence], now_s: float) -> None:
        """Writes the sampling parameters of newly admitted sequences into their slots."""
        for sequence in admitted:
            if sequence.state is State.ENDED:
                continue  # another choice failed the request
            try:
                write_sampling(self._plan.sampling, sequence)
                self._speculation.start(sequence)
            except Exception as error:
                self._fail(sequence.submit.request, error)
                continue
            if not sequence.scheduled_s:
                sequence.scheduled_s = now_s
                self._admitted.append(Admitted(sequence.submit.request, sequence.num_cached))

    def _enqueue(self, chunks: list[Chunk]) -> PendingStep | None:
        """Runs the model over the chunks, and samples their logit rows."""
        chunks = [masked for chunk in chunks if (masked := self._apply_grammar(chunk))]
        chunks = [chunk for chunk in chunks if chunk.sequence.state is not State.ENDED]
        if not chunks:
            return None
        start_s = self._clock()
        work = sum(chunk.work for chunk in chunks)
        batch = build_batch([chunk.rows for chunk in chunks], self._kv_cache.block_tables)
        self._plan.forward(batch)
        rows = [row for chunk in chunks for row in logit_rows_of(chunk)]
        drafts = [
            (chunk.sequence, chunk.sequence.num_tokens, len(chunk.draft))
            for chunk in chunks
            if chunk.draft
        ]
        for chunk in chunks:
            self._scheduler.mark_computed(chunk.sequence, chunk.num_tokens)
        return PendingStep(rows, self._enqueue_sample(rows), drafts, work, start_s)

    def _apply_grammar(self, chunk: Chunk) -> Chunk | None:
        """Sets the grammar's masks for the chunk's logit rows, and cuts its draft before the first
        token that the grammar forbids.

        Returns None if the sequence has ended, because its grammar failed or because no token is
        allowed by both the grammar and the request.
        """
        sequence = chunk.sequence
        if sequence.grammar is None or chunk.num_tokens < sequence.num_uncomputed:
            return chunk
        if sequence.state is State.ENDED:
            return None  # another choice failed the request
        try:
            masks = sequence.grammar.masks(chunk.draft)
        except Exception as error:
            self._fail(sequence.submit.request, error)
            return None
        if masks is not None:
            masks = masks[: num_usable_masks(self._plan.sampling, sequence, masks)]
        if masks is None or not len(masks):
            self._finish(sequence, "stop" if sequence.grammar.may_end() else "length")
            return None
        self._plan.sampling.set_grammar(sequence.slot, masks)
        return chunk._replace(draft=chunk.draft[: len(masks) - 1])

    def _enqueue_sample(self, rows: list[LogitRow]) -> PendingSamples | None:
        if not rows and not self._plan.is_asynchronous:
            return None
        slots = [row.sequence.slot for row in rows]
        num_prompts = [len(row.sequence.submit.prompt_ids) for row in rows]
        positions = [max(0, row.token_index - n) for row, n in zip(rows, num_prompts, strict=True)]
        targets, drafts = [row.target for row in rows], [row.draft for row in rows]
        return self._plan.enqueue_sample(
            np.array(slots, np.int32),
            np.array(positions, np.int64),
            np.array(targets, np.int32) if max(targets, default=NO_ID) > NO_ID else None,
            np.array(drafts, np.int32) if max(drafts, default=NO_ID) > NO_ID else None,
        )

    def _read(self, step: PendingStep) -> None:
        """Waits for the step, and processes what it sampled."""
        if step.samples is not None:
            self._process_samples(step.rows, step.samples.read())
        now_s = self._clock()
        # If the step ran ahead, the device began with it when it was done with the step before.
        self._costs.record(step.work, now_s - max(step.enqueued_s, self._last_read_s))
        self._last_read_s = now_s
        for sequence, num_tokens, num_drafted in step.drafts:
            num_accepted = sequence.num_tokens - num_tokens - 1
            if num_accepted >= 0:  # else it got no token: it has failed, or was aborted
                self._speculation.record(sequence, num_drafted, num_accepted)

    def _process_samples(self, rows: list[LogitRow], samples: Samples) -> None:
        now_s = self._clock()
        for i, row in enumerate(rows):
            sequence = row.sequence
            if sequence.state is not State.RUNNING:
                continue  # it was preempted or has ended, perhaps by another row of this step
            try:
                if row.target == NO_ID and row.is_valid:
                    self._append_token(row, i, samples, now_s)
                elif row.target != NO_ID:
                    self._send_prompt_logprobs(row, i, samples)
            except Exception as error:
                self._fail(sequence.submit.request, error)

    def _append_token(self, row: LogitRow, index: int, samples: Samples, now_s: float) -> None:
        sequence = row.sequence
        if not sequence.max_tokens:
            return self._finish(sequence, "length")
        tokens = tokens_of_row(sequence, sequence.choice, index, samples)
        if row.draft == NO_ID:
            self._tokens.append(tokens)
        else:
            self._scheduler.mark_computed(sequence, 1)
            last = self._tokens[-1]  # of the same sequence: its rows are adjacent
            last.ids.extend(tokens.ids)
            last.logprobs.extend(tokens.logprobs)
            last.alternatives.extend(tokens.alternatives)
            last.ranks.extend(tokens.ranks)
        reason = sequence.append(tokens.ids[0], now_s)
        self._scheduler.cache_last_block(sequence)
        if reason:
            self._finish(sequence, reason)

    def _send_prompt_logprobs(self, row: LogitRow, index: int, samples: Samples) -> None:
        sequence = row.sequence
        # After a preemption, rows that were sent before are computed again.
        if row.token_index == sequence.num_prompt_logprobs_sent + 1:
            self._tokens.append(tokens_of_row(sequence, PROMPT, index, samples))
            sequence.num_prompt_logprobs_sent += 1

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self._remove(sequence)
        self._finished.append(sequence.finished(reason))
        request = sequence.submit.request
        self._sequences[request].remove(sequence)
        if not self._sequences[request]:
            del self._sequences[request]
            self._compiling.pop(request, None)

    def _fail(self, request: int, error: Exception) -> None:
        for sequence in self._sequences.pop(request):
            self._remove(sequence)
        self._compiling.pop(request, None)
        self._failed.append(_failed(request, error))

    def _remove(self, sequence: Sequence) -> None:
        if sequence.submit.request in self._compiling:
            sequence.move_to(State.ENDED)
        else:
            self._scheduler.remove(sequence)

    def _report(self) -> Step:
        gauges = Gauges(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            used_blocks=self._kv_cache.num_used,
            total_blocks=self._kv_cache.num_total,
            num_preemptions=self._scheduler.num_preemptions,
            num_prefix_queries=self._scheduler.num_prefix_queries,
            num_prefix_hits=self._scheduler.num_prefix_hits,
            num_drafts=self._speculation.num_drafts,
            num_draft_tokens=self._speculation.num_draft_tokens,
            num_accepted_tokens=self._speculation.num_accepted_tokens,
            num_recomputed_tokens=self._scheduler.num_recomputed,
        )
        step = Step(self._admitted, self._tokens, self._finished, self._failed, gauges)
        self._admitted, self._tokens, self._finished, self._failed = [], [], [], []
        return step


def _failed(request: int, error: Exception) -> Failed:
    """The message for the client.  An internal error is logged, and the client gets no details."""
    if not isinstance(error, ApiError):
        log.error("request %d failed", request, exc_info=error)
        error = ApiError(500, "The server had an error while processing your request.")
    return Failed(request, error.status, error.message, error.param, error.code)
