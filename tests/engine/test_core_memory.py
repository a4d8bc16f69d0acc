"""The KV cache in an engine: full caches, preemption, shared prefixes."""

from collections.abc import Callable

import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.engine.messages import Sampling
from llmsrv.model.load import load_model
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but


@pytest.mark.parametrize("blocks", slow_but([2, 3, 40], 2, 3))
@pytest.mark.parametrize("length", [15, 16, 17, 31])
def test_one_sequence_can_fill_the_whole_cache(blocks: int, length: int) -> None:
    engine = Engine(blocks=blocks, context=1000)
    prompt = healthy_prompt(length, steps=blocks * BLOCK_SIZE - length)
    submit = engine.submit(1, prompt, max_tokens=1000)
    engine.run()
    expected = alone(submit, context=blocks * BLOCK_SIZE)[0]
    assert engine.outputs[1, 0] == expected and len(prompt + expected) == blocks * BLOCK_SIZE
    engine.assert_idle()


def test_64_long_requests_in_a_cache_for_8_all_finish_as_if_alone() -> None:
    engine = Engine(max_sequences=32, blocks=8 * 4, max_rows=64, context=64)
    submits = [
        engine.submit(r, healthy_prompt(10 + r % 7, r, steps=45), max_tokens=45) for r in range(64)
    ]
    engine.run(5000)
    assert engine.gauges.num_preemptions > 0
    for submit in submits:
        assert engine.outputs[submit.request, 0] == alone(submit)[0]
    engine.assert_idle()


def test_the_youngest_is_preempted_and_sends_no_token_twice() -> None:
    engine = Engine(max_sequences=2, blocks=4, context=64)
    older = engine.submit(1, healthy_prompt(14, steps=45), max_tokens=45)
    younger = engine.submit(2, healthy_prompt(14, 50, steps=45), max_tokens=45)
    ended = []
    while engine.core.has_work:
        ended += [f.request for f in engine.step().finished]
    assert ended == [1, 2] and engine.gauges.num_preemptions >= 1
    assert engine.outputs[1, 0] == alone(older)[0]
    assert engine.outputs[2, 0] == alone(younger)[0]
    assert engine.admitted == [1, 2]  # reported once each, though the younger was admitted twice
    engine.assert_idle()


def test_a_shared_prefix_is_not_computed_again() -> None:
    engine = Engine(max_rows=16)
    shared = healthy_prompt(100, steps=20)
    first = engine.submit(1, shared)
    engine.run()
    second = engine.submit(2, shared)
    third = engine.submit(3, shared[:50] + [9, 9, 9])
    before = engine.plan.num_forwards
    engine.run()
    assert engine.num_cached == [0, 99, 50]
    assert engine.plan.num_forwards - before < 100 // 16 + 10
    for submit in (first, second, third):
        assert engine.outputs.get((submit.request, 0), []) == alone(submit)[0]
    assert engine.gauges.num_prefix_queries == 100 + 100 + 53
    assert engine.gauges.num_prefix_hits == 99 + 50
    engine.assert_idle()


def test_a_conversation_finds_its_own_answer_in_the_cache() -> None:
    engine = Engine()
    prompt = healthy_prompt(20, steps=40)
    engine.submit(1, prompt, max_tokens=40)
    engine.run()
    engine.submit(2, prompt + engine.outputs[1, 0] + [5], max_tokens=1)
    engine.run()
    assert engine.num_cached[-1] == 59  # all positions that were computed


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    engine = Engine()
    prompt = healthy_prompt(32, steps=3)
    for request in (1, 2):
        engine.submit(request, prompt, max_tokens=2)
        engine.run()
    assert engine.num_cached == [0, 31]
    assert engine.outputs[1, 0] == engine.outputs[2, 0]


def test_requests_with_different_salts_share_nothing() -> None:
    engine = Engine()
    prompt = healthy_prompt(40, steps=3)
    for request, salt in enumerate((b"a", b"b", b"a")):
        engine.submit(request, prompt, max_tokens=1, salt=salt)
        engine.run()
    assert engine.num_cached == [0, 0, 39]


def test_the_choices_of_a_request_share_its_prompt_while_they_run() -> None:
    engine = Engine(max_sequences=4, blocks=9, context=120)
    submit = engine.submit(1, healthy_prompt(64, steps=30), n=4, sampling=Sampling(seed=5))
    engine.run()  # without sharing, 4 * 64 positions would need 16 blocks
    assert engine.num_cached == [0, 63, 63, 63]
    for choice in range(4):
        assert engine.outputs[1, choice] == alone(submit, choice)[0]
    engine.assert_idle()


def test_the_blocks_released_first_are_evicted_first() -> None:
    engine = Engine(blocks=8, context=120)
    old, new, other = (healthy_prompt(48, start, steps=3) for start in (1, 3, 5))
    for request, prompt in enumerate((old, new, other, new, old)):
        engine.submit(request, prompt, max_tokens=1)
        engine.run()
    # The end of the old prompt was evicted, not its beginning.
    assert engine.num_cached == [0, 0, 0, 47, 16]
    engine.assert_idle()


@pytest.fixture(scope="module")
def reference_plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Limits], Plan]:
    """Compiles a tiny llama on the reference backend."""
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    program = load_model(path, lambda: None).program
    return lambda limits: ReferenceBackend().compile(program, limits, lambda: None)


def test_a_real_plan_gives_the_same_tokens_under_preemption_as_alone(
    reference_plan: Callable[[Limits], Plan],
) -> None:
    samplings = [GREEDY, Sampling(seed=11), Sampling(seed=12, temperature=0.7, top_p=0.9)]
    requests = [(healthy_prompt(9 + 5 * r, r), samplings[r % 3]) for r in range(9)]
    crowd = Engine(max_sequences=5, blocks=8, max_rows=16, make_plan=reference_plan)
    for request, (prompt, sampling) in enumerate(requests):
        crowd.submit(request, prompt, sampling=sampling, max_tokens=25)
    crowd.run()
    assert crowd.gauges.num_preemptions > 0
    crowd.assert_idle()
    for request, (prompt, sampling) in enumerate(requests):
        single = Engine(max_rows=64, make_plan=reference_plan)
        single.submit(request, prompt, sampling=sampling, max_tokens=25)
        single.run()
        assert single.outputs == {(request, 0): crowd.outputs[request, 0]}


def test_the_fake_plan_behaves_like_the_real_one(reference_plan: Callable[[Limits], Plan]) -> None:
    """The same requests lead to the same steps, since the tokens decide nothing here."""
    kinds: list[list[object]] = []
    for make_plan in (FakePlan, reference_plan):
        engine = Engine(
            max_sequences=3,
            blocks=7,
            max_rows=8,
            context=64,
            make_plan=make_plan,
            clock=lambda: 1.0,  # the durations of steps differ
        )
        for request in range(5):
            sampling = Sampling(0, 0.0, num_logprobs=request % 3 - 1)
            engine.submit(
                request,
                healthy_prompt(5 + 9 * request, request, steps=20),
                n=1 + request % 2,
                max_tokens=20,
                sampling=sampling,
            )
        kinds.append([])
        while engine.core.has_work:
            step = engine.step()
            tokens = [
                (t.request, t.choice, len(t.ids), len(t.logprobs), [len(a) for a in t.alternatives])
                for t in step.tokens
            ]
            ends = [(f.request, f.choice, f.reason) for f in step.finished]
            kinds[-1].append((step.admitted, tokens, ends, step.gauges))
        engine.assert_idle()
    assert kinds[0] == kinds[1]
