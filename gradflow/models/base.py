"""What every energy is: a function to be minimized, with its differential."""

import abc
from typing import Generic

import equinox as eqx
import jax

from ..types import P, Scalar


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
