r"""The Riccati equation behind the closed forms, from its exact invariants.

| on paper | in code |
|---|---|
| $\dot P = FP + PF - PBP$, $F$ and $B \succeq 0$ diagonal | `rates`, `weights` |
| $P = QQ^\top$ | `factor` |

Directions that a start lacks stay absent under the exact flow. In floating point they
are present as rounding, which grows like $e^{ft}$ and in the end decides the limit. So
the start is brought to column echelon form first, in which what is absent is 0.0, and
the steps keep every 0.0.
"""

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..types import Scalar


# Longest step in units of 1 / max |f|. The factor e^(2 f t) of one step is then at
# most 55: nothing overflows, and two digits at most are lost to its condition.
LONGEST_STEP = 2.0
# Below this many units of rounding a singular value of the start counts as zero:
# changes of basis leave up to 6 of them in a start of ten rows.
ROUNDINGS = 64


def riccati(
    rates: Float[Array, " n"],
    weights: Float[Array, " n"],
    factor: Float[Array, "n k"],
    time: Scalar,
) -> Float[Array, "n _"]:
    r"""A factor $Q(t)$ of the solution $P = QQ^\top$ from $P(0) = Q_0 Q_0^\top$:

    $$P(t) = e^{Ft} Q_0 \bigl[1 + Q_0^\top \Phi(t) Q_0\bigr]^{-1} Q_0^\top e^{Ft},
    \qquad \Phi(t) = \int_0^t e^{2Fs} B\,\mathrm{d}s.$$

    `rates` must descend and `weights` be >= 0; this is not checked. Steps of length
    `LONGEST_STEP / max |f|` are composed, each from the factor $Q_1 = e^{Ft} Q_0
    L^{-\top}$ of the one before it ($LL^\top$ is the bracket), so that nothing
    overflows.
    """
    if factor.shape[1] > factor.shape[0]:
        left, values, _ = jnp.linalg.svd(factor, full_matrices=False)
        factor = left * values[None, :]
    count = steps(jnp.max(jnp.abs(rates)) * time)
    step = time / count
    growth = jnp.exp(rates * step)
    nonzero = jnp.where(rates == 0, 1.0, rates)
    growths = jnp.expm1(2 * nonzero * step) / (2 * nonzero)
    integral = weights * jnp.where(rates == 0, step, growths)
    one = jnp.eye(factor.shape[1], dtype=factor.dtype)

    def advance(_, q):
        lower = jnp.linalg.cholesky(one + q.T @ (integral[:, None] * q))
        moved = growth[:, None] * q
        return jax.scipy.linalg.solve_triangular(lower, moved.T, lower=True).T

    return jax.lax.fori_loop(0, count.astype(int), advance, echelon(factor))


def steps(elapsed: Scalar) -> Scalar:
    """How many steps of at most `LONGEST_STEP` make `elapsed`."""
    return jnp.maximum(jnp.ceil(elapsed / LONGEST_STEP), 1)


def noise(matrix: Float[Array, "n k"]) -> Scalar:
    """The size below which a singular value of a part of `matrix` is rounding."""
    return ROUNDINGS * float(jnp.finfo(matrix.dtype).eps) * jnp.linalg.norm(matrix)


def echelon(matrix: Float[Array, "n k"]) -> Float[Array, "n k"]:
    r"""$AQ$ with an orthogonal $Q$ for which each column is 0.0 above its pivot, and
    the pivots move up from column to column.

    The first column starts as low as any combination of columns can, to rounding: it
    spans the kernel of the largest leading block of rows that has one. The next is the
    same for what is orthogonal to it. Kernels come from singular values, since
    elimination row by row takes eps / pivot, not eps, for a zero.
    """
    rows, width = matrix.shape
    places = jnp.arange(rows)[:, None]
    norm = jnp.linalg.norm(matrix)
    barrier = jnp.where(norm > 0, norm, 1.0)

    def kernel(count, found):
        leading = jnp.where(places < count, matrix, 0.0)
        stacked = jnp.concatenate([leading, barrier * found])
        _, sizes, right = jnp.linalg.svd(stacked, full_matrices=False)
        return sizes[-1] <= noise(matrix), right[-1]

    def halve(_, carry):
        low, high, found = carry
        middle = (low + high + 1) // 2
        singular, _ = kernel(middle, found)
        return (
            jnp.where(singular, middle, low),
            jnp.where(singular, high, middle - 1),
            found,
        )

    def peel(j, carry):
        found, pivots = carry
        ends = (jnp.zeros_like(pivots[0]), jnp.full_like(pivots[0], rows), found)
        pivot, _, _ = jax.lax.fori_loop(0, rows.bit_length(), halve, ends)
        _, direction = kernel(pivot, found)
        return found.at[j].set(direction), pivots.at[j].set(pivot)

    start = jnp.zeros((width, width), matrix.dtype), jnp.zeros(width, int)
    directions, pivots = jax.lax.fori_loop(0, width, peel, start)
    return jnp.where(places < pivots[None, :], 0.0, matrix @ directions.T)


def checked_time(t: float | Scalar, dtype: jnp.dtype) -> Scalar:
    """`t` as an array; refused unless finite and >= 0."""
    time = jnp.asarray(t, dtype)
    wrong = ~(jnp.isfinite(time) & (time >= 0))
    return refuse(time, wrong, f"t must be finite and >= 0, got {t}")


def refuse(
    value: Float[Array, "*dims"], wrong: Bool[Array, ""], text: str
) -> Float[Array, "*dims"]:
    """`value`, unless `wrong`: a `ValueError`, or a failing computation if traced."""
    if isinstance(wrong, jax.core.Tracer):
        return eqx.error_if(value, wrong, text)
    if bool(wrong):
        raise ValueError(text)
    return value
