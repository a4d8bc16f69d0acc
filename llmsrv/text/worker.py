"""A separate process that compiles grammars, each in a fork that may crash or time out.

Grammars come from clients, and a hostile one can make llguidance run for minutes, take gigabytes or
overflow its stack.  So each grammar is first compiled here, under limits, one at a time.  The
process keeps the vocabulary in memory and forks for every grammar.  A bad grammar only ends its
fork, and the next one does not have to wait for a restart.

The process reads a source as a frame from its standard input and answers with a frame on its
standard output.  It ends when its input ends, so it never outlives the server.
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

START_S = 15.0  # to load Python, the tokenizer and the vocabulary: 0.5 s on an idle machine
COMPILE_S = 1.0
ANSWER_S = 1.5  # COMPILE_S plus the overhead of the process
MAX_WAITING = 64
# The cache of answers: number of entries, and the largest source that is cached.
MAX_CACHED = 1024
MAX_CACHED_BYTES = 16 << 10
# The limits of a fork, in addition to COMPILE_S; memory is on top of what the vocabulary takes.
# The engine compiles on a thread with a larger stack, so it does not overflow if the fork did not.
CPU_S = 1
MEMORY_BYTES = 128 << 20
STACK_BYTES = 4 << 20

SIZE = struct.Struct(">I")
TOO_SLOW = f"the grammar is too complex: it does not compile within {COMPILE_S:g} s"
CRASHED = "the grammar is too complex: compiling it takes too much memory or too deep a recursion"
TIMEOUT_SIGNALS = signal.SIGALRM, signal.SIGXCPU


class GrammarWorker:
    """The server's side: checks grammars for one model.  Use it only on the event loop thread."""

    def __init__(self, model_path: Path, cache_dir: Path) -> None:
        self._arguments = str(model_path), str(cache_dir)
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._answers: OrderedDict[bytes, dict[str, str]] = OrderedDict()  # by the source's hash

    @property
    def pid(self) -> int | None:
        """The process id; None while no process runs."""
        return self._process.pid if self._process else None

    async def check(self, source: str) -> str:
        """Returns the source in the form for the engine.

        Raises GrammarError if it does not compile within COMPILE_S, not counting the wait for its
        turn, and ApiError 503 if too many grammars are waiting."""
        key = sha256(source.encode()).digest()
        answer = self._answers.pop(key, None) or await self._take_turn(source)
        if len(source) <= MAX_CACHED_BYTES:
            self._answers[key] = answer  # as the most recent
            if len(self._answers) > MAX_CACHED:
                self._answers.popitem(last=False)
        if "error" in answer:
            raise GrammarError(answer["error"])
        return answer["source"]

    async def close(self) -> None:
        """Ends the process; a later check starts a new one."""
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
        """Sends the source to the process and returns its answer."""
        was_running = self._process is not None
        process = await self._running_process()
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
            if not was_running:
                raise
            return await self._ask(source)  # it died while idle; try once with a new one
        except BaseException:  # the client left, and its grammar may take long
            self._kill()
            raise

    def _kill(self) -> asyncio.subprocess.Process | None:
        """Kills the process and its fork; returns the process, or None if there was none."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(OSError):  # it has just exited
                os.killpg(process.pid, signal.SIGKILL)
        return process

    async def _running_process(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        code = "from llmsrv.text.worker import main; main()"
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", code, *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C goes to the server only; we kill the group
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


# ---- The process


def main() -> None:
    model_path, cache_dir = map(Path, sys.argv[1:])
    # Output printed by a library must not mix with the frames.
    frames_in, frames_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    vocabulary = load_ll_tokenizer(model_path, cache_dir)
    _answer(frames_out, b"")
    while head := frames_in.read(SIZE.size):
        source = frames_in.read(*SIZE.unpack(head)).decode()
        if fork := os.fork():
            _, status = os.waitpid(fork, 0)
            if status:
                error = TOO_SLOW if os.WTERMSIG(status) in TIMEOUT_SIGNALS else CRASHED
                _answer(frames_out, json.dumps({"error": error}).encode())
        else:
            _answer_within_limits(source, vocabulary, frames_out)
            os._exit(0)


def _answer_within_limits(
    source: str, vocabulary: "LLTokenizer", frames_out: BinaryIO
) -> None:
    """Compiles and answers; at a limit the process ends without an answer."""
    _set_rlimit(resource.RLIMIT_CORE, 0)
    _set_rlimit(resource.RLIMIT_STACK, STACK_BYTES)
    _set_rlimit(resource.RLIMIT_AS, _address_space_bytes() + MEMORY_BYTES)
    _set_rlimit(resource.RLIMIT_CPU, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, COMPILE_S)
    answer = json.dumps(_compile(source, vocabulary)).encode()
    signal.setitimer(signal.ITIMER_REAL, 0)  # a partial answer would be worse than none
    _answer(frames_out, answer)


def _compile(source: str, vocabulary: "LLTokenizer") -> dict[str, str]:
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


def _set_rlimit(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(which, (soft, hard))
    except (OSError, ValueError):  # macOS does not support all of them
        pass


def _address_space_bytes() -> int:
    """Address space in use; 0 without /proc, where the limit has no effect anyway."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()
