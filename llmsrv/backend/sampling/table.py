"""The sampling parameters of all running sequences, in a form that compiled code reads too.

The table is written when a sequence takes a slot, and whenever a grammar changes the ids that the
sequence may draw next.  reference_sampler.py says what each parameter means.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Floats

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint32]

WEIGHT_BITS = 40
FRACTION_BITS = 32

PARAMETERS = np.dtype(
    [
        ("seed", np.uint64),
        ("top_p", np.int64),  # fractions of 2**32
        ("typical_p", np.int64),
        ("min_p", np.int64),  # a weight
        ("choice", np.uint32),
        ("top_k", np.int32),  # 0: all
        ("temperature", np.float32),  # 0: greedy
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("num_logprobs", np.int32),  # -1: none; 0: the sampled id's; k: also those of the k best
        ("has_extras", np.int32),  # 1 if `extras` has the slot
    ]
)


@dataclass(frozen=True)
class SamplingParameters:
    """How to sample one sequence, as its request asks; the defaults change nothing."""

    seed: int = 0  # 0 .. 2**64 - 1
    choice: int = 0  # index among the choices of one request
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # above 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_logprobs: int = -1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Mask | None = None  # a mask made by mask_of
    min_tokens: int = 0  # end_ids are not drawn before the output has this many tokens
    end_ids: Sequence[int] = ()

    @property
    def has_penalties(self) -> bool:
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0)

    @property
    def has_extras(self) -> bool:
        """True if the slot needs Extras."""
        has_mask = self.allowed is not None or self.min_tokens > 0
        return bool(self.logit_bias) or has_mask or self.has_penalties


@dataclass
class Extras:
    """Parameters of a slot that do not fit in its row of the table; most slots have none.

    bias_ids, bias_values   [N], distinct ids
    end_ids                 [M], banned while the output has fewer than min_tokens
    allowed                 a mask made by mask_of; None allows all ids
    grammar                 [rows, words], one such mask in each row; None allows all ids
    in_prompt               [vocab_size] bool; None without penalties
    counts                  [vocab_size] int32, occurrences in the output; None without penalties
    """

    bias_ids: Ids
    bias_values: Floats
    end_ids: Ids
    min_tokens: int
    allowed: Mask | None = None
    grammar: Mask | None = None
    in_prompt: npt.NDArray[np.bool_] | None = None
    counts: Ids | None = None


class SamplingTable:
    """The sampling parameters of every running sequence, by slot.

    parameters  [max_slots] of PARAMETERS; it never moves, so compiled code may keep its address
    extras      slot -> Extras, for the slots that need them
    """

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.parameters = np.zeros(max_slots, PARAMETERS)
        self.extras: dict[int, Extras] = {}

    def set(
        self,
        slot: int,
        parameters: SamplingParameters,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        """Gives the slot to a sequence; only penalties need its tokens so far."""
        temperature = np.float32(parameters.temperature)
        # Some devices flush subnormal numbers to 0, so treat such temperatures as 0 everywhere.
        if temperature < np.finfo(np.float32).tiny:
            temperature = np.float32(0)
        extras = self._extras(parameters, prompt_ids, output_ids)
        self.extras.pop(slot, None)
        if extras is not None:
            self.extras[slot] = extras
        row = self.parameters[slot]
        row["seed"] = parameters.seed
        row["choice"] = parameters.choice
        row["temperature"] = temperature
        row["top_k"] = min(parameters.top_k, self.vocab_size)
        row["top_p"] = int(parameters.top_p * 2**FRACTION_BITS)
        row["typical_p"] = int(parameters.typical_p * 2**FRACTION_BITS)
        row["min_p"] = int(parameters.min_p * 2**WEIGHT_BITS)
        row["repetition_penalty"] = parameters.repetition_penalty
        row["presence_penalty"] = parameters.presence_penalty
        row["frequency_penalty"] = parameters.frequency_penalty
        row["num_logprobs"] = min(parameters.num_logprobs, self.vocab_size)
        row["has_extras"] = extras is not None

    def set_grammar(self, slot: int, mask: Mask | None) -> None:
        """Sets the ids that the slot may draw, until the next call.

        mask  [words], made by mask_of and not copied; or [rows, words] if a step draws several rows
              of the slot: mask i for its i-th row, the last for all further rows; None: all ids
        """
        if slot not in self.extras:
            if mask is None:
                return
            self.extras[slot] = _no_extras()
            self.parameters[slot]["has_extras"] = 1
        if mask is not None:
            mask = np.atleast_2d(np.ascontiguousarray(mask, np.uint32))
        self.extras[slot].grammar = mask

    def count(self, slot: int, id: int) -> None:
        """Counts an output id for the penalties; sampling calls this."""
        extras = self.extras.get(slot)
        if extras is not None and extras.counts is not None:
            extras.counts[id] += 1

    def _extras(
        self, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> Extras | None:
        if not parameters.has_extras:
            return None
        extras = _no_extras()
        bias = parameters.logit_bias
        extras.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        extras.bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        extras.end_ids = np.array(parameters.end_ids, np.int32)
        extras.min_tokens = parameters.min_tokens
        extras.allowed = parameters.allowed
        if parameters.has_penalties:
            extras.in_prompt = np.zeros(self.vocab_size, np.bool_)
            extras.in_prompt[np.asarray(prompt_ids, np.int64)] = True
            counts = np.bincount(np.asarray(output_ids, np.int64), minlength=self.vocab_size)
            extras.counts = counts.astype(np.int32)
        return extras


def _no_extras() -> Extras:
    no_ids = np.zeros(0, np.int32)
    return Extras(no_ids, np.zeros(0, np.float32), no_ids, 0)


def mask_of(ids: Sequence[int], vocab_size: int) -> Mask:
    """A mask that allows `ids`; its inverse (~) bans them.  The layout is llguidance's.

    Returns [ceil(vocab_size / 32)] uint32; bit i % 32 of word i // 32 is set if id i is allowed.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.asarray(ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)
