"""How long steps take by their number of rows, from those that were made, and from that how many
rows a step may have.  What counts as how many rows is the scheduler's to say (Chunk.work).

A step's cost grows with its rows, but never faster than they do, since each step reads every weight
once.  So what one step took bounds what all others take: of r rows and c seconds, fewer rows n take
from c * n / r to c seconds, and more rows from c to c * n / r.
"""

import bisect
import math

WEIGHT = 0.25  # of the last step in its average
# A step that takes longer than so many times what was expected was held up by something else.
OUTLIER = 2.0
MIN_COST_S = 1e-6


class StepCosts:
    def __init__(self) -> None:
        self._rows = [0]  # what is known, ascending
        self._costs_s = [0.0]

    def record(self, num_rows: int, elapsed_s: float) -> None:
        """A step of so many rows took so long."""
        shift = max(0, num_rows.bit_length() - 3)
        rows = num_rows >> shift << shift  # four kinds of steps from one power of two to the next
        i = bisect.bisect_left(self._rows, rows)
        if i == len(self._rows) or self._rows[i] != rows:
            self._rows.insert(i, rows)
            self._costs_s.insert(i, max(MIN_COST_S, elapsed_s))
        else:
            before_s = self._costs_s[i]
            self._costs_s[i] += WEIGHT * (min(elapsed_s, OUTLIER * before_s) - before_s)
        self._bound_others(rows, self._costs_s[i])

    def of(self, num_rows: int) -> float:
        """Seconds that a step of so many rows, at least 1, takes; 0 before the first step."""
        i = bisect.bisect_left(self._rows, num_rows)
        if i == len(self._rows):
            return self._costs_s[-1] * num_rows / max(1, self._rows[-1])
        cost_s = self._between(i, num_rows)
        if i == 1 and len(self._rows) > 2:  # below all that is known, as what is known goes on
            cost_s = max(cost_s, self._between(2, num_rows))
        return cost_s

    def rows_within(self, limit_s: float) -> float:
        """How many rows a step may have to take no longer, by of(), and at most twice as many as
        were measured and took no longer; without end before the first step."""
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
        """On the line through what is known at i and before it."""
        below, above = self._rows[i - 1], self._rows[i]
        share = (num_rows - below) / (above - below)
        return self._costs_s[i - 1] + share * (self._costs_s[i] - self._costs_s[i - 1])

    def _bound_others(self, rows: int, cost_s: float) -> None:
        for i, n in enumerate(self._rows):
            bounds = sorted((cost_s, cost_s * n / rows))
            self._costs_s[i] = min(max(self._costs_s[i], bounds[0]), bounds[1])
