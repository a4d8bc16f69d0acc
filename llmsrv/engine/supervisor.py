"""Starts, watches and ends one engine process, and exchanges messages with it.

It ends once, for one reason: the process exits, its heartbeat stops, or it sends garbage.  In the
last two cases it is killed.  What happens to its requests, and whether to start another one, is
decided by client.py.
"""

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker

from llmsrv.config import EngineConfig
from llmsrv.engine import process
from llmsrv.engine.heartbeat import Heartbeat
from llmsrv.engine.messages import FromEngine
from llmsrv.engine.messages import Ready
from llmsrv.engine.messages import Stop
from llmsrv.engine.messages import ToEngine
from llmsrv.engine.queues import QueueError
from llmsrv.engine.queues import Receiver
from llmsrv.engine.queues import Sender

log = logging.getLogger("llmsrv.engine")

CHECKS = 10  # heartbeat checks within the time that it may stand still
EXIT_S = 0.5  # from the end of its pipe to its exit
STOP_S = 2.0  # to finish the current step after Stop, and for a killed process to exit


@dataclass(frozen=True)
class Patience:
    """How long the heartbeat may stand still before the engine counts as hung."""

    ready_s: float = 10.0
    loading_s: float = 60.0


class EngineProcess:
    """Starts on construction, which raises OSError if the system has no process or pipe left.

    pid    of the process
    ended  set to the reason, as a clause, when the engine is lost or has stopped
    """

    def __init__(
        self,
        config: EngineConfig,
        generation: int,
        on_message: Callable[[FromEngine], None],
        patience: Patience,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._patience = patience
        self._is_ready = False
        self._is_gone = asyncio.Event()
        self.ended: asyncio.Future[str] = self._loop.create_future()

        context = multiprocessing.get_context("spawn")
        child_receive, self._send_pipe = context.Pipe(duplex=False)
        self._receive_pipe, child_send = context.Pipe(duplex=False)
        self._sender = Sender(self._send_pipe.fileno(), generation)
        self._receiver: Receiver[FromEngine] = Receiver(
            self._receive_pipe.fileno(), generation, FromEngine
        )
        self._heartbeat = Heartbeat()
        self._process = context.Process(
            target=process.main,
            args=(config, child_receive, child_send, generation, self._heartbeat),
            name="llmsrv-engine",
            daemon=True,
        )
        with _signals_blocked():
            self._process.start()
        # If we kept the child's ends open, neither side would notice that the other is gone.
        child_receive.close()
        child_send.close()
        self.pid = self._process.pid
        self._loop.add_reader(self._receive_pipe.fileno(), self._read)
        self._loop.add_reader(self._process.sentinel, self._exited)
        self._watch = self._loop.call_soon(self._check_heartbeat, -1, 0)

    @property
    def num_waiting_bytes(self) -> int:
        """Bytes that were sent but have not fit into the pipe yet."""
        return self._sender.num_waiting_bytes

    def send(self, message: ToEngine) -> None:
        """Never waits.  Does nothing if the engine has ended."""
        if self.ended.done():
            return
        try:
            self._sender.send(message)
        except EOFError:
            return  # _exited will follow
        if self._sender.num_waiting_bytes:
            self._loop.add_writer(self._send_pipe.fileno(), self._write)

    async def stop(self) -> None:
        """Ends the process, gracefully if it is ready, and waits until it is gone."""
        if self._is_ready:
            self.send(Stop())
            await self._gone_within(STOP_S)
        self._end("it was stopped")
        await self._gone_within(STOP_S)

    async def gone(self) -> None:
        """Returns when the process has exited and its memory is free."""
        await self._is_gone.wait()

    async def _gone_within(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._is_gone.wait(), timeout_s)
        except TimeoutError:
            pass

    def _read(self) -> None:
        try:
            self._receive()
        except EOFError:
            self._loop.remove_reader(self._receive_pipe.fileno())
            # _exited follows at once with a better reason, unless the process is slow to exit.
            self._loop.call_later(EXIT_S, self._end, "the engine closed its pipe")

    def _receive(self) -> None:
        """Raises EOFError if there will be no more messages."""
        try:
            messages = self._receiver.receive()
        except QueueError as error:
            log.error("the engine's pipe: %s", error)
            self._end("the engine sent garbage")
            return
        for message in messages:
            if isinstance(message, Ready):
                self._is_ready = True
                self._watch.cancel()
                self._check_heartbeat(-1, 0)
            self._on_message(message)

    def _write(self) -> None:
        try:
            self._sender.flush()
        except EOFError:
            self._loop.remove_writer(self._send_pipe.fileno())
            return
        if not self._sender.num_waiting_bytes:
            self._loop.remove_writer(self._send_pipe.fileno())

    def _check_heartbeat(self, last: int, num_still: int) -> None:
        """Counts checks without a heartbeat instead of seconds: if this process was stopped too, or
        had no CPU time, the engine is not to blame."""
        patience_s = self._patience.ready_s if self._is_ready else self._patience.loading_s
        beat = self._heartbeat.count.value
        num_still = num_still + 1 if beat == last else 0
        if num_still < CHECKS:
            self._watch = self._loop.call_later(
                patience_s / CHECKS, self._check_heartbeat, beat, num_still
            )
        else:
            self._end(f"the engine has hung for {patience_s:g} s")

    def _exited(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        try:
            if not self.ended.done():
                self._receive()  # its last messages still count; one call empties the pipe
        except EOFError:
            pass
        self._process.join()
        self._end(_reason_of(self._process.exitcode))
        self._is_gone.set()

    def _end(self, reason: str) -> None:
        """Kills the process and stops all communication; only _exited may follow."""
        if self.ended.done():
            return
        self.ended.set_result(reason)
        self._watch.cancel()
        self._loop.remove_reader(self._receive_pipe.fileno())
        self._loop.remove_writer(self._send_pipe.fileno())
        self._send_pipe.close()
        self._receive_pipe.close()
        self._process.kill()


def _reason_of(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"the engine exited with code {exitcode}"
    names = {known.value: known.name for known in signal.Signals}
    return f"the engine was ended by {names.get(-exitcode, f'signal {-exitcode}')}"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks the signals that an engine ignores during the `with` block.

    A process started in it inherits the blocked signals.  So a signal to the whole process group
    cannot end it before it is able to ignore that signal.
    """
    resource_tracker.ensure_running()  # starting it unblocks the signals, so do that before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, process.SERVER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
