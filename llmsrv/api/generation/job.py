"""One request's generation, whatever its route: submitted, and followed until every choice has
ended.

Knows token ids and deltas of text; the shapes of chat and completions are in their own modules.
"""

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from llmsrv.api.generation.output import ChoiceOutput
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.output import TextRules
from llmsrv.api.generation.output import TokenEntry
from llmsrv.api.operations import debug
from llmsrv.asgi.request import Request
from llmsrv.engine.client import Generation
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens
from llmsrv.errors import ApiError
from llmsrv.registry.counters import ChoiceClock
from llmsrv.registry.service import Service

ADMISSION_S = 10.0  # after this a stream's 200 goes out although its request still waits


class Job:
    """The choices of one request: choice i * n + j is the j-th choice of prompt i.

    prompt_entries  of each prompt, what was asked of its tokens' log-probabilities, from the second
                    token on; complete before the first delta of its choices
    """

    def __init__(self, service: Service, submits: Sequence[Submit], rules: TextRules) -> None:
        """submits: one a prompt, all of the same n."""
        self.num_prompt_tokens = sum(len(submit.prompt_ids) for submit in submits)
        self.prompt_entries: list[list[TokenEntry]] = [[] for _ in submits]
        self._service = service
        self._n = submits[0].n
        self._has_ended = False
        self._finished: list[Finished] = []
        self.outputs = [
            ChoiceOutput(index, service.text.tokenizer, rules)
            for index in range(len(submits) * self._n)
        ]
        self._clocks = [ChoiceClock(service.counters) for _ in self.outputs]
        self._unfinished = "abort"  # why a choice ended without a finish_reason of its own
        self._generations: list[Generation] = []
        try:
            for submit in submits:
                self._generations.append(service.engine.submit(submit))
        except ApiError:
            self.end()
            raise

    async def admitted(self) -> None:
        """Returns when every prompt is, or after ADMISSION_S; raises what came instead."""
        try:
            async with asyncio.timeout(ADMISSION_S):
                for generation in self._generations:
                    await generation.admitted()
        except ApiError:
            self._unfinished = "error"
            raise
        except TimeoutError:
            pass  # the answer begins now, and pings keep it alive until there is a token

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every choice's deltas as they come; ends the job when it is exhausted or closed."""
        streams = [self._follow(i, generation) for i, generation in enumerate(self._generations)]
        try:
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as merged:
                async for delta in merged:
                    yield delta
        except Exception:
            self._unfinished = "error"
            raise
        finally:
            self.end()

    async def whole(self) -> list[Delta]:
        """Each choice as one delta, when all have ended."""
        whole = [Delta(output.index, "") for output in self.outputs]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                whole[delta.index].add(delta)
        return whole

    def end(self) -> None:
        """Aborts what still runs and counts the request, once."""
        if self._has_ended:
            return
        self._has_ended = True
        for generation in self._generations:
            generation.abort()
        self._count()

    def usage(self) -> dict[str, Any]:
        num_output_tokens = sum(output.num_tokens for output in self.outputs)
        num_cached_tokens = sum(generation.num_cached_tokens for generation in self._generations)
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self.num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": num_cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": 0,
                "audio_tokens": 0,
                "reasoning_tokens": sum(output.num_thought_tokens for output in self.outputs),
                "rejected_prediction_tokens": 0,
            },
        }
        if self._service.config.enable_debug:
            usage["extra"] = debug.figures(self._finished, num_cached_tokens)
        return usage

    async def _follow(self, prompt: int, generation: Generation) -> AsyncGenerator[Delta, None]:
        outputs = self.outputs[prompt * self._n : (prompt + 1) * self._n]
        async for event in generation:
            if event.choice == PROMPT:
                assert isinstance(event, Tokens)
                self.prompt_entries[prompt] += _prompt_entries(event)
                continue
            output = outputs[event.choice]
            if output.finish_reason:
                continue  # what the engine sent before it learnt of the stop string
            if isinstance(event, Finished):
                self._finished.append(event)
                self._service.counters.request_num_preemptions.observe(event.num_preemptions)
                delta: Delta | None = output.finish(event.reason)
            else:
                self._clocks[output.index].note_tokens(len(event.ids), generation.received_s)
                delta = output.push(event)
                if output.finish_reason:
                    generation.abort(event.choice)
            if delta:
                yield delta
            if all(output.finish_reason for output in outputs):
                return

    def _count(self) -> None:
        counters = self._service.counters
        for i, generation in enumerate(self._generations):
            submit, choices = generation.submit, range(i * self._n, (i + 1) * self._n)
            for output, clock in ((self.outputs[c], self._clocks[c]) for c in choices):
                reason = output.finish_reason or self._unfinished
                clock.note_end(reason, output.num_tokens, generation.admitted_s)
            if generation.is_admitted:
                longest = max(self.outputs[c].num_tokens for c in choices)
                counters.note_prompt(len(submit.prompt_ids), self._n, submit.max_tokens, longest)


async def start(request: Request, job: Job) -> Job:
    """Waits until the job is admitted; a client that leaves meanwhile ends it."""
    try:
        async with request.cancel_on_disconnect():
            await job.admitted()
    except BaseException:
        job.end()
        raise
    return job


def _prompt_entries(tokens: Tokens) -> list[TokenEntry]:
    parts = zip(tokens.ids, tokens.logprobs, tokens.alternatives, strict=True)
    return [TokenEntry(id, logprob, alternatives) for id, logprob, alternatives in parts]


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several streams in the order they come; the first error ends them all."""
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
