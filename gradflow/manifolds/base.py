"""What a flow needs to know of the geometry: four methods."""

import abc
from collections.abc import Callable
from typing import Generic

import equinox as eqx
from jaxtyping import Array, Float

from ..types import P, Scalar


class AbstractManifold(eqx.Module, Generic[P]):
    """A set of points with a metric.

    To implement your own: define these four methods.
    """

    @abc.abstractmethod
    def gradient(self, point: P, differential: P) -> P:
        r"""The Riemannian gradient: the tangent $\xi$ with
        $g(\xi, \eta) = \mathrm{d}E(\eta)$ for every tangent $\eta$."""

    @abc.abstractmethod
    def inner(self, point: P, u: P, v: P) -> Scalar:
        """The metric $g(u, v)$ of two tangents at `point`."""

    @abc.abstractmethod
    def chart(self, point: P) -> tuple[Callable[[Float[Array, " dim"]], P], int]:
        """Local coordinates: a map that takes 0 to `point`, and its dimension."""

    @abc.abstractmethod
    def defect(self, point: P) -> Scalar:
        """How far `point` is off the manifold; 0 on it."""
