"""Predicts how long a step takes from its number of rows, by measuring earlier steps.

The scheduler uses this to decide how many rows a step may have, and what counts as a row
(Chunk.work).

The cost of a step grows with its rows, but never faster than proportionally, since every step reads
all weights once.  So one measured step bounds the cost of all others.  If r rows took c seconds,
then n < r rows take between c * n / r and c seconds, and n > r rows between c and c * n / r.
"""

import bisect
import math

WEIGHT = 0.25  # of the latest step in the moving average
# A step that takes more than this multiple of its average was delayed by something else.
OUTLIER = 2.0
MIN_COST_S = 1e-6


class StepCosts:
    def __init__(self) -> None:
        self._rows = [0]  # numbers of rows that were measured, ascending
        self._costs_s = [0.0]

    def record(self, num_rows: int, elapsed_s: float) -> None:
        """Records the duration of a step with num_rows rows."""
        shift = max(0, num_rows.bit_length() - 3)
        rows = num_rows >> shift << shift  # four buckets per power of two
        i = bisect.bisect_left(self._rows, rows)
        if i == len(self._rows) or self._rows[i] != rows:
            self._rows.insert(i, rows)
            self._costs_s.insert(i, max(MIN_COST_S, elapsed_s))
        else:
            before_s = self._costs_s[i]
            self._costs_s[i] += WEIGHT * (min(elapsed_s, OUTLIER * before_s) - before_s)
        self._bound_others(rows, self._costs_s[i])

    def of(self, num_rows: int) -> float:
        """Expected seconds of a step with num_rows >= 1 rows; 0 before the first step."""
        i = bisect.bisect_left(self._rows, num_rows)
        if i == len(self._rows):
            return self._costs_s[-1] * num_rows / max(1, self._rows[-1])
        cost_s = self._between(i, num_rows)
        if i == 1 and len(self._rows) > 2:  # below all measurements: extrapolate the next segment
            cost_s = max(cost_s, self._between(2, num_rows))
        return cost_s

    def rows_within(self, limit_s: float) -> float:
        """How many rows a step may have to take at most limit_s seconds; inf before the first step.

        Between two measurements, at most twice the rows of the smaller one.
        """
        if len(self._rows) == 1:
            return math.inf
        i = bisect.bisect_right(self._costs_s, limit_s)
        if i == len(self._rows):
            return self._rows[-1] * limit_s / self._costs_s[-1]
        below, above = self._rows[i - 1], self._rows[i]
        below_s, above_s = self._costs_s[i - 1], self._costs_s[i]
        share = (limit_s - below_s) / (above_s - below_s)
        return min(below + share * (above - below), 2 * below)

    def _between(self, i: int, num_rows: int) -> float:
        """Linear interpolation between the measurements i - 1 and i."""
        below, above = self._rows[i - 1], self._rows[i]
        share = (num_rows - below) / (above - below)
        return self._costs_s[i - 1] + share * (self._costs_s[i] - self._costs_s[i - 1])

    def _bound_others(self, rows: int, cost_s: float) -> None:
        for i, n in enumerate(self._rows):
            bounds = sorted((cost_s, cost_s * n / rows))
            self._costs_s[i] = min(max(self._costs_s[i], bounds[0]), bounds[1])
