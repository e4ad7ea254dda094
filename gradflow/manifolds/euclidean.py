"""Flat space: the geometry of plain gradient flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..types import P, Scalar
from .base import AbstractManifold


class Euclidean(AbstractManifold[P]):
    """All points of one shape, with the sum of products as metric."""

    def gradient(self, point: P, differential: P) -> P:
        del point
        return differential

    def inner(self, point: P, u: P, v: P) -> Scalar:
        del point
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), u, v)
        return jax.tree.reduce(jnp.add, products)

    def chart(self, point: P) -> tuple[Callable[[Float[Array, " dim"]], P], int]:
        origin, rebuild = ravel_pytree(point)
        return lambda step: rebuild(origin + step), origin.size

    def defect(self, point: P) -> Scalar:
        return jnp.zeros((), dtype=jax.tree.leaves(point)[0].dtype)
