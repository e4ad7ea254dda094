"""One descent: from a flow, a solver and a start to a `Solution`, step by step.

A descent is four pure functions, `init`, `step`, `finished` and `solution`, over a
state that can be stopped, stored and taken up again; `solve.integrate` is a loop over
them. Two hazards shape this file:

- A small speed is not convergence. Near a saddle of a deep network the speed falls
  like a power of the distance; a start close to the origin is stationary to any
  tolerance at once. A `stop` rule that certifies the limit replaces the speed test.
- The flow is autonomous, so every step is taken from time 0: a plateau of length 1e12
  followed by an escape that needs steps of 0.1 loses no digits.
"""

import abc
from collections.abc import Callable
from typing import Any, cast, Generic

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .arguments import check_whole, checked_fields
from .flow import AbstractFlow
from .solution import RESULTS, Solution, SUCCESSFUL
from .solvers.chebyshev import RKC2
from .solvers.step_control import NormwiseStepSize, root_mean_square
from .solvers.stiffness import ahead, CRAWLING, MOSTLY
from .types import P, Scalar


# Below this fraction of the first step the solution is taken to blow up.
VANISHED = 1e-12


class State(eqx.Module, Generic[P]):
    """A descent under way, or many side by side (with an axis of lanes)."""

    point: P
    time: Float[Array, "*lanes"]
    step_size: Float[Array, "*lanes"]
    first_step_size: Float[Array, "*lanes"]
    steps: Int[Array, "*lanes"]
    rejected: Int[Array, "*lanes"]
    velocities: Int[Array, "*lanes"] | None  # None where the solver does not tell
    crawled: Int[Array, "*lanes"] | None  # steps at the limit of stability
    finished: Bool[Array, "*lanes"]
    waiting: Bool[Array, "*lanes"]  # for a solver before it, in a relay of several
    result: RESULTS
    solver_state: PyTree
    control_state: PyTree
    broken: dict[str, Float[Array, "*lanes"]]
    start: P | None  # what an audit compares with
    record: dict[str, Float[Array, "*lanes"]] = eqx.field(default_factory=dict)


def handed_over(result: RESULTS) -> Bool[Array, "*lanes"]:
    """Whether a run ended for another method to go on."""
    return (result == RESULTS.max_steps_reached) | (result == RESULTS.stiff)


class End(eqx.Module, Generic[P]):
    """What is kept of a run, or of many (with a leading axis): what a `Solution` is
    made of, and what another descent needs to go on."""

    point: P
    time: Float[Array, "*draws"]
    steps: Int[Array, "*draws"]
    rejected: Int[Array, "*draws"]
    velocities: Int[Array, "*draws"] | None
    result: RESULTS
    broken: dict[str, Float[Array, "*draws"]]
    start: P | None
    record: dict[str, Float[Array, "*draws"]] = eqx.field(default_factory=dict)


def continued(begun: State[P], before: State[P] | End[P]) -> State[P]:
    """A state just begun, audited from where the run before it started."""
    return eqx.tree_at(
        lambda s: (s.broken, s.start),
        begun,
        (before.broken, before.start),
        is_leaf=lambda x: x is None,
    )


class AbstractDescent(eqx.Module, Generic[P]):
    """A way from a start to a `Solution`, step by step: what lanes and loops run.

    To implement your own: these four functions.
    """

    @abc.abstractmethod
    def init(self, point: P, time: Scalar) -> State[P]:
        """A run that starts at `point`."""

    @abc.abstractmethod
    def step(self, state: State[P], horizon: Scalar) -> State[P]:
        """One trial step; changes nothing when the run is finished."""

    @abc.abstractmethod
    def finished(self, state: State[P]) -> Bool[Array, ""]:
        """Whether the run is over."""

    @abc.abstractmethod
    def solution(self, state: State[P] | End[P]) -> Solution[P]:
        """What there is to say of a run, over or not."""


@checked_fields
class Descent(AbstractDescent[P]):
    """A flow descended by one diffrax solver.

    - `stop`: a predicate that ends the run as `rule_met`; when it is `None` the run
      ends as `successful` at a speed of at most `tolerance`.
    - `audit`: from a start, makes a function that tells of a later point which
      invariants of the exact flow it breaks.
    - `patience`: end as `stiff` after so many steps at the limit of stability, if most
      steps were, for another descent to take over.
    """

    flow: AbstractFlow[P]
    solver: diffrax.AbstractSolver
    control: NormwiseStepSize
    tolerance: Scalar
    stop: Callable[[P], Bool[Array, ""]] | None
    max_steps: Int[Array, ""]
    audit: Callable[[P], Callable[[P], dict[str, Bool[Array, ""]]]] | None = None
    patience: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_whole("patience", self.patience)

    def init(self, point: P, time: Scalar) -> State[P]:
        """A run that starts at `point`."""
        terms, zero = self._terms(), jnp.zeros_like(time)
        first, control_state = self.control.init(
            *(terms, zero, zero + 1, point, None, None),
            *(self.solver.func, self.error_order()),
        )
        first = coarse(jnp.asarray(first, dtype=time.dtype))
        # The very first call decides the shapes; its numbers are read again by `step`.
        solver_state = self.solver.init(terms, zero, first, point, None)
        state = State(
            point,
            time,
            first,
            first,
            steps=jnp.zeros((), dtype=int),
            rejected=jnp.zeros((), dtype=int),
            # Two for the first step size.
            velocities=None if self._spent(solver_state) is None else jnp.asarray(2),
            crawled=None if self.patience is None else jnp.asarray(0),
            finished=jnp.array(False),
            waiting=jnp.array(False),
            result=SUCCESSFUL,
            solver_state=solver_state,
            control_state=control_state,
            broken=self._broken(point, point, time, None),
            start=None if self.audit is None else point,
        )
        velocity = self.flow.velocity(point)
        finite = all_finite(point) & all_finite(velocity)
        met, met_result = self.at_rest(point)
        result = RESULTS.where(met, met_result, SUCCESSFUL)
        result = RESULTS.where(finite, result, RESULTS.not_finite)
        state = eqx.tree_at(
            lambda s: (s.finished, s.result), state, (met | ~finite, result)
        )
        # Solvers put Python numbers among their state; a loop wants arrays.
        return jax.tree.map(
            lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, state
        )

    def take_over(self, before: State[P] | End[P]) -> State[P]:
        """A run that goes on where another descent's stopped, counting its own steps
        but auditing from the same start."""
        return continued(self.init(before.point, before.time), before)

    def step(self, state: State[P], horizon: Scalar) -> State[P]:
        """One trial step; changes nothing when the run is finished."""
        size, landing = self.next_step(state, horizon)
        zero = jnp.zeros_like(size)
        terms = self._terms()
        candidate, error, dense, solver_state, solver_result = self.solver.step(
            terms, zero, size, state.point, None, state.solver_state, made_jump=False
        )
        norms = [root_mean_square(tree) for tree in (state.point, candidate, error)]
        keep, next_size, control_state = self.judge(
            state.step_size, state.control_state, size, landing, *norms
        )
        select = lambda new, old: jnp.where(keep, new, old)
        point = jax.tree.map(select, candidate, state.point)
        own_result = cast(RESULTS, RESULTS.promote(solver_result))
        spent = self._spent(solver_state)
        velocities = None if spent is None else cast(Any, state.velocities) + spent
        crawled = None
        if self.patience is not None:
            crawled = cast(Any, state.crawled) + jnp.where(
                keep & self._crawls(dense["k"]), 1, 0
            )
        state = eqx.tree_at(
            lambda s: (
                s.point,
                s.solver_state,
                s.control_state,
                s.velocities,
                s.crawled,
            ),
            state,
            (
                point,
                jax.tree.map(select, solver_state, state.solver_state),
                control_state,
                velocities,
                crawled,
            ),
            is_leaf=lambda x: x is None,
        )
        state = self.conclude(
            state,
            horizon,
            size,
            landing,
            keep,
            next_size,
            own_result,
            self.at_rest(point),
        )
        broken = self._broken(state.start, point, state.time, state.broken)
        return eqx.tree_at(lambda s: s.broken, state, broken)

    def next_step(self, state: State[P], horizon: Scalar):
        """The size of the next trial step, and whether it lands on the horizon."""
        remaining = horizon - state.time
        landing = state.step_size >= 0.999 * remaining
        return jnp.where(landing, remaining, state.step_size), landing

    def judge(self, step_size, control_state, size, landing, before, after, error):
        """Whether to keep a step, the size of the next one, and what the step size
        control remembers; from the root mean squares of the point before and after and
        of the error. No more of the point is looked at."""
        keep, start, end, _, control_state, _ = self.control.judge(
            jnp.zeros_like(size),
            size,
            before,
            after,
            error,
            cast(Any, self.error_order()),
            control_state,
        )
        next_size = coarse(jnp.asarray(end - start, dtype=size.dtype))
        # A step cut short to land on the horizon says nothing against its
        # predecessor; and an unbounded step would make 0 * inf.
        next_size = jnp.where(
            keep & landing, jnp.maximum(next_size, step_size), next_size
        )
        return (
            keep,
            jnp.minimum(next_size, jnp.sqrt(jnp.finfo(size.dtype).max)),
            control_state,
        )

    def conclude(
        self, state, horizon, size, landing, keep, next_size, failure, rest
    ) -> State[P]:
        """The state after a step was kept or rejected, but for its point. `failure`:
        what the solver says of the step; `rest`: whether the point is a place to stop
        at, and why."""
        met, met_result = rest
        time = jnp.where(keep, state.time + size, state.time)
        time = jnp.where(keep & landing, horizon, time)
        steps = state.steps + jnp.where(keep, 1, 0)
        rejected = state.rejected + jnp.where(keep, 0, 1)

        # In order of precedence, last wins.
        vanished = next_size <= VANISHED * state.first_step_size
        exhausted = steps + rejected >= self.max_steps
        failed = keep & (failure != SUCCESSFUL)
        result = RESULTS.where(failed, failure, SUCCESSFUL)
        finished = jnp.asarray(failed)
        if self.patience is not None:
            crawled = cast(Array, state.crawled)
            stiff = (crawled >= self.patience) & (crawled / steps >= MOSTLY)
            result = RESULTS.where(stiff, cast(RESULTS, RESULTS.stiff), result)
            finished = finished | stiff
        for condition, member in (
            (vanished, RESULTS.step_size_vanished),
            (exhausted, RESULTS.max_steps_reached),
            (keep & landing, RESULTS.horizon_reached),
            (keep & met, met_result),
        ):
            result = RESULTS.where(condition, cast(RESULTS, member), result)
            finished = finished | condition
        return eqx.tree_at(
            lambda s: (s.time, s.step_size, s.steps, s.rejected, s.finished, s.result),
            state,
            (time, next_size, steps, rejected, finished, result),
        )

    def error_order(self):
        """The order of the solver's error estimate."""
        return self.solver.error_order(self._terms())

    def _crawls(self, increments):
        """Whether a step was at the limit of stability."""
        factors = ahead(self.solver)
        moved, changed = (
            root_mean_square(jax.tree.map(difference, increments))
            for difference in (
                lambda k: jnp.tensordot(jnp.asarray(factors, k.dtype), k, axes=1),
                lambda k: k[-1] - k[-2],
            )
        )
        return changed > CRAWLING * moved

    @property
    def tells(self) -> bool:
        """Whether its solver tells how many velocities it takes."""
        return isinstance(self.solver, (RKC2, diffrax.AbstractERK))

    def _spent(self, solver_state):
        """Velocities that a trial step took, if the solver is one that tells."""
        if isinstance(self.solver, RKC2):
            return solver_state.velocities
        if isinstance(self.solver, diffrax.AbstractERK):
            tableau = cast(Any, self.solver).tableau
            return tableau.num_stages - (1 if tableau.fsal else 0)
        return None

    def finished(self, state: State[P]) -> Bool[Array, ""]:
        """Whether the run is over."""
        return state.finished

    def solution(self, state: State[P] | End[P]) -> Solution[P]:
        """What there is to say of a run, over or not."""
        return Solution(
            state.point,
            self.flow.energy(state.point),
            self.flow.speed(state.point),
            state.time,
            jnp.zeros_like(state.time),
            None,
            None,
            state.result,
            {
                "steps": state.steps,
                "rejected": state.rejected,
                "rtol": jnp.asarray(self.control.rtol),
                "velocities": state.velocities,
            },
            None if self.audit is None else state.broken,
        )

    def _broken(
        self,
        start: P | None,
        point: P,
        time: Scalar,
        before: dict[str, Scalar] | None,
    ) -> dict[str, Scalar]:
        """When each invariant was first broken."""
        if self.audit is None or start is None:
            return {}
        never = jnp.full_like(time, jnp.inf)
        now = {
            name: jnp.where(flag, time, never)
            for name, flag in self.audit(start)(point).items()
        }
        if before is None:
            return now
        return {name: jnp.minimum(before[name], moment) for name, moment in now.items()}

    def _terms(self) -> diffrax.ODETerm:
        return diffrax.ODETerm(lambda t, y, args: self.flow.velocity(y))

    def at_rest(self, point: P):
        if self.stop is None:
            return self.flow.speed(point) <= self.tolerance, SUCCESSFUL
        return jnp.asarray(self.stop(point)), RESULTS.rule_met


def coarse(size: Float[Array, "*lanes"]) -> Float[Array, "*lanes"]:
    """A step size rounded to 8 bits.

    The error estimate is a small difference of large numbers, so its rounding, which
    changes with the number of runs side by side, would reach the tenth digit of the
    step size and the eighth of the run. Rounded step sizes are the same.
    """
    mantissa, exponent = jnp.frexp(size)
    rounded = jnp.ldexp(jnp.round(256 * mantissa) / 256, exponent)
    return jnp.where(jnp.isfinite(size) & (size > 0), rounded, size)


def all_finite(tree) -> Bool[Array, ""]:
    """Whether every entry is."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks))
