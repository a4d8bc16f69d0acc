"""The process that compiles grammars: limits, crashes, restarts and the cache."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llmsrv.errors import ApiError
from llmsrv.text import worker
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import grammar_source
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.worker import GrammarWorker
from tests.support.engines import in_loop
from tests.support.gguf_writer import write_tiny_llama

GOOD = choice_source(["yes", "no"])
DEEP = grammar_source(
    "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"'
)
SLOW = json_schema_source(
    {
        "allOf": [
            {"anyOf": [{"type": "string", "pattern": f"a{i}"}, {"type": "integer"}]}
            for i in range(200)
        ]
    }
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("worker") / "tiny.gguf")


@asynccontextmanager
async def started(model: Path) -> AsyncIterator[GrammarWorker]:
    grammars = GrammarWorker(model, model.parent)
    assert grammars.pid is None  # until it is needed
    try:
        yield grammars
    finally:
        await grammars.close()


@in_loop
async def test_a_crash_or_a_limit_affects_only_its_own_grammar(model: Path) -> None:
    assert worker.COMPILE_S <= 1.0 and worker.ANSWER_S <= 1.5  # refused within 2 s
    async with started(model) as grammars:
        assert await grammars.check(GOOD) == GOOD
        pid = grammars.pid
        for source, why in ((DEEP, "memory or too deep"), (SLOW, "too complex")):
            with pytest.raises(GrammarError, match=why):
                await grammars.check(source)
            assert await grammars.check(choice_source([why]))
            assert grammars.pid == pid  # the process was not restarted


@in_loop
async def test_the_error_says_that_a_grammar_does_not_compile_in_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ANSWER_S", 0.01)
    async with started(model) as grammars:
        with pytest.raises(GrammarError, match="does not compile within 1 s"):
            await grammars.check(SLOW)
        assert grammars.pid is None


@in_loop
async def test_a_process_that_was_killed_is_replaced(model: Path) -> None:
    async with started(model) as grammars:
        await grammars.check(GOOD)
        assert grammars.pid is not None
        os.kill(grammars.pid, signal.SIGKILL)
        assert await grammars.check(choice_source(["other"]))


@in_loop
async def test_answers_and_errors_are_cached(model: Path) -> None:
    bad = grammar_source("start: nothing")
    async with started(model) as grammars:
        await grammars.check(GOOD)
        for _ in range(2):
            with pytest.raises(GrammarError, match="unknown name"):
                await grammars.check(bad)
            await grammars.close()  # the second time it is not needed
            assert await grammars.check(GOOD) == GOOD and grammars.pid is None


@in_loop
async def test_many_grammars_take_turns_and_too_many_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MAX_WAITING", 8)
    async with started(model) as grammars:
        sources = [choice_source([f"choice {i}"]) for i in range(12)]
        answers = await asyncio.gather(*map(grammars.check, sources), return_exceptions=True)
        assert answers[:8] == sources[:8]
        assert all(isinstance(answer, ApiError) and answer.status == 503 for answer in answers[8:])


@in_loop
async def test_a_cancelled_check_does_not_affect_the_next_one(model: Path) -> None:
    async with started(model) as grammars:
        await grammars.check(GOOD)
        task = asyncio.create_task(grammars.check(SLOW))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await grammars.check(choice_source(["other"]))
