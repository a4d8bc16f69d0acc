"""One tiny model of each architecture, from its folder and as a GGUF file, through the loader, the
engine and the reference backend.  Transformers made the models and the expected answers
(tests/data/golden/tiny)."""

import asyncio
import functools
import json
from pathlib import Path

import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.engine.core import EngineCore
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens
from llmsrv.model.load import load_model
from tests.support.engines import engine
from tests.support.engines import in_loop
from tests.support.hf_to_gguf import to_gguf
from tests.support.parameters import slow_but

TINY = Path(__file__).parents[1] / "data/golden/tiny"
NAMES = sorted(folder.name for folder in TINY.iterdir())
# GGUF has no key for SmolLM 3's layers without rope: it is every fourth, but in this model the
# second.
GGUF_NAMES = [name for name in NAMES if name != "smollm3-nope"]
# We request twelve, so that the tenth and the next ones may swap places.
GREEDY = Sampling(seed=0, temperature=0.0, num_logprobs=12)
# Without slow tests, these represent the others; the CPU backend's tests cover all of them.
FEW = ("gemma3", "llama-yarn", "phi3-longrope", "qwen3-moe")
TOLERANCE = 1e-3  # of a log-probability


def read_cases(name):
    return json.loads((TINY / name / "golden.json").read_text())["cases"]


def make_submit(number, case):
    return Submit(number, case["prompt_ids"], len(case["greedy_ids"]), [], GREEDY)


class Engine:
    """An engine with limits for the rows and sequences of a step."""

    def __init__(self, program, context_length, max_rows, max_sequences):
        limits = Limits(max_rows, max_sequences, max_sequences, num_blocks=128)
        plan = ReferenceBackend().compile(program, limits, lambda: None)
        numbers = context_length, program.vocab_size, program.long_from
        self.core = EngineCore(plan, limits, *numbers)

    def run(self, cases):
        """Returns the Tokens of each case, in order."""
        tokens = [[] for _ in cases]
        for number, case in enumerate(cases):
            self.core.submit(make_submit(number, case))
        while self.core.has_work:
            step = self.core.step()
            assert not step.failed
            for each in step.tokens:
                tokens[each.request].append(each)
        return tokens


def check(tokens: list[Tokens], case):
    assert [id for each in tokens for id in each.ids] == case["greedy_ids"]
    alternatives = [dict(values) for each in tokens for values in each.alternatives]
    for ours, theirs in zip(alternatives, map(dict, case["top10_logprobs"]), strict=True):
        assert {id: ours.get(id) for id in theirs} == pytest.approx(theirs, abs=TOLERANCE)


def check_all(model, name, max_rows, max_sequences):
    engine = Engine(model.program, model.config.context_length, max_rows, max_sequences)
    for tokens, case in zip(engine.run(read_cases(name)), read_cases(name), strict=True):
        check(tokens, case)


@functools.cache
def load(path):
    return load_model(path, lambda: None)


@pytest.mark.parametrize("name", slow_but(NAMES, *FEW))
@pytest.mark.parametrize("max_rows", [5, pytest.param(512, marks=pytest.mark.slow)])
def test_all_cases_together_give_the_tokens_of_transformers(name, max_rows):
    check_all(load(TINY / name), name, max_rows, max_sequences=4)


@pytest.mark.parametrize("name", slow_but(NAMES, *FEW))
@pytest.mark.parametrize(
    "max_rows", [16, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 3, 512))]
)
def test_each_case_alone_in_chunks_of_any_size_gives_the_tokens_of_transformers(name, max_rows):
    check_all(load(TINY / name), name, max_rows, max_sequences=1)


@pytest.mark.parametrize("name", slow_but(GGUF_NAMES, *FEW))
def test_models_written_as_gguf_give_the_same_tokens(name, tmp_path):
    model = load(to_gguf(TINY / name, tmp_path / "tiny.gguf"))
    check_all(model, name, max_rows=512, max_sequences=4)


@in_loop
async def test_a_real_engine_process_gives_the_tokens_of_transformers():
    """Uses longrope, where the engine itself must distinguish long from short sequences."""
    cases = read_cases("phi3-longrope")

    async def generated(client, case):
        submit = make_submit(0, case)
        async with client.submit(submit) as generation:
            return [each async for each in generation if isinstance(each, Tokens)]

    async with engine(TINY / "phi3-longrope") as client:
        for tokens, case in zip(
            await asyncio.gather(*(generated(client, case) for case in cases)), cases, strict=True
        ):
            check(tokens, case)
