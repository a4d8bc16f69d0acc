"""The sampling contract: what every backend makes of logits, to the bit, and its form in numpy.

Equal float32 logits give equal ids on every backend.  All that is float here is float32, each
operation rounded by itself (no fused multiply-add), and everything after exp is an integer.

For each row, in this order:
    1  logit_bias is added; ids outside the allowed mask, then outside the grammar mask, get -inf
    2  penalties, of ids seen:  repetition r (in prompt or output): l / r where l > 0, else l * r;
       presence p (in the output): l - p;  frequency f: l - f * count in the output
    3  temperature 0: the largest logit, the lowest id among equals.  Otherwise
       x = (logit - max) / temperature, so that x <= 0 whatever the temperature
    4  top_k keeps the k largest x
    5  weight = floor(exp(x) * 2**40), exp as in `weights_of`; from here on integers only
    6  top_p keeps the largest weights until they reach top_p of their sum
    7  min_p keeps weights of at least min_p of the largest weight, which is 2**40
    8  typical_p keeps the ids whose surprise is nearest to the mean one, until they reach typical_p
       of the sum (Meister et al. 2022); the surprise is -x, up to a constant that cancels out
    9  the draw: target = (64 random bits * sum of weights) >> 64 (philox.uniform_bits); the first
       id in id order at which the running sum exceeds target
Among equals the lowest id goes first.  A share of a sum is ceil(sum * fraction / 2**32), at least
1, with fraction = floor(share * 2**32): at least one id is always kept, and 1.0 keeps all.

A row whose logits hold NaN or +inf, or where nothing is left to choose, fails alone: its id is -1.
Reported log-probabilities are those of the model's own logits, before all of this.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsrv.backend.philox import uniform_bits

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint32]

WEIGHT_BITS = 40
FRACTION_BITS = 32
SURPRISE_BITS = 20
FAILED = -1


def float32(hexadecimal: str) -> np.float32:
    return np.float32(float.fromhex(hexadecimal))


# exp(x) = 2**n * exp(r), n = rint(x * LOG2_E), r = x - n * ln 2 in two steps, |r| <= ln(2) / 2.
# LN2_HIGH ends in zeros, so that n * LN2_HIGH is exact.  exp(r) = 1 + r + c2 r**2 + ... c6 r**6, by
# Horner, fitted for the least largest relative error: 3e-9, 1e-7 with rounding.  exp(0) is 1.
LOG2_E = float32("0x1.715476p+0")
LN2_HIGH = float32("0x1.62e4p-1")
LN2_LOW = float32("0x1.7f7d1cp-20")
EXP_COEFFICIENTS = (  # c6 first
    float32("0x1.6a23d0p-10"),
    float32("0x1.123a20p-7"),
    float32("0x1.5558f2p-5"),
    float32("0x1.555492p-3"),
    float32("0x1.fffffcp-2"),
    float32("0x1.0p+0"),
    float32("0x1.0p+0"),
)
LEAST_X = np.float32(-28)  # below, exp(x) * 2**40 < 1: the weight is 0

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
        ("num_logprobs", np.int32),  # -1: none; 0: the sampled id's; k: k alternatives beside it
        ("has_extras", np.int32),  # 1 where `extras` has the slot
    ]
)


@dataclass(frozen=True)
class SamplingParameters:
    """How the tokens of one sequence are drawn, as its request asked; the values are neutral."""

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
    allowed: Mask | None = None  # as `mask_of` makes it

    @property
    def has_penalties(self) -> bool:
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0)


@dataclass
class Extras:
    """What a slot needs beside its numbers; most slots need none of it.

    bias_ids, bias_values   [N], distinct ids
    allowed, grammar        masks as `mask_of` makes them; None allows all
    in_prompt               [vocab_size] bool, and
    counts                  [vocab_size] int32, how often in the output: only where penalties are
    """

    bias_ids: Ids
    bias_values: Floats
    allowed: Mask | None
    grammar: Mask | None
    in_prompt: npt.NDArray[np.bool_] | None
    counts: Ids | None


@dataclass(frozen=True)
class Samples:
    """What one step sampled.

    ids           [R] int32, FAILED where the row could not be sampled
    logprobs      [R] float32, of the sampled id; NaN where not asked for or FAILED
    alternatives  per row its largest (ids, logprobs), most likely first; empty where not asked for
    """

    ids: Ids
    logprobs: Floats
    alternatives: list[tuple[Ids, Floats]]


class SamplingTable:
    """The sampling parameters of every running sequence, by slot.

    parameters  [max_slots] of PARAMETERS; it never moves: compiled code may keep its address
    extras      slot -> Extras, for the slots that have any
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
        """Gives the slot to a sequence; its tokens so far are needed for penalties only."""
        temperature = np.float32(parameters.temperature)
        # Subnormal temperatures would be 0 on a device that flushes them: let them be 0 everywhere.
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
        """The ids that the slot may draw next, None for all; it holds until the next call."""
        extras = self.extras.setdefault(slot, _no_extras())
        extras.grammar = mask
        self.parameters[slot]["has_extras"] = 1

    def count(self, slot: int, id: int) -> None:
        """Notes a sampled id for the penalties; sample() does it for every id that it draws."""
        extras = self.extras.get(slot)
        if extras is not None and extras.counts is not None:
            extras.counts[id] += 1

    def _extras(
        self, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> Extras | None:
        bias = parameters.logit_bias
        if not bias and parameters.allowed is None and not parameters.has_penalties:
            return None
        extras = _no_extras()
        extras.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        extras.bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        extras.allowed = parameters.allowed
        if parameters.has_penalties:
            extras.in_prompt = np.zeros(self.vocab_size, np.bool_)
            extras.in_prompt[np.asarray(prompt_ids, np.int64)] = True
            counts = np.bincount(np.asarray(output_ids, np.int64), minlength=self.vocab_size)
            extras.counts = counts.astype(np.int32)
        return extras


def _no_extras() -> Extras:
    return Extras(np.zeros(0, np.int32), np.zeros(0, np.float32), None, None, None, None)


def mask_of(ids: Sequence[int], vocab_size: int) -> Mask:
    """[ceil(vocab_size / 32)] uint32 in which bit i % 32 of word i // 32 stands for id i: set for
    `ids`.  Its inverse (~) bans them.  The layout is llguidance's."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.asarray(ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


@np.errstate(over="ignore")  # x may be -inf, and a bias may overflow: both are defined
def sample(
    logits: Floats,
    table: SamplingTable,
    slots: Ids,
    output_positions: Integers,
    targets: Ids | None = None,
) -> Samples:
    """Samples each row of logits [R, vocab_size] by its slot's parameters, and counts what it drew.

    slots             [R], each at most once among the rows that are drawn
    output_positions  [R], how many tokens the sequence has put out before this one
    targets           [R], an id to report the log-probability of instead of drawing one, as for the
                      tokens of a prompt; -1 to draw
    """
    if targets is None:
        targets = np.full(len(logits), -1, np.int32)
    largest = logits.argmax(axis=1)  # of a row with NaN, the NaN
    ids = largest.astype(np.int32)
    sound = np.isfinite(logits[np.arange(len(logits)), largest])
    logprobs = np.full(len(logits), np.nan, np.float32)
    alternatives = [(np.zeros(0, np.int32), np.zeros(0, np.float32)) for _ in range(len(logits))]
    for row, slot in enumerate(slots.tolist()):
        parameters, extras = table.parameters[slot], table.extras.get(slot)
        if not sound[row]:
            ids[row] = FAILED
        elif targets[row] >= 0:
            ids[row] = targets[row]
        elif extras is not None or parameters["temperature"] > 0:
            seed, choice = int(parameters["seed"]), int(parameters["choice"])
            bits = uniform_bits(seed, choice, int(output_positions[row]))
            ids[row] = _draw(*candidates(logits[row], parameters, extras), bits)
        if ids[row] == FAILED:
            continue
        if targets[row] < 0:
            table.count(slot, int(ids[row]))
        if parameters["num_logprobs"] >= 0:
            best = largest_of(logits[row], int(parameters["num_logprobs"]))
            values = log_softmax(logits[row], np.append(best, ids[row]))
            logprobs[row] = values[-1]
            alternatives[row] = best.astype(np.int32), values[:-1]
    return Samples(ids, logprobs, alternatives)


def log_softmax(logits: Floats, ids: Integers) -> Floats:
    """The log-probabilities of ids by the logits [vocab_size] of one row."""
    shifted = logits - logits.max()
    # Summed in float64: a vocabulary of small terms would lose digits in float32.
    log_sum = np.log(np.exp(shifted).sum(dtype=np.float64))
    logprobs: Floats = (shifted[ids] - log_sum).astype(np.float32)
    return logprobs


def largest_of(values: Floats, k: int) -> Integers:
    """Where the k largest values are, the largest first, the lowest index first among equals."""
    if k == 0:
        return np.zeros(0, np.int64)
    kth = np.partition(values, len(values) - k)[len(values) - k]
    places = np.flatnonzero(values >= kth)  # k, or more where some equal the kth
    return places[np.argsort(-values[places], kind="stable")[:k]]


def candidates(logits: Floats, parameters: Any, extras: Extras | None) -> tuple[Ids, Integers]:
    """Steps 1 to 8 for the logits [vocab_size] of one row: the ids that may be drawn, in id order,
    and their weights.  Both are empty where nothing is left to choose."""
    if extras is not None:
        logits = _adjusted(logits, parameters, extras)
    best = logits.argmax()
    if not np.isfinite(logits[best]):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    if parameters["temperature"] == 0:
        return np.array([best], np.int32), np.array([1], np.int64)
    # From here on parallel arrays in id order, of the ids that are left.
    x = (logits - logits[best]) / parameters["temperature"]
    ids = np.flatnonzero(x >= LEAST_X).astype(np.int32)
    x = x[ids]
    if 0 < parameters["top_k"] < len(ids):
        kept = np.sort(largest_of(x, int(parameters["top_k"])))
        ids, x = ids[kept], x[kept]
    weights = weights_of(x)
    if parameters["top_p"] < 1 << FRACTION_BITS:
        kept = _top_p(weights, int(parameters["top_p"]))
        ids, x, weights = ids[kept], x[kept], weights[kept]
    if parameters["min_p"] > 0:
        kept = np.flatnonzero(weights >= parameters["min_p"])
        ids, x, weights = ids[kept], x[kept], weights[kept]
    if parameters["typical_p"] < 1 << FRACTION_BITS:
        kept = _typical_p(x, weights, int(parameters["typical_p"]))
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _draw(ids: Ids, weights: Integers, bits: int) -> int:
    """Step 9, with 64 random bits."""
    if len(ids) == 0:
        return FAILED
    sums = weights.cumsum()
    return int(ids[np.searchsorted(sums, bits * int(sums[-1]) >> 64, side="right")])


def _adjusted(logits: Floats, parameters: Any, extras: Extras) -> Floats:
    """Steps 1 and 2: a copy of the logits with bias, masks and penalties."""
    logits = logits.copy()
    logits[extras.bias_ids] += extras.bias_values
    for mask in extras.allowed, extras.grammar:
        if mask is not None:
            bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")
            logits[bits[: len(logits)] == 0] = -np.inf
    if extras.counts is not None and extras.in_prompt is not None:
        seen = np.flatnonzero((extras.counts > 0) | extras.in_prompt)
        values, penalty = logits[seen], parameters["repetition_penalty"]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        put_out = np.flatnonzero(extras.counts)
        logits[put_out] -= parameters["presence_penalty"]
        counts = extras.counts[put_out].astype(np.float32)
        logits[put_out] -= parameters["frequency_penalty"] * counts
    return logits


def weights_of(x: Floats) -> Integers:
    """floor(exp(x) * 2**40) for float32 x in -28 .. 0, by separately rounded operations."""
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    exp_r = np.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        exp_r = exp_r * r + coefficient
    # Scaling by a power of two is exact; weights are not negative, so that astype floors.
    weights: Integers = np.ldexp(exp_r, n.astype(np.int32) + WEIGHT_BITS).astype(np.int64)
    return weights


def _share(total: int, fraction: int) -> int:
    """The least integer that is `fraction` / 2**32 of the total, at least 1."""
    return max(1, -(-total * fraction >> FRACTION_BITS))


def _until(order: Integers, weights: Integers, goal: int) -> Integers:
    """The first places of `order` at which the weights reach the goal, back in id order."""
    count = np.searchsorted(weights[order].cumsum(), goal) + 1
    return np.sort(order[:count])


def _top_p(weights: Integers, fraction: int) -> Integers:
    total = int(weights.sum())
    goal = _share(total, fraction)
    # Saves sorting the long tail: all weights below (total - goal) / N together weigh less than
    # total - goal, so the others reach the goal without them.
    likely = np.flatnonzero(weights * len(weights) >= total - goal)
    return _until(likely[np.argsort(-weights[likely], kind="stable")], weights, goal)


def _typical_p(x: Floats, weights: Integers, fraction: int) -> Integers:
    surprise = np.floor(-x * np.float32(2**SURPRISE_BITS)).astype(np.int64)
    # w * surprise stays below 2**60 / e, since w is 2**40 * exp(x) and t * exp(-t) <= 1 / e; the
    # shifts let sums of any vocabulary fit.
    mean = int((weights * surprise >> 24).sum()) // (int(weights.sum()) >> 24)
    order = np.argsort(np.abs(surprise - mean), kind="stable")
    return _until(order, weights, _share(int(weights.sum()), fraction))
