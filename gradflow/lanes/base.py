r"""The states of many descents side by side, stepped together.

Any descent can be vmapped: `Lanes`. Methods that have a file here step their lanes
themselves, on points in whatever layout is fastest; formulas and control of steps are
the same.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..descent import AbstractDescent, coarse, continued, Descent, End, State
from ..layout import Rows
from ..solution import RESULTS, SUCCESSFUL
from ..types import Scalar


class Lanes(eqx.Module):
    """Any descent, vmapped. Every array has its lanes along `axis`."""

    descent: AbstractDescent

    @property
    def axis(self) -> int:
        return 0

    @property
    def turns(self) -> int | None:
        """Velocities that each lane computes in a round, if that is known."""
        return None

    def begin(self, points: Any, times: Float[Array, " lanes"]) -> State:
        """The states of runs that start at `points` (with a leading axis)."""
        return jax.vmap(self.descent.init)(points, times)

    def take_over(self, ends: End) -> State:
        """The states of runs that go on where those of another method ended."""
        return continued(self.begin(ends.point, ends.time), ends)

    def step(self, states: State, horizon: Scalar) -> State:
        """One round: a trial step, or part of one, of each that is not over."""
        new = jax.vmap(lambda state: self.descent.step(state, horizon))(states)
        over = states.finished

        def choose(old, new):
            return jnp.where(over.reshape([-1] + [1] * (old.ndim - 1)), old, new)

        new, static = eqx.partition(new, eqx.is_array)
        new = jax.tree.map(choose, eqx.filter(states, eqx.is_array), new)
        return eqx.combine(new, static)

    def points(self, kept: Any, at_once: int) -> Any:
        """Points as they are outside, with a leading axis."""
        del at_once
        return kept


class LaidOutLanes(Lanes):
    """Lanes in a layout."""

    descent: Descent
    layout: Rows

    @property
    def axis(self) -> int:
        return self.layout.axis

    def points(self, kept, at_once):
        return self.layout.outside(kept, at_once)

    def begin(self, points, times) -> State:
        descent, control, layout = self.descent, self.descent.control, self.layout
        order = descent.error_order()
        points = layout.inside(points)
        velocity = layout.velocity(points)
        size, rate = layout.sizes(points), layout.sizes(velocity)
        probe = control.probe(size, rate)
        ahead = layout.velocity(plus(points, layout.sum((probe, velocity))))
        change = layout.sizes(jax.tree.map(jnp.subtract, ahead, velocity))
        first = coarse(control.first_step(probe, size, rate, change, order))
        # Along the velocity: a first guess of the spectral radius.
        moving = jnp.where(rate > 0, rate, 1)
        curvature = change / probe / moving
        curvature = jnp.where(curvature > 0, curvature, moving)
        met, reason = layout.rest(points, velocity)
        finite = jnp.isfinite(size) & jnp.isfinite(rate)
        result = jax.vmap(
            lambda met, finite: RESULTS.where(
                finite,
                RESULTS.where(met, reason, SUCCESSFUL),
                RESULTS.not_finite,
            )
        )(met, finite)
        nothing = jnp.zeros(times.shape, dtype=int)
        return State(
            points,
            times,
            first,
            first,
            steps=nothing,
            rejected=nothing,
            velocities=nothing + 2,
            crawled=None if descent.patience is None else nothing,
            finished=met | ~finite,
            waiting=jnp.zeros(times.shape, dtype=bool),
            result=result,
            solver_state=self.first(points, velocity, curvature),
            control_state=jax.tree.map(
                lambda x: jnp.broadcast_to(x, times.shape),
                control.memory(size, order),
            ),
            broken={},
            start=None,
        )

    def first(self, points, velocity, curvature) -> Any:
        """What the method keeps, at a start."""
        raise NotImplementedError

    def judged(self, states, size, landing, candidate, error):
        """Whether to keep each step, the next size, and the memory of the control."""
        norms = [self.layout.sizes(tree) for tree in (states.point, candidate, error)]
        return jax.vmap(self.descent.judge)(
            states.step_size, states.control_state, size, landing, *norms
        )

    def concluded(self, states, horizon, judged, done, point, solver_state):
        """The states after the steps that are done were kept or rejected."""
        size, landing, keep, next_size, (met, reason), control_state = judged

        def conclude(state, size, landing, keep, next_size, met):
            rest = (met, reason)
            return self.descent.conclude(
                state, horizon, size, landing, keep, next_size, SUCCESSFUL, rest
            )

        # Numbers of each lane only: what is known of it but its point.
        old = eqx.tree_at(lambda s: (s.point, s.solver_state), states, (None, None))
        new = jax.vmap(conclude)(old, size, landing, keep, next_size, met)
        new = eqx.tree_at(lambda s: s.control_state, new, control_state)
        new, static = eqx.partition(new, eqx.is_array)
        new = jax.tree.map(
            lambda a, b: jnp.where(done, a, b), new, eqx.filter(old, eqx.is_array)
        )
        return eqx.tree_at(
            lambda s: (s.point, s.solver_state),
            eqx.combine(new, static),
            (point, solver_state),
            is_leaf=lambda x: x is None,
        )


def plus(one, other):
    """The sum of two trees."""
    return jax.tree.map(jnp.add, one, other)
