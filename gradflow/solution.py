"""What a descent returns, and how it ended."""

from typing import Any, cast, Generic

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .types import P, Scalar


class RESULTS(diffrax.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """How a run ended. It says nothing about what kind of place that is."""

    rule_met = "The stopping rule was met."
    stiff = "An explicit method would crawl here: let a stabilised one take over."
    horizon_reached = (
        "The horizon was reached before the run came to rest; raise `horizon`."
    )
    step_size_vanished = (
        "The step size fell to nothing: the solution may blow up in finite time."
    )
    energy_increased = (
        "A step raised the energy, which it never may: it was not taken. Check the "
        "step, or raise `slack` if that is rounding."
    )
    not_finite = (
        "The starting point or its velocity is not finite; start nearer to 0 or "
        "rescale the data."
    )


# Inherited, which type checkers take to be of the parent's type.
SUCCESSFUL = cast(RESULTS, RESULTS.successful)


class Solution(eqx.Module, Generic[P]):
    """What a descent returns.

    - `point`, `energy`, `speed`, `time`: where the run ended, $E$ and the speed there,
      and when. Times are flow time (for loss divided by the number of samples).
    - `distance`: how far the end is from the start, relative to its size. A run that
      moved to within rounding of a saddle is not at it.
    - `times`, `history`: the observations asked for, or `None`.
    - `result`: a `RESULTS` member.
    - `stats`: `steps` accepted, `rejected` steps, `rtol`, and the number of
      `velocities` computed (a derivative of one counts as two; `None` for a method that
      solves equations; for an iteration, how many times its map was). An iteration
      also has the worst `increase` of the energy in a step.
    - `broken`: when the run first broke each invariant of the exact flow (infinite:
      never); `None` if no audit was asked for. From then on it rests on rounding.
    """

    point: P
    energy: Scalar
    speed: Scalar
    time: Scalar
    distance: Scalar
    times: Float[Array, " times"] | None
    history: dict[str, PyTree[Array]] | None
    result: RESULTS
    stats: dict[str, Any]
    broken: dict[str, Scalar] | None = None


def raise_failure(solution):
    """Raises for a run that failed; a horizon reached is no failure."""
    result = solution.result
    fine = (
        (result == SUCCESSFUL)
        | (result == RESULTS.rule_met)
        | (result == RESULTS.horizon_reached)
    )
    if isinstance(fine, jax.core.Tracer):
        return result.error_if(solution, ~fine)
    if not bool(jnp.all(fine)):
        raise RuntimeError(failure_text(solution))
    return solution


def failure_text(solution: Solution) -> str:
    """One sentence on how one run ended: what, where, what to do."""
    steps = int(solution.stats["steps"] + solution.stats["rejected"])
    time = float(solution.time)
    if solution.result == RESULTS.energy_increased:
        return (
            f"the energy (minus the log-likelihood, for EM) rose by "
            f"{float(solution.stats['increase']):.3g} at iteration {steps} (tolerance "
            f"{float(solution.stats['slack']):.3g}): stopped at the point before it; "
            "check the step, or raise slack if that is rounding"
        )
    if solution.result == RESULTS.max_steps_reached and "slack" in solution.stats:
        return (
            f"{steps} iterations used, the last of length {float(solution.speed):.3g}: "
            "raise max_steps, loosen tolerance, or accelerate with Squarem"
        )
    if solution.result == RESULTS.max_steps_reached:
        return (
            f"{steps} steps used at t={time:.6g}, speed {float(solution.speed):.3g}: "
            "raise max_steps, loosen tolerance, or let an implicit method take over "
            "with method=(diffrax.Tsit5(), diffrax.Kvaerno5())"
        )
    if solution.result == RESULTS.step_size_vanished:
        return (
            f"the step size fell to nothing at t={time:.6g}: the solution may blow up "
            "there"
        )
    return RESULTS[solution.result]
