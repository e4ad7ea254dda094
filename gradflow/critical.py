"""Verdicts: what kind of place a point is, and by which rule."""

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .arguments import check_range, checked_arguments
from .flow import AbstractFlow
from .models.base import check_point
from .solution import Solution
from .theory.base import AbstractTheory
from .types import names_of, P, Scalar


# Above this many coordinates the dense Hessian is not formed (its eigenvalues cost
# the cube of this).
LARGEST_HESSIAN = 1024
# A run that moved by more than this (relative) came from elsewhere.
STAYED = 1e-12


class KIND(eqx.Enumeration):
    """What kind of place a point is."""

    global_minimum = "The exact flow from here ends at a global minimum."
    strict_saddle = "A critical point with a direction of negative curvature."
    nonstrict_saddle = "A saddle whose Hessian has no negative eigenvalue."
    not_critical = "Not a critical point: the flow is still moving here."
    diverged = "Not finite."
    unresolved = "Nearly at rest, but no rule says where the flow goes from here."


class RULE(eqx.Enumeration):
    """What decided a verdict."""

    loss_certificate = "The loss is below every critical value but the least."
    closed_form = "The point is a known critical point, and second-order analysis."
    hessian = "The point is critical, and its Hessian has a negative eigenvalue."
    sign_obstruction = (
        "The sign of the determinant, which the flow keeps, excludes the minimum, and "
        "the loss all saddles but one."
    )
    none = "No rule decided."


class CriticalPoint(eqx.Module):
    """A verdict with its evidence.

    - `kind`, `rule`: what, and by which rule. A small speed is never a rule.
    - `active`: the modes of the nearest critical point; `rank` its rank, and
      `rank_gap` the first singular value beyond that rank over the last within it.
    - `speed`; `gap`: energy above the least; `value_gap`: energy above (or below) that
      of the nearest critical point.
    - `curvature`, `index`: the smallest eigenvalue and the number of negative
      eigenvalues of the Hessian. NaN and -1 where it was not formed: the certificate
      needs none, and above 1024 coordinates it is too large.
    - `remaining`: predicted time to leave the neighborhood of the nearest critical
      point: 0 if certified, infinite at a critical point.
    - `precision_limited`: the run that led here broke an invariant of the exact flow,
      so that the verdict says nothing about its start; `limited_at`: when (infinite:
      never; NaN: the run was not audited).
    """

    kind: KIND
    rule: RULE
    active: Bool[Array, " modes"]
    rank: Int[Array, ""]
    rank_gap: Scalar
    speed: Scalar
    gap: Scalar
    value_gap: Scalar
    curvature: Scalar
    index: Int[Array, ""]
    remaining: Scalar
    precision_limited: Bool[Array, ""]
    limited_at: Scalar


@checked_arguments
def classify(
    flow: AbstractFlow[P],
    theory: AbstractTheory[P],
    at: P | Solution[P],
    *,
    speed_tol: float = 1e-5,
    curvature_tol: float = 1e-8,
) -> CriticalPoint:
    r"""Where the exact gradient flow goes from a point, or from the end of a run, as
    far as that is certain.

    In this order:

    1. not finite: `diverged`;
    2. `theory.certificate` holds: `global_minimum`;
    3. `theory.saddle_limit` is certain: that saddle (points of fixed rank only);
    4. a critical point to rounding: its kind by the theory's second-order analysis, or
       where that is open a strict saddle if its Hessian says so. A point 1e-10 away is
       not one: it may leave, and is left open. So is the end of a run that moved to
       within rounding of a saddle: only if what keeps it there is exactly 0 (a
       symmetric start, say) does its limit not depend on rounding;
    5. faster than `speed_tol`: `not_critical`;
    6. `unresolved`, with the predicted `remaining` time.

    **Arguments:**

    - `curvature_tol`: eigenvalues of the Hessian count as negative below minus this
      times the largest in absolute value, or 1 if that is less. (Hessian of the energy
      in a chart: at a critical point its inertia does not depend on the metric.)

    All of this is about the flow from the point at hand. Whether the run followed the
    exact flow up to there is what `precision_limited` says, if it was audited.

    *Reference:* rules 2 to 4 are those of the theory.
    """
    point = cast(P, at.point if isinstance(at, Solution) else at)
    check_point("at", flow.energy, point)
    for name, number in (("speed_tol", speed_tol), ("curvature_tol", curvature_tol)):
        check_range(name, number)
    stayed = at.distance <= STAYED if isinstance(at, Solution) else jnp.array(True)
    energy, speed = flow.energy(point), flow.speed(point)
    leaves = jax.tree.leaves(point)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    finite = finite & jnp.isfinite(energy) & jnp.isfinite(speed)
    # The theory's factorizations want numbers, whatever they are.
    safe = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), point)
    certified = theory.certificate(safe) & finite
    match = theory.match(safe)
    limit = theory.saddle_limit(safe)
    obstructed = jnp.array(False) if limit is None else limit.certain & finite
    open_case = finite & ~certified & ~obstructed
    curvature, index = jax.lax.cond(
        open_case,
        lambda: _inertia(flow, safe, curvature_tol),
        lambda: _no_inertia(energy),
    )
    saddle_stays = stayed | match.exact
    remaining = jax.lax.cond(
        open_case & ~(match.critical & saddle_stays),
        lambda: theory.remaining(safe),
        lambda: jnp.where(certified, jnp.zeros_like(energy), jnp.inf),
    )
    if limit is not None:
        match = eqx.tree_at(
            lambda m: (m.modes, m.value, m.rank),
            match,
            (
                jnp.where(obstructed, limit.modes, match.modes),
                jnp.where(obstructed, limit.value, match.value),
                jnp.where(obstructed, limit.rank, match.rank),
            ),
        )
    # The two second-order roads must not contradict each other.
    nonstrict = match.nonstrict & saddle_stays & ~(index > 0)
    strict = match.strict & saddle_stays & (index != 0)
    curved = match.undecided & saddle_stays & (index > 0)

    broken = at.broken if isinstance(at, Solution) else None
    limited_at = jnp.full_like(energy, jnp.nan)
    if broken is not None:
        limited_at = jnp.min(
            jnp.stack([*broken.values(), jnp.full_like(energy, jnp.inf)])
        )

    kind, rule = KIND.unresolved, RULE.none
    for condition, member, by in (
        (speed > speed_tol, KIND.not_critical, RULE.none),
        (strict, KIND.strict_saddle, RULE.closed_form),
        (curved, KIND.strict_saddle, RULE.hessian),
        (nonstrict, KIND.nonstrict_saddle, RULE.closed_form),
        (match.optimal, KIND.global_minimum, RULE.closed_form),
        *_obstruction(limit, obstructed),
        (certified, KIND.global_minimum, RULE.loss_certificate),
        (~finite, KIND.diverged, RULE.none),
    ):
        kind = KIND.where(condition, member, kind)
        rule = RULE.where(condition, by, rule)
    return CriticalPoint(
        kind,
        rule,
        match.modes,
        match.rank,
        match.rank_gap,
        speed,
        energy - theory.optimal_energy(),
        energy - match.value,
        curvature,
        index,
        remaining,
        jnp.isfinite(limited_at),
        limited_at,
    )


def _obstruction(limit, obstructed):
    """The verdicts of a theory that has a rule for saddles."""
    if limit is None:
        return ()
    return (
        (obstructed & limit.strict, KIND.strict_saddle, RULE.sign_obstruction),
        (obstructed & ~limit.strict, KIND.nonstrict_saddle, RULE.sign_obstruction),
    )


@checked_arguments
def describe(finding: CriticalPoint) -> str:
    """One sentence on one verdict: what, why, and what to do if it is open."""
    name = names_of(KIND, finding.kind)[()]
    evidence = (
        f"gap {float(finding.gap):.3g}, nearest critical point of rank "
        f"{int(finding.rank)} at loss difference {float(finding.value_gap):.3g}, "
        f"speed {float(finding.speed):.3g}"
    )
    if int(finding.index) >= 0:
        evidence += f", smallest Hessian eigenvalue {float(finding.curvature):.3g}"
    if finding.kind == KIND.unresolved or finding.kind == KIND.not_critical:
        remaining = float(finding.remaining)
        leaving = "no escape predicted"
        if remaining < float("inf"):
            leaving = f"about {remaining:.3g} more time to leave it"
        return f"{name} ({evidence}; {leaving})"
    if bool(finding.precision_limited):
        evidence += (
            f"; precision_limited: the run left the exact flow at "
            f"t={float(finding.limited_at):.4g}"
        )
    return f"{name} by {names_of(RULE, finding.rule)[()]} ({evidence})"


def _inertia(flow, point, curvature_tol):
    chart, size = flow.manifold.chart(point)
    if size > LARGEST_HESSIAN:
        return _no_inertia(flow.energy(point))
    origin = jnp.zeros((size,), dtype=jax.tree.leaves(point)[0].dtype)
    hessian = jax.hessian(lambda step: flow.energy(chart(step)))(origin)
    values = jnp.linalg.eigvalsh(hessian)
    # At a point where the Hessian vanishes all of its eigenvalues are rounding.
    scale = jnp.maximum(1.0, jnp.maximum(jnp.abs(values[0]), jnp.abs(values[-1])))
    return values[0], jnp.sum(values < -curvature_tol * scale)


def _no_inertia(like):
    return jnp.full_like(like, jnp.nan), jnp.asarray(-1)
