"""What the answers of chat and completions share: the fields around their choices, usage, and the
order of a stream's events.

Source: OpenAI API reference, "Chat Completions" and "Completions".
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from collections.abc import Callable
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

import orjson

from llmsrv.api.generation.job import Job
from llmsrv.api.generation.output import Delta
from llmsrv.api.openai.schema import GenerationRequest
from llmsrv.api.openai.usage import usage_object
from llmsrv.errors import ApiError
from llmsrv.registry.service import Service


class Reply:
    """The objects of one answer, around the choices that its route makes."""

    def __init__(
        self, service: Service, body: GenerationRequest, job: Job, kind: str, prefix: str
    ) -> None:
        """kind: the value of `object`; prefix: of the id."""
        self._job = job
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{body.request_id or secrets.token_hex(16)}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint,
        }
        if body.service_tier:
            self._head["service_tier"] = "default"
        options = body.stream_options
        is_forced = service.config.enable_force_include_usage
        self._streams_usage = is_forced or bool(options and options.include_usage)
        self._has_usage_in_chunks = bool(options and options.continuous_usage_stats)
        self._has_usage_extra = service.config.enable_debug

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"choices": choices, "usage": self._usage()}

    def chunk(self, choice: dict[str, Any], **further: Any) -> bytes:
        """One piece of one choice.  Its `usage`, if the stream has it, is null or that so far."""
        chunk = {**self._head, "choices": [choice], **further}
        if self._streams_usage:
            chunk["usage"] = self._usage() if self._has_usage_in_chunks else None
        return orjson.dumps(chunk)

    async def events(
        self,
        chunks_of: Callable[[Delta], Iterable[bytes]],
        opening: Iterable[bytes] = (),
        is_slow: Callable[[Delta], bool] = lambda delta: False,
    ) -> AsyncGenerator[bytes, None]:
        """The payloads of a stream: the opening, the chunks of each delta, usage, [DONE].

        is_slow: whether the chunks of this delta are made in a thread.

        Usage also comes before the ApiError that ends the stream early.
        """
        failure = None
        for chunk in opening:
            yield chunk
            del chunk  # orjson takes 4 KB for each, and thousands of streams may wait here
        try:
            async with aclosing(self._job.deltas()) as deltas:
                async for delta in deltas:
                    if is_slow(delta):
                        chunks = await asyncio.to_thread(chunks_of, delta)
                    else:
                        chunks = chunks_of(delta)
                    for chunk in chunks:
                        yield chunk
        except ApiError as error:
            failure = error
        if self._streams_usage:
            yield orjson.dumps(self.whole([]))
        if failure:
            raise failure
        yield b"[DONE]"

    def _usage(self) -> dict[str, Any]:
        return usage_object(self._job.usage(), self._has_usage_extra)
