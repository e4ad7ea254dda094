"""Matrix functions by their spectrum: powers, sign-fixed factors, best rank-k.

All are pure and traceable. Only the arguments named in a `ValueError` are static.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


# Eigenvalues below RTOL times the largest are taken for rounding. The raw MNIST
# training images have their smallest non-zero eigenvalue at 2e-11 and their rounding
# at 4e-17 of the largest, so every cutoff between the two gives the same rank, 712.
RTOL = 1e-12


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
