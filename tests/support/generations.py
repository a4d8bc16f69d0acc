"""Requests to an engine process, and everything that comes back."""

from llmsrv.engine.generation import Generation
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.timing import Timer

GREEDY = Sampling(seed=0, temperature=0.0)
ENDLESS = 10_000  # tokens: many seconds of work


def make_submit(
    prompt_ids: list[int], max_tokens: int, sampling: Sampling = GREEDY, n: int = 1
) -> Submit:
    return Submit(0, prompt_ids, max_tokens, [], sampling, n)


async def admission_of(generation: Generation) -> None:
    await generation.admitted(Timer(), timeout_s=30.0)


async def output_of(generation: Generation) -> tuple[list[list[int]], list[str]]:
    """The ids and the finish reason of every choice."""
    ids: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    async with generation:
        async for event in generation:
            assert event.choice not in reasons
            if isinstance(event, Finished):
                reasons[event.choice] = event.reason
            else:
                ids.setdefault(event.choice, []).extend(event.ids)
    order = sorted(reasons)
    return [ids[choice] for choice in order], [reasons[choice] for choice in order]
