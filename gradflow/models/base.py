"""What every energy is: a function to be minimized, with its differential."""

import abc
import math
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ..types import P, Scalar


# What an E-step finds.
S = TypeVar("S")


class AbstractEnergy(eqx.Module, Generic[P]):
    """An objective $E$ on points, to be minimized.

    To implement your own: subclass and define `__call__`. Override `differential`
    only where a hand-written derivative is faster than automatic differentiation.
    """

    @abc.abstractmethod
    def __call__(self, point: P) -> Scalar:
        """$E$ at `point`."""

    def differential(self, point: P) -> P:
        r"""The Euclidean derivative $\mathrm{d}E$ at `point`, shaped as `point`."""
        return jax.grad(self.__call__)(point)


class AbstractLatentEnergy(AbstractEnergy[P], Generic[P, S]):
    """Minus a log-likelihood with latent variables: what EM needs, and no more.

    To implement your own: `__call__` and two steps, of which `m_step` minimizes the
    expected energy of data and latent variables, given what `e_step` found at a point.
    """

    @abc.abstractmethod
    def e_step(self, point: P) -> S:
        """The expected sufficient statistics at `point`."""

    @abc.abstractmethod
    def m_step(self, point: P, statistics: S) -> P:
        """The next point; `point` says of what kind."""

    def at_bounds(self, point: P) -> dict[str, Bool[Array, "..."]]:
        """By name, flags of bounds that hold `point` where an unbounded step would have
        gone further; none by default."""
        del point
        return {}


class EnergyBelow(eqx.Module, Generic[P]):
    """A predicate on points: their energy, with `noise` roundings of its size added, is
    below `level`.

    Of all stopping rules the cheapest, and one that a batch of runs can look at in
    whatever form it keeps its points.
    """

    energy: AbstractEnergy[P]
    level: Scalar
    noise: Scalar
    offset: Scalar

    def __call__(self, point: P) -> Bool[Array, ""]:
        return self.holds(self.energy(point))

    def holds(self, energy):
        """For an energy, or an array of energies."""
        rounding = self.noise * jnp.finfo(energy.dtype).eps
        return energy + rounding * (energy + self.offset) < self.level


# Kinds of energies and points that passed: to trace them takes longer than some runs.
_CHECKED: set[Any] = set()


def check_point(name: str, energy: Any, point: Any) -> None:
    """Refuses what an energy can't be computed of; nothing is computed.

    **Raises:** `ValueError`, the energy's own if it has one.
    """
    leaves, structure = jax.tree.flatten((energy, point))
    kinds = tuple(
        (leaf.shape, leaf.dtype)
        if eqx.is_array(leaf)
        else type(leaf)
        if isinstance(leaf, (int, float, complex))
        else leaf
        for leaf in leaves
    )
    try:
        if (structure, kinds) in _CHECKED:
            return
    except TypeError:  # something that has no hash
        kinds = None
    try:
        jax.eval_shape(energy, point)
    except ValueError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{name} is no point of {type(energy).__name__}: {type(error).__name__}: "
            f"{text}"
        ) from error
    if kinds is not None:
        _CHECKED.add((structure, kinds))


def as_array(value: Any) -> Any:
    """A Python number or a numpy array of them as a jax array, so that one compiled
    program serves all values; anything else as it is, to be refused by name."""
    if isinstance(value, np.ndarray):
        numeric = value.dtype.kind in "iuf"
    else:
        numeric = isinstance(value, (int, float, np.number))
        numeric = numeric and not isinstance(value, bool)
    return jnp.asarray(value, jnp.result_type(float)) if numeric else value


def check_positive(name: str, value: Any) -> None:
    """Refuses what is not one finite number > 0; traced values pass.

    **Raises:** `ValueError`.
    """
    if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return
    if not isinstance(value, jax.Array) or value.shape != ():
        raise ValueError(f"{name} must be a number > 0, got {value!r}")
    if not (float(value) > 0 and math.isfinite(float(value))):
        raise ValueError(f"{name} must be a finite number > 0, got {float(value)}")
