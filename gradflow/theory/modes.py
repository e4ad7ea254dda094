"""Critical points told by the modes of the data that they have learned: what the
theories of probabilistic PCA and CCA share."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..models.base import EnergyBelow
from ..models.factor import LatentGaussian, NegativeLogLikelihood
from ..types import Scalar
from .base import Match


# Strengths closer than this times the largest are tied.
TIE = 1e-9
# Roundings per variable that a critical point's equations may be off.
ROUNDINGS = 200
# A singular value of the loadings below this times the last kept one is dropped.
DROPPED = 1e-6


def matched(
    theory: Any,
    off: Scalar,
    values: Float[Array, " values"],
    unit: Scalar,
    modes: Bool[Array, " modes"],
    value: Scalar,
    point: LatentGaussian,
) -> Match:
    """The match with the critical point of `modes`: `off` is how far its equations are
    from 0, `values` the singular values whose number is its rank, of size `unit`."""
    size = jnp.sum(modes)
    last = jnp.where(size > 0, values[jnp.maximum(size - 1, 0)], unit)
    padded = jnp.append(values, 0.0)
    gap = padded[jnp.minimum(size, values.size)] / last
    rounding = ROUNDINGS * len(point.loadings) * float(jnp.finfo(values.dtype).eps)
    critical = (off <= rounding) & (gap <= DROPPED)
    optimal = value - theory.optimal_energy() <= TIE
    return Match(
        critical,
        critical & jnp.all(point.loadings == 0),
        critical & optimal,
        critical & ~optimal,
        jnp.array(False),
        modes,
        value,
        size,
        gap,
    )


def nearest(
    share: Float[Array, " modes"], values: Float[Array, " modes"]
) -> Bool[Array, " modes"]:
    """Modes with more than half of their share; tied ones are counted together, as
    their basis is arbitrary, and the first ones reported."""
    close = jnp.abs(values[:, None] - values[None, :]) <= TIE * values[0]
    tied = close.astype(share.dtype)
    learned = jnp.round(tied @ share)
    place = jnp.sum(jnp.tril(tied, -1), axis=1)
    return place < learned


def escape(rate: Scalar, far: Scalar) -> Scalar:
    """The time in which what is `far` from a saddle grows to 1."""
    away = (rate > 0) & (far > 0) & (far < 1)
    time = -jnp.log(jnp.where(away, far, 1)) / jnp.where(away, rate, 1)
    return jnp.where(rate > 0, jnp.where(far > 0, time, jnp.inf), jnp.inf)


def below(
    energy: NegativeLogLikelihood, optimal: Scalar, gap: Scalar
) -> EnergyBelow[LatentGaussian]:
    """Whether the energy is less than `gap` above the least."""
    # Energies may be negative; rounding is relative to their size.
    return EnergyBelow(
        energy,
        level=optimal + (1 - 1e-6) * gap,
        noise=jnp.full_like(optimal, 500),
        offset=jnp.abs(optimal) + energy.size,
    )


def subsets(theory: Any) -> Iterator[tuple[int, ...]]:
    """Every set of at most `theory.latents` modes, smallest first.

    **Raises:** `ValueError` where they are more than 100 000."""
    count = theory.spectrum().size
    sizes = range(min(count, theory.latents) + 1)
    total = sum(math.comb(count, size) for size in sizes)
    if total > 100_000:
        raise ValueError(
            f"there are {total} index sets of {count} modes and {theory.latents} "
            "latent variables: too many to list; ask for the critical point of one set"
        )
    for size in sizes:
        yield from itertools.combinations(range(count), size)


def checked(modes: Sequence[int], count: int, most: int) -> Int[np.ndarray, " modes"]:
    """At most `most` different modes, of `count`."""
    kept = [int(j) for j in modes]
    if len(set(kept)) < len(kept) or any(not 0 <= j < count for j in kept):
        raise ValueError(
            f"modes={tuple(kept)} must be different numbers from 0 to {count - 1}"
        )
    if len(kept) > most:
        raise ValueError(
            f"modes={tuple(kept)} are {len(kept)}, more than latents={most}"
        )
    return np.asarray(kept, dtype=int)


def check_free(energy: NegativeLogLikelihood) -> None:
    """Refuses an energy that holds loadings at 0."""
    if energy.pattern is not None:
        raise ValueError(
            "the energy has a pattern: with loadings held at 0 there is no closed form "
            "(but see battery_optimum)"
        )


def check_latents(latents: Any) -> None:
    """Refuses what is no number of latent variables."""
    if isinstance(latents, bool) or not isinstance(latents, (int, np.integer)):
        raise ValueError(f"latents must be a whole number, got {latents!r}")
    if latents < 1:
        raise ValueError(f"latents must be >= 1, got {latents}")
