"""From a request's sampling parameters to the backend's table of them."""

from llmsrv.backend.sampling import SamplingParameters
from llmsrv.backend.sampling import SamplingTable
from llmsrv.engine.messages import Sampling
from llmsrv.errors import ApiError

# Parameter -> least and largest value; what the API allows is narrower, what the table holds is not
# wider.  A comparison with NaN is false, so NaN is out of every range.
RANGES = {
    "seed": (0, 2**64 - 1),
    "temperature": (0.0, 1e6),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "num_logprobs": (-1, 1000),
}


def check_sampling(sampling: Sampling) -> None:
    """Raises ApiError naming the first parameter that is out of its range."""
    for name, (least, largest) in RANGES.items():
        value = getattr(sampling, name)
        if not least <= value <= largest:
            raise ApiError(
                400,
                f"Invalid '{name}': expected a value from {least} to {largest}, but got {value}.",
                param=name,
                code="invalid_value",
            )


def write_sampling(table: SamplingTable, slot: int, sampling: Sampling, choice: int) -> None:
    """Gives the slot to a sequence of these parameters, which check_sampling has passed."""
    table.set(
        slot,
        SamplingParameters(
            seed=sampling.seed,
            choice=choice,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            num_logprobs=sampling.num_logprobs,
        ),
    )
