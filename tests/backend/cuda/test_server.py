"""Servers whose engine processes run the CUDA backend on the emulation: tiny models of every
architecture and four layers of SmolLM2 over HTTP, with graphs, and work that runs as late as it
may."""

import contextlib
import dataclasses
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.program import Program
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.reference_sampler import log_softmax
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.engine.scheduler import NUM_RECENT_OUTPUTS
from llmsrv.model.load import load_model
from tests.support.cuda import environment
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation
from tests.support.cut_model import write_cut_model
from tests.support.plans import Piece
from tests.support.plans import batch_of
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import gauges
from tests.support.server import is_idle
from tests.support.server import run_server

pytestmark = [needs_emulation, pytest.mark.slow]

GOLDEN = Path(__file__).parents[2] / "data/golden/tiny"
TINY = [path.name for path in sorted(GOLDEN.iterdir())]
OPTIONS = ("--backend", "cuda", "--dtype", "float16")
NO_DRAFTS = ("--speculative-mode", "disable")
LOAD_S = 300.0  # with 16 engines on two cores, and with kernels to compile
LIMITS = Limits(max_rows=256, max_logit_rows=256, max_slots=1, num_blocks=40)
MAX_ERROR, MAX_GAP = 0.02, 0.05
SEEDED = {"temperature": 0.8, "seed": 11}


@dataclasses.dataclass
class Oracle:
    """A model in float32 on the reference backend."""

    program: Program
    plan: Plan

    def logits(self, ids: list[int], num_last: int) -> Any:
        """Of the last rows, each of which predicts the id after it."""
        long_from = self.program.long_from
        is_long = long_from is not None and len(ids) + 1 > long_from
        piece = Piece(ids, 0, list(range(1, 2 + len(ids) // BLOCK_SIZE)), is_long=is_long)
        rows = np.arange(len(ids) - num_last, len(ids), dtype=np.int32)
        self.plan.forward(dataclasses.replace(batch_of([piece]), logit_rows=rows))
        return self.plan.read("logits")

    def sampled(self, num_rows: int) -> list[int]:
        """What the rows of the last logits sample with SEEDED."""
        self.plan.sampling.set(0, SamplingParameters(**SEEDED))
        slots = np.zeros(num_rows, np.int32)
        return self.plan.sample(slots, np.arange(num_rows)).ids.tolist()


@contextlib.contextmanager
def running(*options: str) -> Iterator[RunningServer]:
    install_stand_in()
    emulation = environment(is_lazy=True, memory_mib=1 << 17)
    with run_server(*OPTIONS, *options, environment=emulation, wait=False) as server:
        server.wait_ready(LOAD_S)
        yield server


@pytest.fixture(scope="module")
def tiny_models() -> Iterator[RunningServer]:
    models = [option for name in TINY for option in ("--model", f"{name}={GOLDEN / name}")]
    sizes = "--max-num-sequence", "2", "--prefill-chunk-size", "48"
    with running(*models, *sizes, *NO_DRAFTS) as server:
        yield server


def complete(server: RunningServer, model: str, prompt: list[int], **fields: Any) -> Any:
    """The first choice of a completion."""
    body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({"return_token_ids": True, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return answer["choices"][0] | {"usage": answer["usage"]}


@pytest.mark.parametrize("name", TINY)
def test_answers_of_every_architecture_agree_with_float32(
    tiny_models: RunningServer, name: str
) -> None:
    prompt = [(7 * i) % 200 + 3 for i in range(40)]
    check_answers(tiny_models, name, GOLDEN / name, prompt, 12)


def test_answers_of_four_layers_of_smollm2_agree_with_float32(
    smollm2: Path, tmp_path: Path
) -> None:
    path = write_cut_model(smollm2, tmp_path / "cut.gguf", 4)
    sizes = "--max-num-sequence", "1", "--prefill-chunk-size", "16"
    with running("--model", f"cut={path}", *sizes, *NO_DRAFTS) as server:
        check_answers(server, "cut", path, list(range(500, 520)), 4)


def check_answers(
    server: RunningServer, name: str, path: Path, prompt: list[int], max_tokens: int
) -> None:
    """Greedy and sampled."""
    program = load_model(path, lambda: None).program
    oracle = Oracle(program, ReferenceBackend().compile(program, LIMITS, lambda: None))
    greedy = complete(server, name, prompt, max_tokens=max_tokens, logprobs=1)
    ids, logprobs = greedy["token_ids"], greedy["logprobs"]["token_logprobs"]
    assert len(ids) == max_tokens
    errors = []
    rows = oracle.logits([*prompt, *ids[:-1]], len(ids))
    for row, id, logprob in zip(rows, ids, logprobs, strict=True):
        second, best = np.sort(row)[-2:]
        assert row.argmax() == id or best - second <= MAX_GAP
        errors.append(abs(logprob - float(log_softmax(row, np.array([id]))[0])))
    assert np.mean(errors) <= MAX_ERROR

    ids = complete(server, name, prompt, max_tokens=max_tokens, **SEEDED)["token_ids"]
    oracle.logits([*prompt, *ids[:-1]], len(ids))
    # An id differs if the random number lies next to the bound between two ids.  With a wrong seed
    # or position, nearly all would.
    assert np.not_equal(oracle.sampled(len(ids)), ids).sum() <= 3


# ---- Requests that meet


@pytest.fixture(scope="module")
def crowded() -> Iterator[RunningServer]:
    """Four sequences at once, and a KV cache for two long ones."""
    sizes = "--max-num-sequence", "4", "--prefill-chunk-size", "96", "--max-total-seq-length", "256"
    with running("--model", f"m={GOLDEN / 'llama'}", *sizes, "--batch-invariant") as server:
        yield server


REQUESTS: list[dict[str, Any]] = [
    {"prompt": [(5 * i) % 190 + 3 for i in range(50)], "max_tokens": 60},
    {"prompt": [9, 8, 7] * 15, "max_tokens": 60},  # prompt lookup drafts
    {"prompt": [(5 * i) % 190 + 3 for i in range(45)], "max_tokens": 40, **SEEDED},
    {"prompt": [4, 5, 6], "max_tokens": 30, "structured_outputs": {"regex": "[a-f]{9}"}},
    {"prompt": [30, 40, 50], "max_tokens": 60, "repetition_penalty": 1.3, **SEEDED},
    {"prompt": [11, 12], "max_tokens": 60, "presence_penalty": 0.5},
]


def test_answers_are_the_same_alone_and_in_a_crowd(crowded: RunningServer) -> None:
    """With preemption, drafts, a grammar, penalties and shared prefixes."""
    alone = [complete(crowded, "m", **fields)["token_ids"] for fields in REQUESTS]
    # Many short answers let the engine admit more than fits if all become long.
    complete(crowded, "m", [3], max_tokens=1, n=NUM_RECENT_OUTPUTS)
    together: list[Any] = [None] * len(REQUESTS)

    def ask(index: int) -> None:
        together[index] = complete(crowded, "m", cache_salt=str(index), **REQUESTS[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [choice["token_ids"] for choice in together] == alone
    values = gauges(crowded)
    assert values["vllm:num_preemptions_total"] > 0
    assert values["vllm:spec_decode_num_accepted_tokens_total"] > 0
    eventually(lambda: is_idle(crowded))


@pytest.mark.parametrize("num_shared", [16, 33, 39])
def test_a_shared_prefix_is_reused_to_the_token(crowded: RunningServer, num_shared: int) -> None:
    first = [(3 * i + num_shared) % 190 + 3 for i in range(40)]
    complete(crowded, "m", first, max_tokens=1)
    second = [*first[:num_shared], 250, 251, 252]
    choice = complete(crowded, "m", second, max_tokens=8)
    assert choice["usage"]["prompt_tokens_details"]["cached_tokens"] == num_shared
    fresh = complete(crowded, "m", second, max_tokens=8, cache_salt="another")
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert choice["token_ids"] == fresh["token_ids"]


def test_an_aborted_answer_frees_its_blocks_and_leaves_the_others(crowded: RunningServer) -> None:
    fields = {"prompt": [21, 22, 23], "max_tokens": 30}
    expected = complete(crowded, "m", **fields)["token_ids"]
    body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 200, "stream": True}
    request = urllib.request.Request(
        f"{crowded.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        response.readline()  # the first token is there; the connection closes here
        received = complete(crowded, "m", **fields)["token_ids"]
    assert received == expected
    eventually(lambda: is_idle(crowded))
