"""A process of its own for compiling grammars, each in a fork that may crash or run out of time.

Grammars come from clients, and llguidance can be brought to run for minutes, to grow by gigabytes
or to overflow its stack.  So each is compiled here first, under limits, one after the other.  The
process keeps the vocabulary and forks for every grammar: what a bad one ends is its fork alone, and
the next one need not wait for another start.

The process reads a source as a frame from its standard input and answers with a frame on its
standard output; it ends with its input, so it never outlives the server.
"""

import asyncio
import json
import os
import resource
import signal
import struct
import sys
from collections import OrderedDict
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from typing import BinaryIO

from llmsrv.errors import ApiError
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import compile_source
from llmsrv.text.grammar import gbnf_to_lark
from llmsrv.text.grammar import load_ll_tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

START_S = 15.0  # for Python, the tokenizer and the vocabulary: 0.5 s where nothing else runs
COMPILE_S = 1.0
ANSWER_S = 1.5  # COMPILE_S, and what the process itself takes
MAX_WAITING = 64
# Answers that are kept: so many, to sources of so many bytes at most.
MAX_KEPT = 1024
MAX_KEPT_BYTES = 16 << 10
# The limits of a fork, beside COMPILE_S, beyond what the vocabulary took.  The engine compiles on a
# thread with a larger stack, so what did not overflow here does not there.
CPU_S = 1
MEMORY_BYTES = 128 << 20
STACK_BYTES = 4 << 20

SIZE = struct.Struct(">I")
TOO_SLOW = f"the grammar is too complex: it does not compile within {COMPILE_S:g} s"
CRASHED = "the grammar is too complex: compiling it takes too much memory or too deep a recursion"
TIMES_UP = signal.SIGALRM, signal.SIGXCPU


class GrammarWorker:
    """The server's end: checks grammars for one model.  For the event loop's thread alone."""

    def __init__(self, model_path: Path, cache_dir: Path) -> None:
        self._arguments = str(model_path), str(cache_dir)
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._answers: OrderedDict[bytes, dict[str, str]] = OrderedDict()  # by the source's hash

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._process.pid if self._process else None

    async def check(self, source: str) -> str:
        """The source as the engine takes it.  Raises GrammarError when it does not compile, within
        COMPILE_S of its turn; ApiError 503 when too many wait for theirs."""
        key = sha256(source.encode()).digest()
        answer = self._answers.pop(key, None) or await self._take_turn(source)
        if len(source) <= MAX_KEPT_BYTES:
            self._answers[key] = answer  # behind all others
            if len(self._answers) > MAX_KEPT:
                self._answers.popitem(last=False)
        if "error" in answer:
            raise GrammarError(answer["error"])
        return answer["source"]

    async def close(self) -> None:
        """Ends the process; a check after this starts another."""
        if (process := self._kill()) is not None:
            await process.wait()

    async def _take_turn(self, source: str) -> dict[str, str]:
        if self._num_waiting >= MAX_WAITING:
            message = "The server is overloaded: too many grammars wait to be compiled."
            retry = {"Retry-After": "1"}
            raise ApiError(503, message, code="server_is_overloaded", headers=retry)
        self._num_waiting += 1
        try:
            async with self._turn:
                return await self._ask(source)
        finally:
            self._num_waiting -= 1

    async def _ask(self, source: str) -> dict[str, str]:
        """What the process answers."""
        was_there = self._process is not None
        process = await self._started()
        try:
            async with asyncio.timeout(ANSWER_S):
                await _write(process, source.encode())
                answer: dict[str, str] = json.loads(await _read(process))
                return answer
        except TimeoutError:
            await self.close()
            raise GrammarError(TOO_SLOW) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.close()
            if not was_there:
                raise
            return await self._ask(source)  # something has ended it since it was last asked
        except BaseException:  # the client has left: what it asked for may take long
            self._kill()
            raise

    def _kill(self) -> asyncio.subprocess.Process | None:
        """Returns the process that is killed, with its fork, if there was one."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(OSError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
        return process

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        code = "from llmsrv.text.worker import main; main()"
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", code, *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the server, and the group is what is killed
        )
        try:
            async with asyncio.timeout(START_S):
                await _read(self._process)
        except BaseException:
            self._kill()
            raise
        return self._process


async def _write(process: asyncio.subprocess.Process, frame: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(SIZE.pack(len(frame)) + frame)
    await process.stdin.drain()


async def _read(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    (size,) = SIZE.unpack(await process.stdout.readexactly(SIZE.size))
    return await process.stdout.readexactly(size)


# ---- What runs in the process


def main() -> None:
    model_path, cache_dir = map(Path, sys.argv[1:])
    # What a library prints must not come between the frames.
    frames_in, frames_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    vocabulary = load_ll_tokenizer(model_path, cache_dir)
    _answer(frames_out, b"")
    while head := frames_in.read(SIZE.size):
        source = frames_in.read(*SIZE.unpack(head)).decode()
        if fork := os.fork():
            _, status = os.waitpid(fork, 0)
            if status:
                error = TOO_SLOW if os.WTERMSIG(status) in TIMES_UP else CRASHED
                _answer(frames_out, json.dumps({"error": error}).encode())
        else:
            _answer_within_limits(source, vocabulary, frames_out)
            os._exit(0)


def _answer_within_limits(
    source: str, vocabulary: "LLTokenizer", frames_out: BinaryIO
) -> None:
    """Ends the process at a limit, without an answer."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    _limit(resource.RLIMIT_AS, _memory_bytes() + MEMORY_BYTES)
    _limit(resource.RLIMIT_CPU, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, COMPILE_S)
    answer = json.dumps(_compiled(source, vocabulary)).encode()
    signal.setitimer(signal.ITIMER_REAL, 0)  # half an answer would be worse than none
    _answer(frames_out, answer)


def _compiled(source: str, vocabulary: "LLTokenizer") -> dict[str, str]:
    try:
        source = gbnf_to_lark(source)
        compile_source(source, vocabulary)
    except GrammarError as error:
        return {"error": str(error)}
    except RecursionError:
        return {"error": CRASHED}
    return {"source": source}


def _answer(frames_out: BinaryIO, frame: bytes) -> None:
    frames_out.write(SIZE.pack(len(frame)) + frame)
    frames_out.flush()


def _limit(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(which, (soft, hard))
    except (OSError, ValueError):  # macOS has some of them in name only
        pass


def _memory_bytes() -> int:
    """Address space in use, where /proc tells it; elsewhere the limit is of no effect anyway."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()
