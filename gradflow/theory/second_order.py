r"""What kind of critical point a factorization is, with every "zero" backed by a gap.

A factorization $W_N \cdots W_1$ near a critical point of rank $k$ splits exactly: with
$T_k^+$ the pseudo-inverse of the rank-$k$ truncation of the product $T$, the oblique
projectors $P_j = (W_j \cdots W_1)\, T_k^+\, (W_N \cdots W_{j+1})$ satisfy
$W_j P_{j-1} = P_j W_j$, so every factor is the sum of an active part (product $T_k$)
and a residual $R_j = (1 - P_j) W_j (1 - P_{j-1})$ (product $T - T_k$). In this form

- the point is critical iff $T_k$ is, and $A_j^\top Q_\perp B_j^\top = 0$ for the
  partial products $A_j, B_j$ of the residuals, where $Q_\perp$ is what $T_k$ leaves
  of $Q$;
- it is a strict saddle iff $T_k$ is not best of its rank, or for some $i > j$ both
  $R_{i-1} \cdots R_{j+1} \ne 0$ and $A_i^\top Q_\perp B_j^\top \ne 0$.

All the residual products keep their relative accuracy however small the residuals are,
which a gradient or a Hessian does not: at distance 1e-10 from the origin of a network
of depth 4 both are 0 to rounding, and yet the run will leave.

*Reference:* Achour, Malgouyres, Gerchinovitz, *The loss landscape of deep linear neural
networks: a second-order analysis* (2021): a pivot $(i, j)$ is *tightened* iff one of
its two complementary blocks has rank $k$. Ranks of the whole blocks are $k$ plus those
of the residual blocks, hence the form above.
"""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..types import Scalar


# Between these two, relative to what it is made of, a number is neither zero nor not:
# the verdict is left open. Rounding of factors of size 1 leaves some 1e-15.
ZERO = 1e-13
NONZERO = 1e-6
# The same for singular values within one residual: small ones multiply up.
NONZERO_WITHIN = 1e-3
# Residual of the product's own equations; a point 1e-10 away must fail it.
MATCHED = 1e-12
# Kept singular values must stand out this far from rounding.
KEPT = 1e-8
# Steps after which the prediction of an escape is given up.
PATIENCE = 5000


class Anatomy(eqx.Module):
    """`critical` as in the text above; `exact`: every residual that counts as zero is
    0.0; `loose`: some pivot is not tightened;
    `tightened`: all are (neither holds when a block is in doubt)."""

    critical: Bool[Array, ""]
    exact: Bool[Array, ""]
    loose: Bool[Array, ""]
    tightened: Bool[Array, ""]
    rank_gap: Scalar


def examine(
    factors: tuple[Float[Array, "_ _"], ...],
    q: Float[Array, "y x"],
    rank: Int[Array, ""],
) -> Anatomy:
    """Compares factors (the first one whitened, $W_1 C^{1/2}$) with the critical
    points of rank `rank`."""
    split = _split(factors, q, rank)
    residuals, sure = _without_rounding(split)
    norms = [jnp.linalg.norm(r) for r in residuals]
    depth = len(factors)
    above, below = _partial_products(residuals, split)
    above_norms = [math.prod(norms[j:]) for j in range(depth + 1)]
    below_norms = [math.prod(norms[:j]) for j in range(depth + 1)]
    left_over = jnp.linalg.norm(split.left_over)

    def block(i, j):
        # A_i^T Q_perp B_j^T of layers i >= j, counted from 1.
        value = above[i].T @ split.left_over @ below[j - 1].T
        return _judge(value, above_norms[i] * left_over * below_norms[j - 1])

    product_zero, _ = _judge(above[0], above_norms[0])
    critical = split.matched & sure & product_zero
    for j in range(1, depth + 1):
        critical = critical & block(j, j)[0]
    loose, tightened = jnp.array(False), jnp.array(True)
    for j in range(1, depth):
        middle, middle_norm = split.complements[j], split.complement_norms[j]
        for i in range(j + 1, depth + 1):
            middle_zero, middle_nonzero = _judge(middle, middle_norm)
            outer_zero, outer_nonzero = block(i, j)
            loose = loose | (middle_nonzero & outer_nonzero)
            tightened = tightened & (middle_zero | outer_zero)
            middle = residuals[i - 1] @ middle
            middle_norm = norms[i - 1] * middle_norm
    kept = [jnp.linalg.norm(residual) for residual in split.residuals]
    exact = jnp.all(jnp.stack(kept) == jnp.stack(norms))
    return Anatomy(critical, exact, loose, tightened, split.rank_gap)


def escape_time(
    factors: tuple[Float[Array, "_ _"], ...],
    q: Float[Array, "y x"],
    inverse_root: Float[Array, "x x"],
    rank: Int[Array, ""],
) -> Scalar:
    r"""Predicted time until half of the next mode is learned.

    Near the critical point the residuals follow the gradient flow of
    $-\langle Q_\perp, R_N \cdots R_1 \rangle$ (what is learned does not feel them).
    That flow is followed here, by classical Runge-Kutta steps of a quarter of its
    fastest time. Infinite if it has not got there in `PATIENCE` steps.
    """
    split = _split(factors, q, rank)
    first, *rest = split.residuals
    start = [first @ inverse_root, *rest]
    target = split.left_over @ jnp.linalg.inv(inverse_root)
    # At half a mode, <Q_perp, product> is half the square of its singular value.
    enough = 0.5 * jnp.linalg.norm(split.left_over, 2) ** 2
    steepest = jnp.linalg.norm(target, 2)

    def gain(residuals):
        product, *others = residuals
        for residual in others:
            product = residual @ product
        return jnp.sum(target * product)

    def shifted(residuals, size, velocity):
        return jax.tree.map(lambda r, v: r + size * v, residuals, velocity)

    def go_on(carry):
        residuals, _, count = carry
        return (gain(residuals) < enough) & (count < PATIENCE)

    def step(carry):
        residuals, time, count = carry
        norms = [jnp.linalg.norm(residual) for residual in residuals]
        # The Hessian's blocks are Q_perp times all factors but two.
        fastest = [
            steepest * math.prod(norms[:i] + norms[i + 1 : j] + norms[j + 1 :])
            for i, j in itertools.combinations(range(len(norms)), 2)
        ]
        size = 0.25 / jnp.max(jnp.stack([*fastest, jnp.finfo(q.dtype).tiny * 4]))
        velocity = jax.grad(gain)
        k1 = velocity(residuals)
        k2 = velocity(shifted(residuals, size / 2, k1))
        k3 = velocity(shifted(residuals, size / 2, k2))
        k4 = velocity(shifted(residuals, size, k3))
        slope = jax.tree.map(
            lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4
        )
        return shifted(residuals, size, slope), time + size, count + 1

    residuals, time, _ = jax.lax.while_loop(
        go_on, step, (start, jnp.zeros_like(steepest), jnp.asarray(0))
    )
    return jnp.where(gain(residuals) >= enough, time, jnp.inf)


class _Split(eqx.Module):
    residuals: list[Float[Array, "_ _"]]
    noise: list[Scalar]  # what rounding leaves in each residual
    complements: list[Float[Array, "_ _"]]  # 1 - P_j, j = 0..N
    complement_norms: list[Scalar]
    left_over: Float[Array, "y x"]  # Q_perp
    matched: Bool[Array, ""]
    rank_gap: Scalar


def _split(factors, q, rank) -> _Split:
    depth = len(factors)
    eye = lambda size: jnp.eye(size, dtype=q.dtype)
    below = [eye(q.shape[1])]
    for factor in factors:
        below.append(factor @ below[-1])
    above = [eye(q.shape[0])]
    for factor in reversed(factors):
        above.insert(0, above[0] @ factor)
    product = below[-1]
    left, values, right = jnp.linalg.svd(product, full_matrices=False)
    kept = jnp.arange(values.size) < rank
    inverse = (
        right.T * jnp.where(kept & (values > 0), 1 / values, 0)[None, :]
    ) @ left.T
    projectors = [below[j] @ inverse @ above[j] for j in range(depth + 1)]
    complements = [eye(p.shape[0]) - p for p in projectors]
    norms = [jnp.linalg.norm(p) for p in projectors]
    residuals, noise = [], []
    for j, factor in enumerate(factors):
        residuals.append(complements[j + 1] @ factor @ complements[j])
        amplified = (1 + norms[j + 1]) * (1 + norms[j]) * jnp.linalg.norm(factor)
        # Nothing is subtracted at rank 0: an entry of 1e-100 is exact.
        noise.append(jnp.where(rank > 0, ZERO * amplified, 0))
    largest = jnp.linalg.norm(q, 2)
    gap = q - product
    errors = jnp.maximum(
        jnp.linalg.norm(gap @ right.T, axis=0), jnp.linalg.norm(left.T @ gap, axis=1)
    )
    stands_out = values > KEPT * largest
    matched = jnp.all(~kept | ((errors <= MATCHED * largest) & stands_out))
    last = jnp.where(rank > 0, values[jnp.maximum(rank - 1, 0)], largest)
    following = jnp.where(
        rank < values.size, values[jnp.minimum(rank, values.size - 1)], 0
    )
    rank_gap = following / jnp.where(last > 0, last, 1)
    left_over = complements[-1] @ q @ complements[0]
    tiny = jnp.linalg.norm(left_over) <= MATCHED * jnp.linalg.norm(q)
    return _Split(
        residuals,
        noise,
        complements,
        [1 + norm for norm in norms],
        jnp.where(tiny, 0, left_over),
        matched,
        rank_gap,
    )


def _without_rounding(split):
    """Residuals with rounding set to zero, and whether that was beyond doubt."""
    cleaned, sure = [], jnp.array(True)
    for residual, noise in zip(split.residuals, split.noise, strict=True):
        zero = jnp.linalg.norm(residual) <= noise
        values = jnp.linalg.svd(residual, compute_uv=False)
        small = values <= jnp.maximum(ZERO * values[0], noise)
        clear = jnp.all(small | (values >= NONZERO_WITHIN * values[0]))
        sure = sure & (zero | clear)
        cleaned.append(jnp.where(zero, 0, residual))
    return cleaned, sure


def _partial_products(residuals, split):
    """`above[j]` $= R_N \\cdots R_{j+1}$ and `below[j]` $= R_j \\cdots R_1$."""
    above, below = [split.complements[-1]], [split.complements[0]]
    for residual in reversed(residuals):
        above.insert(0, above[0] @ residual)
    for residual in residuals:
        below.append(residual @ below[-1])
    return above, below


def _judge(matrix, made_of):
    """Whether a matrix is surely zero, and whether it is surely not, relative to the
    norms of what it is the product of."""
    size = jnp.linalg.norm(matrix)
    zero = size <= 10 * ZERO * made_of
    return zero, ~zero & (size >= NONZERO * made_of)
