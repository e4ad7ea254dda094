"""How fast EM and the flow converge near an optimum: eigenvalues, and what runs do."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from ..em import AbstractIteration, ExpectationMaximization, Squarem
from ..models.factor import LatentGaussian, NegativeLogLikelihood


# An eigenvalue of the Hessian below minus this times the largest is negative; one
# within it of 0, or as close to 1 of EM's Jacobian, belongs to a rotation.
FLAT = 1e-7
# Steps of Squarem from the end of a run to where rates are computed.
POLISH = 1000
# The gaps between which a rate is read off.
WINDOW = (1e-11, 1e-7)


@eqx.filter_jit
def polished(energy: NegativeLogLikelihood, point: LatentGaussian) -> LatentGaussian:
    """A point further down, by Squarem."""
    iteration = Squarem(ExpectationMaximization(energy))
    return jax.lax.fori_loop(0, POLISH, lambda _, p: iteration.step(p), point)


def em_rate(iteration: AbstractIteration, best: LatentGaussian) -> float:
    """The largest eigenvalue of EM's Jacobian but those of rotations, which are 1."""
    flat, restore = ravel_pytree(best)
    mapped = lambda x: ravel_pytree(iteration.step(restore(x)))[0]
    values = np.abs(np.linalg.eigvals(np.asarray(jax.jit(jax.jacobian(mapped))(flat))))
    return float(np.max(values[values < 1 - FLAT], initial=0.0))


def flow_rate(energy: NegativeLogLikelihood, best: LatentGaussian) -> float:
    """The least eigenvalue of the Hessian but those of rotations, which are 0."""
    flat, restore = ravel_pytree(best)
    hessian = jax.jit(jax.hessian(lambda x: energy(restore(x))))(flat)
    values = np.linalg.eigvalsh(np.asarray(hessian))
    return float(np.min(values[values > FLAT * values[-1]]))


def slope(
    times: np.ndarray, gaps: np.ndarray, predicted: float
) -> tuple[float, dict[str, Any]]:
    """That of the logarithm of the gap near the optimum, and the line of theory."""
    inside = np.flatnonzero((gaps > WINDOW[0]) & (gaps < WINDOW[1]))
    if inside.size < 3:
        return float("nan"), {"x": [], "y": []}
    seen = np.polyfit(times[inside], np.log(gaps[inside]), 1)[0]
    ends = times[inside[[0, -1]]]
    line = gaps[inside[0]] * np.exp(predicted * (ends - ends[0]))
    return float(seen), {"x": ends, "y": line}
