"""The engine process: supervisor.py starts it, messages through a pipe drive it, and it ends with
its parent.

The top of this module imports only the standard library and what both processes share.  The server
process imports this module to start main() and must never load numpy.  main() imports the rest,
after it has set up the environment.
"""

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from llmsrv import log
from llmsrv.config import EngineConfig
from llmsrv.engine.heartbeat import Heartbeat
from llmsrv.engine.messages import Ready
from llmsrv.engine.messages import Refused
from llmsrv.engine.messages import Stop
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import ToEngine
from llmsrv.errors import StartupError

if TYPE_CHECKING:
    from llmsrv.backend.base import Backend
    from llmsrv.backend.base import Limits
    from llmsrv.backend.base import Plan
    from llmsrv.backend.program import Program
    from llmsrv.engine.core import EngineCore
    from llmsrv.engine.queues import Receiver
    from llmsrv.engine.sizes import Sizes

logger = logging.getLogger("llmsrv.engine")

SERVER_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
# A step computes many small products.  OpenBLAS's threads slow those down, and they spin on cores
# that the server needs.
OPENBLAS_NUM_THREADS = "1"
IDLE_TURN_S = 0.5  # how often an idle engine raises its heartbeat
# The engine pauses while the server has this much left to read.  A step of 128 streams sends 2 KB,
# or 40 KB with 20 alternatives for each token.
MAX_UNREAD_BYTES = 8 << 20
# Added to the kernel's score, out of 1000: short of memory, the kernel kills the engine first.  The
# server then reports errors to its clients and starts a new one.
OOM_SCORE_ADJ = "500"
# Prompt tokens per step whose log-probabilities are computed; logits of 4 MB for a vocabulary of
# 32,000 tokens.
SPARE_LOGIT_ROWS = 32
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The number of the system call sched_setattr, by machine, and the fields of its struct: size,
# policy, flags, nice, priority, runtime, deadline, period.  Since Linux 6.12, runtime is the time
# slice of a thread that is not real-time.
SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
SCHED_ATTR = struct.Struct("IIQiIQQQ")
LONGEST_SLICE_NS = 100_000_000  # the longest that Linux accepts


def main(
    config: EngineConfig,
    receive: Connection,
    send: Connection,
    generation: int,
    heartbeat: Heartbeat,
) -> None:
    """Loads the model, sends Ready or Refused, and runs steps until Stop or the end of the parent.

    receive, send  this process's ends of the two pipes (queues.py)
    heartbeat      grows as long as the engine makes progress: with each weight loaded, each
                   operation of a plan, each turn of the loop
    """
    # Ctrl-C, a service manager or a closed terminal may signal the whole process group.  The server
    # handles that and sends Stop.
    for number in SERVER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    _offer_to_oom_killer()
    _let_others_preempt()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", OPENBLAS_NUM_THREADS)
    log.guard_output()
    log.set_up(config.log_level)
    try:
        _run(config, receive.fileno(), send.fileno(), generation, heartbeat.count)
    except EOFError:
        pass  # the server is gone
    except Exception:
        logger.critical("the engine failed", exc_info=True)
        sys.exit(1)


def _run(
    config: EngineConfig,
    receive_fd: int,
    send_fd: int,
    generation: int,
    heartbeat: ctypes.c_ulonglong,
) -> None:
    from llmsrv.engine import queues

    tick = _Tick(heartbeat)
    sender = queues.Sender(send_fd, generation)
    receiver: Receiver[ToEngine] = queues.Receiver(receive_fd, generation, ToEngine)
    try:
        core, ready = _load(config, tick)
    except Exception as error:
        sender.send(Refused(_refusal(error)))  # the pipe is empty: it fits
        return
    gc.freeze()  # collecting everything that was loaded would delay a step by 8 ms
    sender.send(ready)
    wait = _Waiter(receive_fd, send_fd)
    while _take(receiver, core):
        sender.flush()
        if core.has_work and sender.num_waiting_bytes < MAX_UNREAD_BYTES:
            sender.send(core.step())
        else:
            wait(IDLE_TURN_S, for_writing=sender.num_waiting_bytes > 0)
        tick()


class _Tick:
    """Raises the heartbeat; compiled code does so through its address."""

    def __init__(self, heartbeat: ctypes.c_ulonglong) -> None:
        self._heartbeat = heartbeat
        self.address = ctypes.addressof(heartbeat)

    def __call__(self) -> None:
        self._heartbeat.value += 1


def _load(config: EngineConfig, tick: Callable[[], None]) -> "tuple[EngineCore, Ready]":
    """Loads the model and its draft model, and makes an engine that is ready to run steps."""
    start_s = time.monotonic()
    from llmsrv.backend.base import BLOCK_SIZE
    from llmsrv.backend.choose import run_on_backend
    from llmsrv.engine.core import EngineCore
    from llmsrv.engine.grammar import GrammarCompiler
    from llmsrv.model.load import load_model
    from llmsrv.text.grammar import load_ll_tokenizer

    model = load_model(Path(config.model_path), tick)
    program = model.program
    programs = [program]
    if config.draft_model_path:
        programs.append(load_model(Path(config.draft_model_path), tick).program)
        _check_draft(config, *programs)
    backend, reason, (sizes, limits, plans) = run_on_backend(
        config.backend,
        config.backend_options,
        Path(config.cache_dir),
        lambda backend: _lay_out(config, model.config.context_length, programs, backend, tick),
    )
    ready = Ready(
        architecture=model.config.architecture,
        backend=backend.name,
        backend_reason=reason,
        vocab_size=program.vocab_size,
        context_length=sizes.context_length,
        max_num_sequence=sizes.max_num_sequence,
        num_blocks=sizes.num_blocks,
        block_size=BLOCK_SIZE,
        load_s=time.monotonic() - start_s,
    )
    vocabulary = Path(config.model_path), Path(config.cache_dir), program.vocab_size
    grammars = GrammarCompiler(lambda: load_ll_tokenizer(*vocabulary), program.vocab_size)
    core = EngineCore(
        plans[0],
        limits,
        sizes.context_length,
        program.vocab_size,
        program.long_from,
        compile_grammar=grammars.compile,
        uses_prompt_lookup=config.speculative_mode == "ngram",
        draft_plan=plans[1] if len(plans) > 1 else None,
        draft_length=config.spec_draft_length,
        max_step_s=config.max_step_ms / 1000,
    )
    return core, ready


def _lay_out(
    config: EngineConfig,
    trained_context: int,
    programs: "list[Program]",
    backend: "Backend",
    tick: Callable[[], None],
) -> "tuple[Sizes, Limits, list[Plan]]":
    """Sizes that fit the backend's memory, and a plan of these sizes for each program."""
    from llmsrv.backend.base import Limits
    from llmsrv.engine.sizes import choose_sizes
    from llmsrv.engine.sizes import memory_budget

    sizes = choose_sizes(config, trained_context, memory_budget(programs, backend))
    logger.info("%s", sizes.reason)
    prefill_chunk_size = config.prefill_chunk_size or backend.prefill_chunk_size
    limits = Limits(
        max_rows=max(prefill_chunk_size, sizes.max_num_sequence),
        max_logit_rows=sizes.max_num_sequence + SPARE_LOGIT_ROWS,
        max_slots=sizes.max_num_sequence,
        num_blocks=sizes.num_blocks + 1,
    )
    return sizes, limits, [backend.compile(each, limits, tick) for each in programs]


def _check_draft(config: EngineConfig, program: "Program", draft: "Program") -> None:
    if draft.vocab_size != program.vocab_size:
        raise StartupError(
            f"the draft model {config.draft_model_path} has {draft.vocab_size} tokens and "
            f"{config.model_path} {program.vocab_size}; speculation needs the same vocabulary"
        )


def _refusal(error: Exception) -> str:
    """The message for the person who started the server."""
    if isinstance(error, StartupError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "llmsrv":
            install = f"{sys.executable} -m pip install ."
            return f"the Python package {package} is not installed; run: {install}"
    logger.critical("the model cannot be loaded", exc_info=error)
    return f"the model cannot be loaded: {error!r}"


def _take(receiver: "Receiver[ToEngine]", core: "EngineCore") -> bool:
    """Passes received messages on to the core; False after Stop."""
    for message in receiver.receive():
        if isinstance(message, Submit):
            core.submit(message)
        elif isinstance(message, Stop):
            return False
        else:
            core.abort(message)
    return True


class _Waiter:
    """Sleeps until there is something to read, or room to write if that is wanted."""

    def __init__(self, receive_fd: int, send_fd: int) -> None:
        self._send_fd = send_fd
        self._poll = select.poll()
        self._poll.register(receive_fd, select.POLLIN)

    def __call__(self, timeout_s: float, for_writing: bool) -> None:
        if for_writing:
            self._poll.register(self._send_fd, select.POLLOUT)
        self._poll.poll(timeout_s * 1000)
        if for_writing:
            self._poll.unregister(self._send_fd)


def _die_with_parent() -> None:
    """On Linux, the kernel kills this process when the server ends.  Elsewhere the end of the pipe
    ends it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # the server ended before prctl took effect


def _offer_to_oom_killer() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(OOM_SCORE_ADJ)
    except OSError:
        pass  # not Linux, or forbidden in this container


def _let_others_preempt() -> None:
    """Asks Linux for a long time slice, for this thread and all threads that it starts.

    A thread that wakes with a shorter slice preempts at once.  So the server can send tokens
    immediately, instead of waiting until a computing thread has used up its slice.  Each thread's
    share of the CPU time stays the same.
    """
    number = SYS_SCHED_SETATTR.get(os.uname().machine) if sys.platform == "linux" else None
    if number is None:
        return
    with contextlib.suppress(OSError):  # a sandbox may refuse it; the engine works without
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            size, policy = SCHED_ATTR.size, os.SCHED_OTHER
            asked = SCHED_ATTR.pack(size, policy, 0, nice, 0, LONGEST_SLICE_NS, 0, 0)
            ctypes.CDLL(None).syscall(number, 0, asked, 0)
