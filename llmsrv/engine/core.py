"""The engine without its process: requests in, and one step after the other out.

A step schedules rows, runs the model over them, samples the sequences whose rows are complete, and
reports what came of it in one message.  What goes wrong for one request fails that request; what
goes wrong in the model's own computation is raised, and ends the engine.
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
from typing import NamedTuple

import numpy as np

from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.sampling.samples import Samples
from llmsrv.engine.batch import build_batch
from llmsrv.engine.draft_model import DraftModel
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.kv_cache import BlockHashes
from llmsrv.engine.kv_cache import KVCache
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Admitted
from llmsrv.engine.messages import Failed
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens
from llmsrv.engine.sampling import check_ids
from llmsrv.engine.sampling import check_min_tokens
from llmsrv.engine.sampling import check_sampling
from llmsrv.engine.sampling import num_usable_masks
from llmsrv.engine.sampling import write_sampling
from llmsrv.engine.scheduler import Chunk
from llmsrv.engine.scheduler import Scheduler
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.sequence import State
from llmsrv.engine.speculation import Speculation
from llmsrv.engine.step_costs import StepCosts
from llmsrv.errors import ApiError

log = logging.getLogger("llmsrv.engine")

NONE = -1  # in place of an id
GRAMMAR_WAIT_S = 0.005  # where there is nothing to do but to wait for a grammar
TIMED_OUT = "The request was not finished within the time that this server gives to one."


class LogitRow(NamedTuple):
    """A row whose logits are wanted.

    at      index in its sequence of the token that it tells of, or draws
    target  the prompt's token there, else NONE
    draft   the drafted token that the row stands on, else NONE
    """

    sequence: Sequence
    at: int
    target: int
    draft: int


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
    ) -> None:
        """limits are those that the plan was compiled for; its cache must hold one sequence of
        context_length.  long_from is the program's.  compile_grammar returns at once; None: no
        request has one.  uses_prompt_lookup and draft_length are as Speculation has them,
        draft_plan is the draft model's, compiled for the same limits."""
        self._clock = clock
        self._plan = plan
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
            limits.max_logit_rows - limits.max_slots,
        )
        self._sequences: dict[int, list[Sequence]] = {}  # by request, what has not ended
        self._compiling: dict[int, Future[Grammar]] = {}  # of those that are not queued yet
        self._deadlines: list[tuple[float, int]] = []  # a heap, with requests that have ended

        # Since the last report
        self._admitted: list[Admitted] = []
        self._tokens: list[Tokens] = []
        self._finished: list[Finished] = []
        self._failed: list[Failed] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or report anything."""
        return bool(self._sequences or self._finished or self._failed)

    def submit(self, submit: Submit) -> None:
        """Queues a request, or fails it."""
        assert submit.request not in self._sequences, f"request {submit.request} came twice"
        now_s = self._clock()
        try:
            self._check(submit)
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
        """Ends the choices at once; the next step reports it."""
        for sequence in list(self._sequences.get(abort.request, ())):
            if abort.choice in (None, sequence.choice):
                self._finish(sequence, "abort")

    def step(self) -> Step:
        """Computes one step and returns what it brought, with what ended since the last one."""
        start_s = self._clock()
        self._expire(start_s)
        self._queue_compiled()
        if chunks := self._scheduler.schedule():
            for source, target in self._scheduler.copies:
                self._plan.copy_block(source, target)
            self._prepare_admitted(self._scheduler.admitted, start_s)
            self._compute(chunks)
        elif self._compiling:
            wait(self._compiling.values(), GRAMMAR_WAIT_S, FIRST_COMPLETED)
        return self._report()

    def _queue_compiled(self) -> None:
        """Queues the requests whose grammars have been compiled by now."""
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

    def _expire(self, now_s: float) -> None:
        """Fails the requests whose deadline has come."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = heappop(self._deadlines)[1]
            if request in self._sequences:
                self._fail(request, ApiError(504, TIMED_OUT, code="request_timeout"))

    def _check(self, submit: Submit) -> None:
        """Raises ApiError when the request can never be computed."""
        num_prompt = len(submit.prompt_ids)
        if num_prompt >= self._context_length:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._context_length} tokens. However, "
                f"the prompt has {num_prompt} tokens, and one is needed for the completion.",
                code="context_length_exceeded",
            )
        if num_prompt == 0:
            raise ApiError(400, "the prompt is empty; expected at least 1 token")
        if not 0 <= min(submit.prompt_ids) <= max(submit.prompt_ids) < self._vocab_size:
            raise ApiError(400, f"a token id of the prompt is not in [0, {self._vocab_size})")
        if submit.max_tokens < 1 or submit.n < 1:
            raise ApiError(400, "max_tokens and n must be at least 1")
        check_ids("stop_token_ids", submit.end_ids, self._vocab_size)
        check_sampling(submit.sampling, self._vocab_size)
        check_min_tokens(submit)

    def _prepare_admitted(self, admitted: list[Sequence], now_s: float) -> None:
        """Prepares the sequences that have just been admitted, for the first time or again."""
        for sequence in admitted:
            if sequence.state is State.ENDED:
                continue  # with another choice of its request
            try:
                write_sampling(self._plan.sampling, sequence)
                self._speculation.start(sequence)
            except Exception as error:
                self._fail(sequence.submit.request, error)
                continue
            if not sequence.scheduled_s:
                sequence.scheduled_s = now_s
                self._admitted.append(Admitted(sequence.submit.request, sequence.num_cached))

    def _compute(self, chunks: list[Chunk]) -> None:
        chunks = [masked for chunk in chunks if (masked := self._apply_grammar(chunk))]
        chunks = [chunk for chunk in chunks if chunk.sequence.state is not State.ENDED]
        if not chunks:
            return
        start_s = self._clock()
        work = sum(chunk.work for chunk in chunks)
        batch = build_batch([chunk.rows for chunk in chunks], self._kv_cache.block_tables)
        self._plan.forward(batch)
        rows = [row for chunk in chunks for row in _logit_rows(chunk)]
        before = [chunk.sequence.num_tokens for chunk in chunks]
        for chunk in chunks:
            self._scheduler.mark_computed(chunk.sequence, chunk.num_tokens)
        if rows:
            self._process_samples(rows, self._sample(rows))
        self._costs.record(work, self._clock() - start_s)
        for chunk, num_tokens in zip(chunks, before, strict=True):
            num_accepted = chunk.sequence.num_tokens - num_tokens - 1
            if chunk.draft and num_accepted >= 0:  # else the row before the draft has failed
                self._speculation.record(chunk.sequence, len(chunk.draft), num_accepted)

    def _apply_grammar(self, chunk: Chunk) -> Chunk | None:
        """Lets the chunk's rows draw what its grammar allows there, and cuts its draft at the first
        token that it does not; None where the sequence has ended, because its grammar fails or
        allows nothing that the request does."""
        sequence = chunk.sequence
        if sequence.grammar is None or chunk.num_tokens < sequence.num_uncomputed:
            return chunk
        if sequence.state is State.ENDED:
            return None  # with another choice of its request
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

    def _sample(self, rows: list[LogitRow]) -> Samples:
        slots = [row.sequence.slot for row in rows]
        positions = [max(0, row.at - len(row.sequence.submit.prompt_ids)) for row in rows]
        targets, drafts = [row.target for row in rows], [row.draft for row in rows]
        return self._plan.sample(
            np.array(slots, np.int32),
            np.array(positions, np.int64),
            np.array(targets, np.int32) if max(targets) > NONE else None,
            np.array(drafts, np.int32) if max(drafts) > NONE else None,
        )

    def _process_samples(self, rows: list[LogitRow], samples: Samples) -> None:
        now_s = self._clock()
        for i, row in enumerate(rows):
            sequence = row.sequence
            if sequence.state is State.ENDED:
                continue  # by a token, or by another row of the request in this very step
            try:
                if row.target != NONE and row.at == sequence.num_prompt_logprobs_sent + 1:
                    self._send_prompt_logprobs(sequence, i, samples)
                elif row.target == NONE and _is_draft_accepted(row):
                    self._append_token(row, i, samples, now_s)
            except Exception as error:
                self._fail(sequence.submit.request, error)

    def _append_token(self, row: LogitRow, index: int, samples: Samples, now_s: float) -> None:
        sequence = row.sequence
        tokens = _tokens(sequence, sequence.choice, index, samples)
        if row.draft == NONE:
            self._tokens.append(tokens)
        else:
            self._scheduler.mark_computed(sequence, 1)
            last = self._tokens[-1]  # of the same sequence, whose rows lie together
            last.ids.extend(tokens.ids)
            last.logprobs.extend(tokens.logprobs)
            last.alternatives.extend(tokens.alternatives)
        if reason := sequence.append(tokens.ids[0], now_s):
            self._finish(sequence, reason)

    def _send_prompt_logprobs(self, sequence: Sequence, row: int, samples: Samples) -> None:
        self._tokens.append(_tokens(sequence, PROMPT, row, samples))
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
        )
        step = Step(self._admitted, self._tokens, self._finished, self._failed, gauges)
        self._admitted, self._tokens, self._finished, self._failed = [], [], [], []
        return step


def _logit_rows(chunk: Chunk) -> list[LogitRow]:
    """The chunk's rows whose logits are wanted: the last ones."""
    sequence, prompt_ids = chunk.sequence, chunk.sequence.submit.prompt_ids
    rows = []
    for i in range(chunk.num_rows - chunk.num_logit_rows, chunk.num_rows):
        at = sequence.num_computed + i + 1
        target = prompt_ids[at] if at < len(prompt_ids) else NONE
        draft = chunk.draft[i - chunk.num_tokens] if i >= chunk.num_tokens else NONE
        rows.append(LogitRow(sequence, at, target, draft))
    return rows


def _is_draft_accepted(row: LogitRow) -> bool:
    """Whether every token before the row's is what the row was computed with."""
    if row.at != row.sequence.num_tokens:
        return False  # a draft before it was not kept
    return row.draft == NONE or row.draft == row.sequence.output_ids[-1]


def _tokens(sequence: Sequence, choice: int, row: int, samples: Samples) -> Tokens:
    """What one row has brought; ApiError where it could not be sampled."""
    id = int(samples.ids[row])
    if id < 0:
        raise ApiError(500, "The model's output is not a number; nothing can be sampled.")
    logprobs: list[float] = []
    alternatives: list[list[tuple[int, float]]] = []
    if sequence.submit.sampling.num_logprobs >= 0:
        ids, values = samples.alternatives[row]
        logprobs = [float(samples.logprobs[row])]
        alternatives = [list(zip(ids.tolist(), values.tolist(), strict=True))]
    return Tokens(sequence.submit.request, choice, [id], logprobs, alternatives)


def _failed(request: int, error: Exception) -> Failed:
    """What the client is told; an error that is ours is logged, and told in general words."""
    if not isinstance(error, ApiError):
        log.error("request %d failed", request, exc_info=error)
        error = ApiError(500, "The server had an error while processing your request.")
    return Failed(request, error.status, error.message, error.param, error.code)
