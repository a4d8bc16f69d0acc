"""One sequence: a choice of a request, from the queue to its end.

A request of n choices is n sequences; all share what the first computes of the prompt.  What a
sequence has put out survives a preemption; what it has computed is likely to be found again.
"""

import enum
from dataclasses import dataclass
from dataclasses import field

from llmsrv.engine.grammar import Grammar
from llmsrv.engine.hope import Ground
from llmsrv.engine.hope import Hopes
from llmsrv.engine.kv_cache import Pages
from llmsrv.engine.lookup import Lookup
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Submit

NO_SLOT = -1


class State(enum.Enum):
    WAITING = "waiting"  # in the queue, never scheduled or preempted: holds no slot and no block
    RUNNING = "running"  # has a slot, and rows in steps
    ENDED = "ended"


TRANSITIONS = {
    (State.WAITING, State.RUNNING),  # admitted
    (State.RUNNING, State.WAITING),  # preempted
    (State.WAITING, State.ENDED),
    (State.RUNNING, State.ENDED),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """max_tokens  what the context leaves of what was asked for, at least 1
    is_long     as in backend.base.Batch
    leader      the first choice of its request, None for that one itself
    rank        its place among all sequences, for life (fair_queue.py)
    """

    submit: Submit
    choice: int
    max_tokens: int
    end_ids: frozenset[int]
    queued_s: float
    pages: Pages
    is_long: bool = False
    leader: "Sequence | None" = None
    rank: tuple[int, int] = (0, 0)
    state: State = State.WAITING

    # While it runs
    slot: int = NO_SLOT
    num_computed: int = 0  # positions whose keys and values are in the cache
    num_cached: int = 0  # of these, how many were there when it was admitted last
    num_seen: int = 0  # positions that the draft model has computed, and behind them
    guesses: list[int] = field(default_factory=list)  # these, which may not be what has come
    grounds: list[Ground] = field(default_factory=list)  # of its last draft, or of more than that

    # Over its whole life
    grammar: Grammar | None = None
    lookup: Lookup = field(default_factory=Lookup)
    hopes: Hopes = field(default_factory=Hopes)  # for its drafts
    output_ids: list[int] = field(default_factory=list)
    num_told: int = 1  # tokens of the prompt that are told, as far as it tells them
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_preemptions: int = 0

    def move_to(self, state: State) -> None:
        assert (self.state, state) in TRANSITIONS, (self.state, state)
        self.state = state

    @property
    def num_tokens(self) -> int:
        return len(self.submit.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Rows until the next token can be sampled: 1 in decode, more in prefill."""
        return len(self.submit.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def tells_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt's tokens are still wanted."""
        wanted = self.submit.prompt_logprobs and self.leader is None
        return wanted and self.num_told < len(self.submit.prompt_ids)

    @property
    def awaits_leader(self) -> bool:
        """Whether the first choice is computing the prompt that both begin with, or has to tell of
        it before any choice goes on."""
        leader = self.leader
        if leader is None or leader.state is State.ENDED:
            return False
        is_computing = leader.num_computed < len(self.submit.prompt_ids)
        return leader.tells_prompt or (leader.state is State.RUNNING and is_computing)

    def ids(self, start: int, stop: int) -> list[int]:
        """The tokens at positions [start, stop) of prompt and output."""
        num_prompt = len(self.submit.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return self.submit.prompt_ids[start:stop] + self.output_ids[: max(0, stop - num_prompt)]

    def append(self, id: int, now_s: float) -> str | None:
        """Adds a sampled token; the finish reason when it is the last."""
        if not self.output_ids:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.output_ids.append(id)
        if id in self.end_ids or (self.grammar is not None and self.grammar.accept(id)):
            return "stop"
        return "length" if len(self.output_ids) >= self.max_tokens else None

    def finished(self, reason: str) -> Finished:
        return Finished(
            request=self.submit.request,
            choice=self.choice,
            reason=reason,
            num_prompt_tokens=len(self.submit.prompt_ids),
            num_output_tokens=len(self.output_ids),
            queued_s=self.queued_s,
            scheduled_s=self.scheduled_s,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            num_preemptions=self.num_preemptions,
        )
