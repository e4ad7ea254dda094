r"""Cholesky factors and inverses of triangles: by LAPACK of one matrix, by products of
many at once.

LAPACK's, vmapped, are a call per matrix on a pool of threads, where several such calls
wait for each other: on two cores they took ten times as long as these, or for ever.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float


@jax.custom_jvp
def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The lower triangle $L$ with $LL^\\top$ the matrix, of which only the lower
    triangle is read. NaN in it where the matrix is not positive definite."""
    return _factor(matrix)


@jax.custom_batching.custom_vmap
def _factor(matrix):
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@_factor.def_vmap
def _(_size, _batched, matrices):
    return jax.vmap(_factor_by_columns)(matrices), True


def _factor_by_columns(matrix):
    rows = jnp.arange(len(matrix))

    def add_column(j, lower):
        left = matrix[:, j] - lower @ lower[j]
        column = jnp.where(rows >= j, left / jnp.sqrt(left[j]), 0)
        return lower.at[:, j].set(column)

    return jax.lax.fori_loop(0, len(matrix), add_column, jnp.zeros_like(matrix))


@cholesky.defjvp
def _(primals, tangents):
    (matrix,), (change,) = primals, tangents
    lower = cholesky(matrix)
    inverse = triangular_inverse(lower)
    change = jnp.tril(change) + jnp.tril(change, -1).T
    inner = jnp.tril(inverse @ change @ inverse.T)
    return lower, lower @ (inner - 0.5 * jnp.diag(jnp.diagonal(inner)))


@jax.custom_jvp
def triangular_inverse(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """$L^{-1}$ of a lower triangle."""
    return _inverse(lower)


@jax.custom_batching.custom_vmap
def _inverse(lower):
    eye = jnp.eye(len(lower), dtype=lower.dtype)
    return solve_triangular(lower, eye, lower=True)


@_inverse.def_vmap
def _(_size, _batched, lowers):
    return jax.vmap(_inverse_by_blocks)(lowers), True


def _inverse_by_blocks(lower):
    r"""From those of its diagonal blocks: of $\begin{pmatrix} A & \\ C & B
    \end{pmatrix}$ it is $\begin{pmatrix} A^{-1} & \\ -B^{-1} C A^{-1} & B^{-1}
    \end{pmatrix}$. Blocks of one size are done together."""
    size = len(lower)
    whole = 1 << (size - 1).bit_length()
    padded = jnp.eye(whole, dtype=lower.dtype).at[:size, :size].set(lower)
    inverses = 1 / jnp.diagonal(padded)[:, None, None]
    side = 1
    while side < whole:
        pairs = np.arange(whole // (2 * side))
        blocks = padded.reshape(pairs.size, 2 * side, pairs.size, 2 * side)
        below = blocks[pairs, :, pairs, :][:, side:, :side]
        above, under = inverses[::2], inverses[1::2]
        corner = -under @ below @ above
        inverses = jnp.concatenate(
            [
                jnp.concatenate([above, jnp.zeros_like(above)], axis=2),
                jnp.concatenate([corner, under], axis=2),
            ],
            axis=1,
        )
        side *= 2
    return inverses[0, :size, :size]


@triangular_inverse.defjvp
def _(primals, tangents):
    inverse = triangular_inverse(*primals)
    return inverse, -inverse @ jnp.tril(*tangents) @ inverse


@jax.custom_batching.custom_vmap
def anywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether it is so in any of the lanes of a `vmap`: a `cond` on it still skips what
    no lane needs, where one on the flag of each lane would do both for all."""
    return flag


@anywhere.def_vmap
def _(_size, batched, flag):
    return (jnp.any(flag) if batched[0] else flag), False
