"""Matrix functions by their spectrum: powers, sign-fixed factors, best rank-k.

All are pure and traceable. Only the arguments named in a `ValueError` are static.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


# Eigenvalues below RTOL times the largest are taken for rounding. The raw MNIST
# training images have their smallest non-zero eigenvalue at 2e-11 and their rounding
# at 4e-17 of the largest, so every cutoff between the two gives the same rank, 712.
RTOL = 1e-12
# Jacobi needs 2 to 4 sweeps near a diagonal core and rarely more than 8 at all.
MOST_SWEEPS = 20


def cutoff(dimension: int, dtype: np.dtype, rtol: float = RTOL) -> float:
    r"""The relative size below which an eigenvalue counts as zero:
    $\max(\text{rtol}, \text{dimension} \cdot \epsilon)$.

    The second term is the rounding error of `eigh` itself; it decides in float32.
    """
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be at least 0 and below 1, got {rtol}")
    return max(rtol, dimension * float(jnp.finfo(dtype).eps))


def psd_power(
    matrix: Float[Array, "n n"], power: float, *, rtol: float = RTOL
) -> Float[Array, "n n"]:
    r"""A symmetric positive semidefinite matrix to a real power, on its support:
    $\sum_{\lambda_i > c \lambda_1} \lambda_i^p v_i v_i^\top$.

    Negative powers are those of the pseudo-inverse; power 0 is the orthogonal projector
    on the support.

    **Arguments:**

    - `rtol`: the cutoff $c$, see [`gradflow.spectrum.cutoff`][].
    """
    values, vectors = jnp.linalg.eigh(matrix)
    # Written so that a NaN isn't dropped, and so that the derivative is finite.
    dropped = values <= cutoff(len(matrix), matrix.dtype, rtol) * values[-1]
    dropped = dropped | (values <= 0)
    powers = jnp.where(dropped, 0.0, jnp.where(dropped, 1.0, values) ** power)
    return (vectors * powers[None, :]) @ vectors.T


@jax.jit
def eigh_descending(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues of a symmetric matrix, largest first, and its eigenvectors as
    columns, each with its largest entry positive."""
    values, vectors = jnp.linalg.eigh(matrix)
    vectors = vectors[:, ::-1]
    return values[::-1], vectors * _signs(vectors)[None, :]


def svd_signed(
    matrix: Float[Array, "m n"],
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "k n"]]:
    """The thin singular value decomposition `u @ diag(s) @ vt` whose signs are fixed:
    the largest entry of each column of `u` is positive."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    signs = _signs(u)
    return u * signs[None, :], s, vt * signs[:, None]


def best_rank(matrix: Float[Array, "m n"], rank: int) -> Float[Array, "m n"]:
    """The nearest matrix of at most this rank, in every unitarily invariant norm.

    *Reference*: Eckart and Young 1936; Mirsky 1960.
    """
    if not 0 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank={rank} must be at least 0 and at most min(shape)="
            f"{min(matrix.shape)} of the matrix"
        )
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[None, :rank]) @ vt[:rank]


def _signs(columns: Float[Array, "m k"]) -> Float[Array, " k"]:
    # Entries equal up to rounding count as equal and the first decides: otherwise the
    # sign of (1, -1) / sqrt(2) would differ from machine to machine.
    size = jnp.abs(columns)
    slack = float(jnp.finfo(columns.dtype).eps) ** 0.5
    first = jnp.argmax(size >= (1 - slack) * size.max(axis=0, keepdims=True), axis=0)
    entries = jnp.take_along_axis(columns, first[None, :], axis=0)[0]
    return jnp.where(entries < 0, -1.0, 1.0).astype(columns.dtype)


def graded_svd(
    left: Float[Array, "m k"],
    log_values: Float[Array, " k"],
    right: Float[Array, "n k"],
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "n k"]]:
    r"""Singular values, as logarithms and largest first, and vectors (both as columns)
    of $Y\,\mathrm{diag}(e^{l})\,X^\top$ for well-conditioned $Y$ and $X$.

    Each singular value keeps its own relative accuracy, however small it is beside
    the others; $e^{-1000}$, which is no float, is welcome. (LAPACK's routines keep
    accuracy relative to the largest.) Not differentiable in reverse mode.

    QR of both sides leaves a core graded like its singular values, and one-sided
    Jacobi rotations of its columns, each scaled by its own $e^{l_j}$, keep the
    grading: no scaled column is ever far from size 1.

    *Reference:* Demmel, Gu, Eisenstat, Slapnicar, Veselic, Drmac, *Computing the
    singular value decomposition with high relative accuracy* (1999), algorithm 3.1.
    """
    order = jnp.argsort(-log_values)
    scales = log_values[order]
    left, upper_left = _qr(left[:, order])
    right, upper_right = _qr(right[:, order])
    # Column b of the core over e^(l_b). Both QR factors are triangular, so only
    # ratios of at most 1 enter.
    ratios = jnp.exp(jnp.minimum(scales[:, None] - scales[None, :], 0.0))
    core = upper_left @ (ratios * upper_right.T)
    columns, rotation = _orthogonalize(core, ratios)
    norms = jnp.linalg.norm(columns, axis=0)
    norms = jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)
    values = scales + jnp.log(norms)
    order = jnp.argsort(-values)
    return (
        left @ (columns / norms[None, :])[:, order],
        values[order],
        right @ rotation[:, order],
    )


def _qr(columns: Float[Array, "m k"]):
    """QR, with rows of zeros kept: reflections fill those at the top with rounding,
    and a flow that never leaves a subspace would begin to."""
    frame, upper = jnp.linalg.qr(columns)
    filled = jnp.any(columns != 0, axis=1, keepdims=True)
    return jnp.where(filled, frame, 0), upper


@jax.jit  # A loop outside of jit is compiled anew at each call.
def _orthogonalize(columns: Float[Array, "k k"], ratios: Float[Array, "k k"]):
    """One-sided Jacobi of `columns * scales`, in terms of the ratios of the scales,
    `ratios[j, i]` $= s_j / s_i \\le 1$ for $i < j$; and the product of rotations."""
    size, eps = len(columns), float(jnp.finfo(columns.dtype).eps)
    if size == 1:
        return columns, jnp.ones_like(columns)
    rounds = jnp.asarray(_round_robin(size))

    def rotate(carry, pairs):
        columns, rotation, worst = carry
        i, j = pairs
        a, b, ratio = columns[:, i], columns[:, j], ratios[j, i][None, :]
        aa, bb, ab = (
            jnp.sum(product, axis=0, keepdims=True) for product in (a * a, b * b, a * b)
        )
        size = jnp.sqrt(aa * bb)
        cosine = jnp.abs(ab) / jnp.where(size > 0, size, 1.0)
        # The tangent of the angle over the ratio, from (s_j^2 bb - s_i^2 aa) /
        # (2 s_i s_j ab) times the ratio: nothing under- or overflows.
        needed = cosine > eps
        z = (ratio**2 * bb - aa) / (2 * jnp.where(needed, ab, 1.0))
        scaled = jnp.where(z < 0, -1.0, 1.0) / (jnp.abs(z) + jnp.hypot(ratio, z))
        scaled = jnp.where(needed, scaled, 0.0)
        tangent = ratio * scaled
        cos = 1 / jnp.sqrt(1 + tangent**2)
        v, w = rotation[:, i], rotation[:, j]
        columns = columns.at[:, i].set(cos * (a - ratio * tangent * b))
        columns = columns.at[:, j].set(cos * (scaled * a + b))
        rotation = rotation.at[:, i].set(cos * (v - tangent * w))
        rotation = rotation.at[:, j].set(cos * (tangent * v + w))
        return (columns, rotation, jnp.maximum(worst, jnp.max(cosine))), None

    def sweep(state):
        columns, rotation, _, count = state
        start = (columns, rotation, jnp.zeros((), columns.dtype))
        (columns, rotation, worst), _ = jax.lax.scan(rotate, start, rounds)
        return columns, rotation, worst, count + 1

    start = (columns, jnp.eye(size, dtype=columns.dtype), jnp.ones((), columns.dtype))
    columns, rotation, _, _ = jax.lax.while_loop(
        lambda state: (state[2] > 10 * size * eps) & (state[3] < MOST_SWEEPS),
        sweep,
        (*start, 0),
    )
    return columns, rotation


def _round_robin(size: int) -> np.ndarray:
    """Every pair once, in rounds of disjoint pairs, smaller number first."""
    players = list(range(size + size % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        met = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([sorted(pair) for pair in met if max(pair) < size])
        players = [players[0], players[-1], *players[1:-1]]
    return np.asarray(rounds).transpose(0, 2, 1)
