r"""Where the numbers of many points lie, and what is computed of all of them at once.

`Rows` has the points one after the other and vmaps. Small deep linear networks spend
most of that time in calls for tiny matrices. `Columns` keeps all entries of a network
in one column, one column per lane, so that an addition is one for all lanes, next to
each other in memory; in the eigenbasis of xx, where the product with it is one of
entries.
"""

import itertools
from typing import Any, cast, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .descent import Descent
from .flow import GradientFlow
from .manifolds.euclidean import Euclidean
from .models.base import EnergyBelow
from .models.linear import DeepLinear, SquaredLoss
from .solution import RESULTS, SUCCESSFUL
from .solvers.step_control import root_mean_square
from .types import Scalar


# Above this inner width matrices are large enough for calls of their own.
WIDEST = 12
# Sums of more products are computed apart: inside one loop with what uses them, the
# compiler would compute them anew for each use.
LONGEST_FUSED = 4
# Sums of more products are not written out.
LONGEST = 32


AUTO, ROWS, COLUMNS = "auto", "rows", "columns"
LAYOUTS = (AUTO, ROWS, COLUMNS)


def layout_of(descent: Descent, like: Any, layout: str = AUTO) -> "Rows":
    """The layout asked for; by default the one that is faster for this descent of
    points like `like`.

    **Raises:** `ValueError` if columns are asked for and can't be had.
    """
    flow, stop = descent.flow, descent.stop
    known = (
        descent.audit is None
        and type(flow) is GradientFlow
        and type(flow.manifold) is Euclidean
        and type(flow.energy) is SquaredLoss
        and type(like) is DeepLinear
        and (stop is None or isinstance(stop, EnergyBelow))
    )
    known = known and like.depth > 1
    if layout == COLUMNS and not known:
        raise ValueError(
            "layout='columns' needs the plain gradient flow of a SquaredLoss at a "
            "DeepLinear of depth >= 2, stopped by its speed or an energy and without "
            "an audit: use 'auto'"
        )
    if layout == COLUMNS or layout == AUTO and known and narrow(like):
        return _columns(descent, like.widths)
    return Rows(descent)


def narrow(network: DeepLinear) -> bool:
    """Whether its matrices are too small for calls of their own."""
    return max(network.widths[1:-1]) <= WIDEST


class Rows(eqx.Module):
    """Points as they are outside, with the lanes along `axis`, here the first."""

    descent: Descent
    axis: ClassVar[int] = 0

    def inside(self, points: PyTree[Array]) -> PyTree[Array]:
        """Points (with a leading axis) as they are kept."""
        return points

    def outside(self, kept: PyTree[Array], at_once: int) -> PyTree[Array]:
        """Points as they are outside, with a leading axis."""
        del at_once
        return kept

    def velocity(self, points: PyTree[Array]) -> PyTree[Array]:
        """The velocity of each lane."""
        return jax.vmap(self.descent.flow.velocity)(points)

    def rest(self, points: PyTree[Array], velocity: PyTree[Array]):
        """Whether each lane is at a place to stop at, and why."""
        del velocity
        met = jax.vmap(lambda point: self.descent.at_rest(point)[0])(points)
        reason = SUCCESSFUL if self.descent.stop is None else RESULTS.rule_met
        return met, reason

    def sizes(self, tree: PyTree[Array]) -> Float[Array, " lanes"]:
        """The root mean square of each lane."""
        return jax.vmap(root_mean_square)(tree)

    def spread(self, numbers: Array, leaf: Array) -> Array:
        """A number for each lane, of a shape to be combined with `leaf`."""
        shape = [1] * leaf.ndim
        shape[self.axis] = numbers.size
        return numbers.reshape(shape)

    def sum(self, *terms: tuple[Array, PyTree[Array]]) -> PyTree[Array]:
        """The sum of terms, each a number for every lane times a tree."""
        factors, trees = zip(*terms, strict=True)

        def add(*leaves):
            total = None
            for factor, leaf in zip(factors, leaves, strict=True):
                part = self.spread(factor, leaf) * leaf
                total = part if total is None else total + part
            return total

        return jax.tree.map(add, *trees)

    def choose(self, where: Array, one: PyTree[Array], other: PyTree[Array]):
        """`one` in the lanes where it holds, and `other` elsewhere."""
        return jax.tree.map(
            lambda a, b: jnp.where(self.spread(where, a), a, b), one, other
        )


class Columns(Rows):
    """Deep linear networks, one in each column."""

    widths: tuple[int, ...] = eqx.field(static=True)
    rotation: Float[Array, "x x"]
    scales: Float[Array, " x"]
    # None where y is x, and rotated with it.
    driven: Float[Array, "x y"] | None
    constant: Scalar
    # A number that the compiler does not know, so that it keeps a loop as a loop: what
    # is computed in one is not computed again where it is used.
    once: Int[Array, ""]
    axis: ClassVar[int] = -1

    def inside(self, points: DeepLinear) -> Float[Array, "entries lanes"]:
        """Points (with a leading axis) as columns: their entries in the eigenbasis."""

        def one(point):
            weights = self._rotated(point.weights, self.rotation)
            return jnp.concatenate([jnp.ravel(weight) for weight in weights])

        return jax.vmap(one, out_axes=-1)(points)

    def outside(self, kept, at_once) -> DeepLinear:
        def one(column):
            weights = [weight[..., 0] for weight in self._weights(column[:, None])]
            return DeepLinear(self._rotated(weights, self.rotation.T))

        # Matrix products of other sizes are rounded otherwise.
        return jax.lax.map(one, kept.T, batch_size=at_once)

    def rest(self, points, velocity):
        stop = self.descent.stop
        if stop is None:
            speed = jnp.sqrt(jnp.sum(velocity**2, axis=0))
            return speed <= self.descent.tolerance, SUCCESSFUL
        return cast(EnergyBelow, stop).holds(self.energy(points)), RESULTS.rule_met

    def sizes(self, tree):
        least = 1e20 * float(jnp.finfo(tree.dtype).tiny)
        squares = jnp.mean(tree**2, axis=0)
        plain = jnp.isfinite(squares) & (squares > least)

        def scaled():
            """By the largest entry first: squares of 1e200 overflow."""
            largest = jnp.max(jnp.abs(tree), axis=0)
            usable = jnp.isfinite(largest) & (largest > 0)
            scale = jnp.where(usable, largest, 1)
            mean = jnp.mean((tree / scale[None]) ** 2, axis=0)
            size = jnp.where(usable, scale * jnp.sqrt(mean), largest)
            return jnp.where(plain, jnp.sqrt(squares), size)

        return jax.lax.cond(jnp.all(plain), lambda: jnp.sqrt(squares), scaled)

    def _rotated(self, weights, rotation):
        """Inputs turned by the rotation, and outputs where they are the inputs."""
        first, *middle, last = weights
        last = last if self.driven is not None else rotation.T @ last
        return (first @ rotation, *middle, last)

    def _weights(self, columns):
        weights, place = [], 0
        for inputs, outputs in itertools.pairwise(self.widths):
            rows = columns[place : place + inputs * outputs]
            weights.append(rows.reshape(outputs, inputs, -1))
            place += inputs * outputs
        return weights

    def _products(self, columns):
        """What lies below and above the narrowest inner layer, as in
        `models.linear`: there are the formulas."""
        weights = self._weights(columns)
        cut = 1 + int(np.argmin(self.widths[1:-1]))
        below, above = [], []
        for weight in reversed(weights[:cut]):
            below.insert(0, self._times(below[0], weight) if below else weight)
        for weight in weights[cut:]:
            above.append(self._times(weight, above[-1]) if above else weight)
        lower, upper = below[0], above[-1]
        gram = lower * self.scales[None, :, None]
        if self.driven is None:
            pulled = jnp.swapaxes(upper, 0, 1) * self.scales[None, :, None]
            pushed = jnp.swapaxes(gram, 0, 1)
        else:
            pulled = jnp.swapaxes(_through(self.driven, upper), 0, 1)
            pushed = _through(self.driven.T, jnp.swapaxes(lower, 0, 1))
        return weights, cut, below, above, gram, pulled, pushed

    def velocity(self, points: Float[Array, "entries lanes"]):
        """The velocity of each column, as a column."""
        weights, cut, below, above, gram, pulled, pushed = self._products(points)
        times, turned = self._times, lambda x: jnp.swapaxes(x, 0, 1)
        lower, upper = below[0], above[-1]
        slopes = []
        residual = times(times(turned(upper), upper), gram) - pulled
        for weight, product in zip(weights[:cut], [*below[1:], None], strict=True):
            if product is None:
                slopes.append(residual)
                break
            slopes.append(times(turned(product), residual))
            residual = times(residual, turned(weight))
        residual = times(upper, times(gram, turned(lower))) - pushed
        slopes_above = []
        for weight, product in zip(
            reversed(weights[cut:]), [*reversed(above[:-1]), None], strict=True
        ):
            if product is None:
                slopes_above.append(residual)
                break
            slopes_above.append(times(residual, turned(product)))
            residual = times(turned(weight), residual)
        slopes += reversed(slopes_above)
        return -jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in slopes])

    def energy(self, columns: Float[Array, "entries lanes"]):
        """The energy of each column."""
        _, _, below, above, gram, _, pushed = self._products(columns)
        lower, upper = below[0], above[-1]
        learned = self._times(gram, jnp.swapaxes(lower, 0, 1))
        learned = learned * self._times(jnp.swapaxes(upper, 0, 1), upper)
        return (
            0.5 * jnp.sum(learned, axis=(0, 1))
            - jnp.sum(upper * pushed, axis=(0, 1))
            + self.constant
        )

    def _times(self, left, right):
        """The products of two matrices in each lane."""
        terms = left.shape[1]
        if terms > LONGEST:
            return jnp.sum(left[:, :, None] * right[None], axis=1)

        def product():
            total = left[:, 0, None] * right[None, 0]
            for j in range(1, terms):
                total = total + left[:, j, None] * right[None, j]
            return total

        if terms <= LONGEST_FUSED:
            return product()
        shape = (left.shape[0], *right.shape[1:])
        start = jnp.zeros(shape, left.dtype)
        return jax.lax.fori_loop(0, self.once, lambda *_: product(), start)


@eqx.filter_jit
def _columns(descent: Descent, widths: tuple[int, ...]) -> Columns:
    moments = cast(SquaredLoss, descent.flow.energy).moments
    scales, rotation = jnp.linalg.eigh(moments.xx)
    return Columns(
        descent,
        widths,
        rotation,
        scales,
        None if moments.autoencoding else rotation.T @ moments.xy,
        0.5 * jnp.trace(moments.yy),
        jnp.asarray(1),
    )


def _through(matrix, columns):
    """One matrix times that of each lane."""
    return jnp.tensordot(matrix, columns, axes=1)
