"""How far each pair of values turns from one position to the next, with every scaling of contexts.

Source: transformers' modeling_rope_utils.py; the papers are named at each scaling.
"""

import math
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.model.keys import GGUFKeys
from llmsrv.model.keys import Keys
from llmsrv.model.tensors import Tensors

SCALINGS = ("default", "none", "linear", "llama3", "yarn", "longrope", "su")
DEFAULT_THETA = 10000.0
MOST_THETA = 1e12
MOST_FACTOR = 1e6
MOST_POSITIONS = 1 << 28


@dataclass(frozen=True, eq=False)
class Rope:
    """As in RopeAndStore in backend/program.py; long_from as in Program."""

    frequencies: Array
    long_frequencies: Array | None = None
    magnitude: float = 1.0
    long_from: int | None = None


def read_rope(keys: Keys, tensors: Tensors, head_dim: int) -> Rope:
    """The rope of a model, or of its global layers.

    In GGUF files the divisors of llama3 and longrope are tensors; elsewhere they are in the keys.
    """
    rotary_dim = _rotary_dim(keys, head_dim)
    theta = keys.real("rope_theta", MOST_THETA, default=DEFAULT_THETA)
    plain = _plain(rotary_dim, theta)
    short = tensors.maybe_values("rope_factors_short.weight", len(plain))
    kind = keys.get("rope_type", str)
    if kind not in (None, *SCALINGS):
        keys.refuse("rope_type", repr(kind), "one of " + ", ".join(SCALINGS))
    if kind in ("longrope", "su") or short is not None:
        return _longrope(keys, tensors, plain)
    if kind == "yarn":
        return _yarn(keys, plain, theta)
    if kind == "llama3":
        plain = plain / _llama3_divisors(keys, plain)
    elif kind == "linear" or (kind is None and isinstance(keys, GGUFKeys)):
        plain = plain / keys.real("factor", MOST_FACTOR, default=None if kind else 1.0)
    divisors = tensors.maybe_values("rope_freqs.weight", len(plain))
    return Rope(_float32(plain if divisors is None else plain / divisors))


def read_local_rope(keys: Keys, head_dim: int, theta: float | None) -> Rope:
    """That of the layers with a window, where contexts are not scaled for them.

    theta is the architecture's; where it has none, it is that of the other layers."""
    if theta is None:
        theta = keys.real("rope_theta", MOST_THETA, default=DEFAULT_THETA)
    theta = keys.real("rope_local_base_freq", MOST_THETA, default=theta)
    return Rope(_float32(_plain(_rotary_dim(keys, head_dim), theta)))


def original_context(keys: Keys) -> int:
    """Positions before the context was extended, where the file does not say otherwise."""
    length = keys.integer("max_position_embeddings", MOST_POSITIONS)
    return keys.integer("original_max_position_embeddings", MOST_POSITIONS, default=length)


def _rotary_dim(keys: Keys, head_dim: int) -> int:
    share = keys.real("partial_rotary_factor", most=1.0, default=1.0)
    rotary_dim = keys.integer("rotary_dim", most=head_dim, default=int(head_dim * share))
    if rotary_dim % 2:
        keys.refuse("rotary_dim", rotary_dim, "an even number")
    return rotary_dim


def _plain(rotary_dim: int, theta: float) -> Array:
    """Su et al. 2021, section 3.2.2."""
    plain: Array = theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    return plain


def _float32(frequencies: Array) -> Array:
    return frequencies.astype(np.float32)


def _llama3_divisors(keys: Keys, plain: Array) -> Array:
    """Between the two bounds of turns in the original context, from 1 to factor.

    Llama 3.1's reference code, apply_scaling."""
    factor = keys.real("factor", MOST_FACTOR)
    low = keys.real("low_freq_factor", MOST_FACTOR)
    high = keys.real("high_freq_factor", MOST_FACTOR)
    if high <= low:
        keys.refuse("high_freq_factor", high, f"more than low_freq_factor, {low}")
    original = keys.integer("original_max_position_embeddings", MOST_POSITIONS)
    turns = original * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    divisors: Array = 1 / ((1 - share) / factor + share)
    return divisors


def _yarn(keys: Keys, plain: Array, theta: float) -> Rope:
    """Pairs that turn fast stay as they are, slow ones are divided by factor, with a ramp between.

    Peng et al. 2023, sections 3.2 to 3.4."""
    factor = keys.real("factor", MOST_FACTOR)
    original = original_context(keys)
    if theta <= 1:
        keys.refuse("rope_theta", theta, "above 1")

    def pair_that_turns(times: float) -> float:
        return len(plain) * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low = pair_that_turns(keys.real("beta_fast", MOST_FACTOR, default=32.0))
    high = pair_that_turns(keys.real("beta_slow", MOST_FACTOR, default=1.0))
    if keys.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(plain) - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0, 1)
    frequencies = plain * (1 - ramp) + plain / factor * ramp
    return Rope(_float32(frequencies), magnitude=_yarn_magnitude(keys, factor))


def _yarn_magnitude(keys: Keys, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    given = keys.maybe_real("attention_factor", MOST_FACTOR)
    if isinstance(keys, GGUFKeys):
        return magnitude(1) * (given or 1.0)  # llama.cpp multiplies the two
    if given is not None:
        return given
    scale = keys.maybe_real("mscale", MOST_FACTOR)
    scale_all = keys.maybe_real("mscale_all_dim", MOST_FACTOR)
    if scale is not None and scale_all is not None:
        return magnitude(scale) / magnitude(scale_all)
    return magnitude(1)


def _longrope(keys: Keys, tensors: Tensors, plain: Array) -> Rope:
    """Two sets of divisors, for sequences within the original context and for longer ones.

    Ding et al. 2024, section 3."""
    original = keys.integer("original_max_position_embeddings", MOST_POSITIONS, least=2)
    ropes = []
    for kind in ("short", "long"):
        divisors = tensors.maybe_values(f"rope_factors_{kind}.weight", len(plain))
        if divisors is None:
            divisors = np.array(keys.reals(f"{kind}_factor", len(plain), MOST_FACTOR))
        ropes.append(_float32(plain / divisors))
    magnitude = keys.maybe_real("attention_factor", MOST_FACTOR)
    if magnitude is None:
        length = keys.integer("max_position_embeddings", MOST_POSITIONS)
        factor = keys.real("factor", MOST_FACTOR, default=length / original)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(ropes[0], ropes[1], magnitude, long_from=original)
