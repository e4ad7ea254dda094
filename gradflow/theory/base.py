"""What is proved about one energy, in the form that verdicts need."""

import abc
from collections.abc import Callable
from typing import Generic

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..models.base import AbstractEnergy
from ..models.linear import AbstractLinearNetwork
from ..types import P, Scalar


class Match(eqx.Module):
    """How a point compares with the critical points that the theory knows.

    - `critical`: it is one of them, to rounding, with every decision about what is
      zero backed by a gap; a point that is merely close is not.
    - `exact`: and that does not even rest on rounding: what must vanish is 0.0.
    - `optimal`, `strict`, `nonstrict`: of which kind (none may be known).
    - `undecided`: it is critical and no minimum, and no closed form says of which kind:
      its Hessian decides.
    - `modes`: the modes of the nearest critical point; `value`: the energy there.
    - `rank`, `rank_gap`: rank of that point, and how sharply the point at hand has it
      (the first dropped singular value over the last kept; 0 is perfect).
    """

    critical: Bool[Array, ""]
    exact: Bool[Array, ""]
    optimal: Bool[Array, ""]
    strict: Bool[Array, ""]
    nonstrict: Bool[Array, ""]
    modes: Bool[Array, " modes"]
    value: Scalar
    rank: Int[Array, ""]
    rank_gap: Scalar
    undecided: Bool[Array, ""] | bool = False


class Limit(eqx.Module):
    """A saddle at which the exact flow is certain to end.

    - `certain`: whether it is; the rest means something only then.
    - `strict`: whether its Hessian has a negative eigenvalue.
    - `modes`, `value`, `rank`: its modes, the energy there, and its rank.
    """

    certain: Bool[Array, ""]
    strict: Bool[Array, ""]
    modes: Bool[Array, " modes"]
    value: Scalar
    rank: Int[Array, ""]


class AbstractTheory(eqx.Module, Generic[P]):
    """What is proved about one energy.

    To implement your own: state the energy and these methods. A theory never uses a
    flow or a solver; that it agrees with them is what the tests are for.
    """

    energy: eqx.AbstractVar[AbstractEnergy[P]]

    @abc.abstractmethod
    def optimal_energy(self) -> Scalar:
        """The least value of the energy."""

    @abc.abstractmethod
    def spectrum(self) -> Float[Array, " modes"]:
        """The numbers that decide, one per mode of the data, descending."""

    @abc.abstractmethod
    def active(self, point: P) -> Bool[Array, " modes"]:
        """Which modes of the data `point` has learned."""

    @property
    @abc.abstractmethod
    def certificate(self) -> Callable[[P], Bool[Array, ""]]:
        """The predicate of points from which the exact flow is certain to end at a
        global minimum."""

    @abc.abstractmethod
    def match(self, point: P) -> Match:
        """How `point` compares with the known critical points."""

    @abc.abstractmethod
    def remaining(self, point: P) -> Scalar:
        """Predicted time to leave the neighborhood of the nearest critical point."""

    def saddle_limit(self, point: P) -> Limit | None:
        """The saddle at which the exact flow from `point` is certain to end, for
        theories that have such a rule; `None` for those that have none."""
        del point
        return None

    def decided(self, point: P) -> Bool[Array, ""]:
        """Whether it is certain where the exact flow from `point` ends: what a run may
        stop at."""
        limit = self.saddle_limit(point)
        certified = self.certificate(point)
        return certified if limit is None else certified | limit.certain


def match_by_gradient(
    energy: AbstractEnergy[P],
    point: P,
    *,
    optimal: Bool[Array, ""],
    modes: Bool[Array, " modes"],
    value: Scalar,
    noise: Scalar,
) -> Match:
    """The match of a point that is critical if no entry of the differential is above
    `noise`, its rounding, and a minimum if `optimal`. Exact is a point where the
    differentials by all linear maps are 0.0: these then never move."""
    differential = energy.differential(point)
    largest = [
        jnp.max(jnp.abs(leaf))
        for leaf in jax.tree.leaves(differential)
        if leaf.size > 0
    ]
    critical = jnp.max(jnp.stack(largest)) <= noise
    is_map = lambda node: isinstance(node, AbstractLinearNetwork)
    maps = [n for n in jax.tree.leaves(differential, is_leaf=is_map) if is_map(n)]
    still = [jnp.all(leaf == 0) for leaf in jax.tree.leaves(maps)]
    nothing = jnp.array(False)
    return Match(
        critical,
        critical & jnp.all(jnp.stack(still)),
        critical & optimal,
        nothing,
        nothing,
        modes,
        value,
        jnp.sum(modes),
        jnp.zeros_like(value),
        critical & ~optimal,
    )


def learned_modes(
    share: Float[Array, " modes"], values: Float[Array, " modes"], tie: Scalar
) -> Bool[Array, " modes"]:
    """The modes whose learned share is over one half. Modes whose values differ by at
    most `tie` are counted together (their basis is arbitrary) and the first ones
    reported."""
    close = jnp.abs(values[:, None] - values[None, :]) <= tie
    tied = close.astype(share.dtype)
    place = jnp.sum(jnp.tril(tied, -1), axis=1)
    return (place < jnp.round(tied @ share)) & (values > 0)
