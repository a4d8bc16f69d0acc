"""The sampling contract, which every backend follows to the bit, and its implementation in numpy.

Equal float32 logits give equal ids on every backend.  All floats here are float32, each operation
is rounded separately (no fused multiply-add), and everything after exp is an integer.

For each row, in this order:
    1  add logit_bias; set to -inf the ids outside the allowed mask, the end ids before min_tokens,
       and the ids outside the grammar mask
    2  penalties on logits l of ids seen before:  repetition r (seen in prompt or output): l / r if
       l > 0, else l * r;  presence p (seen in the output): l - p;  frequency f: l - f * count in
       the output
    3  temperature 0 takes the largest logit, on a tie the lowest id.  Otherwise
       x = (logit - max) / temperature, so that x <= 0 whatever the temperature
    4  top_k keeps the k largest x
    5  weight = floor(exp(x) * 2**40), with exp as in `weights_of`; from here on, integers only
    6  top_p keeps the largest weights until they reach top_p of their sum
    7  min_p keeps weights of at least min_p of the largest weight, which is 2**40
    8  typical_p keeps the ids whose surprise is nearest to the mean surprise, until they reach
       typical_p of the sum (Meister et al. 2022); surprise is -x, up to a constant that cancels out
    9  draw: target = (64 random bits * sum of weights) >> 64 (philox.uniform_bits); the id drawn is
       the first in id order at which the running sum exceeds target
Ties go to the lowest id.  A share of a sum is ceil(sum * fraction / 2**32), at least 1, where
fraction = floor(share * 2**32): at least one id is always kept, and a share of 1.0 keeps all.

A row whose logits contain NaN or +inf, or that has no id left to draw, gets the id FAILED; other
rows are not affected.  Log-probabilities are those of the model's own logits, before any of these
steps: logit - max - log(sum / 2**40), in float64, where sum is that of the weights of step 5 at
temperature 1.  So are the ranks.

Speculation: rows of one slot are drawn as if the draft tokens before them were part of the output.
Each row draws with the random bits of its own position, so it draws what plain decoding would draw
there, as long as every draft before it equals what its own row drew.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Floats
from llmsrv.backend.sampling.philox import uniform_bits
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import Extras
from llmsrv.backend.sampling.table import FRACTION_BITS
from llmsrv.backend.sampling.table import Ids
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import WEIGHT_BITS

Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SURPRISE_BITS = 20


def float32(hexadecimal: str) -> np.float32:
    return np.float32(float.fromhex(hexadecimal))


# exp(x) = 2**n * exp(r), where n = rint(x * LOG2_E), r = x - n * ln 2 in two steps, so that
# |r| <= ln(2) / 2.
# LN2_HIGH ends in zeros, so that n * LN2_HIGH is exact.  exp(r) = 1 + r + c2 r**2 + ... c6 r**6 by
# Horner's rule; the coefficients minimize the largest relative error, which is 3e-9, or 1e-7 with
# rounding.  exp(0) is exactly 1.
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
LEAST_X = np.float32(-28)  # for smaller x, exp(x) * 2**40 < 1: the weight is 0


@np.errstate(over="ignore")  # x may be -inf and a bias may overflow; both have a defined result
def sample(
    logits: Floats,
    table: SamplingTable,
    slots: Ids,
    output_positions: Integers,
    targets: Ids | None = None,
    drafts: Ids | None = None,
) -> Samples:
    """Plan.sample for logits [R, vocab_size]: samples each row with its slot's parameters, and
    counts the drawn ids for penalties.

    slots             [R], rows of the same slot adjacent
    output_positions  [R], the number of tokens in the sequence's output before this row's
    targets           [R], an id to report the log-probability of instead of drawing one, as for the
                      tokens of a prompt; -1 to draw
    drafts            [R], the draft token that the previous row, of the same slot, should draw; -1
                      in the first row of a slot that is drawn
    """
    no_ids = np.full(len(logits), -1, np.int32)
    targets = no_ids if targets is None else targets
    drafts = no_ids if drafts is None else drafts
    largest = logits.argmax(axis=1)  # in a row with NaN, this is the NaN
    ids = largest.astype(np.int32)
    is_sound = np.isfinite(logits[np.arange(len(logits)), largest])
    logprobs = np.full(len(logits), np.nan, np.float32)
    ranks = np.zeros(len(logits), np.int32)
    alternatives = [(np.zeros(0, np.int32), np.zeros(0, np.float32)) for _ in range(len(logits))]
    for row, slot in enumerate(slots.tolist()):
        parameters, extras = table.parameters[slot], table.extras.get(slot)
        if not is_sound[row]:
            ids[row] = FAILED
        elif targets[row] >= 0:
            ids[row] = targets[row]
        elif extras is not None or parameters["temperature"] > 0:
            seed, choice, position = parameters["seed"], parameters["choice"], output_positions[row]
            drafted = drafted_before(drafts, row)
            chosen = candidates(logits[row], parameters, extras, int(position), drafted)
            ids[row] = _draw(*chosen, uniform_bits(int(seed), int(choice), int(position)))
        if ids[row] != FAILED and parameters["num_logprobs"] >= 0:
            best = largest_of(logits[row], int(parameters["num_logprobs"]))
            values = log_softmax(logits[row], np.append(best, ids[row]))
            logprobs[row] = values[-1]
            ranks[row] = _rank_of(logits[row], int(ids[row]))
            alternatives[row] = best.astype(np.int32), values[:-1]
    for row in np.flatnonzero((targets < 0) & are_reached(ids, drafts)).tolist():
        table.count(int(slots[row]), int(ids[row]))
    return Samples(ids, logprobs, ranks, alternatives)


def drafted_before(drafts: Ids, row: int) -> Ids:
    """The draft tokens that precede the row in this step."""
    first = row
    while drafts[first] >= 0:
        first -= 1
    return drafts[first + 1 : row + 1]


def are_reached(ids: Ids, drafts: Ids) -> Bools:
    """[R], True if the row has an id and every draft before it equals what its own row drew."""
    reached: Bools = ids != FAILED
    for row in np.flatnonzero(drafts >= 0).tolist():
        reached[row] &= reached[row - 1] and ids[row - 1] == drafts[row]
    return reached


def log_softmax(logits: Floats, ids: Integers) -> Floats:
    """The log-probabilities of `ids` under the logits [vocab_size] of one row."""
    x = logits - logits.max()
    # Integers: the sum does not depend on the order.
    log_sum = math.log(int(weights_of(x[x >= LEAST_X]).sum()) / 2**WEIGHT_BITS)
    logprobs: Floats = (x[ids].astype(np.float64) - log_sum).astype(np.float32)
    return logprobs


def largest_of(values: Floats, k: int) -> Integers:
    """The indices of the k largest values, largest first, ties by lowest index."""
    if k == 0:
        return np.zeros(0, np.int64)
    kth = np.partition(values, len(values) - k)[len(values) - k]
    places = np.flatnonzero(values >= kth)  # k of them, or more on a tie with the kth
    return places[np.argsort(-values[places], kind="stable")[:k]]


def _rank_of(logits: Floats, id: int) -> int:
    """The place of an id, from 1, in the order of largest_of()."""
    before, behind = logits[:id] >= logits[id], logits[id + 1 :] > logits[id]
    return 1 + int(np.count_nonzero(before)) + int(np.count_nonzero(behind))


def candidates(
    logits: Floats,
    parameters: Any,
    extras: Extras | None,
    output_position: int = 0,
    drafted: Sequence[int] | Ids = (),
) -> tuple[Ids, Integers]:
    """Steps 1 to 8 for the logits [vocab_size] of one row: the ids that can be drawn, in id order,
    and their weights.  Both are empty if no id is left."""
    if extras is not None:
        logits = _masked(logits, extras, output_position, len(drafted))
        _apply_penalties(logits, parameters, extras, drafted)
    best = logits.argmax()
    if not np.isfinite(logits[best]):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    if parameters["temperature"] == 0:
        return np.array([best], np.int32), np.array([1], np.int64)
    # From here on, ids, x and weights are parallel arrays in id order of the ids that are left.
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


def _masked(logits: Floats, extras: Extras, output_position: int, num_drafted: int) -> Floats:
    """Step 1: a copy of the logits with bias and masks."""
    logits = logits.copy()
    logits[extras.bias_ids] += extras.bias_values
    if output_position < extras.min_tokens:
        logits[extras.end_ids] = -np.inf
    grammar = extras.grammar
    if grammar is not None:
        grammar = grammar[min(num_drafted, len(grammar) - 1)]
    for mask in extras.allowed, grammar:
        if mask is not None:
            bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")
            logits[bits[: len(logits)] == 0] = -np.inf
    return logits


def _apply_penalties(
    logits: Floats, parameters: Any, extras: Extras, drafted: Sequence[int] | Ids
) -> None:
    """Step 2, in place."""
    if extras.counts is None or extras.in_prompt is None:
        return
    counts = extras.counts.copy()
    np.add.at(counts, np.asarray(drafted, np.int64), 1)
    seen = np.flatnonzero((counts > 0) | extras.in_prompt)
    values, penalty = logits[seen], parameters["repetition_penalty"]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    in_output = np.flatnonzero(counts)
    logits[in_output] -= parameters["presence_penalty"]
    logits[in_output] -= parameters["frequency_penalty"] * counts[in_output].astype(np.float32)


def weights_of(x: Floats) -> Integers:
    """floor(exp(x) * 2**40) for float32 x in -28 .. 0, with every operation rounded separately."""
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    exp_r = np.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        exp_r = exp_r * r + coefficient
    # Scaling by a power of two is exact.  Weights are not negative, so astype rounds down.
    weights: Integers = np.ldexp(exp_r, n.astype(np.int32) + WEIGHT_BITS).astype(np.int64)
    return weights


def _share(total: int, fraction: int) -> int:
    """`fraction` / 2**32 of the total, rounded up, at least 1."""
    return max(1, -(-total * fraction >> FRACTION_BITS))


def _until(order: Integers, weights: Integers, goal: int) -> Integers:
    """The shortest prefix of `order` whose weights reach the goal, sorted into id order."""
    count = np.searchsorted(weights[order].cumsum(), goal) + 1
    return np.sort(order[:count])


def _top_p(weights: Integers, fraction: int) -> Integers:
    total = int(weights.sum())
    goal = _share(total, fraction)
    # Leave the long tail unsorted: all weights below (total - goal) / N together are less than
    # total - goal, so the others reach the goal without them.
    likely = np.flatnonzero(weights * len(weights) >= total - goal)
    return _until(likely[np.argsort(-weights[likely], kind="stable")], weights, goal)


def _typical_p(x: Floats, weights: Integers, fraction: int) -> Integers:
    surprise = np.floor(-x * np.float32(2**SURPRISE_BITS)).astype(np.int64)
    # w * surprise stays below 2**60 / e, since w = 2**40 * exp(x) and t * exp(-t) <= 1 / e.  The
    # shifts make the sums fit for any vocabulary.
    mean = int((weights * surprise >> 24).sum()) // (int(weights.sum()) >> 24)
    order = np.argsort(np.abs(surprise - mean), kind="stable")
    return _until(order, weights, _share(int(weights.sum()), fraction))
