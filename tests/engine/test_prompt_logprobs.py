"""Log-probabilities of prompt tokens: complete, in order, and before those of any choice."""

import numpy as np
import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.reference_sampler import log_softmax
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Sampling
from llmsrv.model.load import load_model
from tests.support.cores import Engine
from tests.support.cores import alone
from tests.support.cores import healthy_prompt
from tests.support.gguf_writer import write_tiny_llama

WITH_LOGPROBS = Sampling(seed=0, temperature=0.0, num_logprobs=2)


@pytest.mark.parametrize("spare_logit_rows", [0, 3, 100])
@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs_are_complete_and_precede_the_choices(
    spare_logit_rows: int, n: int
) -> None:
    engine = Engine(spare_logit_rows=spare_logit_rows)
    prompts = {request: healthy_prompt(20 + request, request) for request in (1, 2)}
    for request, prompt in prompts.items():
        engine.submit(request, prompt, n=n, sampling=WITH_LOGPROBS, prompt_logprobs=True)
    submit = engine.submit(3, healthy_prompt(50))
    for _ in range(1000):
        if not engine.core.has_work:
            break
        engine.step()
        for request, prompt in prompts.items():
            if (request, 0) in engine.outputs:
                assert engine.outputs[request, PROMPT] == prompt[1:]
    assert engine.outputs[3, 0] == alone(submit)[0]
    engine.assert_idle()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_prompt", [1, 16, 40, 200])  # up to the context
def test_a_request_for_no_token_only_computes_its_prompt(num_prompt: int, n: int) -> None:
    engine = Engine(context=200, spare_logit_rows=3)
    prompt = healthy_prompt(num_prompt)
    fields = {"n": n, "max_tokens": 0, "sampling": WITH_LOGPROBS, "prompt_logprobs": True}
    engine.submit(1, prompt, **fields)
    engine.run()
    assert engine.outputs.get((1, PROMPT), []) == prompt[1:]
    assert [engine.finished[1, choice].reason for choice in range(n)] == ["length"] * n
    assert not any(engine.outputs.get((1, choice)) for choice in range(n))
    engine.assert_idle()


def test_prompt_logprobs_are_sent_once_even_if_computed_again() -> None:
    engine = Engine(blocks=8, context=120, max_sequences=3, spare_logit_rows=2)
    prompts = {request: healthy_prompt(40, request) for request in (1, 2, 3)}
    for request, prompt in prompts.items():
        engine.submit(request, prompt, sampling=WITH_LOGPROBS, prompt_logprobs=True, max_tokens=30)
    engine.run()
    assert engine.gauges.num_preemptions > 0
    for request, prompt in prompts.items():
        assert engine.outputs[request, PROMPT] == prompt[1:]
        assert len(engine.outputs[request, 0]) == 30


def test_a_prompt_with_logprobs_is_not_taken_from_the_prefix_cache() -> None:
    engine = Engine()
    prompt = healthy_prompt(40)
    engine.submit(1, prompt, max_tokens=1)
    engine.run()
    engine.submit(2, prompt, max_tokens=1, sampling=WITH_LOGPROBS, prompt_logprobs=True)
    engine.run()
    assert engine.num_cached == [0, 0]
    assert engine.outputs[2, PROMPT] == prompt[1:]


def test_the_values_are_those_of_the_model(tmp_path) -> None:
    model = load_model(write_tiny_llama(tmp_path / "m.gguf"), lambda: None)

    def make_plan(limits: Limits) -> Plan:
        return ReferenceBackend().compile(model.program, limits, lambda: None)

    prompt = [5, 9, 30, 33, 8, 8, 12]
    logprobs: list[float] = []
    engine = Engine(make_plan=make_plan, spare_logit_rows=4, max_rows=8)
    engine.submit(1, prompt, max_tokens=1, sampling=WITH_LOGPROBS, prompt_logprobs=True)
    while engine.core.has_work:
        for tokens in engine.step().tokens:
            if tokens.choice == PROMPT:
                logprobs += tokens.logprobs
                assert len(tokens.alternatives[0]) == 2
    for end in range(1, len(prompt)):
        one = Engine(make_plan=make_plan)
        one.submit(1, prompt[:end], max_tokens=1)
        one.step()
        wanted = log_softmax(one.plan.read("logits")[0], np.array([prompt[end]]))[0]
        assert logprobs[end - 1] == pytest.approx(wanted, abs=1e-4)
