"""Sampling in an engine on the CUDA backend, token for token as on the reference.

The logits of a row are a row of a table, chosen by the row's token, so that both backends have the
same logits to the bit, and every difference is one of sampling: of drafts, of grammars, of counts
after a preemption or of what was set when a step was enqueued.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from llmsrv.backend.base import Backend
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Program
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.config import default_cache_dir
from llmsrv.engine.core import EngineCore
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.grammar import GrammarCompiler
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Submit
from llmsrv.engine.scheduler import NUM_RECENT_OUTPUTS
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import load_ll_tokenizer
from llmsrv.text.grammar import regex_source
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.gguf_writer import write_tiny_llama

pytestmark = [needs_emulation, pytest.mark.slow]

VOCAB_SIZE = 320
CONTEXT_LENGTH = 128
FIRST_LETTER = 3 + ord("a")

PENALIZED = Sampling(
    seed=1, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, num_logprobs=2
)
FILTERED = Sampling(seed=2, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, num_logprobs=0)
BIASED = Sampling(
    seed=3,
    typical_p=0.8,
    frequency_penalty=1.0,
    logit_bias={id: 3.0 for id in range(FIRST_LETTER, FIRST_LETTER + 9)},
    allowed_ids=[2, *range(FIRST_LETTER - 20, FIRST_LETTER + 20)],
)
GREEDY = Sampling(seed=4, temperature=0.0, num_logprobs=4)


def request(number: int, sampling: Sampling, length: int = 9, **fields: object) -> Submit:
    prompt = [(number * 31 + 7 * i) % 250 + 3 for i in range(length)]
    values = {"max_tokens": 30, "end_ids": [], "sampling": sampling, **fields}
    return Submit(number, prompt, **values)  # type: ignore[arg-type]


PLAIN = [
    request(1, GREEDY),
    request(2, PENALIZED, n=2),
    request(3, FILTERED, end_ids=[*range(0, 320, 9)], min_tokens=8),
    request(4, BIASED, 20),
    request(5, GREEDY, prompt_logprobs=True, max_tokens=3),
]
WITH_GRAMMARS = [
    request(1, PENALIZED),
    request(2, GREEDY, grammar=choice_source(["yes, of course", "yes, often", "no"])),
    request(3, FILTERED),
    request(4, PENALIZED, grammar=regex_source(r"[a-h]{3,9}(, [a-d]{4}){2}"), n=2),
    request(5, BIASED, grammar=regex_source("[a-z]{9,30}"), min_tokens=6, end_ids=[2]),
]


def chain() -> Program:
    """The values have at most 11 significant bits, so that float16 holds them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float16)
    values = logits.astype(np.float32)
    table = Tensor("table", "F32", values.shape, values.reshape(-1).view(np.uint8))
    operations = Embed("hidden", table), SelectLogitRows("logits", "hidden")
    buffers = {"hidden": VOCAB_SIZE, "logits": VOCAB_SIZE}
    return Program(operations, buffers, 1, 1, 1, 16, VOCAB_SIZE)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    folder = tmp_path_factory.mktemp("chain")
    path: Path = write_tiny_llama(folder / "tiny.gguf", vocab_size=VOCAB_SIZE)
    return GrammarCompiler(lambda: load_ll_tokenizer(path, folder, VOCAB_SIZE), VOCAB_SIZE)


@pytest.fixture(params=[False, True], ids=["at once", "lazy"])
def cuda(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with mode(is_lazy=request.param):
        yield CUDABackend(CUDAOptions(default_cache_dir(), warms_up=False))


def run(
    backend: Backend,
    submits: list[Submit],
    compiler: GrammarCompiler,
    *,
    draft_length: int | None = None,
    blocks: int = 64,
) -> tuple[dict[tuple[int, int], list[object]], EngineCore]:
    """What clients see, by request and choice; and the core.

    draft_length  None: no prompt lookup
    """

    def compiled(source: str) -> Future[Grammar]:
        future = compiler.compile(source)
        future.result()
        return future

    limits = Limits(max_rows=32, max_logit_rows=24, max_slots=6, num_blocks=blocks + 1)
    core = EngineCore(
        backend.compile(chain(), limits, lambda: None),
        limits,
        CONTEXT_LENGTH,
        VOCAB_SIZE,
        clock=lambda: 1.0,
        compile_grammar=compiled,
        uses_prompt_lookup=draft_length is not None,
        draft_length=draft_length or 0,
    )
    core._scheduler.recent_outputs.extend([0] * NUM_RECENT_OUTPUTS)  # rather preempt
    seen: dict[tuple[int, int], list[object]] = {}
    for submit in submits:
        core.submit(submit)
        add_tokens(seen, core.step())
    while core.has_work:
        add_tokens(seen, core.step())
    assert core._kv_cache.num_used == 0
    return seen, core


def add_tokens(seen: dict[tuple[int, int], list[object]], step: Step) -> None:
    """Adds an entry for each token, however the tokens were sent."""
    assert not step.failed
    for tokens in step.tokens:
        rows = seen.setdefault((tokens.request, tokens.choice), [])
        for i, id in enumerate(tokens.ids):
            logprobs = tokens.logprobs[i : i + 1], tokens.alternatives[i : i + 1]
            rows.append((id, *logprobs, tokens.ranks[i : i + 1]))


@pytest.mark.parametrize("submits", [PLAIN, WITH_GRAMMARS], ids=["plain", "grammars"])
def test_tokens_are_those_of_the_reference(
    submits: list[Submit], cuda: Backend, compiler: GrammarCompiler
) -> None:
    expected, _ = run(ReferenceBackend(), submits, compiler)
    assert len(expected) >= 6
    assert run(cuda, submits, compiler)[0] == expected


@pytest.mark.parametrize("submits", [PLAIN, WITH_GRAMMARS], ids=["plain", "grammars"])
def test_drafts_change_no_token(
    submits: list[Submit], cuda: Backend, compiler: GrammarCompiler
) -> None:
    expected, _ = run(ReferenceBackend(), submits, compiler)
    seen, core = run(cuda, submits, compiler, draft_length=3)
    assert seen == expected
    speculation = core._speculation
    assert 0 < speculation.num_accepted_tokens < speculation.num_draft_tokens


def test_counts_go_on_after_a_preemption(cuda: Backend, compiler: GrammarCompiler) -> None:
    submits = [request(n, PENALIZED, 20, n=2, max_tokens=40) for n in range(1, 4)]
    expected, _ = run(ReferenceBackend(), submits, compiler)
    seen, core = run(cuda, submits, compiler, blocks=10)
    assert seen == expected
    assert core._scheduler.num_preemptions > 0
