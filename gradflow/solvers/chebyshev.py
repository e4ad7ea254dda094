r"""An explicit method whose steps may be as long as the square of its stages allows.

After a fast mode has died out a gradient flow is stiff: Tsit5 crawls in steps of the
fast mode's time, and an implicit method solves with a dense Jacobian. Along the
negative real axis, where the Hessian of an energy puts its eigenvalues, $s$ stages of
a Runge-Kutta-Chebyshev method are stable up to $h \rho = 0.653 (s^2 - 1)$, with $\rho$
the spectral radius of the Jacobian: the cost of a stretch of time grows like the square
root of its stiffness, in velocities only.
"""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from ..arguments import checked_fields
from ..types import Scalar
from .step_control import NormwiseStepSize, root_mean_square


DAMPING = 2 / 13
# The least of beta(s) / (s^2 - 1) over all s, with beta(s) = (w0 + 1) / w1.
REACH = 2 / 3 * (1 - 2 * DAMPING / 15)
# The radius is estimated from below, and grows until it is estimated again.
SAFETY = 1.1
SETTLED = 5e-4
# Stages between two estimates, and the most iterations of one, each of the price of
# some 2 stages: lanes side by side wait for the longest. While the last iteration has
# changed the radius by more than UNKNOWN, as at a start, the next step goes on.
KEPT = 100
MOST_ITERATIONS = 4
UNKNOWN = 0.02
# A controller never follows a rejected step by one longer than 0.9 of it.
REJECTED = 0.95
# The part of an old direction that is replaced: another eigenvalue may have become the
# largest, of which the old direction holds nothing but rounding.
RENEWED = 0.05


class State(NamedTuple):
    """What RKC2 keeps of its last step, that of a rejected one being dropped."""

    velocity: PyTree[Array]
    direction: PyTree[Array]
    radius: Scalar
    age: Int[Array, ""]  # stages since the radius was estimated
    length: Scalar  # of the step
    velocities: Int[Array, ""]  # computed for it; a derivative counts as two


@checked_fields
class RKC2(diffrax.AbstractAdaptiveSolver):
    r"""The Runge-Kutta-Chebyshev method of order 2, for flows whose Jacobian has
    eigenvalues near the negative real axis.

    With $w_0 = 1 + \epsilon / s^2$, $\epsilon = 2/13$, $w_1 = T_s'(w_0) / T_s''(w_0)$,
    $b_j = T_j''(w_0) / T_j'(w_0)^2$ and $a_j = 1 - b_j T_j(w_0)$ its stability
    polynomial is $a_s + b_s T_s(w_0 + w_1 z)$. The number $s$ of stages of a step comes
    from an estimate of the spectral radius by power iteration, begun from the last
    one's vector. The error is that of a cubic through both ends,
    $0.8 (y_0 - y_1) + 0.4 h (f_0 + f_1)$.

    Usable in `diffrax.diffeqsolve` too, with derivatives in forward mode only.

    **Arguments:**

    - `max_stages`: a step that needs more is rejected. A solver can't shorten a step,
      but an infinite error makes any controller do so by the most it ever does (by 5).
      Such a trial costs no stage. At the limit about every third trial is rejected.

    *Reference:* Sommeijer, Shampine, Verwer 1998, *RKC: an explicit solver for
    parabolic PDEs*, J. Comput. Appl. Math. 88.
    """

    max_stages: int = eqx.field(static=True, default=200)
    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation

    def __check_init__(self):
        if self.max_stages < 2:
            raise ValueError(f"max_stages must be >= 2, got {self.max_stages}")

    def order(self, terms) -> int:
        return 2

    def error_order(self, terms) -> int:
        return 3

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> State:
        length = jnp.abs(jnp.asarray(terms.contr(t0, t1)))
        return State(
            terms.vf(t0, y0, args),
            scattered(y0),
            jnp.zeros_like(length),
            jnp.zeros((), dtype=int),
            # Longer than any: the first step makes an estimate.
            jnp.full_like(length, jnp.inf),
            jnp.ones((), dtype=int),
        )

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        control = jnp.asarray(terms.contr(t0, t1))
        length = jnp.abs(control)
        before = jax.lax.cond(
            made_jump, lambda: terms.vf(t0, y0, args), lambda: solver_state.velocity
        )
        # A solver isn't told of a rejection, but a shorter step is a sign of one.
        shorter = length < REJECTED * solver_state.length
        due = shorter | (solver_state.age >= KEPT) | made_jump
        direction, radius, moved, iterations = spectral_radius(
            lambda y: terms.vf(t0, y, args),
            y0,
            solver_state.direction,
            solver_state.radius,
            iterations=jnp.where(due, MOST_ITERATIONS, 0),
        )
        age = jnp.where(due, jnp.where(moved > UNKNOWN, KEPT, 0), solver_state.age)

        wanted = jnp.ceil(jnp.sqrt(1 + length * SAFETY * radius / REACH))
        wanted = jnp.maximum(wanted, 2)
        # Not so for NaN either.
        possible = wanted <= self.max_stages
        stages = jnp.where(possible, wanted, 0).astype(age.dtype)
        change, after = self._stages(terms, t0, t1, y0, args, before, stages)

        y1 = _combined((1, y0), (1, change))
        usable = possible & _all_finite((y1, after))
        error = _combined(
            (-0.8, change), (0.4 * control, before), (0.4 * control, after)
        )
        # An infinite candidate would be inf / inf to diffrax's controller.
        error = jax.tree.map(lambda leaf: jnp.where(usable, leaf, jnp.inf), error)
        y1 = jax.tree.map(lambda new, old: jnp.where(usable, new, old), y1, y0)
        dense = {
            "y0": y0,
            "y1": y1,
            "k0": _combined((control, before)),
            "k1": _combined((control, after)),
        }
        spent = stages + 2 * iterations
        state = State(after, direction, radius, age + stages, length, spent)
        return y1, error, dense, state, diffrax.RESULTS.successful

    def _stages(self, terms, t0, t1, y0, args, before, stages):
        """How far the step goes, and the velocity there.

        All velocities are found in one loop whose number of turns is known at run time
        only: outside, XLA on CPU computes a velocity anew for each of its
        consumers. Stages are kept as differences from `y0`, so that
        their rounding is relative to the step.
        """
        control = jnp.asarray(terms.contr(t0, t1))
        dtype = control.dtype
        excess = DAMPING / jnp.maximum(stages, 1).astype(dtype) ** 2
        w0 = 1 + excess
        w1 = jnp.asarray(slopes(self.max_stages), dtype)[stages]
        b = 1 / (4 * w0**2)  # of stages 0, 1 and 2
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        first = (w0, one, zero), (excess, one, zero)
        still = jax.tree.map(jnp.zeros_like, y0)
        begun = _combined((b * w1 * control, before))

        def stage(_, carry):
            older, newer, _, chebyshev, b2, b1, node = carry
            time = t0 + node.astype(jnp.result_type(t0)) * (t1 - t0)
            velocity = terms.vf(time, _combined((1, y0), (1, newer)), args)
            a1 = 1 - b1 * chebyshev[0][0]
            chebyshev = following(chebyshev, excess)
            _, slope, curvature = chebyshev[0]
            b0 = curvature / slope**2
            ratio = 2 * b0 / b1
            newest = _combined(
                (ratio * w0, newer),
                (-b0 / b2, older),
                (ratio * w1 * control, velocity),
                (-a1 * ratio * w1 * control, before),
            )
            node = w1 * curvature / slope
            return newer, newest, velocity, chebyshev, b1, b0, node

        # The last turn is there for its velocity: what it adds to is dropped.
        carry = (still, begun, before, first, b, b, b * w1)
        carry = jax.lax.fori_loop(0, stages, stage, carry)
        return carry[0], carry[2]


def control_of(solver: Any, rtol: Any) -> NormwiseStepSize:
    """The control of a method's steps: those of RKC2 are as long as their error allows,
    as it has no limit of stability around which they could go up and down."""
    if isinstance(solver, RKC2):
        return NormwiseStepSize(rtol, pcoeff=0.0, icoeff=1.0)
    return NormwiseStepSize(rtol)


def spectral_radius(
    function, point, direction, radius: Scalar, *, iterations: Int[Array, ""] | int
) -> tuple[Any, Scalar, Scalar, Int[Array, ""]]:
    r"""The largest $|\lambda|$ of the Jacobian of a vector field at a point, by power
    iteration from an earlier pair.

    Derivatives are exact: differences of velocities are noise in float32.

    **Returns:** the vector, the estimate, by how much of itself the last iteration
    changed it, and the number of iterations. Below 0.05 % there are no more iterations.
    """
    renewed = _combined((1, direction), (RENEWED, scattered(point)))

    def unsettled(carry):
        _, new, old, count = carry
        settled = (count > 0) & (jnp.abs(new - old) <= SETTLED * new)
        return ~settled & (count < iterations)

    def iterate(carry):
        direction, old, _, count = carry
        size = root_mean_square(direction)
        unit = _combined((1 / jnp.where(size > 0, size, 1), direction))
        _, image = jax.jvp(function, (point,), (unit,))
        new = root_mean_square(image)
        # Nowhere to go from a vector of the kernel, or after an overflow.
        usable = jnp.isfinite(new) & (new > 0)
        image = _combined((1 / jnp.where(usable, new, 1), image))
        kept = jax.tree.map(lambda a, b: jnp.where(usable, a, b), image, unit)
        return kept, new.astype(old.dtype), old, count + 1

    carry = (renewed, radius, radius, jnp.zeros((), dtype=int))
    found, new, old, count = jax.lax.while_loop(unsettled, iterate, carry)
    keep = lambda a, b: jnp.where(count > 0, a, b)
    moved = jnp.abs(new - old) / jnp.where(new > 0, new, 1)
    return jax.tree.map(keep, found, direction), new, moved, count


def following(chebyshev, excess):
    r"""$T_{j+1}, T'_{j+1}, T''_{j+1}$ at $w_0$, and what they are more than those of
    $j$, from the same of $j$.

    In differences all terms of $T_{j+1} = 2 w_0 T_j - T_{j-1}$ are positive, so that
    float32 loses nothing.
    """
    values, rises = chebyshev
    sources = (0, 2 * values[0], 4 * values[1])
    rises = tuple(
        rise + 2 * excess * value + source
        for rise, value, source in zip(rises, values, sources, strict=True)
    )
    values = tuple(value + rise for value, rise in zip(values, rises, strict=True))
    return values, rises


@functools.cache
def slopes(max_stages: int) -> np.ndarray:
    r"""$w_1$ for 0, 1, ... stages, where $T_s(\cosh\theta) = \cosh s\theta$."""
    s = np.arange(2, max_stages + 1)
    theta = 2 * np.arcsinh(np.sqrt(DAMPING / 2) / s)
    slope = s * np.sinh(s * theta) / np.sinh(theta)
    curvature = (s**2 * np.cosh(s * theta) - np.cosh(theta) * slope) / np.sinh(
        theta
    ) ** 2
    return np.concatenate([np.zeros(2), slope / curvature])


def scattered(point, axis: int | None = None):
    """Numbers of size 1 without a pattern, which no symmetry of a point shares; the
    same along an `axis` of lanes."""

    def numbers(leaf):
        shape = list(leaf.shape)
        if axis is not None:
            shape[axis] = 1
        count = jnp.arange(math.prod(shape), dtype=leaf.dtype)
        return jnp.broadcast_to(jnp.cos(count**2).reshape(shape), leaf.shape)

    return jax.tree.map(numbers, point)


def _combined(*terms):
    """The sum of coefficients times trees."""
    coefficients, trees = zip(*terms, strict=True)

    def add(*leaves):
        products = [
            jnp.asarray(coefficient, leaf.dtype) * leaf
            for coefficient, leaf in zip(coefficients, leaves, strict=True)
        ]
        return functools.reduce(jnp.add, products)

    return jax.tree.map(add, *trees)


def _all_finite(tree) -> Bool[Array, ""]:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks))
