"""The angle by which rope turns each pair of values per position, with all context scalings.

Source: transformers' modeling_rope_utils.py; each scaling cites its paper.
"""

import math
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.model.hparams import GGUFHParams
from llmsrv.model.hparams import HParams
from llmsrv.model.tensors import Tensors

SCALINGS = ("default", "none", "linear", "llama3", "yarn", "longrope", "su")
DEFAULT_THETA = 10000.0
MAX_THETA = 1e12
MAX_FACTOR = 1e6
MAX_POSITIONS = 1 << 28


@dataclass(frozen=True, eq=False)
class Rope:
    """As in RopeAndStore in backend/program.py; long_from as in Program."""

    frequencies: Array
    long_frequencies: Array | None = None
    magnitude: float = 1.0
    long_from: int | None = None


def read_rope(hparams: HParams, tensors: Tensors, head_dim: int) -> Rope:
    """Reads the rope of a model, or of its global layers.

    The divisors of llama3 and longrope are tensors in GGUF files, and hyperparameters elsewhere.
    """
    rotary_dim = _rotary_dim(hparams, head_dim)
    theta = hparams.real("rope_theta", MAX_THETA, default=DEFAULT_THETA)
    inv_freq = _inverse_frequencies(rotary_dim, theta)
    short = tensors.maybe_values("rope_factors_short.weight", len(inv_freq))
    rope_type = hparams.get("rope_type", str)
    if rope_type not in (None, *SCALINGS):
        hparams.refuse("rope_type", repr(rope_type), "one of " + ", ".join(SCALINGS))
    if rope_type in ("longrope", "su") or short is not None:
        return _longrope(hparams, tensors, inv_freq)
    if rope_type == "yarn":
        return _yarn(hparams, inv_freq, theta)
    if rope_type == "llama3":
        inv_freq = inv_freq / _llama3_divisors(hparams, inv_freq)
    elif rope_type == "linear" or (rope_type is None and isinstance(hparams, GGUFHParams)):
        inv_freq = inv_freq / hparams.real("factor", MAX_FACTOR, default=None if rope_type else 1.0)
    divisors = tensors.maybe_values("rope_freqs.weight", len(inv_freq))
    return Rope(_float32(inv_freq if divisors is None else inv_freq / divisors))


def read_local_rope(hparams: HParams, head_dim: int, theta: float | None) -> Rope:
    """Reads the rope of windowed layers to which context scaling does not apply.

    theta  the default for these layers; None: that of the other layers"""
    if theta is None:
        theta = hparams.real("rope_theta", MAX_THETA, default=DEFAULT_THETA)
    theta = hparams.real("rope_local_base_freq", MAX_THETA, default=theta)
    return Rope(_float32(_inverse_frequencies(_rotary_dim(hparams, head_dim), theta)))


def original_context(hparams: HParams) -> int:
    """Positions before the context was extended; by default, max_position_embeddings."""
    length = hparams.integer("max_position_embeddings", MAX_POSITIONS)
    return hparams.integer("original_max_position_embeddings", MAX_POSITIONS, default=length)


def _rotary_dim(hparams: HParams, head_dim: int) -> int:
    share = hparams.real("partial_rotary_factor", maximum=1.0, default=1.0)
    rotary_dim = hparams.integer("rotary_dim", maximum=head_dim, default=int(head_dim * share))
    if rotary_dim % 2:
        hparams.refuse("rotary_dim", rotary_dim, "an even number")
    return rotary_dim


def _inverse_frequencies(rotary_dim: int, theta: float) -> Array:
    """Source: Su et al. 2021, section 3.2.2."""
    inv_freq: Array = theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    return inv_freq


def _float32(frequencies: Array) -> Array:
    return frequencies.astype(np.float32)


def _llama3_divisors(hparams: HParams, inv_freq: Array) -> Array:
    """Divisors from 1 to factor, interpolated by the number of turns in the original context.

    Source: Llama 3.1's reference code, apply_scaling."""
    factor = hparams.real("factor", MAX_FACTOR)
    low = hparams.real("low_freq_factor", MAX_FACTOR)
    high = hparams.real("high_freq_factor", MAX_FACTOR)
    if high <= low:
        hparams.refuse("high_freq_factor", high, f"more than low_freq_factor, {low}")
    original = hparams.integer("original_max_position_embeddings", MAX_POSITIONS)
    turns = original * inv_freq / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    divisors: Array = 1 / ((1 - share) / factor + share)
    return divisors


def _yarn(hparams: HParams, inv_freq: Array, theta: float) -> Rope:
    """Leaves pairs that turn fast unchanged and divides slow ones by factor, with a ramp between.

    Source: Peng et al. 2023, sections 3.2 to 3.4."""
    factor = hparams.real("factor", MAX_FACTOR)
    original = original_context(hparams)
    if theta <= 1:
        hparams.refuse("rope_theta", theta, "above 1")

    def pair_with_turns(times: float) -> float:
        return len(inv_freq) * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low = pair_with_turns(hparams.real("beta_fast", MAX_FACTOR, default=32.0))
    high = pair_with_turns(hparams.real("beta_slow", MAX_FACTOR, default=1.0))
    if hparams.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(inv_freq) - 1)
    ramp = np.clip((np.arange(len(inv_freq)) - low) / max(high - low, 0.001), 0, 1)
    frequencies = inv_freq * (1 - ramp) + inv_freq / factor * ramp
    return Rope(_float32(frequencies), magnitude=_yarn_magnitude(hparams, factor))


def _yarn_magnitude(hparams: HParams, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    given = hparams.maybe_real("attention_factor", MAX_FACTOR)
    if isinstance(hparams, GGUFHParams):
        return magnitude(1) * (given or 1.0)  # llama.cpp multiplies the two
    if given is not None:
        return given
    scale = hparams.maybe_real("mscale", MAX_FACTOR)
    scale_all = hparams.maybe_real("mscale_all_dim", MAX_FACTOR)
    if scale is not None and scale_all is not None:
        return magnitude(scale) / magnitude(scale_all)
    return magnitude(1)


def _longrope(hparams: HParams, tensors: Tensors, inv_freq: Array) -> Rope:
    """Two sets of divisors, for sequences within the original context and for longer ones.

    Source: Ding et al. 2024, section 3."""
    original = hparams.integer("original_max_position_embeddings", MAX_POSITIONS, minimum=2)
    ropes = []
    for length in ("short", "long"):
        divisors = tensors.maybe_values(f"rope_factors_{length}.weight", len(inv_freq))
        if divisors is None:
            divisors = np.array(hparams.reals(f"{length}_factor", len(inv_freq), MAX_FACTOR))
        ropes.append(_float32(inv_freq / divisors))
    magnitude = hparams.maybe_real("attention_factor", MAX_FACTOR)
    if magnitude is None:
        context_length = hparams.integer("max_position_embeddings", MAX_POSITIONS)
        factor = hparams.real("factor", MAX_FACTOR, default=context_length / original)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(ropes[0], ropes[1], magnitude, long_from=original)
