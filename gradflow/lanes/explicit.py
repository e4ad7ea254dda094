"""Explicit Runge-Kutta methods on networks in columns."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..descent import Descent, State
from ..layout import Columns, Rows
from ..solvers.stiffness import ahead, CRAWLING
from ..types import Scalar
from .base import LaidOutLanes


class ExplicitLanes(LaidOutLanes):
    """An explicit Runge-Kutta method whose last stage is at the end of the step, on
    deep linear networks in columns."""

    layout: Columns
    stages: Int[Array, ""]

    @property
    def turns(self) -> int:
        return cast(Any, self.descent.solver).tableau.num_stages - 1

    def first(self, points, velocity, curvature):
        return velocity

    def step(self, states: State, horizon: Scalar) -> State:
        layout, at_work = self.layout, ~states.finished
        size, landing = self.descent.next_step(states, horizon)
        candidate, error, velocity, crawls = self._trial(
            states.point, states.solver_state, size
        )
        keep, next_size, control_state = self.judged(
            states, size, landing, candidate, error
        )
        keep = at_work & jnp.asarray(keep)
        point = layout.choose(keep, candidate, states.point)
        velocity = layout.choose(keep, velocity, states.solver_state)
        rest = layout.rest(point, velocity)
        velocities = cast(Array, states.velocities) + jnp.where(at_work, self.turns, 0)
        states = eqx.tree_at(lambda s: s.velocities, states, velocities)
        if crawls is not None:
            crawled = cast(Array, states.crawled) + jnp.where(keep & crawls, 1, 0)
            states = eqx.tree_at(lambda s: s.crawled, states, crawled)
        return self.concluded(
            states,
            horizon,
            (size, landing, keep, next_size, rest, control_state),
            at_work,
            point,
            velocity,
        )

    def _trial(self, columns, velocity, size):
        """One step of the method: where it ends, its error, the velocity there; and
        whether it was at the limit of stability."""
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
            return slopes.at[i + 1].set(self.layout.velocity(place)), place

        # The last stage is at the end of the step.
        slopes, end = jax.lax.fori_loop(0, self.stages, stage, (slopes, columns))
        error = combined(slopes, jnp.asarray(tableau.b_error, columns.dtype), count)
        crawls = None
        if self.descent.patience is not None:
            factors = jnp.asarray(ahead(self.descent.solver), columns.dtype)
            moved = self.layout.sizes(combined(slopes, factors, count - 1))
            changed = size * self.layout.sizes(slopes[-1] - slopes[-2])
            crawls = changed > CRAWLING * moved
        return end, error, slopes[-1], crawls


def explicit_lanes(descent: Descent, layout: Rows) -> ExplicitLanes | None:
    """Lanes for this descent, if it is one for them."""
    known = type(descent.solver) in (diffrax.Tsit5, diffrax.Dopri5, diffrax.Bosh3)
    if not known or not isinstance(layout, Columns):
        return None
    tableau = cast(Any, descent.solver).tableau
    # A number that the compiler does not know, so that it keeps the loop as a loop:
    # what is computed in one is not computed again where it is used.
    return ExplicitLanes(descent, layout, jnp.asarray(tableau.num_stages - 1))
