"""Iterate: from an iteration and a starting point to a `Solution`.

An iteration is descended like a flow: the same four functions over the same state, so
that studies, ensembles and verdicts need not know which of the two they run. Time is
the number of steps. Each step is certified: one that raises the energy by more than
rounding ends the run before it.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .arguments import checked_arguments, checked_fields
from .descent import AbstractDescent, all_finite, End, State
from .em import AbstractIteration, distance
from .models.base import AbstractLatentEnergy, check_point
from .solution import raise_failure, RESULTS, Solution, SUCCESSFUL
from .solve import check_positive, checked_dtype, observed, run
from .types import P, Scalar


class Stepwise(AbstractDescent[P]):
    """An iteration as a descent; the fields are those of `Iterator`."""

    iteration: AbstractIteration[P]
    tolerance: Scalar
    stop: Callable[[P], Bool[Array, ""]] | None
    max_steps: Int[Array, ""]
    slack: Scalar
    gain: Scalar

    def init(self, point: P, time: Scalar) -> State[P]:
        """A run that starts at `point`."""
        energy = self.iteration.energy(point)
        finite = all_finite(point) & jnp.isfinite(energy)
        met = jnp.array(False) if self.stop is None else jnp.asarray(self.stop(point))
        result = RESULTS.where(met, cast(RESULTS, RESULTS.rule_met), SUCCESSFUL)
        result = RESULTS.where(finite, result, cast(RESULTS, RESULTS.not_finite))
        one, none = jnp.ones_like(time), jnp.zeros((), dtype=int)
        return State(
            point,
            time,
            one,
            one,
            steps=none,
            rejected=none,
            velocities=none,
            crawled=None,
            finished=met | ~finite,
            waiting=jnp.array(False),
            result=result,
            solver_state=energy,
            control_state=None,
            broken={},
            start=None,
            record={"increase": jnp.full_like(time, -jnp.inf)},
        )

    def step(self, state: State[P], horizon: Scalar) -> State[P]:
        """One step; one that raises the energy is not taken."""
        before = state.solver_state
        point = self.iteration.step(state.point)
        energy = self.iteration.energy(point)
        increase = energy - before
        # Written so that a NaN is an increase.
        falls = increase <= self.slack * jnp.maximum(1, jnp.abs(before))
        due = state.time >= horizon
        taken = falls & ~due
        point = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), point, state.point
        )
        moved = distance(point, state.point)
        one = jnp.where(due, 0, 1)
        resting = (moved <= self.tolerance) | (-increase <= self.gain)
        time, steps = state.time + one, state.steps + one
        met = jnp.array(False) if self.stop is None else jnp.asarray(self.stop(point))

        # In order of precedence, last wins.
        result, finished = SUCCESSFUL, jnp.array(False)
        for condition, member in (
            (steps >= self.max_steps, RESULTS.max_steps_reached),
            (time >= horizon, RESULTS.horizon_reached),
            (taken & resting & (self.stop is None), SUCCESSFUL),
            (taken & met, RESULTS.rule_met),
            (~falls & ~due, RESULTS.energy_increased),
        ):
            result = RESULTS.where(condition, cast(RESULTS, member), result)
            finished = finished | condition
        increase = jnp.where(jnp.isnan(increase), jnp.inf, increase)
        worst = jnp.maximum(state.record["increase"], increase)
        return eqx.tree_at(
            lambda s: (
                s.point,
                s.time,
                s.steps,
                s.velocities,
                s.finished,
                s.result,
                s.solver_state,
                s.record["increase"],
            ),
            state,
            (
                point,
                time,
                steps,
                jnp.asarray(state.velocities) + one * self.iteration.updates,
                finished,
                result,
                jnp.where(taken, energy, before),
                jnp.where(due, state.record["increase"], worst),
            ),
        )

    def finished(self, state: State[P]) -> Bool[Array, ""]:
        """Whether the run is over."""
        return state.finished

    def solution(self, state: State[P] | End[P]) -> Solution[P]:
        """What there is to say of a run, over or not."""
        energy = self.iteration.energy
        bounds = {}
        if isinstance(energy, AbstractLatentEnergy):
            bounds = energy.at_bounds(state.point)
        return Solution(
            state.point,
            energy(state.point),
            self.iteration.speed(state.point),
            state.time,
            jnp.zeros_like(state.time),
            None,
            None,
            state.result,
            {
                "steps": state.steps,
                "rejected": state.rejected,
                "velocities": state.velocities,
                "increase": state.record["increase"],
                "slack": self.slack,
                **bounds,
            },
        )


@checked_fields
class Iterator(eqx.Module, Generic[P]):
    """How to iterate: all of `iterate`'s arguments but the start.

    Called with a point it is `iterate(..., throw=False)`. A `Study` given one as
    `descend` runs its draws on a fixed number of lanes and refills each as it ends.

    **Raises:** `ValueError` for arguments out of range.
    """

    iteration: AbstractIteration[P]
    tolerance: float | None = None
    stop: Callable[[P], Bool[Array, ""]] | None = None
    max_steps: int | Int[Array, ""] = 10_000
    slack: float | None = None
    gain: float | None = None

    def __check_init__(self):
        check_positive("max_steps", self.max_steps, whole=True)
        for name in ("tolerance", "slack", "gain"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value)
                if math.isinf(value):
                    raise ValueError(f"{name} must be finite, got {value}")

    def __call__(self, point: P) -> Solution[P]:
        dtype = checked_dtype(point)
        return run(self.descents(point), point, self.end(dtype)[None], {})[0]

    def descents(self, point: P) -> tuple[Stepwise[P]]:
        """The descent, for points like `point`."""
        dtype = checked_dtype(point)
        defaults = (1e-8, 1e-10) if dtype == jnp.float64 else (1e-4, 1e-4)
        tolerance, slack = (
            jnp.asarray(default if value is None else value, dtype)
            for value, default in zip(
                (self.tolerance, self.slack), defaults, strict=True
            )
        )
        return (
            Stepwise(
                self.iteration,
                tolerance,
                self.stop,
                jnp.asarray(self.max_steps),
                slack,
                jnp.asarray(-jnp.inf if self.gain is None else self.gain, dtype),
            ),
        )

    def end(self, dtype) -> Scalar:
        """The step to stop at: none."""
        return jnp.asarray(jnp.inf, dtype)


@checked_arguments
def iterate(
    iteration: AbstractIteration[P],
    point0: P,
    *,
    tolerance: float | None = None,
    stop: Callable[[P], Bool[Array, ""]] | None = None,
    times: Float[Array, " times"] | None = None,
    observe: Mapping[str, Callable[[P], PyTree[Array]]] | None = None,
    max_steps: int | Int[Array, ""] = 10_000,
    slack: float | None = None,
    gain: float | None = None,
    throw: bool = True,
) -> Solution[P]:
    r"""Iterates $x \mapsto F(x)$ from `point0`.

    **Arguments:**

    - `tolerance`: the length of a step (all entries of the point, Euclidean) to stop at
      (default 1e-8 in float64, 1e-4 in float32).
    - `stop`: a predicate on points, looked at after each step, that replaces it.
    - `times`, `observe`: as for `integrate`; times are numbers of steps.
    - `max_steps`: the number of steps to give up at.
    - `slack`: by how much, relative to its size or 1, a step may raise the energy: what
      rounding can do (default 1e-10 in float64, 1e-4 in float32).
    - `gain`: stop, too, at a step that lowers the energy by no more than this: where an
      optimum lies at infinity (a noise variance that goes to 0), steps stay long.
    - `throw`: raise if the run fails. Pass `False` under `vmap` and read `result`.

    `stats` has the worst `increase` of the energy, the number of times that the
    underlying map was computed as `velocities`, and flags of what a latent energy calls
    its bounds, such as "heywood".

    **Raises:** `ValueError` for arguments out of range; `RuntimeError` (with
    `throw=True`) when the energy rises, the steps are used up or the start is not
    finite.
    """
    iterator = Iterator(iteration, tolerance, stop, max_steps, slack, gain)
    dtype = checked_dtype(point0)
    check_point("point0", iteration.energy, point0)
    solution = observed(
        iterator.descents(point0),
        point0,
        times,
        observe,
        iterator.end(dtype),
        iteration.energy,
    )
    return raise_failure(solution) if throw else solution
