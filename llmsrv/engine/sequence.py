"""A sequence: one choice of a request, from the queue to its end.

A request with n choices has n sequences; they share the prompt blocks that the first one computes.
A preempted sequence keeps its output, and is likely to find its blocks in the prefix cache again.
"""

import enum
from dataclasses import dataclass
from dataclasses import field

from llmsrv.engine.acceptance import AcceptanceRates
from llmsrv.engine.acceptance import DraftSource
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.kv_cache import BlockHashes
from llmsrv.engine.lookup import Lookup
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Submit
from llmsrv.engine.repetition import ends_with_repetition

NO_SLOT = -1


class State(enum.Enum):
    WAITING = "waiting"  # in the queue, new or preempted: has no slot and no block
    RUNNING = "running"  # has a slot, and rows in the steps
    ENDED = "ended"


TRANSITIONS = {
    (State.WAITING, State.RUNNING),  # admitted
    (State.RUNNING, State.WAITING),  # preempted
    (State.WAITING, State.ENDED),
    (State.RUNNING, State.ENDED),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """max_tokens  of the request, limited by the context length; 0: only the prompt is computed
    is_long     see backend.base.Batch
    leader      the first choice of the request; None for the first choice itself
    rank        its place among all sequences, which never changes (fair_queue.py)
    """

    submit: Submit
    choice: int
    max_tokens: int
    end_ids: frozenset[int]
    queued_s: float
    block_hashes: BlockHashes
    is_long: bool = False
    leader: "Sequence | None" = None
    rank: tuple[int, int] = (0, 0)
    state: State = State.WAITING

    # While it runs
    slot: int = NO_SLOT
    num_computed: int = 0  # positions whose keys and values are in the KV cache
    num_cached: int = 0  # how many of them the prefix cache had at the last admission
    num_draft_computed: int = 0  # positions that the draft model has computed, without its drafts
    computed_draft_ids: list[int] = field(default_factory=list)  # drafts computed after them
    draft_sources: list[DraftSource] = field(default_factory=list)  # of the last draft, or longer

    # Over its whole life
    grammar: Grammar | None = None
    lookup: Lookup = field(default_factory=Lookup)
    acceptance_rates: AcceptanceRates = field(default_factory=AcceptanceRates)
    output_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs_sent: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_preemptions: int = 0
    num_discarded: int = 0  # positions that were computed when it was last preempted

    def move_to(self, state: State) -> None:
        assert (self.state, state) in TRANSITIONS, (self.state, state)
        self.state = state

    @property
    def num_tokens(self) -> int:
        return len(self.submit.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Rows to compute before the next token can be sampled: 1 in decode, more in prefill."""
        return len(self.submit.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def has_placeholder(self) -> bool:
        """Whether the last token stands for one that is not known yet (pipeline.py)."""
        return bool(self.output_ids) and self.output_ids[-1] < 0

    @property
    def num_cacheable(self) -> int:
        """Leading tokens that are computed and known, so that the prefix cache may hold them."""
        return min(self.num_computed, self.num_tokens - self.has_placeholder)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some log-probabilities of the prompt's tokens are wanted and not sent yet.

        The first token of a prompt has none.
        """
        wanted = self.submit.prompt_logprobs and self.leader is None
        return wanted and self.num_prompt_logprobs_sent < len(self.submit.prompt_ids) - 1

    @property
    def awaits_leader(self) -> bool:
        """Whether the first choice must finish first: it is computing the shared prompt, or it has
        prompt log-probabilities to send before any choice's tokens."""
        leader = self.leader
        if leader is None or leader.state is State.ENDED:
            return False
        is_computing = leader.num_computed < len(self.submit.prompt_ids)
        return leader.wants_prompt_logprobs or (leader.state is State.RUNNING and is_computing)

    def ids(self, start: int, stop: int) -> list[int]:
        """The tokens at positions [start, stop) of prompt and output."""
        num_prompt = len(self.submit.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return self.submit.prompt_ids[start:stop] + self.output_ids[: max(0, stop - num_prompt)]

    def append(self, id: int, now_s: float) -> str | None:
        """Appends a sampled token; returns the finish reason if it is the last one."""
        if not self.output_ids:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.output_ids.append(id)
        if id in self.end_ids or (self.grammar is not None and self.grammar.accept(id)):
            return "stop"
        is_full = len(self.output_ids) >= self.max_tokens
        return "length" if is_full or self._repeats_itself() else None

    def _repeats_itself(self) -> bool:
        detection = self.submit.repetition_detection
        if detection is None or len(self.output_ids) < self.submit.min_tokens:
            return False
        return ends_with_repetition(self.output_ids, detection)

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
