r"""The states of many descents side by side, in the layout that is fastest to step.

Any descent can be vmapped: `Lanes`, whose arrays have the lanes first. Small deep
linear networks spend most of that time in calls for tiny matrices. `LinearLanes` keeps
all entries of a network in one column, one column per lane, so that an addition is one
for all lanes, next to each other in memory; in the eigenbasis of xx, where the product
with it is one of entries. Method and control of steps are the same.
"""

import itertools
from typing import Any, cast, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .descent import coarse, Descent, End, RESULTS, State, SUCCESSFUL
from .flow import GradientFlow
from .manifolds.euclidean import Euclidean
from .models.base import EnergyBelow
from .models.linear import DeepLinear, SquaredLoss
from .types import Scalar


# Above this inner width matrices are large enough for calls of their own.
WIDEST = 12
# Sums of more products are computed apart: inside one loop with what uses them, the
# compiler would compute them anew for each use.
LONGEST_FUSED = 4
# Sums of more products are not written out.
LONGEST = 32


def lanes_of(descent: Descent, like: Any) -> "Lanes":
    """The fastest layout there is for this descent of points like `like`."""
    flow, stop = descent.flow, descent.stop
    known = (
        type(flow) is GradientFlow
        and type(flow.manifold) is Euclidean
        and type(flow.energy) is SquaredLoss
        and type(like) is DeepLinear
        and type(descent.solver) in (diffrax.Tsit5, diffrax.Dopri5, diffrax.Bosh3)
        and descent.audit is None
        and (stop is None or isinstance(stop, EnergyBelow))
    )
    if known and like.depth > 1 and max(like.widths[1:-1]) <= WIDEST:
        return _linear(descent, like.widths)
    return Lanes(descent)


class Lanes(eqx.Module):
    """Any descent, vmapped. Every array has its lanes along `axis`."""

    descent: Descent
    axis: ClassVar[int] = 0

    def begin(self, points: Any, times: Float[Array, " lanes"]) -> State:
        """The states of runs that start at `points` (with a leading axis)."""
        return jax.vmap(self.descent.init)(points, times)

    def take_over(self, ends: End) -> State:
        """The states of runs that go on where those of another method ended."""
        state = self.begin(ends.point, ends.time)
        return eqx.tree_at(
            lambda s: (s.broken, s.start),
            state,
            (ends.broken, ends.start),
            is_leaf=lambda x: x is None,
        )

    def step(self, states: State, horizon: Scalar) -> State:
        """One trial step of each that is not over."""
        return jax.vmap(lambda state: self.descent.step(state, horizon))(states)

    def points(self, kept: Any, at_once: int) -> Any:
        """Points as they are outside, with a leading axis."""
        del at_once
        return kept


class LinearLanes(Lanes):
    """Deep linear networks descended by an explicit method, one in each column."""

    widths: tuple[int, ...] = eqx.field(static=True)
    rotation: Float[Array, "x x"]
    scales: Float[Array, " x"]
    # None where y is x, and rotated with it.
    driven: Float[Array, "x y"] | None
    constant: Scalar
    # Numbers that the compiler does not know, so that it keeps loops as loops: what is
    # computed in one is not computed again where it is used.
    once: Int[Array, ""]
    stages: Int[Array, ""]
    axis: ClassVar[int] = -1

    def begin(self, points, times) -> State:
        descent, control = self.descent, self.descent.control
        order = descent.error_order()
        columns = self.columns(points)
        velocity = self.velocity(columns)
        size, rate = _rms(columns), _rms(velocity)
        probe = control.probe(size, rate)
        change = _rms(self.velocity(columns + probe[None] * velocity) - velocity)
        first = coarse(control.first_step(probe, size, rate, change, order))
        met, met_result = self._rest(columns, velocity)
        finite = jnp.isfinite(size) & jnp.isfinite(rate)
        result = jax.vmap(
            lambda met, finite: RESULTS.where(
                finite,
                RESULTS.where(met, met_result, SUCCESSFUL),
                RESULTS.not_finite,
            )
        )(met, finite)
        nothing = jnp.zeros(times.shape, dtype=int)
        return State(
            columns,
            times,
            first,
            first,
            steps=nothing,
            rejected=nothing,
            finished=met | ~finite,
            waiting=jnp.zeros(times.shape, dtype=bool),
            result=result,
            solver_state=velocity,
            control_state=jax.tree.map(
                lambda x: jnp.broadcast_to(x, times.shape),
                control.memory(size, order),
            ),
            broken={},
            start=None,
        )

    def step(self, states: State, horizon: Scalar) -> State:
        descent = self.descent
        size, landing = descent.next_step(states, horizon)
        candidate, error, velocity = self._trial(
            states.point, states.solver_state, size
        )
        norms = [_rms(columns) for columns in (states.point, candidate, error)]
        keep, next_size, control_state = jax.vmap(descent.judge)(
            states.step_size, states.control_state, size, landing, *norms
        )
        keep = jnp.asarray(keep)
        point = jnp.where(keep[None], candidate, states.point)
        velocity = jnp.where(keep[None], velocity, states.solver_state)
        met, met_result = self._rest(point, velocity)

        def conclude(state, size, landing, keep, next_size, met):
            rest = (met, met_result)
            return descent.conclude(
                state, horizon, size, landing, keep, next_size, SUCCESSFUL, rest
            )

        # Numbers of each lane only: what is known of it but its point.
        numbers = eqx.tree_at(lambda s: (s.point, s.solver_state), states, (None, None))
        numbers = jax.vmap(conclude)(numbers, size, landing, keep, next_size, met)
        return eqx.tree_at(
            lambda s: (s.point, s.solver_state, s.control_state),
            numbers,
            (point, velocity, control_state),
            is_leaf=lambda x: x is None,
        )

    def points(self, kept, at_once) -> DeepLinear:
        def one(column):
            weights = [weight[..., 0] for weight in self._weights(column[:, None])]
            return DeepLinear(self._rotated(weights, self.rotation.T))

        # Matrix products of other sizes are rounded otherwise.
        return jax.lax.map(one, kept.T, batch_size=at_once)

    def columns(self, points: DeepLinear) -> Float[Array, "entries lanes"]:
        """Points (with a leading axis) as columns: their entries in the eigenbasis."""

        def one(point):
            weights = self._rotated(point.weights, self.rotation)
            return jnp.concatenate([jnp.ravel(weight) for weight in weights])

        return jax.vmap(one, out_axes=-1)(points)

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

    def velocity(self, columns: Float[Array, "entries lanes"]):
        """The velocity of each column, as a column."""
        weights, cut, below, above, gram, pulled, pushed = self._products(columns)
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

    def _rest(self, columns, velocity):
        stop = self.descent.stop
        if stop is None:
            speed = jnp.sqrt(jnp.sum(velocity**2, axis=0))
            return speed <= self.descent.tolerance, SUCCESSFUL
        return cast(EnergyBelow, stop).holds(self.energy(columns)), RESULTS.rule_met

    def _trial(self, columns, velocity, size):
        """One step of the method: where it ends, its error, the velocity there."""
        tableau = cast(Any, self.descent.solver).tableau
        count = tableau.num_stages
        factors = np.zeros((count, count))
        for i, row in enumerate(tableau.a_lower, 1):
            factors[i, :i] = row
        weights = jnp.asarray(factors, columns.dtype)
        slopes = jnp.broadcast_to(velocity, (count, *velocity.shape))

        def combined(slopes, factors, last):
            total = factors[0] * slopes[0]
            for j in range(1, last):
                total = total + factors[j] * slopes[j]
            return size[None] * total

        def stage(i, carry):
            slopes, _ = carry
            # Factors of slopes that are not there yet are 0.
            place = columns + combined(slopes, weights[i + 1], count - 1)
            return slopes.at[i + 1].set(self.velocity(place)), place

        # The last stage is at the end of the step.
        slopes, end = jax.lax.fori_loop(0, self.stages, stage, (slopes, columns))
        error = combined(slopes, jnp.asarray(tableau.b_error, columns.dtype), count)
        return end, error, slopes[-1]

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
def _linear(descent: Descent, widths: tuple[int, ...]) -> LinearLanes:
    moments = cast(SquaredLoss, descent.flow.energy).moments
    scales, rotation = jnp.linalg.eigh(moments.xx)
    return LinearLanes(
        descent,
        widths,
        rotation,
        scales,
        None if moments.autoencoding else rotation.T @ moments.xy,
        0.5 * jnp.trace(moments.yy),
        jnp.asarray(1),
        jnp.asarray(cast(Any, descent.solver).tableau.num_stages - 1),
    )


def _through(matrix, columns):
    """One matrix times that of each lane."""
    return jnp.tensordot(matrix, columns, axes=1)


def _rms(columns: Float[Array, "entries lanes"]) -> Float[Array, " lanes"]:
    """`step_control.root_mean_square` of each lane."""
    largest = jnp.max(jnp.abs(columns), axis=0)
    # Scaled by the largest entry first: squares of 1e200 overflow.
    least = 1e4 * float(jnp.finfo(columns.dtype).tiny)
    usable = jnp.isfinite(largest) & (largest > 0)
    scale = jnp.where(usable, jnp.maximum(largest, least), 1)
    mean = jnp.mean((columns * (1 / scale)[None]) ** 2, axis=0)
    return jnp.where(usable, scale * jnp.sqrt(mean), largest)
