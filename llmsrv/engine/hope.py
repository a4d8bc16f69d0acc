"""How likely a drafted token is to be kept, when those before it are: by what it is drafted for,
and by what became of those of the same sequence that were drafted for the same reason."""

from enum import IntEnum

WEIGHT = 0.1  # of a token's fate in the hope for the next ones
FORGIVENESS = 0.005  # of each draft that was not tried: text changes


class Ground(IntEnum):
    """Why a token is drafted: it follows tokens that were there before, and what it followed then,
    too; a small model drew it; a grammar leaves nothing else."""

    FEW_SAME = 0
    SOME_SAME = 1
    MANY_SAME = 2
    MODEL = 3
    GRAMMAR = 4


# At first.  A grammar leaves one text, which tokens may still spell in several ways.
FIRST_HOPES = {
    Ground.FEW_SAME: 0.4,
    Ground.SOME_SAME: 0.65,
    Ground.MANY_SAME: 0.85,
    Ground.MODEL: 0.5,
    Ground.GRAMMAR: 0.95,
}
SOME, MANY = 4, 8  # tokens


def ground_of(num_same: int) -> Ground:
    """Of a token that follows so many that were there before."""
    if num_same < SOME:
        return Ground.FEW_SAME
    return Ground.SOME_SAME if num_same < MANY else Ground.MANY_SAME


class Hopes:
    """Those of one sequence."""

    def __init__(self) -> None:
        self._hopes = dict(FIRST_HOPES)

    def of(self, ground: Ground) -> float:
        return self._hopes[ground]

    def note(self, ground: Ground, is_kept: bool) -> None:
        self._hopes[ground] += WEIGHT * (is_kept - self._hopes[ground])

    def forgive(self, ground: Ground) -> None:
        """A draft that might begin so was not tried."""
        self._hopes[ground] += FORGIVENESS * (FIRST_HOPES[ground] - self._hopes[ground])
