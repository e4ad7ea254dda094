"""Integrate: from a flow and a starting point to a `Solution`.

An explicit method hovers near an equilibrium at a speed some hundred times its error
tolerance, so the stopping speed must lie well above that tolerance: the one knob
`tolerance` is the stopping speed, and the solver works at `tolerance / 1000`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, Generic

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .arguments import check_one_of, check_range, checked_arguments, checked_fields
from .descent import Descent, handed_over
from .flow import AbstractFlow
from .layout import LAYOUTS
from .manifolds.fixed_rank import FixedRank
from .models.base import check_point
from .models.low_rank import LowRank
from .solution import raise_failure, RESULTS, Solution, SUCCESSFUL
from .solvers.chebyshev import control_of, RKC2
from .solvers.rank_preserving import RankPreserving
from .solvers.step_control import root_mean_square
from .solvers.stiffness import PATIENCE
from .types import P, Scalar


# The solver's tolerance is the stopping speed divided by this (see the module's text).
TOLERANCE_RATIO = 1000
TSIT5 = diffrax.Tsit5()
AUTO = "auto"


def _as_tuple(method) -> Any:
    if isinstance(method, (tuple, list, str)):
        return method if isinstance(method, str) else tuple(method)
    return (method,)


@checked_fields
class Integrator(eqx.Module, Generic[P]):
    """How to integrate a flow: all of `integrate`'s arguments but the start. Its method
    is "auto", as what is compiled serves many runs.

    Called with a point it is `integrate(..., throw=False)`. A `Study` given one as
    `descend` runs its draws on a fixed number of lanes and refills each as it ends.
    These keep deep linear networks as `layout` says: "rows", one after the other (wide
    ones), "columns", entry by entry beside each other (narrow ones), or "auto".

    **Raises:** `ValueError` for arguments out of range.
    """

    flow: AbstractFlow[P]
    horizon: float | Scalar = float("inf")
    tolerance: float | None = None
    rtol: float | None = None
    stop: Callable[[P], Bool[Array, ""]] | None = None
    method: str | tuple[diffrax.AbstractSolver, ...] = eqx.field(
        default=AUTO, converter=_as_tuple
    )
    max_steps: int | Int[Array, ""] = 16384
    audit: Callable[[P], Callable[[P], dict[str, Bool[Array, ""]]]] | None = None
    layout: str = eqx.field(static=True, default="auto")

    def __check_init__(self):
        check_positive("horizon", self.horizon)
        check_positive("max_steps", self.max_steps, whole=True)
        check_range("tolerance", self.tolerance)
        check_range("rtol", self.rtol)
        if not self.method:
            raise ValueError("method is empty: give at least one diffrax solver")
        if isinstance(self.method, str) and self.method != AUTO:
            raise ValueError(
                f"method={self.method!r} must be {AUTO!r} or a diffrax solver"
            )
        check_one_of("layout", self.layout, LAYOUTS)

    def __call__(self, point: P) -> Solution[P]:
        dtype = checked_dtype(point)
        return run(self.descents(point), point, self.end(dtype)[None], {})[0]

    def descents(self, point: P) -> tuple[Descent[P], ...]:
        """One descent for each method, for points like `point`."""
        dtype = checked_dtype(point)
        low_rank = isinstance(point, LowRank)
        if low_rank and not isinstance(self.flow.manifold, FixedRank):
            raise ValueError(
                f"a LowRank point needs manifold=FixedRank(rank={point.rank}, depth), "
                f"got {type(self.flow.manifold).__name__}: its three arrays are one of "
                "many ways to write a matrix, so a flat flow of them means nothing"
            )
        auto = self.method == AUTO
        # A step of RKC2 would leave the matrices of rank k.
        relay = () if low_rank else (RKC2(),)
        methods = (TSIT5, *relay) if auto else self.method
        tolerance, rtol = checked_tolerances(
            self.tolerance, self.rtol, dtype, hovers=not isinstance(methods[-1], RKC2)
        )
        return tuple(
            Descent(
                self.flow,
                _adaptive(solver, rtol, point),
                control_of(solver, jnp.asarray(rtol, dtype)),
                jnp.asarray(tolerance, dtype),
                self.stop,
                jnp.asarray(self.max_steps),
                self.audit,
                PATIENCE if auto and relay and solver is TSIT5 else None,
            )
            for solver in methods
        )

    def end(self, dtype) -> Scalar:
        """The horizon, or far enough for any flow: an infinite one gives inf - inf."""
        latest = float(np.sqrt(float(jnp.finfo(dtype).max)))
        return jnp.minimum(jnp.asarray(self.horizon, dtype), latest)


@checked_arguments
def integrate(
    flow: AbstractFlow[P],
    point0: P,
    *,
    horizon: float = float("inf"),
    tolerance: float | None = None,
    rtol: float | None = None,
    stop: Callable[[P], Bool[Array, ""]] | None = None,
    times: Float[Array, " times"] | None = None,
    observe: Mapping[str, Callable[[P], PyTree[Array]]] | None = None,
    method: diffrax.AbstractSolver | Sequence[diffrax.AbstractSolver] | str = TSIT5,
    max_steps: int | Int[Array, ""] = 16384,
    audit: Callable[[P], Callable[[P], dict[str, Bool[Array, ""]]]] | None = None,
    throw: bool = True,
) -> Solution[P]:
    r"""Integrates $\dot x = v(x)$ from `point0`.

    **Arguments:**

    - `horizon`: the time to stop at.
    - `tolerance`: the speed to stop at (default 1e-6 in float64, 1e-2 in float32).
    - `rtol`: the solver's tolerance per step, relative to the size of the point. Leave
      it alone (`tolerance / 1000`) unless you know better.
    - `stop`: a predicate on points, looked at after each step, that replaces the speed
      test. `theory.certificate` stops as soon as the limit is certain.
    - `times`, `observe`: run to `times[-1]` and evaluate each function of `observe`
      (by default the energy) at each time, as floating numbers: NaN where a run that
      failed never came. Neither rule then ends the run early, and trajectories are
      kept only through `observe`.
    - `method`: a diffrax solver, or several: each takes over where the one before it
      has used its `max_steps`. "auto": Tsit5, and `RKC2` from where Tsit5 has been held
      at its limit of stability for some time. For a `LowRank` point it is made rank
      preserving.
    - `audit`: from the start, makes a function that tells of each later point which
      invariants of the exact flow it breaks, such as `Audit`. When each first broke
      is `Solution.broken`.
    - `throw`: raise if the run fails. Pass `False` under `vmap` and read `result`.

    **Raises:** `ValueError` for arguments out of range; `RuntimeError` (with
    `throw=True`) when the steps are used up, the step size vanishes or the start is
    not finite. Reaching the horizon is not a failure.
    """
    integrator = Integrator(
        flow, horizon, tolerance, rtol, stop, method, max_steps, audit
    )
    dtype = checked_dtype(point0)
    check_point("point0", flow.energy, point0)
    descents = integrator.descents(point0)
    solution = observed(
        descents, point0, times, observe, integrator.end(dtype), flow.energy
    )
    return raise_failure(solution) if throw else solution


def observed(descents, point, times, observe, end, energy):
    """Runs descents to the last of `times`, or to rest if there are none."""
    if times is None:
        if observe is not None:
            raise ValueError("observe is given without times: say when to observe")
        return run(descents, point, end[None], {})[0]
    targets = _checked_times(times, end.dtype)
    functions = {"energy": energy} if observe is None else dict(observe)
    # Neither the speed nor a rule ends an observed run.
    descents = tuple(
        eqx.tree_at(lambda d: d.stop, d, _never, is_leaf=lambda x: x is None)
        for d in descents
    )
    solution, history = run(descents, point, targets, functions)
    return eqx.tree_at(
        lambda s: (s.times, s.history),
        solution,
        (targets, history),
        is_leaf=lambda x: x is None,
    )


@eqx.filter_jit
def run(descents, point, targets, functions):
    """Runs to each target in turn and evaluates `functions` there."""

    def segment(carry, target):
        states = []
        for descent, state in zip(descents, carry, strict=True):
            state = _resume(state)
            # A later solver begins where the one before it ran out of steps.
            if states:
                state = _hand_over(descent, states[-1], state)
            state = jax.lax.while_loop(
                lambda s: ~descent.finished(s),  # noqa: B023 (called at once)
                lambda s: descent.step(s, target),  # noqa: B023
                state,
            )
            states.append(state)
        last = states[-1]
        seen = {name: function(last.point) for name, function in functions.items()}
        # What a failed run never reached is NaN; its result says why.
        failed = last.time < target
        seen = jax.tree.map(
            lambda x: jnp.where(failed, jnp.nan, _floating(x, target.dtype)), seen
        )
        return tuple(states), seen

    zero = jnp.zeros_like(targets[0])
    first, *rest = [descent.init(point, zero) for descent in descents]
    waiting = jnp.array(True)
    states = (
        first,
        *(
            eqx.tree_at(lambda s: (s.finished, s.waiting), state, (waiting, waiting))
            for state in rest
        ),
    )
    states, history = jax.lax.scan(segment, states, targets)
    solution = descents[-1].solution(states[-1])
    counts = [
        sum(getattr(state, name) for state in states) for name in ("steps", "rejected")
    ]
    velocities = None
    if all(state.velocities is not None for state in states):
        velocities = sum(state.velocities for state in states)
    moved = root_mean_square(jax.tree.map(jnp.subtract, solution.point, point))
    size = root_mean_square(solution.point)
    solution = eqx.tree_at(
        lambda s: (
            s.distance,
            s.stats["steps"],
            s.stats["rejected"],
            s.stats["velocities"],
        ),
        solution,
        (moved / jnp.where(size > 0, size, 1), *counts, velocities),
        is_leaf=lambda x: x is None,
    )
    return solution, history


def _resume(state):
    """A run that reached the last target goes on to the next one."""
    again = state.result == RESULTS.horizon_reached
    return eqx.tree_at(
        lambda s: (s.finished, s.result),
        state,
        (
            state.finished & ~again,
            RESULTS.where(again, SUCCESSFUL, state.result),
        ),
    )


def _hand_over(descent, before, state):
    """The state of a later solver: begun anew if the one before it has just handed
    over, its end passed on if it ended, untouched if this solver is at work."""
    exhausted = handed_over(before.result)
    begun = descent.take_over(before)
    ended = eqx.tree_at(
        lambda s: (s.finished, s.waiting, s.result),
        begun,
        (jnp.array(True), jnp.array(True), before.result),
    )
    new = _select(exhausted, begun, ended)
    return _select(state.waiting, new, state)


def _select(condition, new, old):
    """`new` where `condition` holds, for two states of one structure."""
    dynamic_new, static = eqx.partition(new, eqx.is_array)
    dynamic_old = eqx.filter(old, eqx.is_array)
    chosen = jax.tree.map(
        lambda a, b: jnp.where(condition, a, b), dynamic_new, dynamic_old
    )
    return eqx.combine(chosen, static)


def _floating(array, dtype):
    """Flags and counts as floating numbers, among which there is a NaN."""
    array = jnp.asarray(array)
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(dtype)


def _never(point) -> Bool[Array, ""]:
    del point
    return jnp.array(False)


def _adaptive(solver, rtol, point):
    """The solver with an error estimate, its root finder's tolerances set, and made
    rank preserving for a point of fixed rank."""
    if not isinstance(solver, diffrax.AbstractSolver):
        raise ValueError(
            f"method={solver!r} is no diffrax solver: give one such as diffrax.Tsit5()"
        )
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        finder = cast(Any, solver.root_finder)
        # diffrax marks tolerances to be taken from the step size control.
        if not isinstance(finder.rtol, (int, float, jax.Array)):
            solver = eqx.tree_at(
                lambda s: (
                    s.root_finder.rtol,
                    s.root_finder.atol,
                    s.root_finder.norm,
                ),
                solver,
                (rtol, rtol, root_mean_square),
            )
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        solver = diffrax.HalfSolver(solver)
    if isinstance(point, LowRank) and not isinstance(solver, RankPreserving):
        solver = RankPreserving(solver)
    return solver


def checked_dtype(point):
    leaves = jax.tree.leaves(point)
    if not leaves or not all(
        (eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        for leaf in leaves
    ):
        raise ValueError("point0 must be made of real floating point arrays only")
    return jnp.result_type(*leaves)


def checked_tolerances(tolerance, rtol, dtype, hovers=True):
    """The stopping speed and the solver's tolerance. RKC2 does not hover: all modes of
    a step at its limit are damped."""
    reachable = 8 * float(jnp.finfo(dtype).eps)
    if tolerance is None:
        tolerance = 1e-6 if dtype == jnp.float64 else 1e-2
    check_positive("tolerance", tolerance)
    if rtol is None:
        rtol = tolerance / TOLERANCE_RATIO
    check_positive("rtol", rtol)
    for name, value in (("tolerance", tolerance), ("rtol", rtol)):
        if math.isinf(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if hovers and rtol > 1.001 * tolerance / 100:
        raise ValueError(
            f"tolerance={tolerance:g} can't be reached with solver tolerance "
            f"{rtol:g}: the speed of a numerical run hovers some hundred times above "
            f"it, so use rtol <= {tolerance / TOLERANCE_RATIO:g} or tolerance >= "
            f"{rtol * TOLERANCE_RATIO:g}"
        )
    if rtol < reachable:
        raise ValueError(
            f"rtol={rtol:g} (tolerance={tolerance:g}) is below what {dtype} can reach, "
            f"{reachable:.2g}: use tolerance >= "
            f"{1.01 * reachable * TOLERANCE_RATIO:.2g}"
        )
    return tolerance, rtol


def check_positive(name, value, whole=False):
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array) and value.shape == ():
        value = value.item()
    types = (int, np.integer) if whole else (int, float, np.number)
    if isinstance(value, bool) or not isinstance(value, types):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} > 0, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def _checked_times(times, dtype):
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"times has shape {values.shape}: give at least one time")
        if not np.all(np.isfinite(values)) or values[0] < 0:
            raise ValueError("times must be finite and >= 0")
        if np.any(np.diff(values) <= 0):
            raise ValueError("times must increase strictly")
    return jnp.asarray(times, dtype)
