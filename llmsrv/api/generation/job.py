"""The generation of one request: submitted to the engine, and followed until every choice ends.

Knows token ids and deltas; how an answer looks is the dialects' affair.
"""

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.output import ChoiceOutput
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.output import OutputRules
from llmsrv.api.generation.output import TokenLogprob
from llmsrv.api.generation.submit import make_submits
from llmsrv.api.generation.submit import output_rules
from llmsrv.api.generation.submit import tenant_of
from llmsrv.api.generation.tools import ToolUse
from llmsrv.asgi.request import Request
from llmsrv.engine.generation import Generation
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens
from llmsrv.errors import ApiError
from llmsrv.registry.counters import ChoiceClock
from llmsrv.registry.service import Service
from llmsrv.timing import Timer

# Where many have arrived, as from 128 choices, others on the event loop get a turn in between.
EVENTS_PER_TURN = 16
ADMISSION_S = 10.0  # after this a stream's 200 goes out although its request still waits


@dataclass(frozen=True)
class Usage:
    """What a request has cost so far, all its prompts and choices together.

    num_cached_tokens     of the prompts, found in the prefix cache
    num_reasoning_tokens  of the output
    finished              the engine's counts and times of the choices that it has ended
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int
    finished: Sequence[Finished]


class Job:
    """The choices of one request.  Choice i * n + j is the j-th choice of prompt i.

    num_choices      of all prompts together
    prompt_logprobs  per prompt: its tokens from the second on, if their log-probabilities are
                     wanted; complete before the first delta of the prompt's choices
    """

    def __init__(self, service: Service, submits: Sequence[Submit], rules: OutputRules) -> None:
        """submits: one per prompt, all with the same n."""
        self.prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in submits]
        self._service = service
        self._n = submits[0].n
        self._has_ended = [False] * len(submits)
        self._finished: list[Finished] = []
        self.num_choices = len(submits) * self._n
        self._outputs = [
            ChoiceOutput(index, service.text.tokenizer, rules) for index in range(self.num_choices)
        ]
        self._clocks = [ChoiceClock(service.counters) for _ in self._outputs]
        self._is_prompt_counted = [False] * len(submits)
        self._unfinished_reason = "abort"  # counted for choices without a finish_reason
        self._generations: list[Generation] = []
        try:
            for submit in submits:
                self._generations.append(service.engine.submit(submit))
        except ApiError:
            self.end()
            raise

    async def admitted(self, timer: Timer) -> None:
        """Returns when every prompt is admitted, or after ADMISSION_S: then a stream begins, and
        pings keep it alive until there is a token.

        If it raises, as the ApiError that came instead, the job has ended.
        """
        begun_s = timer.now()
        try:
            for generation in self._generations:
                left_s = ADMISSION_S - (timer.now() - begun_s)
                await generation.admitted(timer, left_s)
        except BaseException as error:
            if isinstance(error, ApiError):
                self._unfinished_reason = "error"
            self.end()
            raise

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every choice's deltas as they come.  Ends the job when exhausted or closed."""
        return self._follow(0) if len(self._generations) == 1 else self._merged()

    async def collect(self) -> list[Delta]:
        """Each choice as one delta, when all have ended."""
        choices = [Delta(output.index) for output in self._outputs]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.index].add(delta)
        return choices

    def end(self) -> None:
        """Aborts the choices that still run and counts the request.  May be called again."""
        for prompt in range(len(self._generations)):
            self._end_prompt(prompt)

    def usage(self) -> Usage:
        return Usage(
            num_prompt_tokens=sum(each.num_prompt_tokens for each in self._generations),
            num_output_tokens=sum(output.num_tokens for output in self._outputs),
            num_cached_tokens=sum(each.num_cached_tokens for each in self._generations),
            num_reasoning_tokens=sum(output.num_reasoning_tokens for output in self._outputs),
            finished=self._finished,
        )

    async def _follow(self, prompt: int) -> AsyncGenerator[Delta, None]:
        outputs = self._outputs[prompt * self._n : (prompt + 1) * self._n]
        num_events = 0
        try:
            async for event in self._generations[prompt]:
                num_events += 1
                if num_events == 1:
                    self._count_prompt(prompt)
                if num_events % EVENTS_PER_TURN == 0:
                    await asyncio.sleep(0)
                if delta := self._take(prompt, event):
                    yield delta
                if all(output.finish_reason for output in outputs):
                    return
        except Exception:
            self._unfinished_reason = "error"
            raise
        finally:
            self._end_prompt(prompt)

    def _take(self, prompt: int, event: Tokens | Finished) -> Delta | None:
        """What an event adds to its choice; None if no text can be released yet."""
        if event.choice == PROMPT:
            assert isinstance(event, Tokens)
            self.prompt_logprobs[prompt] += _token_logprobs(event)
            return None
        generation, index = self._generations[prompt], prompt * self._n + event.choice
        output, clock = self._outputs[index], self._clocks[index]
        if output.finish_reason:
            return None  # sent before the engine learnt of the stop string
        if isinstance(event, Finished):
            self._finished.append(event)
            self._service.counters.request_num_preemptions.observe(event.num_preemptions)
            return output.finish(event.reason)
        clock.note_tokens(len(event.ids), generation.received_s)
        delta = output.push(event)
        clock.note_output(output.num_tokens)
        if output.finish_reason:
            generation.abort(event.choice)
        return delta

    async def _merged(self) -> AsyncGenerator[Delta, None]:
        streams = [self._follow(prompt) for prompt in range(len(self._generations))]
        num_deltas = 0
        try:
            async with aclosing(_merge(streams)) as merged:
                async for delta in merged:
                    yield delta
                    num_deltas += 1
                    if num_deltas % EVENTS_PER_TURN == 0:
                        await asyncio.sleep(0)
        finally:
            self.end()

    def _count_prompt(self, prompt: int) -> None:
        """Counts the prompt's tokens, once, if it has been admitted."""
        generation = self._generations[prompt]
        if generation.is_admitted and not self._is_prompt_counted[prompt]:
            self._is_prompt_counted[prompt] = True
            self._service.counters.prompt_tokens += generation.num_prompt_tokens

    def _end_prompt(self, prompt: int) -> None:
        """Aborts the prompt's choices that still run and counts it, once."""
        if self._has_ended[prompt]:
            return
        self._has_ended[prompt] = True
        generation, counters = self._generations[prompt], self._service.counters
        generation.abort()
        choices = range(prompt * self._n, (prompt + 1) * self._n)
        for choice in choices:
            output = self._outputs[choice]
            reason = output.finish_reason or self._unfinished_reason
            self._clocks[choice].note_end(reason, output.num_tokens, generation.admitted_s)
        self._count_prompt(prompt)
        if generation.is_admitted:
            longest = max(self._outputs[choice].num_tokens for choice in choices)
            counters.note_prompt(
                generation.num_prompt_tokens, self._n, generation.max_tokens, longest
            )


def start_job(
    request: Request,
    service: Service,
    options: GenerationOptions,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    n: int,
    num_logprobs: int,
    wants_prompt_logprobs: bool = False,
    grammar: str = "",
    tools: ToolUse | None = None,
    is_thinking: bool | None = None,
) -> Job:
    """Submits a request to the engine.

    prompts                token ids
    max_tokens, grammar    as in submit.make_submits(), which says what is raised
    num_logprobs           alternatives per output token; -1: no log-probabilities
    wants_prompt_logprobs  even if options.prompt_logprobs is None
    tools, is_thinking     as in OutputRules
    """
    num_prompt_logprobs = -1 if options.prompt_logprobs is None else options.prompt_logprobs
    submits = make_submits(
        service,
        options,
        prompts,
        max_tokens,
        n=n,
        num_logprobs=max(num_logprobs, num_prompt_logprobs),
        wants_prompt_logprobs=wants_prompt_logprobs or options.prompt_logprobs is not None,
        tenant=tenant_of(request),
        grammar=grammar,
    )
    rules = output_rules(options, service.text.tokenizer, tools, is_thinking)
    return Job(service, submits, rules)


def _token_logprobs(tokens: Tokens) -> list[TokenLogprob]:
    parts = zip(tokens.ids, tokens.logprobs, tokens.alternatives, tokens.ranks, strict=True)
    return [
        TokenLogprob(id, logprob, alternatives, rank=rank)
        for id, logprob, alternatives, rank in parts
    ]


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several streams in the order they come.  The first error ends them all."""
    deltas: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def forward(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async for delta in stream:
                deltas.put_nowait(delta)
        finally:
            deltas.put_nowait(None)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        for _ in tasks:
            while (delta := await deltas.get()) is not None:
                yield delta
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
