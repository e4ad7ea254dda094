"""Flows: the ordinary differential equations that descend an energy."""

import abc
from typing import Generic

import equinox as eqx
import jax
import jax.numpy as jnp

from .arguments import checked_fields
from .manifolds.base import AbstractManifold
from .manifolds.euclidean import Euclidean
from .models.base import AbstractEnergy
from .types import P, Scalar


class AbstractFlow(eqx.Module, Generic[P]):
    """An autonomous flow $\\dot x = v(x)$ that descends `energy`, measured by
    `manifold`.

    To implement your own: subclass and define `velocity`.
    """

    energy: eqx.AbstractVar[AbstractEnergy[P]]
    manifold: eqx.AbstractVar[AbstractManifold[P]]

    @abc.abstractmethod
    def velocity(self, point: P) -> P:
        """$\\dot x$ at `point`."""

    def speed(self, point: P) -> Scalar:
        r"""$\|\dot x\|_g$, the square root of $-\mathrm{d}E/\mathrm{d}t$ for a gradient
        flow."""
        velocity = self.velocity(point)
        return jnp.sqrt(self.manifold.inner(point, velocity, velocity))


@checked_fields
class GradientFlow(AbstractFlow[P]):
    r"""$\dot x = -\mathrm{grad}\,E(x)$."""

    energy: AbstractEnergy[P]
    manifold: AbstractManifold[P] = Euclidean()

    def velocity(self, point: P) -> P:
        gradient = self.manifold.gradient(point, self.energy.differential(point))
        return jax.tree.map(jnp.negative, gradient)
